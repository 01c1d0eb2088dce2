"""Fixtures shared by all tests."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' shared folder beside the checkout; absent in a user's clone."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the developers' data folder {SHARED}, which is not part of a clone")
    return SHARED


@pytest.fixture(autouse=True)
def package_logger_as_found() -> Iterator[None]:
    """Commands set up the package's logger for a process of their own; the next test must not inherit that."""
    yield
    package = logging.getLogger("cryosplat")
    package.handlers, package.propagate = [], True
    package.setLevel(logging.NOTSET)
