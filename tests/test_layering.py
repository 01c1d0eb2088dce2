"""Lower modules never import higher ones, and the outside packages stay behind the modules that own them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cryosplat"

LAYERS = (
    # Statements, formulas and tables that need nothing else of the package.
    (
        "errors",
        "conventions",
        "ctf",
        "residues",
        "sampling",
        "reference",
        "_extension",
        "devices",
        "fingerprints",
        "quadratic",
        "batches",
        "pointgroups",
    ),
    ("cudaops", "placement", "settings", "stackpaths", "aberrations"),
    # Single files and single operations.
    ("ending", "files", "unpickle", "columns", "images", "ops", "spectral", "symmetry", "nulls"),
    ("atoms", "csfiles"),
    (
        "config",
        "volumes",
        "stackfiles",
        "metrics",
        "checkpoint",
        "runlock",
        "listing",
        "scores",
        "tablecopies",
        "phantom",
        "slices",
        "gaussians",
        "masks",
    ),
    ("status", "pseudoatoms", "chimerax"),
    ("distributed", "optimiser", "stepgraph", "halves", "alignments", "optics", "runs", "fsc"),
    ("pixelsizes", "interruption", "opticsnotes", "progress"),
    ("fitkeeping", "descent"),
    ("sharpening", "uncertainty", "directional", "localresolution", "fscchecks", "records", "particles"),
    ("figures", "fscsuite", "sectors"),
    ("fscfigures", "eventlog", "runfiles"),
    # What training is put together from.
    ("imageprep",),
    ("cache",),
    ("prefetch",),
    ("dataset", "monitor", "outputs", "simulate", "postprocess", "verdicts"),
    ("reconstruction", "nodeimages", "inspection", "gaussianfiles", "survey", "fsccommand", "backprojection"),
    ("calibration",),
    ("posterior",),
    ("linearmaps", "volumefit"),
    ("symmetrycheck",),
    ("memory",),
    ("evaluation", "trainer", "holdout", "sign"),
    ("start", "preparation", "imagesurvey"),
    ("findings",),
    ("report",),
    ("products", "costs", "particlescores"),
    # What people call.
    ("train", "validation", "backprojectcommand", "exporting", "doctor", "comparing", "inspectcommand"),
    ("api", "cli"),
    # Whose names are those of "api", brought in when one is used; others import it for its version alone.
    ("__init__",),
)

UPWARD = {
    ("train", "cli"): "python -m cryosplat.train reports errors as the cryosplat command does",
}
"""Imports against the order, allowed inside a function only."""

OWNERS = {
    "torch.distributed": {"distributed"},
    "torch.nn.parallel": {"distributed"},
    "cryodrgn": {"particles", "images", "unpickle"},
    "submitit": set(),
    "matplotlib": {"figures", "fscfigures"},
    "PIL": {"figures"},
    "jinja2": {"report"},
    "gemmi": {"atoms"},
    "tensorboard": {"metrics", "eventlog"},
    "torch.utils.tensorboard": {"metrics", "eventlog"},
    "cryosplat._C": {"_extension"},
    "cryosplat.reference": set(),
}
"""Outside package: the modules that may import it."""

LAZY = ("cryodrgn", "gemmi", "jinja2", "tensorboard", "torch.utils.tensorboard")
"""Heavy, and needed for some inputs only: imported where they are used."""

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(full name, whether inside a function) of everything a file imports; of ``from a import b``, both a and a.b."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module, inside))
            found.extend((f"{node.module}.{alias.name}", inside) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text()), False)
    return found


def is_part_of(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def level(module: str) -> int:
    places = [place for place, names in enumerate(LAYERS) if module in names]
    assert len(places) == 1, f"give cryosplat/{module}.py its place in LAYERS of tests/test_layering.py"
    return places[0]


def test_the_table_names_the_modules_there_are():
    assert sorted(name for names in LAYERS for name in names) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_lower_ones(module):
    for name, inside in imports(PACKAGE / f"{module}.py"):
        parts = name.split(".")
        if parts[0] != "cryosplat" or len(parts) < 2 or parts[1] not in MODULES:
            continue
        if inside and (module, parts[1]) in UPWARD:
            continue
        assert level(parts[1]) < level(module), f"cryosplat/{module}.py imports {parts[1]}, which is not below it"


@pytest.mark.parametrize("module", MODULES)
def test_outside_packages_stay_with_their_owners(module):
    for name, inside in imports(PACKAGE / f"{module}.py"):
        for package, owners in OWNERS.items():
            assert not is_part_of(name, package) or module in owners, f"cryosplat/{module}.py imports {name}"
        for package in LAZY:
            assert inside or not is_part_of(name, package), f"cryosplat/{module}.py imports {name} outside a function"
        assert not is_part_of(name, "launch"), f"cryosplat/{module}.py imports {name}"


@pytest.mark.parametrize("module", [module for module in MODULES if module != "distributed"])
def test_only_one_module_says_torch_distributed(module):
    used = [
        ast.unparse(node)
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.distributed", "torch.nn.parallel"))
    ]
    assert not used


def test_the_compiled_core_knows_nothing_of_pytorch():
    for path in [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.cu")]:
        includes = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        assert not [line for line in includes if any(word in line for word in ("torch", "ATen", "c10"))], path


LAUNCHER_NEEDS = tuple(f"cryosplat.{name}" for name in ("config", "settings", "errors", "files", "status"))
"""What the launcher imports at once; all else, and PyTorch with it, only when it looks at data or trains."""


def test_the_launcher_is_quick_to_find_mistakes_that_need_no_data():
    for path in ROOT.glob("launch/*.py"):
        top = {name for name, inside in imports(path) if is_part_of(name, "cryosplat") and not inside}
        assert all(any(is_part_of(name, module) for module in LAUNCHER_NEEDS) for name in top), path
