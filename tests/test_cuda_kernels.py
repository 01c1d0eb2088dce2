"""The CUDA kernels where their blocks, chunks and lists end: run on the host, in both orders, and broken on purpose."""

import dataclasses
import shutil
from pathlib import Path

import hostcuda
import pytest
import torch
from backends import OnGpu, needs_gpu
from mixtures import Case, draw, relative_l2, run_splat, run_voxelise

from cryosplat import cudaops, ops
from cryosplat.errors import InputError

# Of csrc/cuda: footprints staged at a time, Gaussians whose bits a block reads at once, views a block lists.
CHUNK, BITS_AT_ONCE, VIEWS_LISTED = 256, 512 * 32, 256


def round_ball(gaussians: int, views: int, box: int, models: int = 1, spread: float = 0.1) -> Case:
    """Many small round Gaussians; nothing keeps them clear of edges, so compare in double precision."""
    generator = torch.Generator().manual_seed(gaussians)
    return dataclasses.replace(
        draw(box, 1, models, views, kinds=("round",)),
        means=spread * box * torch.randn(models, gaussians, 3, generator=generator, dtype=torch.float64),
        covariances=torch.tensor([1.0, 0.1, 0.2, 1.2, 0.0, 0.9], dtype=torch.float64).repeat(models, gaussians, 1),
        amplitudes=torch.randn(models, gaussians, generator=generator, dtype=torch.float64),
        kinds=("round",) * gaussians,
    )


def assert_same(ours, expected, tolerance=1e-11) -> None:
    """Against the CPU kernels, which have been held to the reference."""
    for index, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert relative_l2(a, b) <= tolerance, f"output {index}"


@pytest.mark.parametrize("gaussians", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 1])
def test_lists_longer_than_a_chunk_are_drawn_whole(gaussians):
    case, volume = round_ball(gaussians, 2, 40, spread=0.02), round_ball(gaussians, 0, 9, 2)
    with hostcuda.on_host():
        ours, ours_volume = run_splat(hostcuda, case), run_voxelise(hostcuda, volume)
    assert_same(ours, run_splat(ops, case))
    assert_same(ours_volume, run_voxelise(ops, volume))


@pytest.mark.parametrize("gaussians", [BITS_AT_ONCE - 1, BITS_AT_ONCE + 1])
def test_more_gaussians_than_a_block_reads_bits_of_are_drawn(gaussians):
    case = round_ball(gaussians, 1, 34)
    case.amplitudes[:, : gaussians - 300] = 0  # the last bits are what is tested
    with hostcuda.on_host():
        ours = run_splat(hostcuda, case)
    assert_same(ours, run_splat(ops, case))


@pytest.mark.parametrize("views", [15, 16, 17, VIEWS_LISTED - 1, VIEWS_LISTED + 1, 600])
def test_any_number_of_views_is_dealt_to_blocks(views):
    case = round_ball(33, views, 8, models=2)
    with hostcuda.on_host():
        ours = run_splat(hostcuda, case)
    assert_same(ours, run_splat(ops, case))


@pytest.mark.parametrize("box", [63, 64, 65, 100])
def test_footprints_that_a_whole_warp_walks_agree(box):
    """Some as wide as the box beside small ones, so that warps have both."""
    case = draw(box, 13, 2, 3, kinds=("huge", "round", "disc"))
    volume = draw(box // 2, 5, 1, 0, kinds=("huge", "round"), volume=True)
    with hostcuda.on_host():
        ours, ours_volume = run_splat(hostcuda, case), run_voxelise(hostcuda, volume)
    assert_same(ours, run_splat(ops, case))
    assert_same(ours_volume, run_voxelise(ops, volume))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_in_any_order_of_threads_and_blocks(dtype):
    case, volume = draw(70, 67, 3, 20), draw(20, 41, 2, 0, volume=True)
    results = []
    for backwards in (False, True):
        with hostcuda.on_host(backwards=backwards):
            results.append((*run_splat(hostcuda, case, dtype), *run_voxelise(hostcuda, volume, dtype)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_is_written_beyond_the_workspace_and_the_outputs(monkeypatch):
    """Bytes around every workspace stay as they were; memory around outputs is checked by comparing all of them."""
    rooms = []

    def guarded(size, like):
        room = torch.full((size + 1024,), 0xFF, dtype=torch.uint8)
        first = 256 + -room.data_ptr() % 256
        rooms.append((room, first, size))
        return room[first : first + size]

    case, volume = draw(33, 65, 3, 17), draw(17, 33, 2, 0, volume=True)
    with hostcuda.on_host():
        monkeypatch.setattr(cudaops, "_workspace", guarded)
        run_splat(hostcuda, case), run_voxelise(hostcuda, volume)
    assert len(rooms) == 4
    for room, first, size in rooms:
        assert (room[:first] == 0xFF).all() and (room[first + size :] == 0xFF).all()


def test_a_view_of_no_model_is_nan_and_spares_the_others():
    case = draw(17, 9, 2, 4)
    mixture = [t.detach() for t in case.mixture(torch.float64)]
    for wrong in (-1, 2, 2**40):
        model = case.model.clone()
        model[2] = wrong
        with hostcuda.on_host():
            images = cudaops.splat(*mixture, case.rotations, case.shifts, model, 17, 3.5)
        assert images[2].isnan().all() and images[[0, 1, 3]].isfinite().all()


def test_a_box_beyond_16_bits_is_refused():
    case = draw(8, 1)
    with hostcuda.on_host(), pytest.raises(InputError, match="4096 pixels a side, got 4097"):
        cudaops.voxelise(case.means, case.covariances, case.amplitudes, 4097, 3.5)


# What a hand may slip on: file, what is there, what stands there then.
SLIPS = {
    "a tile's last row": ("draw.h", "extent.y.last - y, tile_side - 1)", "extent.y.last - y - 1, tile_side - 1)"),
    "a chunk's last footprint": ("draw.h", "if (thread < count) {", "if (thread + 1 < count) {"),
    "a footprint's last column": ("gather.h", "column <= walk.last;", "column < walk.last;"),
    "a footprint's last row": ("gather.h", "if (row < walk.height) loaded", "if (row + 1 < walk.height) loaded"),
    "a group's last layer": ("gather.h", "first + i < layers.count); ++i", "first + i + 1 < layers.count); ++i"),
    "a chunk's last view": ("splat.cu", "view < last && model_of", "view < last - 1 && model_of"),
    "a slab's last plane": ("voxelise.cu", "planes.last >= slab * slab_planes", "planes.last > slab * slab_planes"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_broken_tail_is_noticed(slip, tmp_path):
    """The other tests would fail if a kernel's tail were wrong: here one is."""
    sources = tmp_path / "csrc"
    shutil.copytree(hostcuda.ROOT / "csrc", sources)
    name, right, wrong = SLIPS[slip]
    file = Path(sources, "cuda", name)
    assert file.read_text().count(right) == 1
    file.write_text(file.read_text().replace(right, wrong))
    broken = hostcuda.load(sources)
    case, volume = draw(33, 33, 3, 17), draw(17, 33, 2, 0, volume=True)
    with hostcuda.on_host(broken):
        ours = (*run_splat(hostcuda, case), *run_voxelise(hostcuda, volume))
    expected = (*run_splat(ops, case), *run_voxelise(ops, volume))
    errors = [1.0 if not a.isfinite().all() else relative_l2(a, b) for a, b in zip(ours, expected, strict=True)]
    assert max(errors) > 1e-5


@needs_gpu
@pytest.mark.parametrize("gaussians, box, views, models", [(2048, 128, 64, 3), (30000, 256, 8, 1), (17, 33, 600, 2)])
def test_a_gpu_gives_the_same_bits_twice_and_agrees_with_the_cpu(gaussians, box, views, models):
    case = round_ball(gaussians, views, box, models)
    first, again = run_splat(OnGpu(), case, torch.float64), run_splat(OnGpu(), case, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert_same(first, run_splat(ops, case))


@needs_gpu
def test_kernels_follow_the_current_stream():
    case = round_ball(2000, 16, 64)
    arguments = [t.detach().cuda() for t in (*case.mixture(torch.float32), *case.poses(torch.float32), case.model)]
    expected = ops.splat(*arguments, 64, 3.5)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # so that work on another stream would come too early
        arguments[2].mul_(2)
        doubled = ops.splat(*arguments, 64, 3.5)
    side.synchronize()
    assert torch.equal(doubled, 2 * expected)
