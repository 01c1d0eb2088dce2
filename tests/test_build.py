"""The compiled core builds anywhere, runs on every x86-64 processor, and needs no PyTorch."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from ninja import BIN_DIR

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
X86 = os.uname().machine == "x86_64"


def run(*command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def copy_sources(to: Path) -> Path:
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, to)
    shutil.copytree(ROOT / "csrc", to / "csrc")
    (to / "cryosplat").mkdir()
    for name in ("__init__.py", "_extension.py"):
        shutil.copy(ROOT / "cryosplat" / name, to / "cryosplat")
    return to


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A fresh copy of the sources, built in place; its path has a space, which ninja files must survive."""
    tree = copy_sources(tmp_path_factory.mktemp("a tree"))
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning:" not in done.stdout
    return tree


@pytest.fixture(scope="module")
def objects(tree) -> Path:
    return next((tree / "build").glob("core.*"))


def test_the_core_loads_in_an_interpreter_without_pytorch(tree):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "numpy"]))  # importing them now fails
sys.path.insert(0, {str(tree)!r})
from cryosplat._extension import core
print(core.__file__, core.instruction_set())
"""
    done = run(sys.executable, "-I", "-S", "-c", code, cwd=tree)
    assert done.returncode == 0, done.stderr
    file, name = done.stdout.rsplit(maxsplit=1)
    assert file == str(tree / "cryosplat" / f"_C{SUFFIX}") and name in ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("wanted", ["baseline", "avx2", "avx512"])
def test_the_instruction_set_can_be_lowered_but_not_raised(tree, wanted):
    best, lowered = (
        run(sys.executable, "-c", "import cryosplat._C as c; print(c.instruction_set())", cwd=tree, **environment)
        for environment in ({"CRYOSPLAT_ISA": ""}, {"CRYOSPLAT_ISA": wanted})
    )
    order = ["baseline", "avx2", "avx512"]
    assert order.index(lowered.stdout.strip()) == min(order.index(wanted), order.index(best.stdout.strip()))


def test_the_core_links_to_nothing_of_pytorchs(tree):
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", tree / "cryosplat" / f"_C{SUFFIX}", cwd=tree).stdout)
    assert needed and not [name for name in needed if re.match("lib(torch|c10|python)", name)]


@pytest.mark.skipif(not X86, reason="instruction sets of x86-64")
def test_what_runs_before_the_choice_has_no_wide_instructions(tree, objects):
    for name in ("bindings.o", "dispatch.o", "kernels.baseline.o"):
        assert not re.search(r"%[yz]mm", run("objdump", "-d", objects / name, cwd=tree).stdout), name
    assert "%ymm" in run("objdump", "-d", objects / "kernels.avx2.o", cwd=tree).stdout
    assert "%zmm" not in run("objdump", "-d", objects / "kernels.avx2.o", cwd=tree).stdout
    assert "%zmm" in run("objdump", "-d", objects / "kernels.avx512.o", cwd=tree).stdout


@pytest.mark.skipif(not X86, reason="instruction sets of x86-64")
@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_no_function_of_a_wide_set_can_replace_one_of_the_others(tree, objects, name):
    # The linker keeps one of equal weak functions (templates, inline ones of the standard library): were it the one
    # compiled for AVX-512, the program would stop with an illegal instruction elsewhere.
    listing = run("nm", objects / f"kernels.{name}.o", cwd=tree).stdout
    weak = [line.split()[2] for line in listing.splitlines() if re.search(r" [WVu] \S", line)]
    assert weak and not [symbol for symbol in weak if name not in symbol and not symbol.startswith("DW.ref.")]


def test_a_second_build_compiles_nothing_and_a_changed_header_what_includes_it(tree, objects):
    assert "no work to do" in run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree).stdout
    header = tree / "csrc" / "cpu" / "kernels.h"
    before = header.stat()
    os.utime(header)
    ninja = shutil.which("ninja", path=f"{BIN_DIR}{os.pathsep}{os.environ['PATH']}")
    try:
        planned = run(ninja, "-n", "-f", objects / "build.ninja", cwd=objects).stdout
    finally:
        os.utime(header, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "kernels.baseline.o" in planned and "dispatch.o" in planned and "bindings.o" not in planned


def test_the_flags_keep_nan_and_bind_to_no_machine(objects):
    text = (objects / "build.ninja").read_text()
    assert "-ffast-math" not in text and "-ffinite-math-only" not in text and "-march=native" not in text


def test_a_wheel_holds_the_core_and_not_its_sources(tree, tmp_path):
    done = run(
        sys.executable, *"-m pip wheel -q --no-deps --no-build-isolation -w".split(), tmp_path, ".", cwd=tree
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("cryosplat-*.whl"))).namelist()
    assert f"cryosplat/_C{SUFFIX}" in names and "cryosplat/_extension.py" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o"))]


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"CXX": "no-such-compiler"}, "CXX names the compiler 'no-such-compiler'"), ({"PATH": ""}, "apt-get install g++")],
)
def test_a_missing_compiler_is_said_in_words(tmp_path, environment, message):
    tree = copy_sources(tmp_path)
    if "PATH" in environment:
        environment = {"PATH": str(tmp_path), "CXX": ""}
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, **environment)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def extension_error(folder: Path, *files: str) -> str:
    package = folder / "cryosplat"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(ROOT / "cryosplat" / "_extension.py", package)
    for name in files:
        (package / name).write_bytes(b"not a library")
    # -S: an editable installation of the package would lend its own core.
    done = run(sys.executable, "-S", "-c", "import cryosplat._extension", cwd=folder)
    assert done.returncode != 0
    return done.stderr[done.stderr.rindex("ImportError") :]


def test_without_the_core_the_error_says_what_to_run(tmp_path):
    message = extension_error(tmp_path)
    assert f"{tmp_path / 'cryosplat'} has no _C{SUFFIX}: it was never built" in message
    assert "make venv" in message and "pip install" in message


def test_a_core_for_another_python_is_named(tmp_path):
    message = extension_error(tmp_path, "_C.cpython-27-x86_64-linux-gnu.so")
    assert "has _C.cpython-27-x86_64-linux-gnu.so but this Python needs" in message


def test_a_core_that_does_not_load_is_named_with_the_reason(tmp_path):
    assert "is there but does not load" in extension_error(tmp_path, f"_C{SUFFIX}")
