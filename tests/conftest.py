"""Fixtures: every backend in turn, every dtype in turn."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import numpy as np
import pytest

BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """The backend under test: a module with the functions of the operator table."""
    return import_module(f"backprop_kernels.{request.param}")


@pytest.fixture(params=("float32", "float64"), scope="session")
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    """The dtype of every array of the call."""
    name: str = request.param
    return np.dtype(name)


@pytest.fixture(params=BACKENDS, scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device of a model under test: each backend by its name."""
    name: str = request.param
    return name
