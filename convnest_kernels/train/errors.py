"""What `train` tells its user without a traceback."""

from __future__ import annotations

import importlib
from types import ModuleType


class TrainError(Exception):
    """A failure that the user can act on; the message says what happened and how to go on."""

    exit_code = 1


class UsageError(TrainError):
    """The command line asks for something that cannot be."""

    exit_code = 2


def need(module: str, package: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which package to install for what."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrainError(
            f"{purpose} needs {package}, which cannot be imported ({error}); "
            "install it with: pip install 'convnest-kernels[train]'"
        ) from error
