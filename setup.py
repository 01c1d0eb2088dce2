"""Builds ``cryosplat._C``, the compiled core; everything else about the package is in pyproject.toml.

The core knows nothing of PyTorch (Python passes it raw pointers), so pip's build isolation needs pybind11 and ninja
only, and one binary serves every torch version. It serves every x86-64 node of a cluster too: the kernels are compiled
once per instruction set and chosen at run time, never with -march=native.

Where nvcc of CUDA 12.4 or newer is found, the CUDA half is compiled too, every csrc/cuda/*.cu, for the architectures
that CRYOSPLAT_CUDA_ARCH names ("90", or several: "80,90") or, without it, for those of ARCHITECTURES that this nvcc
knows; CRYOSPLAT_CUDA_ARCH=off leaves it out. The CUDA runtime is linked statically and looks for a driver at its first
call, so the file loads where there is none. What each kernel takes of a GPU is printed and stays in
build/core.../cuda_resources.json; one that should not spill and does stops the build, but for CRYOSPLAT_ALLOW_SPILLS=1.

CXX, CXXFLAGS, LDFLAGS, CUDA_HOME and MAX_JOBS are honoured. Objects stay in build/, one folder per Python, so a second
build compiles only what changed; ninja takes header dependencies from the compiler.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

# NaN must stay detectable, so not -ffast-math: only the two parts of it that vectorisation needs and that keep NaN and
# infinity (no errno from the mathematical functions, no visible floating-point traps).
COMMON_FLAGS = (
    "-std=c++17 -O3 -DNDEBUG -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra "
    "-fno-math-errno -fno-trapping-math -ffp-contract=fast"
).split()

INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512".split(),
}

# NaN and infinity as above: no --use_fast_math. Registers and spills of every kernel go to the log beside the object.
CUDA_FLAGS = (
    "-std=c++17 -O3 -DNDEBUG -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra -Werror all-warnings "
    "-Wno-deprecated-gpu-targets -Xptxas -v"
).split()

# Volta (up to CUDA 12), Turing, A100, RTX 30, RTX 40 and L40, H100 and H200, B200, RTX 50 (both since CUDA 12.8). A
# device between two of them runs the code of the one below with the same first digits.
ARCHITECTURES = ("70", "75", "80", "86", "89", "90", "100", "120")

OLDEST_CUDA, NEWEST_CUDA = (12, 4), 13  # a version, and the number that those tried so far begin with

CUDA_HOME = "/usr/local/cuda"  # where NVIDIA's installers put it

BINDINGS = "csrc/bindings.cpp"
DISPATCH = "csrc/cpu/dispatch.cpp"
KERNELS = "csrc/cpu/kernels.cpp"  # compiled once per instruction set
CUDA_FOLDER = "csrc/cuda"
RESOURCES = "csrc/resources.py"


@dataclass(frozen=True)
class Cuda:
    """What the CUDA half is compiled with."""

    nvcc: str
    version: str  # "13.0"
    architectures: tuple[str, ...]
    libraries: tuple[str, ...]  # of the linker: the static runtime and what it needs

    def flags(self) -> list[str]:
        """Machine code of every architecture, and PTX, which the driver compiles when it loads it, of two.

        PTX runs on no chip older than its own, so that of the lowest serves all that lie between and have no code with
        their first digits (sm_110 here, or an A100 with "75,90"). Chips above the highest would do with it too, but
        its newer PTX has the newer instructions (insert.cu has one).
        """
        with_ptx = {self.architectures[0], self.architectures[-1]}
        codes = {
            name: f"[sm_{name},compute_{name}]" if name in with_ptx else f"sm_{name}" for name in self.architectures
        }
        return [f"-gencode=arch=compute_{name},code={code}" for name, code in codes.items()]


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def compile_units(cuda: Cuda | None) -> list[tuple[str, str, str, list[str]]]:
    """(rule, source, object, flags of its own) of everything that is linked."""
    sets = INSTRUCTION_SETS if is_x86() else {"baseline": []}
    # Only the bindings see Python, whose headers lie elsewhere in every one of pip's build environments.
    bindings = [f"-I{folder}" for folder in find_includes()]
    if cuda:
        bindings.append(f'-DCRYOSPLAT_CUDA_ARCHITECTURES="{" ".join(cuda.architectures)}"')
        bindings.append(f'-DCRYOSPLAT_CUDA_VERSION="{cuda.version}"')
    units = [
        ("compile", BINDINGS, "bindings.o", bindings),
        ("compile", DISPATCH, "dispatch.o", [] if is_x86() else ["-DCRYOSPLAT_ONLY_BASELINE"]),
    ]
    for name, flags in sets.items():
        units.append(("compile", KERNELS, f"kernels.{name}.o", [f"-DCRYOSPLAT_ISA={name}", *flags]))
    if cuda:
        units += [("compile_cuda", source, f"{Path(source).stem}.cuda.o", cuda.flags()) for source in cuda_sources()]
    return units


def cuda_sources() -> list[str]:
    """Every kernel file, so that a new one is compiled and linked by being there."""
    root = Path(__file__).resolve().parent
    return [str(path.relative_to(root)) for path in sorted((root / CUDA_FOLDER).glob("*.cu"))]


def find_cuda() -> Cuda | None:
    wanted = os.environ.get("CRYOSPLAT_CUDA_ARCH", "").strip()
    if wanted == "off":
        return None
    homes = (os.environ.get("CUDA_HOME"), None, CUDA_HOME)
    nvcc = next(filter(None, (shutil.which("nvcc", path=home and str(Path(home, "bin"))) for home in homes)), None)
    if nvcc is None:
        where = "no nvcc in CUDA_HOME, PATH or /usr/local/cuda"
        if wanted:
            raise PlatformError(
                f"CRYOSPLAT_CUDA_ARCH={wanted}, but there is {where}; CRYOSPLAT_CUDA_ARCH=off needs none"
            )
        print(f"cryosplat: {where}, so this build is for CPUs only", flush=True)
        return None
    return Cuda(nvcc, find_version(nvcc), choose_architectures(nvcc, wanted), find_cuda_libraries(nvcc))


def find_version(nvcc: str) -> str:
    found = re.search(r"release (\d+)\.(\d+)", ask_nvcc(nvcc, "--version"))
    if found is None:
        raise PlatformError(f"{nvcc} --version names no release; CRYOSPLAT_CUDA_ARCH=off builds without CUDA")
    version = int(found[1]), int(found[2])
    if version < OLDEST_CUDA:
        raise PlatformError(
            f"{nvcc} is of CUDA {found[1]}.{found[2]}, and cryosplat needs {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or newer. "
            "Set CUDA_HOME to a newer toolkit (CUDA_HOME=/usr/local/cuda-13.0), or CRYOSPLAT_CUDA_ARCH=off for a build "
            "without CUDA"
        )
    if version[0] > NEWEST_CUDA:
        print(f"cryosplat: {nvcc} is of CUDA {version[0]}, and none after {NEWEST_CUDA} has been tried", flush=True)
    return f"{version[0]}.{version[1]}"


def choose_architectures(nvcc: str, wanted: str) -> tuple[str, ...]:
    known = re.findall(r"sm_(\w+)", ask_nvcc(nvcc, "--list-gpu-code"))
    names = wanted.replace(".", "").replace(",", " ").replace(";", " ").split()
    if strange := [name for name in names if name not in known]:
        raise PlatformError(
            f"CRYOSPLAT_CUDA_ARCH names {', '.join(strange)}, which {nvcc} does not know. It knows {', '.join(known)}; "
            "name some of these, or off for a build without CUDA"
        )
    chosen = {name for name in names or ARCHITECTURES if name in known}
    if not chosen:
        raise PlatformError(
            f"{nvcc} knows none of {', '.join(ARCHITECTURES)}; CRYOSPLAT_CUDA_ARCH=off builds without CUDA"
        )
    return tuple(sorted(chosen, key=lambda name: (int(re.sub(r"\D", "", name)), name)))


def find_cuda_libraries(nvcc: str) -> tuple[str, ...]:
    """nvcc knows where its libraries are; it may be a wrapper, far from them."""
    plan = ask_nvcc(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
    found = re.search(r"^#\$ LIBRARIES=(.*)$", plan, re.MULTILINE)
    folders = [word for word in shlex.split(found[1] if found else "") if not word.endswith("/stubs")]
    return (*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread")


def ask_nvcc(nvcc: str, *arguments: str) -> str:
    done = subprocess.run([nvcc, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise PlatformError(
            f"{nvcc} {' '.join(arguments)} fails; CRYOSPLAT_CUDA_ARCH=off builds without CUDA. It says:\n{done.stdout}"
        )
    return done.stdout


def find_compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        if shutil.which(wanted[0]) is None:
            raise PlatformError(f"CXX names the compiler {wanted[0]!r}, which is not there")
        return wanted
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise PlatformError(
        "cryosplat needs a C++17 compiler and found none (g++, c++, clang++, or the one that CXX names).\n"
        "On Debian or Ubuntu: apt-get install g++. On a cluster: load a compiler module, for example 'module load gcc'."
    )


def find_ninja() -> str:
    """The one from PyPI before the system's: another version would not take over what it has built."""
    try:
        import ninja
    except ImportError:
        found = None
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR)
    found = found or shutil.which("ninja")  # in pip's build environment, with some versions of pip, only PATH knows it
    if found is None:
        raise PlatformError("cryosplat is built with ninja, which is not there: pip install ninja")
    return found


def find_includes() -> list[str]:
    """Folders of the headers of Python and pybind11."""
    python = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not any(Path(folder, "Python.h").is_file() for folder in python):
        raise PlatformError(
            f"no Python.h in {' or '.join(sorted(python))}: the headers of this Python are missing.\n"
            "On Debian or Ubuntu: apt-get install python3-dev"
        )
    try:
        import pybind11
    except ImportError as error:
        raise PlatformError("cryosplat is built with pybind11, which is not there: pip install pybind11") from error
    return [pybind11.get_include(), *sorted(python)]


def ninja_words(words: list[str]) -> str:
    """Words of a command, quoted for the shell and then for ninja."""
    return shlex.join(words).replace("$", "$$")


def ninja_path(path: Path) -> str:
    return "".join(f"${letter}" if letter in "$ :" else letter for letter in str(path))


RULES = """
rule compile
  command = $cxx $flags $own -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $out
rule compile_cuda
  command = $nvcc $cuda_flags $own -MMD -MF $out.d -c $in -o $out >$out.log 2>&1 || { cat $out.log; false; }
  depfile = $out.d
  deps = gcc
  description = compile $out
rule report
  command = $python $logs $own -o $out
  description = write $out
rule link
  command = $cxx -o $out $in $link
  description = link $out
"""


def write_ninja(folder: Path, library: Path, cuda: Cuda | None) -> Path:
    root = Path(__file__).resolve().parent
    compiler = find_compiler()
    user_flags, user_link = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
    flags = [*user_flags, *COMMON_FLAGS, f"-I{root / 'csrc'}"]
    link = ["-shared", "-fopenmp", *user_link, *(cuda.libraries if cuda else ())]
    # Of "ccache g++ -m64" the compiler is g++; nvcc takes no more than that.
    host = next(word for word in reversed(compiler) if not word.startswith("-"))
    lines = [
        f"cxx = {ninja_words(compiler)}",
        f"flags = {ninja_words(flags)}",
        f"link = {ninja_words(link)}",
        f"nvcc = {ninja_words([cuda.nvcc] if cuda else [])}",
        f"cuda_flags = {ninja_words([*CUDA_FLAGS, '-ccbin', host])}",
        RULES,
    ]
    units = compile_units(cuda)
    objects = [folder / name for _, _, name, _ in units]
    for (rule, source, _, own), compiled in zip(units, objects, strict=True):
        lines.append(f"build {ninja_path(compiled)}: {rule} {ninja_path(root / source)}")
        lines.append(f"  own = {ninja_words(own)}")
    report = folder / "cuda_resources.json"
    if cuda:
        lines += report_lines(report, cuda, objects)
    else:
        report.unlink(missing_ok=True)  # of a build before
    before_linking = f" | {ninja_path(report)}" if cuda else ""
    lines.append(f"build {ninja_path(library)}: link {' '.join(map(ninja_path, objects))}{before_linking}")
    file = folder / "build.ninja"
    file.write_text("\n".join(lines) + "\n")
    return file


def report_lines(report: Path, cuda: Cuda, objects: list[Path]) -> list[str]:
    """ninja's lines for what reads the CUDA compiler's logs."""
    script = Path(__file__).resolve().parent / RESOURCES
    compiled = [path for path in objects if path.name.endswith(".cuda.o")]
    own = ["--cuda", cuda.version]
    if os.environ.get("CRYOSPLAT_ALLOW_SPILLS", "") not in ("", "0"):
        own.append("--allow-spills")
    return [
        f"build {ninja_path(report)}: report {' '.join(map(ninja_path, compiled))} | {ninja_path(script)}",
        f"  python = {ninja_words([sys.executable, str(script)])}",
        f"  logs = {ninja_words([f'{path}.log' for path in compiled])}",
        f"  own = {ninja_words(own)}",
    ]


def spread_threads(jobs: int) -> str:
    """NVCC_APPEND_FLAGS that have nvcc compile for several architectures at a time, where ``jobs`` outnumber sources.

    In the environment, because ninja would compile all anew for another number on the command line.
    """
    threads = -(-jobs // max(len(cuda_sources()), 1))
    return f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --threads {threads}".strip()


class NinjaBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        # Not self.build_temp: for an editable install that is thrown away, and every install would compile everything.
        folder = Path(__file__).resolve().parent / "build" / f"core{suffix.removesuffix('.so')}"
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"_C{suffix}"
        cuda = find_cuda()
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        command = [find_ninja(), "-f", str(write_ninja(folder, library, cuda)), "-j", jobs]
        environment = {**os.environ, "NVCC_APPEND_FLAGS": spread_threads(int(jobs))}
        if subprocess.run(command, cwd=folder, env=environment).returncode:
            without = "; CRYOSPLAT_CUDA_ARCH=off leaves the CUDA half out" if cuda else ""
            raise CompileError(
                f"the compiled core of cryosplat did not build; the compiler's messages are above{without}"
            )
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)


setup(
    ext_modules=[Extension("cryosplat._C", [BINDINGS, DISPATCH, KERNELS, *cuda_sources()])],
    cmdclass={"build_ext": NinjaBuild},
)
