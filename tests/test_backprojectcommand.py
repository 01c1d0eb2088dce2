"""``cryosplat backproject`` writes maps of the images, the same on any number of ranks, and replaces nothing."""

import subprocess
import sys

import numpy as np
import pytest
import training_set
from ranks import TIMEOUT_S, environment

from cryosplat import cli
from cryosplat.fsc import fsc
from cryosplat.volumes import read_map

FILES = {"unregularised.mrc", "half_a.mrc", "half_b.mrc", "linear.mrc", "mask.mrc"}


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


@pytest.fixture(scope="module")
def settings(stack):
    files = ("data.particles=particles.star", "data.poses=poses.pkl", "data.ctf=ctf.pkl")
    return [f"data_root={stack}", *files, "train.threads=1"]


@pytest.fixture(scope="module")
def maps(settings, tmp_path_factory):
    """Folder of the maps of the training set, by one process; to be read only."""
    folder = tmp_path_factory.mktemp("backproject") / "made" / "here"
    assert cli.main(["backproject", *settings, "-o", str(folder)]) == 0
    return folder


@pytest.fixture
def command(settings, capsys):
    def run(*words):
        try:
            code = cli.main(["backproject", *settings, *(str(word) for word in words)])
        except SystemExit as ended:  # of argparse
            code = ended.code
        return (code, *capsys.readouterr())

    return run


def volume(folder, name):
    return read_map(folder / f"{name}.mrc")[0]


def difference(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_it_writes_maps_of_the_molecule_with_their_pixel_size(maps, stack):
    assert {path.name for path in maps.iterdir()} == FILES
    assert all(read_map(path)[1] == pytest.approx(training_set.PIXEL_SIZE_A) for path in maps.iterdir())
    truth, mask = read_map(stack / "truth.mrc")[0], volume(maps, "mask")
    assert mask.min() >= 0 and mask.max() == 1 and mask[truth > 0.5 * truth.max()].min() > 0.99
    means = {
        name: fsc(volume(maps, name), truth, training_set.PIXEL_SIZE_A, mask).fsc[1:11].mean()
        for name in ("unregularised", "linear", "half_a", "half_b")
    }
    assert min(means.values()) > 0.85 and means["unregularised"] > max(means["half_a"], means["half_b"])


def test_filtering_takes_noise_away_and_no_map_is_masked(maps, stack):
    """Outside the molecule there is noise: less of it in the filtered map, and none missing in the others."""
    outside = volume(maps, "mask") == 0
    noise = {name: volume(maps, name)[outside].std() for name in ("unregularised", "linear", "half_a")}
    assert noise["linear"] < 0.9 * noise["unregularised"]
    assert noise["half_a"] == pytest.approx(2**0.5 * noise["unregularised"], rel=0.15)


def test_half_maps_are_those_of_a_run(maps, tmp_path_factory):
    run = training_set.reference_run(tmp_path_factory)
    for name in ("half_a", "half_b", "mask"):
        assert difference(volume(maps, name), volume(run, name)) < 1e-5


def test_it_says_what_the_half_maps_agree_on_and_where_the_mask_is_from(command, stack, tmp_path):
    code, output, _ = command("data.mask=mask.mrc", "-o", tmp_path / "out")
    assert code == 0 and f"{tmp_path / 'out'}: unregularised.mrc, half_a.mrc" in output
    assert "half-map FSC 0.143 under the mask: " in output and "mask: data.mask=mask.mrc" in output
    np.testing.assert_array_equal(volume(tmp_path / "out", "mask"), read_map(stack / "mask.mrc")[0])


def test_without_halves_there_is_one_map_of_all_particles(command, maps, tmp_path):
    assert command("--no-halves", "-o", tmp_path / "out")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["unregularised.mrc"]
    # Each half's noise weighs its own images; here they are the same noise but for chance.
    assert difference(volume(tmp_path / "out", "unregularised"), volume(maps, "unregularised")) < 1e-3


def turned(volume):
    """A map a quarter turn about z through voxel D // 2; the first planes, which have no partner, are left out."""
    return np.rot90(volume[1:, 1:, 1:], axes=(1, 2))


def test_a_point_group_makes_the_map_symmetric(command, maps, tmp_path):
    assert command("--sym", "C4", "--no-halves", "-o", tmp_path / "out")[0] == 0
    found, plain = volume(tmp_path / "out", "unregularised"), volume(maps, "unregularised")
    # Not exactly: of the box's faces, those at -D/2 take part in the refinement, and there are none at +D/2.
    assert difference(turned(found), found[1:, 1:, 1:]) < 0.05
    assert difference(turned(plain), plain[1:, 1:, 1:]) > 0.5


def test_held_out_images_are_left_out(command, maps, tmp_path):
    assert command("data.holdout=0.3", "-o", tmp_path / "out")[0] == 0
    assert difference(volume(tmp_path / "out", "unregularised"), volume(maps, "unregularised")) > 0.05


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_replaced(command, tmp_path, name):
    (tmp_path / name).write_text("mine")
    code, output, errors = command("-o", tmp_path)
    assert code == 2 and not output and f"error: {tmp_path / name} exists already; choose another folder" in errors
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sym", "X2"], "symmetry 'X2': expected C<n> or D<n>"),
        (["data.poses=none.pkl"], "data.poses: there is no file"),
        (["data.null=noise"], "data.null=noise: cryosplat backproject takes the images as they are"),
        (["data.mask=poses.pkl"], "poses.pkl: not a readable MRC map"),
    ],
)
def test_what_a_user_can_get_wrong_is_named(command, tmp_path, words, message):
    settings_first = sorted(words, key=lambda word: word.startswith("-") or "=" not in word)
    code, output, errors = command(*settings_first, "-o", tmp_path / "out")
    assert code == 2 and not output and "Traceback" not in errors
    assert message in errors.splitlines()[-1]
    assert not list(tmp_path.rglob("*.mrc"))


def on_two_ranks(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "cryosplat.cli", "backproject", *map(str, words)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)


def test_two_ranks_make_the_same_maps_and_say_so_once(settings, maps, tmp_path):
    ended = on_two_ranks(*settings, "-o", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == FILES and ended.stdout.count("half_a.mrc") == 1
    for name in ("unregularised", "half_a", "half_b", "linear"):
        assert difference(volume(tmp_path, name), volume(maps, name)) < 1e-4


def test_two_ranks_say_once_what_is_wrong(settings, tmp_path):
    ended = on_two_ranks(*settings, "--sym", "X2", "-o", tmp_path / "out")
    assert ended.returncode == 1 and ended.stderr.count("error: symmetry 'X2'") == ended.stderr.count("error:") == 1
