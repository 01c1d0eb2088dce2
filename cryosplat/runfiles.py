"""The files of a run directory and what each of them is, in words."""

import fnmatch
from pathlib import Path

MEANINGS = {
    "report.html": "this page",
    "map.mrc": "the map: linear half maps and Gaussians put together; not masked, filtered or sharpened",
    "half_a.mrc": "half map a, linear in the images and without any regularisation: for deposition",
    "half_b.mrc": "half map b, the same",
    "mask.mrc": "the mask that everything was measured under, 0 to 1",
    "linear.mrc": "what there is without Gaussians: the linear map of all particles, Wiener-filtered",
    "mixture.mrc": "the map of the Gaussians of all particles",
    "mixture_half_?.mrc": "the map of a half's Gaussians; for comparison only",
    "gaussians.npz": "the Gaussians of all models: positions, widths, turns, amplitudes, in A",
    "gaussians.ply": "the Gaussians of all particles as a point cloud, for viewers",
    "gaussians.cif": "the same as pseudo-atoms",
    "view.cxc": "opens maps and Gaussians in ChimeraX",
    "fsc.csv": "every FSC curve, shell by shell",
    "fsc.png": "the FSC curves to compare",
    "fsc.xml": "the corrected FSC of the half maps, as EMDB takes it",
    "fsc_half_maps.png": "all curves of the half maps",
    "directional.png": "resolution by direction",
    "viewing_directions.png": "from where the particles were seen",
    "sections.png": "central sections of the map",
    "projections.png": "projections of the map",
    "particles.csv": "residual, scale, correlation and gain of every particle",
    "volume_fit.csv": "log likelihood by step of the fit in the volume",
    "volume_fit.png": "the same as a figure",
    "loss.png": "losses in training image by image",
    "holdout.csv": "likelihood of the images kept aside, and of as many that were used",
    "holdout.png": "the same as a figure",
    "summary.json": "the run in numbers, and what was found",
    "metrics.csv": "what was logged while images were trained on",
    "run.log": "messages of the run",
    "halves.npy": "the half of every particle, as it was drawn",
    "config.yaml": "every setting, defaults included",
    "tensorboard": "curves and pictures over time: tensorboard --logdir",
    "checkpoints": "where an interrupted run goes on from",
    "validation": "null tests of the run, by cryosplat validate",
    "postprocess": "the sharpened map, by cryosplat postprocess",
    "jobs": "logs and code of the jobs that were submitted",
    "status.json": "what the run is doing",
    "lock.json": "which process is at the run",
}
"""By name, ``?`` for any letter; those that people look for come first."""


def files_of(folder: Path) -> list[tuple[str, int, str]]:
    """(name, bytes, meaning) of what lies in a run directory, in the order of ``MEANINGS``; a folder ends in "/" and
    has the bytes of all that is in it. Of what no run writes the meaning is empty, and it comes last."""
    order = list(MEANINGS)
    rows = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        pattern = next((pattern for pattern in order if fnmatch.fnmatch(path.name, pattern)), None)
        place, meaning = (len(order), "") if pattern is None else (order.index(pattern), MEANINGS[pattern])
        rows.append((place, path.name + "/" * path.is_dir(), _bytes(path), meaning))
    return [row[1:] for row in sorted(rows)]


def _bytes(path: Path) -> int:
    inside = path.rglob("*") if path.is_dir() else [path]
    return sum(each.lstat().st_size for each in inside if not each.is_dir())
