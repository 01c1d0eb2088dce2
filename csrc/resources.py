"""What the CUDA compiler says each kernel takes: registers, shared memory, and bytes that did not fit into registers.

ninja runs this over the logs of ``ptxas -v``, before it links: python csrc/resources.py LOG... --cuda 13.0 -o FILE.
To see the table again: python csrc/resources.py --show FILE. Needs nothing but Python.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

HOT_SCALAR, HOT_SINCE = "float", 75
"""Kernels that must not spill: all in single precision, which training uses, on every chip that CUDA 13 compiles for.
In double precision they serve tests, and sm_70 is compiled for by CUDA 12 alone."""

CODES = {"f": "float", "d": "double", "b": "bool", "i": "int", "j": "unsigned", "l": "long", "m": "unsigned long"}


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture ("90"). Registers are a thread's, ``shared`` is bytes a block, without what a
    launch adds; ``stack`` and spills are bytes a thread, in memory. ``arguments`` are those of the template."""

    kernel: str
    arguments: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def is_hot(self) -> bool:
        scalars = [name for name in self.arguments.split(", ") if name in ("float", "double")]
        return scalars[:1] != ["double"] and number(self.architecture) >= HOT_SINCE

    @property
    def spills(self) -> bool:
        return self.spill_stores + self.spill_loads > 0


def number(architecture: str) -> int:
    return int(re.match(r"\d+", architecture)[0])


def read_log(text: str) -> list[Usage]:
    """The kernels of one log; what a kernel calls without inlining counts as its own.

    Raises:
        ValueError: ptxas says something else than it used to.
    """
    found = []
    for part in re.split(r"(?=Compiling entry function )", text)[1:]:
        entry = re.match(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", part)
        used = re.findall(r"Used (\d+) registers", part)
        memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if not entry or len(used) != 1 or not memory:
            raise ValueError(f"not understood, in what ptxas -v says:\n{part}")
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = (sum(map(int, column)) for column in zip(*memory, strict=True))
        name, arguments = read_symbol(entry[1])
        sizes = (int(used[0]), int(shared[1]) if shared else 0, stack, stores, loads)
        found.append(Usage(name, ", ".join(arguments), entry[2], *sizes))
    return found


def read_symbol(symbol: str) -> tuple[str, list[str]]:
    """Name and template arguments of a mangled kernel, without namespaces; as far as kernels use the mangling.

    >>> read_symbol("_ZN9cryosplat4cuda12_GLOBAL__N_14drawIfLi8ELb1EEEvPT_")
    ('draw', ['float', '8', 'true'])
    """
    name, rest = _last_name(symbol.removeprefix("_Z").removeprefix("N"))
    arguments = []
    rest = rest[1:] if rest.startswith("I") else ""
    while rest and rest[0] != "E":
        if literal := re.match(r"L(?:\d+\w+?|[a-z])(n?\d+)E", rest):
            value = literal[1].replace("n", "-")
            arguments.append({"0": "false", "1": "true"}[value] if rest[1] == "b" else value)
            rest = rest[literal.end() :]
        elif rest[0] in CODES:
            arguments.append(CODES[rest[0]])
            rest = rest[1:]
        elif rest[0].isdigit():
            argument, rest = _last_name(rest)
            arguments.append(argument)
        else:
            arguments.append("...")
            break
    return name or symbol, arguments


def _last_name(mangled: str) -> tuple[str, str]:
    """The last of the names that ``mangled`` begins with, each after its length, and what follows them."""
    name = ""
    while length := re.match(r"\d+", mangled):
        end = length.end() + int(length[0])
        name, mangled = mangled[length.end() : end], mangled[end:]
    return name, mangled


def table(cuda: str, kernels: list[Usage]) -> str:
    architectures = sorted({usage.architecture for usage in kernels}, key=lambda name: (number(name), name))
    rows = [["kernel", "shared", "stack", *(f"sm_{name}" for name in architectures)]]
    for name in sorted({(usage.kernel, usage.arguments) for usage in kernels}):
        own = {usage.architecture: usage for usage in kernels if (usage.kernel, usage.arguments) == name}
        cells = [_cell(own[architecture]) if architecture in own else "" for architecture in architectures]
        largest = (str(max(getattr(usage, size) for usage in own.values())) for size in ("shared", "stack"))
        rows.append([f"{name[0]}<{name[1]}>" if name[1] else name[0], *largest, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{row[0]:<{widths[0]}}" + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
             for row in rows]  # fmt: skip
    title = f"CUDA {cuda}: registers a thread, + bytes spilled, by architecture; bytes of shared memory a block"
    return "\n".join([title, *lines])


def _cell(usage: Usage) -> str:
    spilled = usage.spill_stores + usage.spill_loads
    return f"{usage.registers}+{spilled}" if spilled else str(usage.registers)


def report(logs: list[Path], cuda: str, to: Path, allow_spills: bool) -> int:
    """Write ``to`` and print its table; 1, with nothing written, if a hot kernel spills."""
    kernels = [usage for log in logs for usage in read_log(log.read_text())]
    print(table(cuda, kernels))
    spilling = [usage for usage in kernels if usage.is_hot and usage.spills]
    for usage in spilling:
        print(
            f"{usage.kernel}<{usage.arguments}> spills on sm_{usage.architecture}: {usage.spill_stores} bytes stored, "
            f"{usage.spill_loads} loaded a thread"
        )
    if spilling and not allow_spills:
        print("Such kernels are slow, so this build stops; CRYOSPLAT_ALLOW_SPILLS=1 builds all the same.")
        return 1
    to.write_text(json.dumps({"cuda": cuda, "kernels": [asdict(usage) for usage in kernels]}, indent=1) + "\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logs", nargs="*", type=Path)
    parser.add_argument("--cuda", help="the compiler's version")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--allow-spills", action="store_true")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of a report that was written before")
    options = parser.parse_args()
    if options.show:
        said = json.loads(options.show.read_text())
        print(table(said["cuda"], [Usage(**kernel) for kernel in said["kernels"]]))
        return 0
    return report(options.logs, options.cuda, options.output, options.allow_spills)


if __name__ == "__main__":
    sys.exit(main())
