"""Builds ``cryosplat._C``, the compiled core; everything else about the package is in pyproject.toml.

The core knows nothing of PyTorch (Python passes it raw pointers), so pip's build isolation needs pybind11 and ninja
only, and one binary serves every torch version. It serves every x86-64 node of a cluster too: the kernels are compiled
once per instruction set and chosen at run time, never with -march=native.

CXX, CXXFLAGS, LDFLAGS and MAX_JOBS are honoured. Objects stay in build/, one folder per Python, so a second build
compiles only what changed; ninja takes header dependencies from the compiler.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
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

BINDINGS = "csrc/bindings.cpp"
DISPATCH = "csrc/cpu/dispatch.cpp"
KERNELS = "csrc/cpu/kernels.cpp"  # compiled once per instruction set


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def compile_units() -> list[tuple[str, str, list[str]]]:
    """(source, object, flags of its own) of everything that is linked."""
    sets = INSTRUCTION_SETS if is_x86() else {"baseline": []}
    units = [
        # Only this one sees Python, whose headers lie elsewhere in every one of pip's build environments.
        (BINDINGS, "bindings.o", [f"-I{folder}" for folder in find_includes()]),
        (DISPATCH, "dispatch.o", [] if is_x86() else ["-DCRYOSPLAT_ONLY_BASELINE"]),
    ]
    units += [(KERNELS, f"kernels.{name}.o", [f"-DCRYOSPLAT_ISA={name}", *flags]) for name, flags in sets.items()]
    # The CUDA half (csrc/cuda/*.cu, where nvcc is found) joins here: its objects in this list, its rule in write_ninja.
    return units


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


def write_ninja(folder: Path, library: Path) -> Path:
    root = Path(__file__).resolve().parent
    user_flags, user_link = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
    flags = [*user_flags, *COMMON_FLAGS, f"-I{root / 'csrc'}"]
    lines = [
        f"cxx = {ninja_words(find_compiler())}",
        f"flags = {ninja_words(flags)}",
        f"link = {ninja_words(['-shared', '-fopenmp', *user_link])}",
        "rule compile",
        "  command = $cxx $flags $own -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx -o $out $in $link",
        "  description = link $out",
    ]
    objects = []
    for source, name, own in compile_units():
        objects.append(ninja_path(folder / name))
        lines.append(f"build {objects[-1]}: compile {ninja_path(root / source)}")
        lines.append(f"  own = {ninja_words(own)}")
    lines.append(f"build {ninja_path(library)}: link {' '.join(objects)}")
    file = folder / "build.ninja"
    file.write_text("\n".join(lines) + "\n")
    return file


class NinjaBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        # Not self.build_temp: for an editable install that is thrown away, and every install would compile everything.
        folder = Path(__file__).resolve().parent / "build" / f"core{suffix.removesuffix('.so')}"
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"_C{suffix}"
        command = [find_ninja(), "-f", str(write_ninja(folder, library))]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if subprocess.run(command, cwd=folder).returncode:
            raise CompileError("the compiled core of cryosplat did not build; the compiler's messages are above")
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)


setup(
    ext_modules=[Extension("cryosplat._C", [BINDINGS, DISPATCH, KERNELS])],
    cmdclass={"build_ext": NinjaBuild},
)
