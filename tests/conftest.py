"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' shared folder beside the checkout; absent in a user's clone."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the developers' data folder {SHARED}, which is not part of a clone")
    return SHARED
