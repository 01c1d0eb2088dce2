"""Half sets: the input's own, else drawn so that nothing is shared."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import load, make_images, make_poses, write_dataset, write_pickle, write_stack, write_star

from cryosplat.errors import InputError
from cryosplat.halves import split_halves


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
