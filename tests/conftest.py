"""Fixtures: every backend in turn, every dtype in turn."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.cuda_host import build
from tests.cuda_host.backend import backend as cuda_on_host
from tests.cuda_host.backend import installed, on_gpu
from tests.gpu import GPU

BACKENDS = ("reference", "cpu", "cuda", *GPU)  # "cuda" in the emulator: tests/cuda_host
# What g++ compiles for every operator, the rest is `long`: one that saves nothing, one Y, two Z.
# test_cuda_code.py has every formula of every table.
EMULATED = ("identity", "relu", "gelu", "sin")
# Trainings of 5 to 30 s in the emulator, of kernels that shorter tests hold to the reference.
SLOW_EMULATED = (
    "test_input_noise_trains_like_a_penalty_on_the_slope",
    "test_overfits_32_random_numbers",
    "test_xor_is_not_learnt_without_the_hidden_layer",
)
# Formulas that one table holds for both dtypes: here in float32 (and by the reference in both), in
# float64 with whole numbers, by complex step and in whole trainings.
FLOAT64_IS_LONG = (
    "test_activation_and_dropout_compose",
    "test_five_steps_agree_with_a_loop_over_scalars",
    "test_loss_agrees_with_an_independent_formula",
    "test_output_activation_is_part_of_the_loss",
)


def pytest_configure() -> None:
    """What a shell or a CI system leaves behind, and tests cannot run with."""
    # What runs in the background is started with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Where these are set, pytest writes the whole difference of what was found unequal, and
    # difflib needs hours for the bytes of two arrays that a planted bug made unequal.
    for name in ("CI", "BUILD_NUMBER"):
        os.environ.pop(name, None)


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as long what would compile one more variant of a kernel, or emulates for seconds."""
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        variant = given.get("backend") == "cuda" and given.get("activation", "relu") not in EMULATED
        name = getattr(item, "originalname", item.name)
        compiled = given.get("backend") in ("cpu", "cuda")
        again = compiled and given.get("dtype") == "float64" and name in FLOAT64_IS_LONG
        slow = given.get("device") == "cuda" and name in SLOW_EMULATED
        if variant or again or slow:
            item.add_marker(pytest.mark.long)


def _expect_emulator() -> None:
    if reason := build.problem():
        pytest.skip(f"the CUDA emulator {reason}")


@pytest.fixture
def emulator() -> Iterator[None]:
    """CuPy and NVRTC are the emulator's."""
    _expect_emulator()
    with installed():
        yield


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request: pytest.FixtureRequest) -> ModuleType | SimpleNamespace:
    """The backend under test: a module with the functions of the operator table."""
    if request.param == "gpu":
        return on_gpu
    if request.param == "cuda":
        _expect_emulator()
        return cuda_on_host
    return import_module(f"backprop_kernels.{request.param}")


@pytest.fixture(params=("float32", "float64"), scope="session")
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    """The dtype of every array of the call."""
    name: str = request.param
    return np.dtype(name)


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of a model under test: each backend by its name."""
    name: str = request.param
    if name != "cuda":
        yield "cuda" if name == "gpu" else name
        return
    _expect_emulator()
    with installed():
        yield name
