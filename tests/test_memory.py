"""What fits a GPU's memory, chosen from sizes alone; what is said where nothing does."""

import logging
from dataclasses import replace

import pytest
import torch
import training_set

from cryosplat import cli
from cryosplat._extension import HAS_CUDA, core
from cryosplat.errors import InputError
from cryosplat.memory import FOOTPRINT, MARGIN, RESERVED, Plan, Task, choose

GIB = 2**30
WHOLE_JOB = Task(
    images=100_000, stored_box=256, box=256, number_bytes=2, models=3, gaussians=30_000, grids=2, solves=True,
    fits=True, batch=64,
)  # fmt: skip
STEPS_ALONE = replace(WHOLE_JOB, grids=0, solves=False, fits=False, batch=4096)


def free_for(task: Task, cache: str, micro_batch: int) -> int:
    """The least free memory that a choice fits in."""
    return int(task.need(cache, micro_batch) / (1 - MARGIN) + RESERVED) + 1


def test_images_are_what_the_manual_says_and_grids_too():
    parts = WHOLE_JOB.parts("device", 64)
    assert parts["images"] / GIB == pytest.approx(12.3, abs=0.05)
    assert parts["linear maps"] / GIB == pytest.approx(3.5 * 2.0, abs=0.1)
    assert WHOLE_JOB.parts("host", 64)["images"] == 0
    assert replace(WHOLE_JOB, number_bytes=4).parts("device", 64)["images"] == 2 * parts["images"]
    assert replace(WHOLE_JOB, solves=False).parts("device", 64)["linear maps"] * 3.5 == parts["linear maps"]
    nothing = replace(WHOLE_JOB, grids=0, fits=False, batch=0).parts("device", 1)
    assert nothing["linear maps"] == nothing["fit in the volume"] == nothing["training step"] == 0


def test_images_stay_on_the_gpu_while_they_fit_and_go_to_the_host_then():
    enough = free_for(WHOLE_JOB, "device", 64)
    assert choose(WHOLE_JOB, enough, "auto", None) == Plan("device", None)
    assert choose(WHOLE_JOB, enough - 4096, "auto", None) == Plan("host", None)
    assert choose(WHOLE_JOB, enough, "host", None) == Plan("host", None)


def test_the_micro_batch_shrinks_before_images_go_but_not_to_nothing():
    task = STEPS_ALONE
    assert choose(task, free_for(task, "device", 1024), "auto", None) == Plan("device", 1024)
    assert choose(task, free_for(task, "device", 512), "auto", None).cache == "host"
    assert choose(task, free_for(task, "device", 512), "device", None) == Plan("device", 512)
    assert choose(task, free_for(task, "host", 128), "auto", None) == Plan("host", 128)
    assert choose(task, free_for(task, "device", 64), "auto", 64) == Plan("device", 64)


@pytest.mark.parametrize(
    "task, free_gib, cache, micro_batch, advice",
    [
        (WHOLE_JOB, 12, "device", None, "data.cache=host or data.box=192"),
        (WHOLE_JOB, 6, "auto", None, "data.box=216"),
        (STEPS_ALONE, 12, "host", 4096, "train.micro_batch=1024 or data.box=108"),
        (WHOLE_JOB, 2, "auto", None, "data.box=144"),
        (WHOLE_JOB, 0.5, "auto", None, "train.device=cpu"),
    ],
)
def test_where_nothing_fits_the_message_says_what_would(task, free_gib, cache, micro_batch, advice):
    with pytest.raises(InputError, match=rf"too little memory.*{free_gib} GiB are free.*What would fit: {advice}$"):
        choose(task, int(free_gib * GIB), cache, micro_batch)
    changes = dict(word.split("=") for word in advice.split(" or "))
    for key, value in changes.items():
        if key == "data.cache":
            assert choose(task, int(free_gib * GIB), value, micro_batch).cache == "host"
        elif key == "data.box":
            choose(replace(task, box=int(value)), int(free_gib * GIB), cache, micro_batch)
        elif key == "train.micro_batch":
            choose(task, int(free_gib * GIB), cache, int(value))


# A run


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


def with_free(memory: int, monkeypatch, caplog) -> None:
    """As if a rank had a GPU with that much free memory; it computes on the CPU all the same."""
    for module in ("train", "backprojectcommand"):
        monkeypatch.setattr(f"cryosplat.{module}.free_bytes", lambda world: memory)
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("spare, place", [(4096, "device"), (-4096, "host")])
def test_a_run_goes_by_its_estimate(stack, tmp_path_factory, tmp_path, monkeypatch, caplog, spare, place):
    box, images = training_set.BOX, training_set.IMAGES
    need = images * box * (box // 2 + 1) * 4 + 3.5 * 2 * (2 * box) ** 2 * (box + 1) * 16  # with its linear maps
    with_free(int(need / (1 - MARGIN) + RESERVED) + spare, monkeypatch, caplog)
    run_dir = training_set.trained(stack, tmp_path / "run")
    assert f"images on the {place}" in caplog.text
    ours, theirs = (
        training_set.last_checkpoint(each)["trainer"]["mixtures"]
        for each in (run_dir, training_set.reference_run(tmp_path_factory))
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_run_that_nothing_fits_stops_before_it_reads_an_image(stack, tmp_path, monkeypatch, caplog):
    with_free(RESERVED, monkeypatch, caplog)
    with pytest.raises(InputError, match="the GPU has too little memory for this run"):
        training_set.trained(stack, tmp_path / "run")
    assert "read 301 images" not in caplog.text


def test_so_does_backprojection(stack, tmp_path, monkeypatch, caplog, capsys):
    with_free(RESERVED, monkeypatch, caplog)
    words = training_set.settings(stack, tmp_path / "run")
    assert cli.main(["backproject", *words, "-o", str(tmp_path / "maps")]) == 2
    assert "the GPU has too little memory for this run" in capsys.readouterr().err
    assert not list(tmp_path.glob("maps/*.mrc"))


@pytest.mark.skipif(not HAS_CUDA, reason="the core was built without CUDA")
@pytest.mark.parametrize("gaussians, box", [(2048, 128), (30_000, 256), (200_000, 360)])
def test_work_spaces_are_estimated_as_the_kernels_ask_for_them(gaussians, box):
    kernels, views = core.cuda.float32, 32
    task = Task(0, box, box, 2, 1, gaussians, 0, False, False, views)
    asked = kernels.splat_forward_bytes(1, gaussians, views, box)
    known = (
        task.parts("device", views)["training step"]
        - replace(task, gaussians=0).parts("device", views)["training step"]
    )
    assert asked <= known <= 1.6 * asked  # parameters and moments are in it too
    assert views * gaussians * FOOTPRINT <= asked
    drawn = task.parts("device", views)["evaluation"] - 4 * box**3
    assert kernels.voxelise_forward_bytes(1, gaussians, box) == pytest.approx(drawn, rel=0.1)
