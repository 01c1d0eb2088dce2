"""Fixtures shared by all tests."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurmcluster
from backends import BACKENDS, backend_named

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; set on all that is skipped for want of one")
    config.addinivalue_line("markers", "browser: looks at pages with chromium; -m 'not browser' leaves them out")
    if not hasattr(config, "workerinput"):  # in the process that starts xdist's workers, or in the only one
        slurmcluster.begin_session()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """So that ``-m gpu`` selects what the reasons of ``skipif`` say, before pytest makes its choice."""
    for item in items:
        if any("GPU" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")):
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' shared folder beside the checkout; absent in a user's clone."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the developers' data folder {SHARED}, which is not part of a clone")
    return SHARED


@pytest.fixture(autouse=True)
def package_loggers_as_found() -> Iterator[None]:
    """Commands set up the package's logger for a process of their own, and importing cryodrgn unguarded disables all
    loggers there are; neither another test nor a fixture that ran a command may leave that to this one."""
    _reset_loggers()
    yield
    _reset_loggers()


def _reset_loggers() -> None:
    package = logging.getLogger("cryosplat")
    package.handlers, package.propagate = [], True
    package.setLevel(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)  # cryodrgn, imported unguarded, leaves it at INFO
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "cryosplat" and isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The operators of ops, of the CUDA kernels run on the host, and of these on a GPU if there is one."""
    with backend_named(request.param) as module:
        yield module


@pytest.fixture
def slurm() -> Iterator[slurmcluster.Cluster]:
    """A real Slurm of two nodes, for this test alone; its queue is emptied afterwards."""
    with slurmcluster.cluster("1") as found:
        yield found


@pytest.fixture
def slurm_net() -> Iterator[slurmcluster.Cluster]:
    """The same, each node in a network of its own: no process of one finds another by the loopback."""
    with slurmcluster.cluster("net") as found:
        yield found


def pytest_unconfigure(config) -> None:
    if not hasattr(config, "workerinput"):
        slurmcluster.end_session()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One worker runs all tests on Slurm: they would only wait for each other."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class SlurmTogether(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "slurm" if "/test_slurm" in nodeid else super()._split_scope(nodeid)

    return SlurmTogether(config, log)
