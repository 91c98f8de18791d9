"""Libraries that only some features need: imported on use, or an error says what to install."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from backprop_kernels.errors import MissingExtraError


def need(module: str, extra: str, where: str) -> Any:
    """The module, or MissingExtraError naming the extra of this library that brings it."""
    try:
        return import_module(module)
    except ImportError as problem:
        library = module.partition(".")[0]
        raise MissingExtraError(
            f'{where}: expected {library}, got {problem}; pip install "fused-backprop[{extra}]"'
        ) from problem
