"""The documents say what is true: their commands run; their files, settings, columns, messages and numbers are ours."""

import ast
import csv
import functools
import json
import os
import re
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from plyfile import PlyData
from reader import ROOT, SMALLER, Desk, blocks, commands, lay_out, names, program_state_kept, table

from cryosplat.config import load_config
from cryosplat.metrics import COLUMNS, read_volume_fit
from cryosplat.scores import NUMBERS
from cryosplat.settings import RECIPES, Config
from cryosplat.unpickle import read_pickle

PAGES = [ROOT / name for name in ("README.md", "docs/formats.md", "docs/operations.md", "docs/empiar.md")]
PAGES += sorted({ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")} - set(PAGES))
FORMATS, OPERATIONS = ROOT / "docs/formats.md", ROOT / "docs/operations.md"
CLUSTER, TROUBLE = ROOT / "docs/cluster.md", ROOT / "docs/troubleshooting.md"
FOLLOWED = [page for page in PAGES if page != CLUSTER]
"""Pages whose commands this test runs; those of the other are run on a real Slurm by tests/test_slurm_launch.py."""

LISTED = {
    "make demo": "installs and trains for minutes; run by hand from a fresh clone",
    "make test": "runs this test; .ci/run calls it",
    "make docs": "tests/test_site.py does it",
    "make lint": "checks style, not behaviour; run before every commit",
    "make venv": "the first step of make test",
    "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make venv": "a download",
    "CUDA_HOME=/usr/local/cuda-12.8 CRYOSPLAT_CUDA_ARCH=90 make venv": "needs that toolkit",
    "python csrc/resources.py --show 'build/core.*/cuda_resources.json'": "tests/test_build.py does it",
    "pip install -e .": "a download; the Makefile's own step",
    "sudo apt-get install g++ make python3-venv python3-dev": "changes the machine",
    "source .venv/bin/activate": "changes the shell; what follows here runs in that environment anyway",
    "cryosplat validate runs/my": "trains six times over; tests/test_validation.py does it to smaller runs",
    "cryosplat validate runs/mine": "as above",
    "cryosplat validate runs/10028": "as above",
    "cryosplat validate runs/10049": "as above",
    "cryosplat validate runs/10076": "as above",
    "cryosplat validate runs/10180": "as above",
    "cryosplat validate runs/my --tests phases,holdout --processes 8": "as above",
    "torchrun --standalone --nproc-per-node 4 -m cryosplat.cli backproject --config my.yaml -o linear_by_four": "tests/"
    "test_backprojectcommand.py does it",
    "python -m cryosplat.train --config my.yaml data.cache=disk cache.dir=/local/scratch/me cache.max_gb=500": "writes "
    "to a disk of a node; tests/test_cache.py does it elsewhere",
    "python -m pytest -q tests/test_ctf.py": "runs with all other tests",
    "tensorboard --logdir runs": "a server without an end",
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 1 --rdzv-endpoint first-host:12345 "
    "-m cryosplat.train --config my.yaml": "needs two machines",
}
"""Commands of the pages that this test does not run, and why not."""

ALL_COMMANDS = [
    pytest.param(command, id=f"{page.name}: {command}")
    for page in FOLLOWED
    for language, text in blocks(page)
    if language == "bash"
    for command in commands(text)
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patch, program_state_kept():
        patch.chdir(folder)
        path = [str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        patch.setenv("PATH", os.pathsep.join(path))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_"))]:
            patch.delenv(name)
        lay_out(folder)
        desk = Desk(folder)
        for page in FOLLOWED:
            desk.follow(page, LISTED)
    return desk


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_every_command_runs_or_is_listed_with_a_reason(desk, command):
    assert command in LISTED or desk.status[command] == 0


def test_nothing_is_listed_or_made_smaller_in_vain():
    written = {parameter.values[0] for parameter in ALL_COMMANDS}
    assert set(LISTED) <= written
    assert all(any(large in command for command in written) for large in SMALLER)


def test_poses_and_ctf_parsed_from_either_program_are_those_of_the_particles(desk):
    poses, ctf = (read_pickle(desk.folder / "standin" / name) for name in ("poses.pkl", "ctf.pkl"))
    assert len(desk.parsed) == 4
    for command, values in desk.parsed.items():
        if "pose" in command:
            np.testing.assert_allclose(values[0], poses[0], atol=1e-5, err_msg=command)
            np.testing.assert_allclose(values[1], poses[1], atol=1e-5, err_msg=command)
        else:
            np.testing.assert_allclose(values, ctf, rtol=1e-5, atol=1e-4, err_msg=command)


# What is named is there


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def links(page: Path) -> list[str]:
    prose = re.sub(r"^    .*$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE)  # not formulas
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]


ALL_LINKS = [pytest.param(page, link, id=f"{page.name}: {link}") for page in PAGES for link in sorted(set(links(page)))]


@pytest.mark.parametrize(("page", "link"), ALL_LINKS)
def test_every_link_leads_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists()
    if anchor:
        assert anchor in {slug(title) for title in re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_source_file_named_is_there(page):
    text = page.read_text()
    folders = "cryosplat|csrc|launch|slurm|configs|tests|benchmarks|docs"
    columns_of_cs = {f"cryosplat/{name}" for name in NUMBERS}
    missing = set(re.findall(rf"`((?:{folders})/[\w./-]*)`", text)) - columns_of_cs
    missing = [name for name in missing if not (ROOT / name).exists()]
    sources = {path.name for pattern in ("*.py", "*/*.py") for path in ROOT.glob(pattern)}
    missing += [name for name in re.findall(r"`(\w+\.py)`", text) if name not in sources]
    assert not missing


def test_every_module_has_its_line_in_the_architecture_and_none_imports_one_below_it():
    page = ROOT / "docs/architecture.md"
    order = [row[0].strip("`") for row in table(page, "## Modules, lowest first")]
    assert sorted(order) == sorted(path.stem for path in (ROOT / "cryosplat").glob("*.py") if path.stem != "__init__")
    for place, module in enumerate(order):
        tree = ast.parse((ROOT / "cryosplat" / f"{module}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cryosplat"):
                used = [node.module.rpartition(".")[2], *(alias.name for alias in node.names)]
                below = [name for name in used if name in order[place + 1 :]]
                assert not below, f"{module} imports {below}"


# Settings, files, columns, messages


@functools.cache
def defaults() -> dict[str, object]:
    flat = {}
    for key, value in OmegaConf.to_container(OmegaConf.structured(Config)).items():
        flat.update(
            {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        )
    return flat


def test_the_table_of_settings_has_every_key_with_its_default():
    said = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in table(FORMATS, "## Settings")}
    assert said == defaults()


def test_the_table_of_recipes_has_every_recipe_with_what_it_sets():
    said = {
        row[0].strip("`"): {key: yaml.safe_load(value) for key, value in re.findall(r"`([\w.]+)=(\S+)`", row[2])}
        for row in table(FORMATS, "## Recipes")
    }
    assert said == RECIPES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_named_exists(page):
    sections = "|".join(sorted({key.split(".")[0] for key in defaults() if "." in key}))
    unknown = []
    for section, name in re.findall(rf"(?<![\w./])({sections})\.(\w+)", page.read_text()):
        module = ROOT / "cryosplat" / f"{section}.py"
        code = name == "py" or (module.exists() and f"def {name}(" in module.read_text())
        if f"{section}.{name}" not in defaults() and not code:
            unknown.append(f"{section}.{name}")
    assert not unknown


def test_the_example_configuration_is_one(desk):
    assert load_config(desk.folder / "my.yaml").run_dir == "runs/my"


def test_the_run_directory_holds_what_is_said(desk):
    said = {name.rstrip("/") for name in names(FORMATS, "## The run directory")}
    assert {path.name for path in (desk.folder / "runs/my").iterdir()} == said
    assert names(ROOT / "README.md", "## What comes out") <= {*said, *(f"{name}/" for name in said)}
    trained = {path.name for path in (desk.folder / "runs/two").iterdir()}
    assert trained == {*said, "loss.png"} - {"volume_fit.csv", "volume_fit.png"}


def test_the_simulated_stack_has_the_files_that_are_said(desk):
    assert {path.name for path in (desk.folder / "simulated").iterdir()} == names(FORMATS, "## A simulated stack")


def test_the_sharpened_map_has_the_files_and_the_record_the_keys_that_are_said(desk):
    assert {path.name for path in (desk.folder / "sharpened").iterdir()} == names(FORMATS, "## A sharpened map")
    record = json.loads((desk.folder / "sharpened/postprocess.json").read_text())
    assert set(record) == names(FORMATS, "## postprocess.json")
    assert record["weighting"] == "truth" and record["fsc_from"].startswith("calibrated_map of runs/my")


def test_every_key_of_the_summary_is_explained(desk):
    assert set(json.loads((desk.folder / "runs/my/summary.json").read_text())) == names(FORMATS, "## summary.json")


def test_every_column_is_explained(desk):
    assert names(FORMATS, "## metrics.csv") == set(COLUMNS)
    assert names(FORMATS, "## volume_fit.csv") == set(read_volume_fit(desk.folder / "runs/my/volume_fit.csv"))
    with open(desk.folder / "runs/my/fsc.csv", newline="") as file:
        written = next(csv.reader(file))
    said = names(FORMATS, "## fsc.csv")
    errors = {name for name in written if name.endswith("_error")}
    assert set(written) - errors == said and "calibrated_map_error" in errors
    assert {name.removesuffix("_error") for name in errors} <= said


def test_the_backproject_command_writes_the_files_that_are_said(desk):
    assert {path.name for path in (desk.folder / "linear").iterdir()} == names(
        FORMATS, "## Files of cryosplat backproject"
    )


def test_the_fsc_command_writes_the_files_and_curves_that_are_said(desk):
    said = names(FORMATS, "## Files of cryosplat fsc")
    curves = {name for name in said if "." not in name}
    assert {path.name for path in (desk.folder / "fsc_halves").iterdir()} == said - curves
    written = set()
    for folder in ("fsc_halves", "fsc_mask"):
        with open(desk.folder / folder / "fsc.csv", newline="") as file:
            written |= set(next(csv.reader(file))[3:])
    assert curves - {"phase_randomised"} <= written <= {f"{name}{tail}" for name in curves for tail in ("", "_error")}


def test_the_files_of_gaussians_hold_what_is_said(desk):
    said = names(FORMATS, "## The Gaussians")
    arrays = np.load(desk.folder / "runs/my/gaussians.npz")
    halves = {f"{half}_{name}" for half in ("half_a", "half_b") for name in said}
    assert set(arrays.files) == {*said, *halves, "box", "pixel_size_a"}
    properties = PlyData.read(desk.folder / "runs/my/gaussians.ply")["vertex"].data.dtype.names
    text = FORMATS.read_text()
    assert all(f"`{name}`" in text for name in properties)


def test_amplitudes_are_in_the_unit_that_is_said(desk):
    arrays = np.load(desk.folder / "runs/my/gaussians.npz")
    total = arrays["amplitudes"].sum() / arrays["pixel_size_a"] ** 2
    assert mrcfile.read(desk.folder / "runs/my/mixture.mrc").sum() == pytest.approx(total, rel=0.01)


def test_every_tensorboard_tag_is_explained(desk):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = set()
    for folder in ("my/tensorboard", "my/tensorboard/volume_fit", "two/tensorboard"):
        events = EventAccumulator(str(desk.folder / "runs" / folder))
        events.Reload()
        tags = events.Tags()
        written |= {*tags["scalars"], *tags["images"]}
        written |= {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    said = names(FORMATS, "## TensorBoard")
    section = FORMATS.read_text().partition("## TensorBoard")[2].partition("\n## ")[0]
    tails = re.findall(r"`(_\w+)`", section)
    assert tails
    maps = [f"map/{kind}{tail}" for kind in ("sections", "projections") for tail in tails]
    assert written - {"custom_scalars__config__"} == {*said, *maps} - {"memory/gpu_max_reserved_GiB"}


def literals() -> list[str]:
    """Every string in the sources, with … for what is put in."""
    found = [(ROOT / "Makefile").read_text()]
    for path in [*(ROOT / "cryosplat").glob("*.py"), *(ROOT / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append(re.sub("…+", "…", "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_explained_are_those_of_the_program():
    strings = literals()
    quoted = [row[0].strip("`") for row in table(OPERATIONS, "## Messages")]
    failures = CLUSTER.read_text().partition("What the program says:")[2].partition("What Slurm says:")[0]
    of_clusters = re.findall(r"^\| `([^`]+)` \|", failures, re.MULTILINE)
    first_met = re.findall(r"^\*\*`(.+?)`\*\*", TROUBLE.read_text().replace(", **`", "\n**`"), re.MULTILINE)
    assert len(of_clusters) > 10 and len(first_met) > 20
    quoted += of_clusters + first_met
    unknown = [message for message in quoted if not any(message in string for string in strings)]
    assert len(quoted) > 20 and not unknown


def test_the_memory_figures_are_those_of_the_formula():
    def gib(box):
        return 100_000 * box * (box // 2 + 1) * 4 / 2**30

    assert f"{gib(256):.1f} GiB, of 128 px {gib(128):.1f} GiB" in OPERATIONS.read_text()
    assert f"{3 * 8192 * 11 * 12 / 2**20:.1f} MiB for 8,192" in OPERATIONS.read_text()
