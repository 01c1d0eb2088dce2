"""Where stacks are looked for: names rewritten, and messages whose settings, once set, do find them."""

import re
import shlex

import numpy as np
import pytest
from stacks import load, make_images, write_dataset, write_stack, write_star
from tables import COUNT, cs, relion30, save_cs, write_star31

from cryosplat.config import check_files, load_config
from cryosplat.errors import InputError
from cryosplat.listing import read_listing
from cryosplat.stackpaths import parse_prefix

NAME = "Extract/job012/Micrographs/a.mrcs"


def star(path, name=NAME, count=COUNT):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_star(path, [f"{image + 1}@{name}" for image in range(count)], **relion30())


def the_setting_that_mends(folder, **keys):
    """Of the message, as key and value."""
    with pytest.raises(InputError, match="stacks do not exist") as raised:
        load(folder, **keys)
    found = re.search(r"Set (.*), which finds all of them", str(raised.value))
    assert found, raised.value
    (word,) = shlex.split(found[1])
    key, _, value = word.removeprefix("data.").partition("=")
    return key, value


PLACES = {
    "a star file deep in its project": (
        "project/Refine3D/job020/run_data.star",
        NAME,
        f"project/{NAME}",
        "datadir",
    ),
    "a project under data_root": ("p.star", NAME, f"disk/my project/{NAME}", "datadir"),
    "a project that was moved": ("p.star", f"/nowhere/old/{NAME}", f"new/{NAME}", "prefix"),
    "a link of cryoSPARC": ("CS-p/J5/p.star", "S1/J2/extract/a.mrcs", "CS-p/J2/extract/a.mrcs", "prefix"),
    "only the file's name": ("p.star", "x/y/a.mrcs", "stacks/a.mrcs", "prefix"),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_message_has_the_setting_that_finds_the_stacks(tmp_path, name):
    listed, inside, there, expected = PLACES[name]
    star(tmp_path / listed, inside)
    write_stack(tmp_path / there, make_images())
    key, value = the_setting_that_mends(tmp_path, particles=listed)
    assert key == expected
    np.testing.assert_array_equal(
        load(tmp_path, particles=listed, **{key: value}).read(np.arange(COUNT)), make_images()
    )


def test_the_message_says_how_many_are_found(tmp_path):
    write_star(
        tmp_path / "p.star", ["1@a/x.mrcs", "2@a/x.mrcs", "1@a/y.mrcs", "1@b/z.mrcs", "2@b/z.mrcs", "3@b/z.mrcs"]
    )
    write_stack(tmp_path / "project" / "a" / "x.mrcs", make_images())
    write_stack(tmp_path / "project" / "b" / "z.mrcs", make_images())
    with pytest.raises(
        InputError, match=rf"3 of 3 stacks .*Set data\.datadir={tmp_path}/project, which finds 2 of them"
    ):
        load(tmp_path, particles="p.star")


def test_what_is_nowhere_is_said_to_be(tmp_path):
    star(tmp_path / "p.star", "nowhere_at_all/nothing_like_it.mrcs")
    with pytest.raises(InputError, match=r"Set data\.datadir to the folder .* or data\.prefix=old=new"):
        load(tmp_path, particles="p.star")


def test_prefixes_rewrite_names_and_the_first_that_fits_counts(tmp_path):
    names = ["1@S1/a.mrcs", "2@S1/a.mrcs", "1@/old/b.mrcs", "2@/old/b.mrcs", "1@c.mrcs", "2@c.mrcs"]
    write_star(tmp_path / "p.star", names, **relion30())
    for name in ("one/a.mrcs", "two/b.mrcs", "c.mrcs"):
        write_stack(tmp_path / name, make_images())
    table = load(tmp_path, particles="p.star", prefix="S1/=one/, /old/=two/, S=nowhere")
    assert [path.name for path in table.images.paths] == ["b.mrcs", "a.mrcs", "c.mrcs"]
    with pytest.raises(
        InputError, match=r"p\.star: data\.prefix=S2/=: none of its 3 stacks begins with 'S2/'; the first"
    ):
        load(tmp_path, particles="p.star", prefix="S2/=")
    write_star(tmp_path / "c.txt.star", names)
    (tmp_path / "list.txt").write_text("S1/a.mrcs\n")
    assert len(load(tmp_path, particles="list.txt", poses=str(write_poses(tmp_path)), prefix="S1/=one/")) == COUNT


def write_poses(folder):
    write_dataset(folder / "other")
    return folder / "other" / "poses.pkl"


@pytest.mark.parametrize("text", ["S1/", "=x", "a=b,,"])
def test_a_prefix_of_another_form_is_refused(text):
    with pytest.raises(InputError, match=r"data\.prefix=.*expected old=new"):
        parse_prefix(text)


# Passthrough files, classes, tomography, two dimensions


def test_several_passthrough_files_are_merged_the_first_counting(tmp_path):
    columns = cs()
    write_stack(tmp_path / "particles.mrcs", make_images())

    def part(name, *beginnings, **changes):
        chosen = {key: values for key, values in (columns | changes).items() if key.startswith(("uid", *beginnings))}
        save_cs(tmp_path / name, chosen)

    part("p.cs", "alignments3D")
    part("a.cs", "blob")
    part("b.cs", "ctf", "blob", **{"blob/path": np.full(COUNT, b"nowhere.mrcs")})
    table = load(tmp_path, particles="p.cs", passthrough="a.cs, b.cs")
    assert table.ctf[:, 0].tolist() == columns["ctf/df1_A"].tolist()
    np.testing.assert_array_equal(table.read(np.arange(COUNT)), make_images())
    (tmp_path / "my.yaml").write_text("data:\n  particles: p.cs\n  passthrough: [a.cs, b.cs]\n")
    config = load_config(tmp_path / "my.yaml", [f"data_root={tmp_path}"])
    check_files(config)
    assert config.data.passthrough == "a.cs,b.cs"
    with pytest.raises(InputError, match=rf"data\.passthrough: there is no file {tmp_path}/c\.cs"):
        check_files(load_config(tmp_path / "my.yaml", [f"data_root={tmp_path}", "data.passthrough=a.cs,c.cs"]))


def renamed(group, **changes):
    return {name.replace("alignments3D", group): values for name, values in cs(**changes).items()}


@pytest.mark.parametrize("group", ["alignments_class_0", "alignments_class3D_0", "alignments_class3D_7"])
def test_the_alignment_of_the_only_class_is_taken(tmp_path, group):
    write_stack(tmp_path / "particles.mrcs", make_images())
    save_cs(tmp_path / "p.cs", renamed(group))
    save_cs(tmp_path / "q.cs", cs())
    found, expected = (load(tmp_path, particles=name) for name in ("p.cs", "q.cs"))
    np.testing.assert_array_equal(found.rotations, expected.rotations)
    np.testing.assert_array_equal(found.shifts, expected.shifts)
    assert found.half.tolist() == expected.half.tolist()


def test_several_classes_have_to_be_chosen_from(tmp_path):
    both = renamed("alignments_class_0") | renamed("alignments_class_1")
    save_cs(tmp_path / "p.cs", both)
    message = (
        r"p\.cs: poses in 2 columns, .*\(alignments_class_0, alignments_class_1\), and none in alignments3D: .*Name"
    )
    with pytest.raises(InputError, match=message):
        read_listing(tmp_path / "p.cs", [])
    save_cs(tmp_path / "p.cs", cs(alignments3D__pose=None) | {"alignments3D_multi/pose": np.zeros((COUNT, 3, 3))})
    with pytest.raises(InputError, match=r"poses in 1 columns.*\(alignments3D_multi\)"):
        read_listing(tmp_path / "p.cs", [])
    save_cs(tmp_path / "p.cs", both | cs())
    assert len(read_listing(tmp_path / "p.cs", [])) == COUNT


@pytest.mark.parametrize("column", ["TomoName", "TomoParticleName"])
def test_subtomograms_are_refused_in_plain_words(tmp_path, column):
    write_star31(tmp_path / "p.star", **{column: ["t1"] * COUNT})
    with pytest.raises(
        InputError, match=rf"p\.star: a star file of tomography \(column _rln{column}\): .*single-particle"
    ):
        read_listing(tmp_path / "p.star", [])


def test_poses_of_two_dimensions_are_refused(tmp_path):
    write_stack(tmp_path / "particles.mrcs", make_images())
    names = [f"{image + 1}@particles.mrcs" for image in range(COUNT)]
    write_star(tmp_path / "p.star", names, **relion30(AngleRot=None, AngleTilt=None))
    with pytest.raises(
        InputError, match="so no poses; poses of a 2D classification are not enough: take the star file of"
    ):
        load(tmp_path, particles="p.star")
    write_star(tmp_path / "p.star", names, **relion30(AngleRot=[0] * COUNT, AngleTilt=[0.0] * COUNT))
    with pytest.raises(InputError, match="are 0 in all 6 rows, as a 2D classification leaves them"):
        load(tmp_path, particles="p.star")
