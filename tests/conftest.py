"""Fixtures: every backend in turn, every dtype in turn."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import backprop_kernels
import numpy as np
import pytest

BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> ModuleType:
    """The backend under test: a module with the functions of the operator table."""
    name = f"{backprop_kernels.__name__}.{request.param}"
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # only a backend that is not there at all may skip
        pytest.skip(f"{name} does not exist in this checkout")
    return import_module(name)


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
