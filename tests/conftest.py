"""Fixtures: every backend in turn, every dtype in turn."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.cuda_host import build
from tests.cuda_host.backend import backend as cuda_on_host

BACKENDS = ("reference", "cpu")
OPERATOR_BACKENDS = (*BACKENDS, "cuda")  # in the emulator: tests/cuda_host


@pytest.fixture(params=OPERATOR_BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> ModuleType | SimpleNamespace:
    """The backend under test: a module with the functions of the operator table."""
    if request.param == "cuda":
        if reason := build.problem():
            pytest.skip(f"the CUDA emulator {reason}")
        return cuda_on_host
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
