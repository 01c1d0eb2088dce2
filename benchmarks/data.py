"""How fast images come in: the cache filled from a large stack, and training from it.

    python -m benchmarks.data write FOLDER              200,000 images of 128 px (13 GB), 2,000 of them distinct
    python -m benchmarks.data fill FOLDER CACHE...      read rate, transform rate, filling each of these cache folders
    python -m benchmarks.data train FOLDER CACHE        training from memory and from the disk, in turns

The page cache is told to forget a file (posix_fadvise) before it is read. ``benchmarks/data.md`` has the figures.
"""

import argparse
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mrcfile
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from cryosplat import distributed, train
from cryosplat.config import load_config
from cryosplat.imageprep import IMAGES_AT_ONCE
from cryosplat.nodeimages import read_images
from cryosplat.particles import read_particles
from cryosplat.prefetch import readers
from cryosplat.sampling import BatchPlan

IMAGES, DISTINCT, BOX = 200_000, 2_000, 128
PIXEL_SIZE_A = 1.5
PIECE = 2**22
TRAINED = 8192
ROUNDS = 3


def write(folder: Path, count: int) -> None:
    """Write particles.mrcs and poses.pkl; the images are noise with something dark round the centre."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    distance = np.hypot(*(np.indices((BOX, BOX)) - BOX // 2))
    images = rng.standard_normal((DISTINCT, BOX, BOX), dtype=np.float32)
    images += np.exp(-((distance / 16) ** 2)).astype(np.float32)
    stack = folder / "particles.mrcs"
    with mrcfile.new(stack, overwrite=True) as handle:
        handle.set_data(images[:1])
        handle.set_image_stack()
        handle.voxel_size = PIXEL_SIZE_A
        handle.header.nz = count  # which mz = 1 leaves a stack
        header = handle.header.tobytes()
    with open(stack, "wb") as handle:
        handle.write(header)
        for _ in range(count // DISTINCT):
            handle.write(images.tobytes())
        os.fsync(handle.fileno())
    rotations = Rotation.random(count, random_state=1).as_matrix().astype(np.float32)
    with open(folder / "poses.pkl", "wb") as handle:
        handle.write(pickle.dumps((rotations, np.zeros((count, 2), np.float32))))


def settings(folder: Path, cache: Path, where: str, *others: str) -> list[str]:
    return [
        f"data_root={folder}", "data.particles=particles.mrcs", "data.poses=poses.pkl", "data.ctf=none",
        f"data.pixel_size={PIXEL_SIZE_A}", f"data.cache={where}", f"cache.dir={cache}", *others,
    ]  # fmt: skip


def forget(*paths: Path) -> None:
    """Take files out of the page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_rate(path: Path) -> float:
    """Bytes a second of a sequential read."""
    forget(path)
    buffer, total, began = bytearray(PIECE), 0, time.perf_counter()
    with open(path, "rb", buffering=0) as handle:
        while read := handle.readinto(buffer):
            total += read
    return total / (time.perf_counter() - began)


def transform_rate(threads: int, seconds: float = 3.0) -> float:
    """Images a second that so many threads transform (``rfft2``, no more), each as fast as its core's cache allows."""

    def work(_: int) -> int:
        images, done, end = torch.randn(IMAGES_AT_ONCE, BOX, BOX), 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            torch.fft.rfft2(images, norm="ortho")
            done += len(images)
        return done

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return sum(pool.map(work, range(threads))) / seconds


def fill_once(folder: Path, cache: Path, count: int) -> None:
    """In a process of its own, whose memory is looked at: fill a cache, and print what that took as JSON."""
    config = load_config(None, settings(folder, cache, "disk", f"data.first={count}"))
    with distributed.join(config) as world:
        table = read_particles(config.data, config.data_root, 0, True)
        plan = BatchPlan(table.half, 32, 0, table.held_out)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        usage, began = time.process_time(), time.perf_counter()
        read_images(config, world, table, plan, "disk")
        seconds, cpu = time.perf_counter() - began, time.process_time() - usage
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"seconds": seconds, "cpu": cpu, "gib_before": before / 2**20, "gib": peak / 2**20, "threads": readers()}
    print(json.dumps(found))


def fill(folder: Path, caches: list[Path], count: int) -> None:
    stack, threads = folder / "particles.mrcs", os.cpu_count()
    image_bytes = 4 * BOX**2
    for cache in caches:
        disk, transforms = read_rate(stack) / image_bytes, transform_rate(threads)
        for again in ("filled", "found there"):
            forget(stack, *cache.glob("*/*.chunk"))
            module = [sys.executable, "-m", "benchmarks.data", "fill-once"]
            command = [*module, str(folder), str(cache), f"--images={count}"]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rate = count / found["seconds"]
            print(
                f"{cache} {again}: {rate:.0f} images/s in {found['seconds']:.1f} s ({found['cpu']:.1f} of CPU); the "
                f"disk reads {disk:.0f}, {threads} threads transform {transforms:.0f}: "
                f"{rate / min(disk, transforms):.0%} of the lower; {found['gib']:.2f} GiB resident at most, "
                f"{found['gib_before']:.2f} before; load "
                f"{os.getloadavg()[0]:.1f}",
                flush=True,
            )
        shutil.rmtree(cache)


def compare_training(folder: Path, cache: Path) -> None:
    """Images a second and share of the time that is waited, from memory and from the disk in turns."""
    few = ("recipe=images", "train.epochs=1", "data.check_sign=false", f"data.first={TRAINED}", "maps.halves=false")
    for number in range(ROUNDS):
        for where in ("device", "host", "disk"):
            with tempfile.TemporaryDirectory(dir=folder) as run:
                summary = train.train(load_config(None, settings(folder, cache, where, f"run_dir={run}/run", *few)))
            rate, waiting = summary["images_per_second"], summary["waiting"]
            print(number, where, f"{rate:.1f} images/s, waiting {waiting:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "fill", "fill-once", "train"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("caches", type=Path, nargs="*")
    parser.add_argument("--images", type=int, default=IMAGES)
    args = parser.parse_args()
    if args.what == "write":
        write(args.folder, args.images)
    elif args.what == "fill":
        fill(args.folder, args.caches, args.images)
    elif args.what == "fill-once":
        fill_once(args.folder, args.caches[0], args.images)
    else:
        compare_training(args.folder, args.caches[0])


if __name__ == "__main__":
    main()
