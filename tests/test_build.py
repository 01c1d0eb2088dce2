"""The compiled core builds anywhere, runs on every x86-64 processor, and needs no PyTorch."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import setuptools
from ninja import BIN_DIR
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parents[1]
CUDA_SOURCE = ROOT / "csrc" / "cuda" / "insert.cu"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
X86 = os.uname().machine == "x86_64"
NVCC = next(filter(None, (shutil.which("nvcc", path=path) for path in (None, "/usr/local/cuda/bin"))), None)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc in PATH or /usr/local/cuda")


def run(*command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    words = [str(word) for word in command]
    environment = {**os.environ, "CRYOSPLAT_CUDA_ARCH": "off", **environment}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


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
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o", ".cu"))]


@pytest.fixture(scope="module")
def cuda_tree(tmp_path_factory) -> Path:
    tree = copy_sources(tmp_path_factory.mktemp("a cuda tree"))
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, CRYOSPLAT_CUDA_ARCH="90,7.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    return tree


def in_core(tree: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    code = f"from cryosplat._extension import HAS_CUDA, core; {code}"
    return run(sys.executable, "-S", "-c", code, cwd=tree, **environment)


def test_without_cuda_the_core_says_so(tree):
    done = in_core(tree, "print(repr(core.cuda_architectures), HAS_CUDA, hasattr(core, 'cuda'))")
    assert done.stdout.split() == ["''", "False", "False"], done.stderr


@needs_nvcc
def test_the_cuda_half_loads_and_answers_without_a_driver(cuda_tree):
    done = in_core(cuda_tree, "print(core.cuda_architectures, HAS_CUDA, core.cuda.float64.insert is not None)")
    assert done.stdout.split() == ["75", "90", "True", "True"], done.stderr
    # No views: nothing to launch, so no driver is asked for.
    nothing = in_core(cuda_tree, "print(core.cuda.float32.insert(1, 0, 4, 4, 0, 0, 0, 0, 0, 0, True, 0, 0))")
    assert nothing.stdout.strip() == "None", nothing.stderr


@needs_nvcc
def test_a_launch_that_fails_says_why(cuda_tree):
    code = "core.cuda.float32.insert(1, 1, 4, 4, 0, 0, 0, 0, 0, 0, True, 0, 0)"
    message = in_core(cuda_tree, code, CUDA_VISIBLE_DEVICES="").stderr
    assert "RuntimeError: insertion did not start on the GPU: " in message
    assert re.search("driver|device", message.splitlines()[-1])


@needs_nvcc
def test_the_cuda_runtime_is_within_and_exports_nothing(cuda_tree):
    core = cuda_tree / "cryosplat" / f"_C{SUFFIX}"
    assert "libcuda" not in run("readelf", "-d", core, cwd=cuda_tree).stdout
    # PyTorch has a runtime of its own in the same process.
    exported = run("nm", "-D", "--defined-only", core, cwd=cuda_tree).stdout
    assert "PyInit__C" in exported and not re.search(r" [TB] _*cuda", exported)


@needs_nvcc
def test_every_kernel_is_there_for_every_architecture_and_its_registers_are_in_the_log(cuda_tree):
    log = next((cuda_tree / "build").glob("core.*/insert.cuda.o.log")).read_text()
    found = re.findall(r"entry function '\w*?(insert_(?:scatter|gather))I([df])E\w*' for 'sm_(\d+)'", log)
    assert sorted(found) == sorted(
        (kernel, scalar, architecture)
        for kernel in ("insert_scatter", "insert_gather")
        for scalar in "df"
        for architecture in ("75", "90")
    )
    assert len(re.findall(r"Used \d+ registers", log)) == len(found)


@needs_nvcc
def test_vectors_are_added_in_one_instruction_where_there_is_one(tmp_path):
    for architecture, wanted in (("80", False), ("90", True)):
        to = tmp_path / f"{architecture}.ptx"
        done = run(NVCC, "-std=c++17", "-ptx", f"-arch=compute_{architecture}", "-o", to, CUDA_SOURCE, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("red.relaxed.gpu.global.add.v4.f32" in to.read_text()) == wanted


@needs_nvcc
def test_a_changed_cuda_source_is_compiled_again_and_nothing_else(cuda_tree):
    folder = next((cuda_tree / "build").glob("core.*"))
    os.utime(cuda_tree / "csrc" / "cuda" / "launch.h")
    ninja = shutil.which("ninja", path=f"{BIN_DIR}{os.pathsep}{os.environ['PATH']}")
    planned = run(ninja, "-n", "-f", folder / "build.ninja", cwd=folder).stdout
    assert "insert.cuda.o" in planned and "bindings.o" not in planned and "kernels" not in planned


@needs_nvcc
def test_an_error_in_a_cuda_source_shows_the_compilers_message(tmp_path):
    tree = copy_sources(tmp_path)
    for name in ("bindings.cpp", "cpu/dispatch.cpp", "cpu/kernels.cpp"):
        (tree / "csrc" / name).write_text("")
    (tree / "csrc" / "cuda" / "insert.cu").write_text("int unused() { int here; return 0; }\n")  # a warning is an error
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, CRYOSPLAT_CUDA_ARCH="90")
    assert done.returncode != 0 and "here" in done.stdout and "CRYOSPLAT_CUDA_ARCH=off" in done.stderr


FAKE_NVCC = """#!/bin/sh
case "$1" in
  --list-gpu-code) printf 'sm_70\\nsm_75\\nsm_80\\nsm_90\\nsm_90a\\n';;
  --dryrun) echo '#$ TOP=/x'; echo '#$ LIBRARIES=  "-L/x/lib/stubs" "-L/x/a lib"';;
esac
"""


@pytest.fixture
def build_script(monkeypatch, tmp_path) -> dict:
    """What setup.py defines, and an nvcc of CUDA 12 in CUDA_HOME."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    nvcc = tmp_path / "home" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CRYOSPLAT_CUDA_ARCH", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_an_older_toolkit_compiles_for_what_it_knows(build_script, tmp_path):
    cuda = build_script["find_cuda"]()
    assert cuda.nvcc == str(tmp_path / "home" / "bin" / "nvcc") and cuda.architectures == ("70", "75", "80", "90")
    assert cuda.libraries[0] == "-L/x/a lib" and "-lcudart_static" in cuda.libraries
    assert cuda.flags()[-1] == "-gencode=arch=compute_90,code=[sm_90,compute_90]" and len(cuda.flags()) == 4


def test_architectures_can_be_named_and_switched_off(build_script, monkeypatch):
    for wanted, found in [("90", ("90",)), ("8.0;70", ("70", "80")), ("90a, 75", ("75", "90a"))]:
        monkeypatch.setenv("CRYOSPLAT_CUDA_ARCH", wanted)
        assert build_script["find_cuda"]().architectures == found
    monkeypatch.setenv("CRYOSPLAT_CUDA_ARCH", "off")
    assert build_script["find_cuda"]() is None


def test_an_architecture_that_nvcc_does_not_know_is_named(build_script, monkeypatch):
    monkeypatch.setenv("CRYOSPLAT_CUDA_ARCH", "90,35")
    with pytest.raises(PlatformError, match="names 35, which .* knows 70, 75, 80, 90, 90a"):
        build_script["find_cuda"]()


def test_without_nvcc_the_build_says_that_it_is_for_cpus(build_script, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME")
    find_cuda = build_script["find_cuda"]
    monkeypatch.setitem(find_cuda.__globals__, "CUDA_HOME", str(tmp_path / "none"))
    assert find_cuda() is None and "for CPUs only" in capsys.readouterr().out
    monkeypatch.setenv("CRYOSPLAT_CUDA_ARCH", "90")
    with pytest.raises(PlatformError, match="CRYOSPLAT_CUDA_ARCH=90, but there is no nvcc"):
        find_cuda()


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
