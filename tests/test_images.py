"""Stacks and the files that list them: read as they are, or refused by name."""

import os

import mrcfile
import numpy as np
import pytest
from stacks import load, make_images, make_poses, write_dataset, write_pickle, write_stack, write_star

from cryosplat.errors import InputError
from cryosplat.images import read_header

DATA_TYPES = [np.float32, np.float16, np.int8, np.int16, np.uint16]


@pytest.mark.parametrize("dtype", DATA_TYPES)
def test_every_real_mode_is_read_as_float32(tmp_path, dtype):
    images = np.abs(make_images(4, 6)).astype(dtype) if dtype is np.uint16 else make_images(4, 6, dtype)
    write_stack(tmp_path / "s.mrcs", images)
    write_pickle(tmp_path / "poses.pkl", make_poses(4))
    read = load(tmp_path, particles="s.mrcs", poses="poses.pkl").read(np.array([3, 1, 2]))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, images[[3, 1, 2]].astype(np.float32))


def test_an_extended_header_is_stepped_over(tmp_path):
    images = write_stack(tmp_path / "s.mrcs", make_images(4))
    with mrcfile.open(tmp_path / "s.mrcs", "r+") as handle:
        handle.set_extended_header(np.arange(300, dtype=np.uint8))
    write_pickle(tmp_path / "poses.pkl", make_poses(4))
    np.testing.assert_array_equal(load(tmp_path, particles="s.mrcs", poses="poses.pkl").read(np.arange(4)), images)


def patched(path, offset, values):
    """Overwrite 32-bit integers of an MRC header."""
    with open(path, "r+b") as handle:
        handle.seek(offset)
        handle.write(np.array(values, "<i4").tobytes())


def bad_stack(path, name):
    write_stack(path, make_images(6, 8))
    size = path.stat().st_size
    if name == "truncated":
        os.truncate(path, size - 2 * 8 * 8 * 4 - 5)
    elif name == "truncated in the extended header":
        patched(path, 92, [10**6])
    elif name == "header cut":
        os.truncate(path, 700)
    elif name == "empty":
        os.truncate(path, 0)
    elif name == "not square":
        write_stack(path, np.zeros((3, 8, 6), np.float32))
    elif name == "odd box":
        write_stack(path, make_images(3, 7))
    elif name == "complex":
        write_stack(path, make_images(3, 8).astype(np.complex64))
    elif name == "unknown mode":
        patched(path, 12, [9])
    elif name == "no images":
        patched(path, 8, [0])
    elif name == "big-endian":
        with mrcfile.new(path, overwrite=True) as handle:
            handle.set_data(make_images(3, 8).astype(">f4"))
    elif name == "text":
        path.write_text("x" * 5000)


BAD_STACKS = {
    "truncated": "truncated: the header promises 6 images, the file has 3 whole ones",
    "truncated in the extended header": "the file has 0 whole ones",
    "header cut": "700 bytes, too short for an MRC stack",
    "empty": "0 bytes, too short",
    "not square": "images of 6 x 8 pixels; they must be square",
    "odd box": "images of 7 pixels; the box must be even",
    "complex": r"MRC mode 4 \(complex 32-bit\)",
    "unknown mode": r"not an MRC stack \(mode 9",
    "no images": "the stack has no images",
    "big-endian": "big-endian",
    "text": "not an MRC stack",
}


@pytest.mark.parametrize("name", BAD_STACKS)
def test_a_bad_stack_is_refused_by_name_alone_and_inside_star_and_txt(tmp_path, name):
    write_dataset(tmp_path)
    bad_stack(tmp_path / "bad.mrcs", name)
    write_star(tmp_path / "p.star", [f"{image + 1}@bad.mrcs" for image in range(6)])
    (tmp_path / "p.txt").write_text("bad.mrcs\n")
    for particles in ("bad.mrcs", "p.star", "p.txt"):
        with pytest.raises(InputError, match=rf"bad\.mrcs: .*{BAD_STACKS[name]}"):
            load(tmp_path, particles=particles, poses="poses.pkl")


def test_a_stack_that_shrinks_after_the_check_is_noticed_when_it_is_read(tmp_path):
    table = load(tmp_path, **write_dataset(tmp_path))
    write_stack(tmp_path / "particles.mrcs", make_images(1))
    with pytest.raises(InputError, match=r"particles\.mrcs: the stack has changed"):
        table.read(np.arange(6))
    (tmp_path / "particles.mrcs").unlink()
    with pytest.raises(InputError, match=r"particles\.mrcs: the image stack cannot be read"):
        table.read(np.arange(6))


@pytest.fixture
def several(tmp_path):
    """Two stacks in folders, a star and a txt over them, and the images in the order of the star."""
    one = write_stack(tmp_path / "job1" / "a.mrcs", make_images(4, seed=1))
    two = write_stack(tmp_path / "job2" / "b.mrcs", make_images(3, seed=2))
    names = ["2@job2/b.mrcs", "1@job1/a.mrcs", "000003@job2/b.mrcs", "4@job1/a.mrcs", "3@job1/a.mrcs", "2@job1/a.mrcs"]
    write_star(tmp_path / "p.star", names)
    (tmp_path / "p.txt").write_text("job2/b.mrcs\njob1/a.mrcs\n")
    write_pickle(tmp_path / "poses.pkl", make_poses(6))
    write_pickle(tmp_path / "poses7.pkl", make_poses(7))
    return np.stack([two[1], one[0], two[2], one[3], one[2], one[1]]), np.concatenate([two, one])


def test_star_and_txt_gather_images_from_several_stacks_as_cryodrgn_does(tmp_path, several):
    from cryosplat.images import logging_untouched

    with logging_untouched():
        from cryodrgn.source import ImageSource
    for particles, poses, expected in (("p.star", "poses.pkl", several[0]), ("p.txt", "poses7.pkl", several[1])):
        table = load(tmp_path, particles=particles, poses=poses)
        np.testing.assert_array_equal(table.read(np.arange(len(table))), expected)
        theirs = ImageSource.from_file(str(tmp_path / particles), lazy=True).images(as_numpy=True)
        np.testing.assert_array_equal(theirs, expected)
        ids = np.random.default_rng(0).integers(0, len(table), 20)
        np.testing.assert_array_equal(table.read(ids), expected[ids])
    (tmp_path / "p.txt").write_text("\njob2/b.mrcs\n\njob1/a.mrcs\n\n")
    np.testing.assert_array_equal(load(tmp_path, particles="p.txt", poses="poses7.pkl").read(np.arange(7)), several[1])
    assert load(tmp_path, particles="p.star", poses="poses.pkl").location(3) == (
        f"{tmp_path}/job1/a.mrcs, image 3 (row 3 of p.star)"
    )


@pytest.mark.parametrize("particles", ["p.star", "p.txt"])
def test_a_missing_stack_is_named_with_its_rows_and_the_key_that_mends_it(tmp_path, several, particles):
    (tmp_path / "job2" / "b.mrcs").unlink()
    count = "2 of 6 rows" if particles == "p.star" else "1 of 2 rows"
    with pytest.raises(InputError, match=rf"1 of 2 stacks do not exist, for {count}.*'job2/b\.mrcs'.*data\.datadir"):
        load(tmp_path, particles=particles, poses="poses.pkl")


def test_a_missing_stack_that_the_subset_does_not_need_is_not_missed(tmp_path, several):
    (tmp_path / "job2" / "b.mrcs").unlink()
    (tmp_path / "rows.txt").write_text("1\n3\n4\n5\n")
    table = load(tmp_path, particles="p.star", poses="poses.pkl", indices="rows.txt", half_maps=False)
    np.testing.assert_array_equal(table.read(np.arange(4)), several[0][[1, 3, 4, 5]])


def test_stacks_are_found_by_datadir_data_root_and_bare_name(tmp_path, several):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "p.star").write_text((tmp_path / "p.star").read_text())
    keys = {"particles": "tables/p.star", "poses": "poses.pkl"}
    np.testing.assert_array_equal(load(tmp_path, **keys).read(np.arange(6)), several[0])
    flat = tmp_path / "flat"
    flat.mkdir()
    (tmp_path / "job1" / "a.mrcs").rename(flat / "a.mrcs")
    (tmp_path / "job2" / "b.mrcs").rename(flat / "b.mrcs")
    with pytest.raises(InputError, match=r"data\.(datadir|prefix)"):
        load(tmp_path, **keys)
    np.testing.assert_array_equal(load(tmp_path, datadir="flat", **keys).read(np.arange(6)), several[0])


def test_two_stacks_of_one_bare_name_are_not_mixed_up(tmp_path):
    write_dataset(tmp_path)
    write_star(tmp_path / "p.star", [f"{row + 1}@job{1 + row % 2}/particles.mrcs" for row in range(6)])
    with pytest.raises(InputError, match="'job1/particles.mrcs' and 'job2/particles.mrcs' would both be read from"):
        load(tmp_path, particles="p.star", poses="poses.pkl")


@pytest.mark.parametrize("image", [0, 7])
def test_an_image_that_the_stack_does_not_have_is_named_by_its_row(tmp_path, image):
    write_dataset(tmp_path)
    write_star(tmp_path / "p.star", [f"{number}@particles.mrcs" for number in (1, 2, 3, image, 5, 6)])
    with pytest.raises(InputError, match=rf"row 3 is image {image - 1} .*particles\.mrcs, which has 6 images"):
        load(tmp_path, particles="p.star", poses="poses.pkl")


def test_stacks_of_different_boxes_are_refused(tmp_path, several):
    write_stack(tmp_path / "job2" / "b.mrcs", make_images(3, 10))
    with pytest.raises(InputError, match=r"different box sizes, .*a\.mrcs of 8 px and .*b\.mrcs of 10 px"):
        load(tmp_path, particles="p.star", poses="poses.pkl")


BAD_STARS = {
    "no particles": ("data_\nloop_\n_rlnMicrographName\nm.mrc\n", "no table with a column _rlnImageName"),
    "empty": ("", "no table with a column _rlnImageName"),
    "ragged": ("data_\nloop_\n_rlnImageName\n_rlnVoltage\n1@a.mrcs 300\n2@a.mrcs\n", "line 6 has 1 values for 2 col"),
    "no number": ("data_\nloop_\n_rlnImageName\n1@a.mrcs\na.mrcs\n", "row 1: _rlnImageName is 'a.mrcs'"),
    "no stack": ("data_\nloop_\n_rlnImageName\n1@a.mrcs\n2\n", "row 1: _rlnImageName '2' is not number@stack.mrcs"),
    "huge number": (f"data_\nloop_\n_rlnImageName\n{2**70}@a.mrcs\n", "row 0: _rlnImageName is '118"),
    "subset": (
        "data_\nloop_\n_rlnImageName\n_rlnRandomSubset\n1@a.mrcs x\n",
        "_rlnRandomSubset is 'x', expected 1 or 2",
    ),
    "quote": ("data_\nloop_\n_rlnImageName\n'1@a.mrcs\n", "line 4: no closing quotation"),
    "optics": (
        "data_optics\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n1 2.0\n"
        "data_particles\nloop_\n_rlnImageName\n_rlnOpticsGroup\n1@a.mrcs 2\n",
        "row 0: optics group 2 is not in data_optics",
    ),
}


@pytest.mark.parametrize("name", BAD_STARS)
def test_a_bad_star_file_is_refused_with_its_line_or_row(tmp_path, name):
    text, message = BAD_STARS[name]
    (tmp_path / "p.star").write_text(text)
    with pytest.raises(InputError, match=rf"p\.star: .*{message}"):
        load(tmp_path, particles="p.star", poses="poses.pkl")


def test_names_in_quotes_with_spaces_are_read(tmp_path):
    write_dataset(tmp_path)
    (tmp_path / "particles.mrcs").rename(tmp_path / "my particles.mrcs")
    write_star(tmp_path / "p.star", [f'"{image + 1}@my particles.mrcs"' for image in range(6)])
    assert load(tmp_path, particles="p.star", poses="poses.pkl").read(np.arange(6)).shape == (6, 8, 8)


@pytest.mark.parametrize("data", [b"", b"\x80\x04N.", b"\xff\xfe\x00"])
@pytest.mark.parametrize("particles", ["p.cs", "p.star", "p.txt", "p.mrcs"])
def test_a_file_that_is_not_what_its_extension_says_is_an_input_error(tmp_path, data, particles):
    (tmp_path / particles).write_bytes(data)
    with pytest.raises(InputError, match=rf"p\.{particles[2:]}: "):
        load(tmp_path, particles=particles, poses="poses.pkl")


def test_a_cs_file_without_images_is_refused(tmp_path):
    for table in (np.zeros(3, dtype=[("uid", "<u8")]), np.zeros(3), np.zeros((2, 2))):
        with open(tmp_path / "p.cs", "wb") as handle:
            np.save(handle, table)
        with pytest.raises(InputError, match="it has no blob/path and blob/idx"):
            load(tmp_path, particles="p.cs", poses="poses.pkl")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mrcfile's, of old headers
@pytest.mark.parametrize(
    "particles, count, box, pixel_size_a",
    [
        ("sample_particles_relion31.star", 17, 200, 1.4),
        ("relion31.star", 5, 256, 2.806),
        ("empiar_10076_7.star", 7, 320, 1.309998),
        ("empiar_10076_7.cs", 7, 320, 1.309998),
        ("empiar_10076_7.mrc", 7, 320, 1.31),
    ],
)
def test_real_files_of_relion_and_cryosparc_are_read(shared, tmp_path, particles, count, box, pixel_size_a):
    folder = shared / "data" / "readers"
    poses = write_pickle(tmp_path / "poses.pkl", make_poses(count))
    size = 1.31 if particles.endswith(".mrc") else None
    # Every particle of relion31.star is of one subset.
    table = load(folder, particles=particles, poses=str(poses), pixel_size=size, half_maps=particles != "relion31.star")
    assert (len(table), table.box) == (count, box) and table.pixel_size_a == pytest.approx(pixel_size_a)
    images = table.read(np.arange(count))
    table.require_finite(images, np.arange(count))
    stack = folder / {"s": "sample.mrcs", "r": "relion31.mrcs", "e": "empiar_10076_7.mrc"}[particles[0]]
    np.testing.assert_array_equal(images, mrcfile.open(stack, permissive=True).data)


def test_a_star_file_of_something_else_is_refused(shared, tmp_path):
    with pytest.raises(InputError, match=r"sample\.star: no table with a column _rlnImageName"):
        load(shared / "data" / "readers", particles="sample.star", poses="poses.pkl")


def test_half_sets_and_pickles_of_real_refinements_fit_together(shared, tmp_path):
    folder = shared / "data"
    for cs, poses, ctf, count in (
        ("readers/cryosparc_P12_J24_001_particles.cs", "readers/cryosparc_P12_J24_poses.pkl", None, 2019),
        ("empiar10025/cryosparc_P9_J209_000_particles.cs", "empiar10025/poses.pkl", "empiar10025/ctf.pkl", 11764),
    ):
        table = np.load(folder / cs)
        path = "blob/path"
        names = sorted({name.decode().removeprefix(">") for name in table[path]}) if path in table.dtype.names else []
        for name in names:  # the images themselves are not there: stacks of the right length, all zero
            stack = tmp_path / name
            stack.parent.mkdir(parents=True, exist_ok=True)
            write_stack(stack, np.zeros((1, 2, 2), np.int8))
            images = int(table["blob/idx"].max()) + 1
            patched(stack, 8, [images])
            os.truncate(stack, 1024 + 4 * images)
        ours = load(folder, particles=cs, poses=poses, ctf=ctf, datadir=str(tmp_path))
        assert len(ours) == count
        np.testing.assert_array_equal(ours.half, table["alignments3D/split"])


def test_the_header_gives_the_pixel_size_of_the_stack(tmp_path):
    write_stack(tmp_path / "s.mrcs", make_images(3), 1.31)
    assert read_header(tmp_path / "s.mrcs").pixel_size_a == pytest.approx(1.31, rel=1e-6)
    patched(tmp_path / "s.mrcs", 28, [0, 0, 0])
    assert read_header(tmp_path / "s.mrcs").pixel_size_a == 0
