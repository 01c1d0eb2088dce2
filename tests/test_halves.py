"""Half sets: the input's own, else drawn so that nothing is shared."""

import json
import logging
import shutil

import mrcfile
import numpy as np
import pandas
import pytest
import starfile
import training_set
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import load, make_images, make_poses, write_dataset, write_pickle, write_stack, write_star

from cryosplat.errors import InputError
from cryosplat.halves import first_copies, save_halves, split_halves
from cryosplat.volumes import read_map


def test_a_drawn_split_is_balanced_and_depends_on_the_seed():
    image, unknown = np.arange(1001), np.full(1001, -1)
    half, unit = split_halves(image, unknown, seed=3)
    assert unit == "particle" and half.dtype == np.int8 and sorted(np.bincount(half)) == [500, 501]
    np.testing.assert_array_equal(half, split_halves(image, unknown, seed=3)[0])
    assert 400 < (half != split_halves(image, unknown, seed=4)[0]).sum() < 600


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(-1, 12)), min_size=1, max_size=80),
    seed=st.integers(0, 1000),
)
def test_same_images_never_part_nor_do_micrographs_that_are_kept(rows, seed):
    image, group = np.array(rows).T
    half, unit = split_halves(image, group, seed)
    for number in np.unique(image):
        assert len(np.unique(half[image == number])) == 1
    if unit == "micrograph":
        for number in np.unique(group[group >= 0]):
            assert len(np.unique(half[group == number])) == 1
    else:
        largest = np.bincount(np.unique(image, return_inverse=True)[1]).max()
        assert abs(np.bincount(half, minlength=2) @ [1, -1]) <= largest


@given(seed=st.integers(0, 1000), order=st.permutations(range(20)))
def test_a_drawn_split_does_not_depend_on_the_order_of_the_rows(seed, order):
    image, group = np.arange(20), np.arange(20) // 3
    for groups in (group, np.full(20, -1)):
        half = split_halves(image, groups, seed)[0]
        np.testing.assert_array_equal(split_halves(image[order], groups[order], seed)[0], half[order])


def test_micrographs_of_unequal_size_make_halves_of_nearly_equal_size():
    group = np.repeat(np.arange(40), np.random.default_rng(0).integers(1, 60, 40))
    half, unit = split_halves(np.arange(len(group)), group, seed=0)
    assert unit == "micrograph" and abs(half.mean() - 0.5) < 0.02


def test_micrographs_are_given_up_where_a_half_would_be_too_small():
    for group in (np.zeros(50, int), np.repeat([0, 1], [45, 5])):
        half, unit = split_halves(np.arange(50), group, seed=0)
        assert unit == "particle" and half.sum() == 25


@pytest.fixture
def keys(tmp_path):
    return {**write_dataset(tmp_path), "particles": "p.star"}


NAMES = [f"{image + 1}@particles.mrcs" for image in range(6)]


def test_rln_random_subset_is_taken_and_kept_by_a_subset(tmp_path, keys):
    write_star(tmp_path / "p.star", NAMES, RandomSubset=[2, 1, 2, 1, 1, 2])
    table = load(tmp_path, **keys)
    assert table.half.tolist() == [1, 0, 1, 0, 0, 1] and "rlnRandomSubset in" in table.half_origin
    assert load(tmp_path, first=3, seed=9, **keys).half.tolist() == [1, 0, 1]


def test_a_halves_file_comes_before_the_star_counted_from_0_or_1(tmp_path, keys):
    write_star(tmp_path / "p.star", NAMES, RandomSubset=[2, 1, 2, 1, 1, 2])
    for first in (0, 1):
        write_pickle(tmp_path / "h.pkl", np.array([0, 0, 0, 1, 1, 1]) + first)
        table = load(tmp_path, halves="h.pkl", **keys)
        assert table.half.tolist() == [0, 0, 0, 1, 1, 1] and "h.pkl" in table.half_origin


def test_micrograph_names_keep_together_in_a_drawn_split_that_a_subset_keeps(tmp_path, keys):
    write_star(tmp_path / "p.star", NAMES, MicrographName=["b", "a", "b", "a", "c", "d"])
    table = load(tmp_path, seed=5, **keys)
    assert "drawn by micrograph from seed 5" in table.half_origin
    assert table.half[0] == table.half[2] and table.half[1] == table.half[3]
    assert table.group.tolist() == [1, 0, 1, 0, 2, 3]
    assert load(tmp_path, seed=5, first=5, **keys).half.tolist() == table.half[:5].tolist()


def test_a_cs_file_gives_its_split_or_its_micrographs(tmp_path, keys):
    fields = [("blob/path", "S20"), ("blob/idx", "<u4"), ("blob/psize_A", "<f4")]
    for field, values, half in (
        ("alignments3D/split", [1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0]),
        ("location/micrograph_uid", [9, 9, 7, 7, 9, 7], None),
        ("location/micrograph_path", [b"x", b"x", b"y", b"y", b"x", b"y"], None),
    ):
        kind = "S4" if isinstance(values[0], bytes) else "<u8"
        rows = [(b">particles.mrcs", image, 2.0, value) for image, value in enumerate(values)]
        with open(tmp_path / "p.cs", "wb") as handle:
            np.save(handle, np.array(rows, dtype=[*fields, (field, kind)]))
        table = load(tmp_path, **{**keys, "particles": "p.cs"})
        np.testing.assert_array_equal(table.read(np.arange(6)), make_images())
        if half is not None:
            assert table.half.tolist() == half and "alignments3D/split" in table.half_origin
        else:
            assert "by micrograph" in table.half_origin
            assert len({int(part) for part in table.half[[0, 1, 4]]}) == 1 and np.bincount(table.half).tolist() == [
                3,
                3,
            ]


def test_the_same_image_twice_stays_in_one_half_and_is_warned_of_where_the_input_parts_it(tmp_path, keys, caplog):
    names = [*NAMES[:3], *NAMES[:3]]
    write_star(tmp_path / "p.star", names)
    half = load(tmp_path, **keys).half
    np.testing.assert_array_equal(half[:3], half[3:])
    write_star(tmp_path / "p.star", names, RandomSubset=[1, 1, 1, 2, 2, 1])
    with caplog.at_level(logging.WARNING, logger="cryosplat"):
        load(tmp_path, **keys)
    assert "2 images are in both halves" in caplog.text


BAD_HALVES = {
    "too few": ([0, 1, 0], r"h\.pkl: 3 halves for the 6 particles"),
    "a third half": ([0, 1, 3, 0, 1, 0], r"row 2 is 3, expected 0 or 1"),
    "an unassigned particle": ([1, 2, 1, 2, 0, 2], r"row 4 is 0, expected 1 or 2"),
    "all in one": ([0] * 6, r"half b has no particles: .*h\.pkl puts all 6 into the other"),
    "fractions": ([0.5] * 6, "expected integers"),
}


@pytest.mark.parametrize("name", BAD_HALVES)
def test_bad_halves_are_refused(tmp_path, name):
    keys = write_dataset(tmp_path)
    values, message = BAD_HALVES[name]
    write_pickle(tmp_path / "h.pkl", np.array(values))
    with pytest.raises(InputError, match=message):
        load(tmp_path, halves="h.pkl", **keys)


def test_a_half_without_particles_is_refused_unless_no_half_maps_are_wanted(tmp_path, keys):
    write_star(tmp_path / "p.star", NAMES, RandomSubset=[2, 2, 2, 2, 2, 1])
    with pytest.raises(InputError, match=r"half a has no particles: rlnRandomSubset of .*maps\.halves=false"):
        load(tmp_path, first=5, **keys)
    assert load(tmp_path, first=5, half_maps=False, **keys).half.tolist() == [1] * 5


def test_a_single_particle_cannot_make_two_halves(tmp_path):
    write_stack(tmp_path / "one.mrcs", make_images(1))
    write_pickle(tmp_path / "poses.pkl", make_poses(1))
    with pytest.raises(InputError, match="has no particles: the draw by particle"):
        load(tmp_path, particles="one.mrcs", poses="poses.pkl")


# Drawn halves, and images that are copies under other names


def test_where_halves_come_from_and_what_that_means(tmp_path, keys):
    write_star(tmp_path / "p.star", NAMES)
    table = load(tmp_path, **keys)
    assert table.half_from == "particle" and "not gold standard with respect to poses" in table.half_origin
    write_star(tmp_path / "p.star", NAMES, MicrographName=["b", "a", "b", "a", "c", "d"])
    assert load(tmp_path, **keys).half_from == "micrograph"
    write_star(tmp_path / "p.star", NAMES, RandomSubset=[1, 2] * 3)
    assert load(tmp_path, **keys).half_from == "column"
    write_pickle(tmp_path / "h.pkl", np.array([0, 1] * 3))
    assert load(tmp_path, halves="h.pkl", **keys).half_from == "file"


def test_drawn_halves_do_not_depend_on_the_order_of_the_rows_in_the_file(tmp_path, keys):
    keys |= {"poses": "poses.pkl", "ctf": "none"}
    micrographs = ["b", "a", "b", "a", "c", "d"]
    for columns in ({}, {"MicrographName": micrographs}):
        write_star(tmp_path / "p.star", NAMES, **columns)
        half = load(tmp_path, **keys).half
        order = [4, 2, 0, 5, 1, 3]
        shuffled = {name: [values[row] for row in order] for name, values in columns.items()}
        write_star(tmp_path / "p.star", [NAMES[row] for row in order], **shuffled)
        assert load(tmp_path, **keys).half.tolist() == half[order].tolist()


def test_the_first_copy_by_stack_and_slice_counts_in_any_order_of_the_rows():
    random = np.random.default_rng(0)
    image, stack, slices = random.integers(0, 20, 60), random.integers(0, 3, 60), random.permutation(60)
    first = first_copies(image, stack, slices)
    assert (image[first] == image).all()
    for number in np.unique(image):
        mine = np.flatnonzero(image == number)
        assert set(first[mine]) == {mine[np.lexsort((slices[mine], stack[mine]))[0]]}
    order = random.permutation(60)
    np.testing.assert_array_equal(order[first_copies(image[order], stack[order], slices[order])], first[order])


def test_halves_that_are_saved_are_taken_again_by_a_subset_too(tmp_path, keys):
    write_star(tmp_path / "p.star", NAMES)
    np.save(tmp_path / "rows.npy", [4, 1, 0, 5])
    table = load(tmp_path, indices="rows.npy", **keys)
    save_halves(tmp_path / "halves.npy", table.half, table.rows, table.listed)
    again = load(tmp_path, indices="rows.npy", halves="halves.npy", seed=3, **keys)
    assert again.half.tolist() == table.half.tolist()
    with pytest.raises(InputError, match=r"halves\.npy: row 2 is -1, expected 0 or 1"):
        load(tmp_path, halves="halves.npy", **keys)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A stack whose second file has 30 images of the first again, with other grey levels, and no half sets."""
    folder = tmp_path_factory.mktemp("copied") / "stack"
    source = training_set.training_set(tmp_path_factory)
    shutil.copytree(source, folder)
    images, headed = mrcfile.read(source / "particles.mrcs"), starfile.read(source / "particles.star")
    write_stack(folder / "more.mrcs", 3 * images[:30] + 1, training_set.PIXEL_SIZE_A)
    particles = headed["particles"].drop(columns="rlnRandomSubset")
    more = particles[:30].assign(rlnImageName=[f"{image + 1:06d}@more.mrcs" for image in range(30)])
    headed["particles"] = pandas.concat([particles, more])
    starfile.write(headed, folder / "particles.star", overwrite=True)
    return folder


def test_copies_under_other_names_come_into_one_half_of_a_drawn_split(copied, tmp_path):
    words = ("data.poses=null", "data.ctf=null")
    run_dir = training_set.fitted(copied, tmp_path / "run", *words)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["images_in_both_halves"] == 0 and summary["halves_from"] == "particle"
    half = np.load(run_dir / "halves.npy")
    assert half[:30].tolist() == half[301:].tolist()
    drawn = load(copied, particles="particles.star").half
    moved = half != drawn
    assert 5 < moved.sum() < 25 and not moved[30:].any()  # more.mrcs comes first
    assert "not gold standard with respect to poses" in (run_dir / "run.log").read_text()
    # Given back, they make the same run, to the bit.
    again = training_set.fitted(copied, tmp_path / "again", *words, f"data.halves={run_dir / 'halves.npy'}")
    for name in ("half_a.mrc", "half_b.mrc", "map.mrc"):
        np.testing.assert_array_equal(read_map(again / name)[0], read_map(run_dir / name)[0])


def test_images_that_are_all_copies_make_no_halves(tmp_path, keys):
    write_star(tmp_path / "p.star", NAMES)
    with pytest.raises(InputError, match=r"p\.star: all 6 images are copies"):
        load(tmp_path, **keys).with_copies_together(np.zeros(6, int))
