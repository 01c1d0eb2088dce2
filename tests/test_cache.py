"""The cache on disk: the same images as in memory, each read once, whatever happens to files or to who makes them."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_dataset import stack_of
from training_set import halves, last_checkpoint, settings, trained, training_set

from cryosplat import cache, distributed, nodeimages
from cryosplat.cache import ChunkSet, Layout, kept_sets, remove_set
from cryosplat.config import load_config
from cryosplat.errors import InputError
from cryosplat.images import ImageReader
from cryosplat.metrics import read_metrics
from cryosplat.nodeimages import fill, open_cache, read_images
from cryosplat.sampling import BatchPlan

COUNT, BOX, PER_CHUNK = 100, 16, 16
ALONE = distributed.World(0, 1, 0, 1, torch.device("cpu"), "none", "single", 1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(nodeimages, "images_per_chunk", lambda box: PER_CHUNK)


@pytest.fixture
def table(tmp_path):
    return stack_of(tmp_path / "stack", images())


def images(seed=0, count=COUNT):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, BOX, BOX)) * rng.uniform(0.5, 2, (count, 1, 1)) + 3


def config(folder, *words):
    return load_config(None, [f"cache.dir={folder}", "data.cache=disk", *words])


def opened(table, folder, *words):
    return open_cache(config(folder, *words), ALONE, table, np.arange(len(table)))


def read(table, folder, *words, where="disk"):
    """The data set of all particles, of one scale."""
    plan = BatchPlan(table.half, 32, 0, table.held_out)
    made = read_images(config(folder, *words), ALONE, table, plan, where)
    made.normalise(made.statistics.deviation)
    return made


@pytest.fixture
def reads(monkeypatch):
    """Ids of the images that were read from stacks so far."""
    found, plain = [], ImageReader.read
    monkeypatch.setattr(
        ImageReader, "read", lambda self, ids, out=None: found.extend(ids.tolist()) or plain(self, ids, out)
    )
    return found


def same(first, second):
    order = [np.array([7, 2, 93, 31]), np.array([], dtype=np.int64), np.arange(40), np.arange(99, 20, -3)]
    for ours, theirs in zip(first.batches(order), second.batches(order), strict=True):
        assert torch.equal(ours.images, theirs.images) and ours.ids.tolist() == theirs.ids.tolist()
    for name in ("deviation", "fingerprint", "power", "count"):
        np.testing.assert_array_equal(getattr(first.statistics, name), getattr(second.statistics, name))


@pytest.mark.parametrize("words", [(), ("data.box=10", "data.precision=single")])
def test_batches_and_statistics_are_those_of_memory_bit_by_bit_and_nothing_is_held(table, tmp_path, words):
    on_disk, held = read(table, tmp_path / "cache", *words), read(table, tmp_path, *words, where="device")
    same(on_disk, held)
    assert on_disk.bytes_in_memory == 0 and on_disk.waited_s > 0 and held.waited_s == 0


def test_each_image_is_read_once_in_file_order_and_not_at_all_by_the_next_run(table, tmp_path, reads):
    first = read(table, tmp_path / "cache")
    first.batch(np.arange(COUNT))
    assert sorted(reads) == list(range(COUNT))
    reads.clear()
    same(read(table, tmp_path / "cache"), first)
    assert reads == []


def test_a_table_in_another_order_is_read_in_the_order_of_its_file(tmp_path, monkeypatch):
    whole = stack_of(tmp_path / "stack", images())
    rows = np.random.default_rng(3).permutation(COUNT)
    np.save(tmp_path / "stack" / "rows.npy", rows)
    table = stack_of(tmp_path / "stack", images(), indices="rows.npy")
    kept = open_cache(config(tmp_path / "cache"), ALONE, table, np.arange(COUNT))
    assert table.images.slices[kept.ids].tolist() == list(range(COUNT)) != table.images.slices.tolist()
    dataset = read(table, tmp_path / "cache")
    expected = read(whole, tmp_path / "other", where="device").statistics.deviation[rows]
    np.testing.assert_array_equal(dataset.statistics.deviation, expected)
    same(dataset, read(table, tmp_path, where="host"))


def test_a_stack_that_has_changed_is_not_served_from_before(table, tmp_path, reads):
    read(table, tmp_path / "cache")
    path = table.images.paths[0]
    content = path.read_bytes()
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    reads.clear()
    read(table, tmp_path / "cache")
    assert len(reads) == COUNT
    path.write_bytes(content[:-4] + np.float32(99).tobytes())  # and the time of the first
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    reads.clear()
    changed = read(table, tmp_path / "cache")
    assert len(reads) == COUNT
    same(changed, read(table, tmp_path, where="device"))


@pytest.mark.parametrize("words", [("data.box=10",), ("data.precision=single",), ("data.first=50",)])
def test_what_is_prepared_otherwise_is_another_set(table, tmp_path, words):
    ids = np.arange(50 if "data.first=50" in words else COUNT)
    one = opened(table, tmp_path / "cache").chunks.folder
    assert open_cache(config(tmp_path / "cache", *words), ALONE, table, ids).chunks.folder != one
    assert opened(table, tmp_path / "cache").chunks.folder == one


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 1000), lambda path: path.write_bytes(b"")])
def test_a_damaged_chunk_is_noticed_and_made_again_alone(table, tmp_path, reads, caplog, damage):
    first = read(table, tmp_path / "cache")
    damage(next((tmp_path / "cache").glob("*/00002.chunk")))
    reads.clear()
    with caplog.at_level(logging.WARNING):
        second = read(table, tmp_path / "cache")
    assert sorted(reads) == list(range(32, 48)) and "00002.chunk" in caplog.text and "made again" in caplog.text
    same(first, second)


def test_a_chunk_that_vanishes_while_it_is_in_use_is_read_from_the_stack(table, tmp_path, reads):
    dataset, held = read(table, tmp_path / "cache"), read(table, tmp_path, where="device")
    next((tmp_path / "cache").glob("*/00001.chunk")).unlink()
    reads.clear()
    same(dataset, held)
    assert set(reads) <= set(range(16, 32)) and reads


def test_null_images_are_those_of_memory_and_the_cache_keeps_the_true_ones(table, tmp_path):
    noise, names = np.ones((2, 12)), np.arange(COUNT)
    both = [read(table, tmp_path / "cache", where=where) for where in ("disk", "host")]
    true = both[0].batch(np.arange(COUNT)).images
    for dataset in both:
        dataset.make_null("phases", 5, names, noise, 8.0)
    same(*both)
    assert not torch.equal(both[0].batch(np.arange(COUNT)).images, true)
    assert torch.equal(read(table, tmp_path / "cache").batch(np.arange(COUNT)).images, true)


# Room


def put(root, name, bytes_of_each=80_000, used=0.0):
    """A set of five chunks, made and given back."""
    made = ChunkSet(root, {"name": name}, Layout(5, 1, (100, 100, 2), torch.float32, 3))
    for chunk in range(5):
        made.path(chunk).write_bytes(bytes(bytes_of_each))
    made.close()
    os.utime(made.folder / "use.lock", (used, used))
    return made.folder


def test_sets_used_longest_ago_make_room_but_none_that_is_in_use(tmp_path, table):
    old, middle, new = (put(tmp_path, name, used=when) for name, when in (("old", 100), ("mid", 200), ("new", 300)))
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl; f=open({str(old / 'use.lock')!r}); fcntl.flock(f, fcntl.LOCK_SH);"
         "print(1, flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    kept = opened(table, tmp_path, f"cache.max_gb={1_000_000 / 2**30}")  # 1.2 MB are there, and this set has 73 kB
    assert kept.chunks.kept == kept.chunks.layout.chunks
    assert old.exists() and not middle.exists() and new.exists()
    assert not remove_set(old)
    holder.communicate(b"\n")
    assert remove_set(old) and not old.exists()
    kept.chunks.close()


def test_what_there_is_no_room_for_is_read_from_the_stacks_and_that_is_said(table, tmp_path, caplog, reads):
    total = opened(table, tmp_path / "else").chunks.layout.total_bytes
    held = read(table, tmp_path, where="device")
    reads.clear()
    with caplog.at_level(logging.WARNING):
        dataset = read(table, tmp_path / "cache", f"cache.max_gb={0.5 * total / 2**30}")
    assert "no room for" in caplog.text and "cache.max_gb" in caplog.text
    there = sorted((tmp_path / "cache").glob("*/*.chunk"))
    assert 1 <= len(there) <= 3 and sum(path.stat().st_size for path in there) <= total / 2
    assert sorted(reads) == list(range(COUNT))
    same(dataset, held)


def test_a_full_disk_is_said_and_the_run_goes_on(table, tmp_path, caplog):
    """Files may not be longer than a few kB: what the kernel says then is not what it says of a full disk, but it comes
    at the same place."""
    held, limits = read(table, tmp_path, where="device"), resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            dataset = read(table, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "the cache keeps what it has" in caplog.text and caplog.text.count("cache.dir") == 1
    assert not list((tmp_path / "cache").glob("*/*.chunk")) and not list((tmp_path / "cache").glob("*/*.part"))
    same(dataset, held)


def test_a_folder_that_cannot_be_made_is_named_with_the_way_out(table, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache\.dir: cannot write to .*file/.*data\.cache=host"):
        read(table, tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    "environ, folder",
    [
        ({"SLURM_TMPDIR": "/local/7", "TMPDIR": "/t"}, "/local/7/cryosplat-"),
        ({"TMPDIR": "/t", "XDG_CACHE_HOME": "/x"}, "/t/cryosplat-"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/cryosplat-"),
    ],
)
def test_the_cache_is_where_the_cluster_offers_it(environ, folder):
    assert str(cache.cache_folder(None, environ)) == folder + str(os.getuid())
    assert cache.cache_folder("/mine", environ) == Path("/mine")


# Several processes

FILL = """
import sys, time, numpy as np, torch
sys.path.insert(0, {tests!r})
import test_cache
from cryosplat import nodeimages, cache
from stacks import load
nodeimages.images_per_chunk = lambda box: test_cache.PER_CHUNK
table = load({stack!r}, particles="particles.mrcs", poses="poses.pkl", ctf="ctf.pkl", halves="halves.pkl")
kept = test_cache.opened(table, {folder!r})
write = cache.ChunkSet.write
def slowly(self, chunk, made):
    time.sleep({pause})
    write(self, chunk, made)
cache.ChunkSet.write = slowly
print("ready", flush=True)
print(nodeimages.fill(kept, {place}, {sharers}), flush=True)
"""


def filling(tmp_path, pause=0.0, place=0, sharers=1):
    words = {"stack": str(tmp_path / "stack"), "folder": str(tmp_path / "cache"), "tests": os.path.dirname(__file__)}
    script = FILL.format(**words, pause=pause, place=place, sharers=sharers)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def chunks_there(tmp_path):
    return sorted((tmp_path / "cache").glob("*/*.chunk"))


def test_what_a_killed_process_has_finished_is_kept_and_the_rest_is_made(table, tmp_path, reads):
    process = filling(tmp_path, pause=0.3)
    while len(chunks_there(tmp_path)) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = [int(path.stem) for path in chunks_there(tmp_path)]
    assert 2 <= len(done) < 7
    dataset = read(table, tmp_path / "cache")
    assert sorted(reads) == [image for image in range(COUNT) if image // PER_CHUNK not in done]
    same(dataset, read(table, tmp_path, where="device"))


def test_two_jobs_at_once_make_every_chunk_once(table, tmp_path):
    both = [filling(tmp_path, pause=0.1) for _ in range(2)]
    made = [int(process.communicate()[0]) for process in both]
    assert sum(made) == COUNT and len(chunks_there(tmp_path)) == 7
    same(read(table, tmp_path / "cache"), read(table, tmp_path, where="device"))


def test_ranks_of_a_node_share_the_work(table, tmp_path):
    both = [filling(tmp_path, 0.0, place, 2) for place in (0, 1)]
    assert sorted(int(process.communicate()[0]) for process in both) == [48, 52]
    kept = opened(table, tmp_path / "cache")
    assert fill(kept, 0, 1) == 0
    about = json.loads((kept.chunks.folder / "set.json").read_text())
    assert about["images"] == COUNT and about["stacks"][0][0] == str(table.images.paths[0].resolve())
    assert [one.folder for one in kept_sets(tmp_path / "cache")] == [kept.chunks.folder]


# Runs


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_from_the_disk_is_the_run_from_memory_bit_by_bit_and_ranks_share_one_cache(
    ranks, tmp_path, tmp_path_factory
):
    stack, found = training_set(tmp_path_factory), {}
    for where in ("device", "disk", "again"):
        words = settings(
            stack, tmp_path / where, f"data.cache={'device' if where == 'device' else 'disk'}",
            f"cache.dir={tmp_path / 'cache'}", "train.epochs=1", "train.threads=1",
        )  # fmt: skip
        if ranks == 1:
            trained(stack, tmp_path / where, *words)
        else:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            subprocess.run([*launch, "-m", "cryosplat.train", *words], check=True, capture_output=True, timeout=240)
        found[where] = last_checkpoint(tmp_path / where)["trainer"]
    for where in ("disk", "again"):
        for ours, theirs in zip(found[where]["mixtures"], found["device"]["mixtures"], strict=True):
            assert torch.equal(ours, theirs)
    (only,) = kept_sets(tmp_path / "cache")
    assert json.loads((only.folder / "set.json").read_text())["images"] == len(halves(stack))
    summary = json.loads((tmp_path / "disk" / "summary.json").read_text())
    assert 0 < summary["waiting"] < 1
    assert read_metrics(tmp_path / "disk" / "metrics.csv")["waiting"].max() > 0
    assert json.loads((tmp_path / "device" / "summary.json").read_text())["waiting"] == 0
