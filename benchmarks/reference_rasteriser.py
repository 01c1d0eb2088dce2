"""Speed and memory against the rasteriser of the CryoSplat reference, on the same GPU in the same run:

    CRYOSPLAT_REFERENCE=FOLDER python -m benchmarks.reference_rasteriser [--gaussians 30000] [--box 256]

FOLDER is a clone of GitHub Chen-Suyi/cryosplat with its submodules. Its licence allows research only: none of it is in
this repository, and it is called through its public functions alone. It draws one image at a time, as its own training
loop does; ours are drawn by batch. Both make the same Gaussians under the same poses, forward and backward to the
parameters of means, scales, orientations and amplitudes; neither CTF, loss nor optimiser is timed. The correlation of
the two images says whether they show the same (the reference blurs its images by 0.3 px^2 along y, so it is below 1).
"""

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import describe, time_call
from benchmarks.ops import CUTOFF
from benchmarks.step import SIGMA_PX
from cryosplat import ops
from cryosplat.files import atomic_path
from cryosplat.gaussians import inverse_softplus

RASTERISER = "diff_gaussian_rasterization"
BUILD = Path("build/reference")
TURNS = 5
SPREAD = 0.12
"""Standard deviation of the positions, fraction of the box."""


def load(folder: Path) -> tuple[type, object, object]:
    """The reference's model, renderer and projection matrix; its rasteriser is compiled first where it is not there."""
    sys.path[:0] = [str(folder.resolve()), str(BUILD.resolve())]
    if importlib.util.find_spec(RASTERISER) is None:
        with tempfile.TemporaryDirectory() as scratch:  # its build writes beside its sources
            source = shutil.copytree(folder / "submodules" / "diff-gaussian-rasterization", Path(scratch, "source"))
            install = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
            command = [sys.executable, *install, "--target", str(BUILD), str(source)]
            subprocess.run(command, check=True, stdout=sys.stderr)
        importlib.invalidate_caches()
    model = importlib.import_module("gaussian_model").GaussianModel
    render = importlib.import_module("gaussian_renderer").render
    return model, render, importlib.import_module("utils.graphics_utils").getProjectionMatrix


def start(gaussians: int, box: int) -> list[Tensor]:
    """Positions (G, 3) and scales (G, 3) in fractions of the box, quaternions (G, 4), amplitudes (G, 1)."""
    generator = torch.Generator().manual_seed(0)
    return [
        SPREAD * torch.randn(gaussians, 3, generator=generator),
        torch.full((gaussians, 3), SIGMA_PX / box),
        torch.nn.functional.normalize(torch.randn(gaussians, 4, generator=generator), dim=-1),
        0.5 + torch.rand(gaussians, 1, generator=generator),
    ]


def reference_calls(folder: Path, values: list[Tensor], rotations: Tensor, residual: Tensor):
    """(image of a view, forward and backward of one view) of the reference."""
    model_type, render, projection_matrix = load(folder)
    positions, scales, quaternions, amplitudes = values
    model = model_type()
    raw = torch.full_like(scales, inverse_softplus(float(scales[0, 0])))
    model.create_from_given_params(positions, raw, quaternions, torch.log(torch.expm1(amplitudes)))
    box = residual.shape[-1]
    views = torch.eye(4).repeat(len(rotations), 1, 1)
    views[:, :3, :3] = rotations
    views = views.cuda()
    projection = projection_matrix(-0.5, 0.5, -0.5, 0.5, -0.5, 0.5, type="cryoem").cuda()
    leaves = [model._xyz, model._scaling, model._rotation, model._amplitude]
    calls = 0

    def image(view: int = 0) -> Tensor:
        return render(model, box, box, views[view], projection)["rendered_image"].squeeze()

    def both():
        nonlocal calls
        calls += 1
        image(calls % len(views)).backward(residual[0])
        for leaf in leaves:
            leaf.grad = None

    return image, both


def our_calls(values: list[Tensor], rotations: Tensor, residual: Tensor):
    """The same of this program, for all views at once."""
    positions, scales, quaternions, amplitudes = (value.cuda().requires_grad_() for value in values)
    box, views = residual.shape[-1], len(rotations)
    poses = rotations.cuda(), torch.zeros(views, 2, device="cuda"), torch.zeros(views, dtype=torch.long, device="cuda")

    def images() -> Tensor:
        covariances = ops.covariances(quaternions, scales * box)
        return ops.splat((positions * box)[None], covariances[None], amplitudes.T, *poses, box, CUTOFF)

    def both():
        torch.autograd.grad(images(), [positions, scales, quaternions, amplitudes], residual)

    return images, both


def peak(call) -> tuple[float, float]:
    """Seconds of a call (median of turns) and the memory it needs above what is there already, GiB."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    return sorted(time_call(call, torch.device("cuda")) for _ in range(TURNS))[TURNS // 2], memory


def compare(folder: Path, gaussians: int, box: int, batch: int) -> dict:
    values = start(gaussians, box)
    generator = torch.Generator().manual_seed(1)
    rotations = torch.linalg.qr(torch.randn(batch, 3, 3, generator=generator))[0]
    rotations[:, :, 0] *= torch.linalg.det(rotations)[:, None]
    residual = torch.randn(batch, box, box, generator=generator).cuda()
    their_image, theirs = reference_calls(folder, values, rotations, residual)
    our_images, ours = our_calls(values, rotations, residual)
    with torch.no_grad():
        pair = torch.stack([their_image().flatten(), our_images()[0].flatten()])
    their_s, their_gib = peak(theirs)
    our_s, our_gib = peak(ours)
    return {
        "gaussians": gaussians,
        "box": box,
        "batch": batch,
        "correlation": float(torch.corrcoef(pair)[0, 1]),
        "reference_images_per_s": 1 / their_s,
        "images_per_s": batch / our_s,
        "times_faster": their_s * batch / our_s,
        "reference_memory_gib": their_gib,
        "memory_gib": our_gib,
        "memory_gib_per_image": our_gib / batch,
    }


def table(row: dict) -> str:
    return (
        "| Gaussians | box | our batch | reference, images/s | ours, images/s | times faster | reference, GiB | "
        "ours, GiB | correlation |\n|---|---|---|---|---|---|---|---|---|\n"
        f"| {row['gaussians']} | {row['box']} | {row['batch']} | {row['reference_images_per_s']:.4g} | "
        f"{row['images_per_s']:.4g} | {row['times_faster']:.1f} | {row['reference_memory_gib']:.3f} | "
        f"{row['memory_gib']:.3f} | {row['correlation']:.4f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaussians", type=int, default=30_000)
    parser.add_argument("--box", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    folder = os.environ.get("CRYOSPLAT_REFERENCE")
    if not folder or not Path(folder, "gaussian_renderer").is_dir():
        print(f"CRYOSPLAT_REFERENCE={folder}: expected a clone of Chen-Suyi/cryosplat, with gaussian_renderer/ in it")
        return 1
    row = compare(Path(folder), args.gaussians, args.box, args.batch)
    print(table(row))
    if args.output:
        with atomic_path(args.output) as temporary:
            temporary.write_text(json.dumps({"about": describe(torch.device("cuda")), "rows": [row]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
