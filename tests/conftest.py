"""Options of the test run."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-backbones",
        action="store_true",
        help="check every law of every method on every tiny backbone, not on the chosen few",
    )
