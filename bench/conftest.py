"""Options of `pytest bench/`."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--against", type=Path, help="results folder: fail where a ratio to eager got worse"
    )
