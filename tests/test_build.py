"""The compiled core builds anywhere, runs on every x86-64 processor, and needs no PyTorch."""

import json
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
CUDA_FOLDER = ROOT / "csrc" / "cuda"
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
    for name in ("__init__.py", "_extension.py", "report.html.j2"):
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
    assert {f"cryosplat/_C{SUFFIX}", "cryosplat/_extension.py", "cryosplat/report.html.j2"} <= set(names)
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
    done = in_core(tree, "print([core.cuda_architectures, core.cuda_version, HAS_CUDA, hasattr(core, 'cuda')])")
    assert done.stdout.strip() == "['', '', False, False]", done.stderr


@needs_nvcc
def test_the_cuda_half_loads_and_answers_without_a_driver(cuda_tree):
    done = in_core(cuda_tree, "print(core.cuda_version, core.cuda_architectures, core.cuda.float64.insert is not None)")
    version = re.search(r"release ([\d.]+)", run(NVCC, "--version", cwd=cuda_tree).stdout)[1]
    assert done.stdout.split() == [version, "75", "90", "True"], done.stderr
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
def test_every_kernel_is_reported_for_every_architecture(cuda_tree):
    file = next((cuda_tree / "build").glob("core.*/cuda_resources.json"))
    kernels = json.loads(file.read_text())["kernels"]
    sources = "".join(path.read_text() for path in CUDA_FOLDER.iterdir())
    written = {re.search(r"(\w+)\(", re.sub(r"__launch_bounds__\(.*?\)", "", head))[1]
               for head in re.findall(r"__global__([^{]*)", sources)}  # fmt: skip
    assert {"insert_gather", "insert_scatter"} <= written == {kernel["kernel"] for kernel in kernels}
    for name in {(kernel["kernel"], kernel["arguments"]) for kernel in kernels}:
        own = [kernel for kernel in kernels if (kernel["kernel"], kernel["arguments"]) == name]
        assert sorted(kernel["architecture"] for kernel in own) == ["75", "90"]
        assert all(0 < kernel["registers"] <= 255 for kernel in own)
    gather = next(kernel for kernel in kernels if (kernel["kernel"], kernel["arguments"]) == ("insert_gather", "float"))
    assert gather["shared"] > 4096 and gather["spill_stores"] == 0
    shown = run(sys.executable, cuda_tree / "csrc/resources.py", "--show", file, cwd=cuda_tree).stdout.splitlines()
    assert shown[1].split() == ["kernel", "shared", "stack", "sm_75", "sm_90"] and len(shown) == 2 + len(kernels) // 2


SPILLING = """
template <class T>
__global__ void __launch_bounds__(1024, 2) greedy(T* to) {
  T values[64];
  for (int k = 0; k < 64; ++k) values[k] = to[k];
  __syncthreads();
  for (int k = 0; k < 64; ++k) to[64 * threadIdx.x + k] = values[63 - k] * values[k];
}
template __global__ void greedy(SCALAR*);
"""


@needs_nvcc
def test_a_kernel_that_spills_stops_the_build_unless_that_is_allowed_or_in_double_precision(tmp_path):
    tree = copy_sources(tmp_path)
    for name in ("bindings.cpp", "cpu/dispatch.cpp", "cpu/kernels.cpp"):
        (tree / "csrc" / name).write_text("")
    shutil.rmtree(tree / "csrc/cuda")
    (tree / "csrc/cuda").mkdir()
    source = tree / "csrc" / "cuda" / "new.cu"  # and a file that nobody has listed is compiled

    def build(scalar: str, **environment: str) -> subprocess.CompletedProcess:
        source.write_text(SPILLING.replace("SCALAR", scalar))
        command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
        return run(*command, cwd=tree, CRYOSPLAT_CUDA_ARCH="90", **environment)

    done = build("float")
    assert done.returncode != 0 and re.search(r"greedy<float> spills on sm_90: [1-9]\d* bytes stored", done.stdout)
    assert "CRYOSPLAT_ALLOW_SPILLS=1" in done.stdout and not list(tree.glob("build/core.*/*.so"))
    assert build("float", CRYOSPLAT_ALLOW_SPILLS="1").returncode == 0 and list(tree.glob("build/core.*/*.so"))
    assert build("float").returncode != 0  # what was allowed once is not allowed for ever
    assert build("double").returncode == 0


@needs_nvcc
def test_vectors_are_added_in_one_instruction_where_there_is_one(tmp_path):
    for architecture, wanted in (("80", False), ("90", True)):
        to = tmp_path / f"{architecture}.ptx"
        done = run(
            NVCC,
            "-std=c++17",
            "-ptx",
            f"-arch=compute_{architecture}",
            "-o",
            to,
            CUDA_FOLDER / "insert.cu",
            cwd=tmp_path,
        )
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
    for path in (tree / "csrc" / "cuda").glob("*.cu"):
        path.write_text("int unused() { int here; return 0; }\n")  # a warning is an error
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree, CRYOSPLAT_CUDA_ARCH="90")
    assert done.returncode != 0 and "here" in done.stdout and "CRYOSPLAT_CUDA_ARCH=off" in done.stderr


LOG = """ptxas info    : 0 bytes gmem, 16 bytes cmem[3]
ptxas info    : Compiling entry function '_ZN9cryosplat4cuda11_GLOBAL__N_4drawIfLi8ELb1EEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN9cryosplat4cuda11_GLOBAL__N_4drawIfLi8ELb1EEEvPT_
    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for a_function_that_it_calls
    16 bytes stack frame, 0 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN9cryosplat4cuda4plusEv' for 'sm_90a'
ptxas info    : Function properties for _ZN9cryosplat4cuda4plusEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 352 bytes cmem[0]
"""


def test_the_compilers_log_is_read(resources):
    first, second = resources["read_log"](LOG)
    assert (first.kernel, first.arguments, first.architecture) == ("draw", "float, 8, true", "80")
    assert (first.registers, first.shared, first.stack, first.spill_stores, first.spill_loads) == (40, 1024, 24, 4, 12)
    assert (second.kernel, second.arguments, second.architecture) == ("plus", "", "90a")
    assert (second.registers, second.shared, second.spills) == (8, 0, False)
    assert resources["read_log"]("") == []
    with pytest.raises(ValueError, match="not understood"):
        resources["read_log"](LOG.replace("Used", "Takes"))


@pytest.mark.parametrize(
    ("arguments", "architecture", "hot"),
    [
        ("float", "75", True),
        ("float, 8", "120", True),
        ("Half, float", "90a", True),
        ("", "80", True),
        ("double", "90", False),
        ("double, float", "90", False),
        ("float", "70", False),
    ],
)
def test_kernels_in_single_precision_must_not_spill(resources, arguments, architecture, hot):
    assert resources["Usage"]("draw", arguments, architecture, 32, 0, 0, 4, 4).is_hot == hot


@pytest.mark.parametrize(
    ("symbol", "name", "arguments"),
    [
        ("_ZN9cryosplat4cuda47_GLOBAL__N__989bcdff_9_insert_cu_b9b0e97a_2493613insert_gatherIfEEvNS1_4PlanIT_EE",
         "insert_gather", ["float"]),
        ("_Z4drawIdLin1ELb0EEvPT_", "draw", ["double", "-1", "false"]),
        ("_Z4drawIf6__halfEvPT_", "draw", ["float", "__half"]),
        ("_Z4drawIfNS_4KindEEvPT_", "draw", ["float", "..."]),
        ("_Z4plusPf", "plus", []),
        ("plain", "plain", []),
    ],
)  # fmt: skip
def test_kernels_have_the_names_of_their_sources(resources, symbol, name, arguments):
    assert resources["read_symbol"](symbol) == (name, arguments)


@pytest.fixture(scope="module")
def resources() -> dict:
    return runpy.run_path(str(ROOT / "csrc/resources.py"))


FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools, release 12.4, V12.4.131';;
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
    assert cuda.version == "12.4" and cuda.flags() == [
        "-gencode=arch=compute_70,code=[sm_70,compute_70]",
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]


def test_a_toolkit_that_is_too_old_is_refused_and_one_that_is_new_is_tried(build_script, tmp_path, capsys, monkeypatch):
    nvcc = tmp_path / "home" / "bin" / "nvcc"
    nvcc.write_text(FAKE_NVCC.replace("12.4", "12.3"))
    with pytest.raises(PlatformError, match="CUDA 12.3, and cryosplat needs 12.4 or newer. Set CUDA_HOME .*ARCH=off"):
        build_script["find_cuda"]()
    monkeypatch.setenv("CRYOSPLAT_CUDA_ARCH", "off")
    assert build_script["find_cuda"]() is None
    monkeypatch.delenv("CRYOSPLAT_CUDA_ARCH")
    nvcc.write_text(FAKE_NVCC.replace("12.4", "14.1"))
    assert build_script["find_cuda"]().version == "14.1" and "none after 13 has been tried" in capsys.readouterr().out


def test_nvcc_compiles_for_several_architectures_at_a_time_where_there_are_cores(build_script, monkeypatch):
    monkeypatch.delenv("NVCC_APPEND_FLAGS", raising=False)
    sources = len(list(CUDA_FOLDER.glob("*.cu")))
    assert build_script["spread_threads"](1) == "--threads 1"
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert build_script["spread_threads"](3 * sources) == "-lineinfo --threads 3"


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
