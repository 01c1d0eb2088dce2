"""The ``cryosplat`` command."""

import argparse
import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Sequence

from cryosplat import __version__
from cryosplat.errors import InputError, Interrupted, PeerError, PeerGone, is_first_rank

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

USER_ERROR = 2
INTERRUPTED = 130
GO_ON_LATER = os.EX_TEMPFAIL
"""75: the run was asked to go and has saved; the same command goes on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for what the user can mend, 75 for a run that was asked to go and
    goes on later, 130 after Ctrl-C, 1 for a run that ``validate`` or an installation that ``doctor`` finds wanting."""
    parser = argparse.ArgumentParser(
        prog="cryosplat",
        description="Cryo-EM homogeneous reconstruction by Gaussian splatting: particle images with known poses and "
        "CTF in, a map, two half maps and their resolution out.",
        epilog="'cryosplat COMMAND --help' says more.",
    )
    parser.add_argument("--version", action="version", version=f"cryosplat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    words = list(sys.argv[1:] if argv is None else argv)
    for name, (summary, add) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        # Only the one that is asked for brings its module in: "cryosplat --help" must not wait for PyTorch.
        if name in words:
            add(command)
    args, rest = parser.parse_known_args(words)
    # What argparse leaves over of settings that come after options.
    late = [word for word in rest if hasattr(args, "settings") and not word.startswith("-")]
    if len(late) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in late)}")
    if late:
        args.settings = [*args.settings, *late]
    return run_command(args.run, args)


def run_command(run: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run with logging set up; what the user can mend is printed as one line, without a traceback.

    Returns:
        The exit code: what ``run`` returns, None being 0, unless it fails.
    """
    _set_up_logging()
    _keep_freed_memory()
    try:
        return run(args) or 0
    except PeerGone:
        # At once: PyTorch's process group, when its objects are freed, may wait for ever for the peer that is gone.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(USER_ERROR)
    except PeerError:
        return USER_ERROR
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except Interrupted as error:
        if is_first_rank():
            print(f"interrupted: {error}", file=sys.stderr, flush=True)
        return GO_ON_LATER
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _keep_freed_memory() -> None:
    """Have glibc keep large arrays that are freed for the next ones, where it is the C library.

    By default it hands each back to the system, which must zero it again page by page: two thirds of the system time
    of a back-projection (benchmarks/cpu.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _set_up_logging() -> None:
    """Messages of cryosplat go to standard error: all of rank 0's, warnings of the others'."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("cryosplat")
    package.handlers = [handler]
    package.setLevel(logging.INFO if is_first_rank() else logging.WARNING)
    package.propagate = False


# The commands: each puts its description, arguments and ``run`` into its parser.


def _train(parser: argparse.ArgumentParser) -> None:
    from cryosplat import train

    parser.description = (
        "Reconstruct a particle stack. Alone, or under torchrun: "
        "torchrun --nproc-per-node 4 -m cryosplat.train --config my.yaml"
    )
    train.add_arguments(parser)
    parser.set_defaults(run=train.run)


def _backproject(parser: argparse.ArgumentParser) -> None:
    from cryosplat import backprojectcommand

    backprojectcommand.add_arguments(parser)
    parser.set_defaults(run=backprojectcommand.run)


def _simulate(parser: argparse.ArgumentParser) -> None:
    from cryosplat import simulate

    parser.description = "Make a particle stack with known truth from a protein phantom, an atomic model or a map."
    simulate.add_arguments(parser)
    parser.set_defaults(run=simulate.run)


def _fsc(parser: argparse.ArgumentParser) -> None:
    from cryosplat import fsccommand

    fsccommand.add_arguments(parser)
    parser.set_defaults(run=fsccommand.run)


def _postprocess(parser: argparse.ArgumentParser) -> None:
    from cryosplat import postprocess

    postprocess.add_arguments(parser)
    parser.set_defaults(run=postprocess.run)


def _voxelise(parser: argparse.ArgumentParser) -> None:
    from cryosplat import inspection

    parser.description = (
        "Sample a Gaussian mixture on a voxel grid. Without --box and --pixel-size the grid is the run's own."
    )
    parser.add_argument("mixture", help="gaussians.npz or gaussians.ply of a run")
    parser.add_argument("-o", "--output", required=True, help="map to write (.mrc)")
    models = ("full", "half_a", "half_b")
    parser.add_argument("--model", default="full", choices=models, help="of an .npz; default: full")
    parser.add_argument("--box", type=int, help="voxels a side")
    parser.add_argument("--pixel-size", type=float, help="A a voxel")
    parser.set_defaults(run=inspection.voxelise)


def _inspect(parser: argparse.ArgumentParser) -> None:
    from cryosplat import inspectcommand

    inspectcommand.add_arguments(parser)
    parser.set_defaults(run=inspectcommand.run)


def _export(parser: argparse.ArgumentParser) -> None:
    from cryosplat import exporting

    exporting.add_arguments(parser)
    parser.set_defaults(run=exporting.run)


def _validate(parser: argparse.ArgumentParser) -> None:
    from cryosplat import validation

    validation.add_arguments(parser)
    parser.set_defaults(run=validation.run)


def _report(parser: argparse.ArgumentParser) -> None:
    from cryosplat import report

    report.add_arguments(parser)
    parser.set_defaults(run=report.run)


def _status(parser: argparse.ArgumentParser) -> None:
    from cryosplat import status

    status.add_arguments(parser)
    parser.set_defaults(run=status.run)


def _gaussians(parser: argparse.ArgumentParser) -> None:
    from cryosplat import gaussianfiles

    gaussianfiles.add_arguments(parser)
    parser.set_defaults(run=gaussianfiles.run)


def _compare(parser: argparse.ArgumentParser) -> None:
    from cryosplat import comparing

    comparing.add_arguments(parser)
    parser.set_defaults(run=comparing.run)


def _doctor(parser: argparse.ArgumentParser) -> None:
    from cryosplat import doctor

    parser.description = (
        "Say what was built, what this machine has, whether its GPUs can be used and, if not, what to do. The exit "
        "status is 1 if no run could start here."
    )
    parser.set_defaults(run=doctor.run)


_COMMANDS = {
    "train": ("reconstruct a particle stack", _train),
    "status": ("what runs are doing now", _status),
    "validate": ("say what a run's resolution is worth, by null tests", _validate),
    "report": ("a run on one HTML page", _report),
    "backproject": ("linear maps of a particle stack", _backproject),
    "simulate": ("make a particle stack with known truth", _simulate),
    "voxelise": ("map of a Gaussian mixture", _voxelise),
    "gaussians": ("the Gaussians of a run for other programs: .pdb, .cif, .ply, .npz", _gaussians),
    "postprocess": ("sharpen a map", _postprocess),
    "fsc": ("resolution of two half maps, or of a map against a reference", _fsc),
    "export": ("a run's particles back to RELION or cryoSPARC, all or the best", _export),
    "compare": ("runs side by side: settings, resolution, curves, cost", _compare),
    "doctor": ("what was built, what this machine has, and whether its GPUs can be used", _doctor),
    "inspect": ("what a particle file holds, whether a run could start from it, and how; or any other file", _inspect),
    "info": ("the same as inspect", _inspect),
}


if __name__ == "__main__":
    sys.exit(main())
