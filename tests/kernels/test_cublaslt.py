"""cuBLASLt as a candidate, and which kernel is the fastest: measured, remembered, explained."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backprop_kernels import machine_code_cache
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda import cublaslt, tuning
from backprop_kernels.cuda.in_precision import InPrecision
from backprop_kernels.cuda.launch import capture
from backprop_kernels.cuda.tiles import DECIDE, LIBRARY, Choice, choose
from backprop_kernels.errors import DeviceUnavailableError
from backprop_kernels.precisions import PRECISIONS, round_to

import backprop as bp
from tests.cuda_host import build, fake_cublaslt
from tests.cuda_host.backend import Place, adapter, installed, on_gpu
from tests.cuda_host.fake_cublaslt import FakeLibrary
from tests.gpu import GPU

BATCH, INSIDE, OUTSIDE = 70, 40, 24
F32 = np.dtype(np.float32)


@pytest.fixture
def library() -> Iterator[FakeLibrary]:
    if reason := build.problem():
        pytest.skip(f"the CUDA emulator {reason}")
    with installed(), fake_cublaslt.fake_cublaslt() as fake:
        yield fake


def whole(precision: str, *shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(0)
    return [round_to(rng.integers(-3, 4, s).astype(PRECISIONS[precision].real), precision)
            for s in shapes]  # fmt: skip


def only(name: str) -> Any:
    """Let every choice be this kernel, where it is a candidate."""

    def decide(candidates: Any) -> Choice:
        return next((c for c in candidates if c.name.startswith(name)), candidates[0])

    return tuning.deciding(decide)


@contextmanager
def noted() -> Iterator[list[str]]:
    """The operators whose products the library makes."""
    made: list[str] = []
    product = cublaslt.product

    def noting(operator: str, *given: Any) -> None:
        made.append(operator)
        product(operator, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cublaslt, "product", noting)
        yield made


def test_structures_are_those_of_the_headers() -> None:
    found = cublaslt.Found
    assert ctypes.sizeof(cublaslt.Algorithm) == 64 and ctypes.sizeof(found) == 96
    offsets = [getattr(found, name).offset for name, _ in found._fields_]
    assert offsets == [0, 64, 72, 76, 80]


@pytest.fixture(params=["emulator", *GPU])
def place(request: pytest.FixtureRequest) -> Place:
    """Where the library is: on a GPU itself, so that every number of its headers is tried."""
    if request.param == "gpu":
        if not cublaslt.available():
            pytest.skip("needs nvidia-cublas")
        return on_gpu.place
    request.getfixturevalue("library")
    return installed


@pytest.mark.parametrize(
    "precision",
    [
        "float32",
        "bf16",
        *(pytest.param(p, marks=pytest.mark.long) for p in ("float64", "tf32", "fp16")),
    ],
)
def test_products_are_those_of_the_own_kernels(place: Place, precision: str) -> None:
    """With all that is fused into them, bit by bit, as whole numbers are exact either way."""
    backend = adapter(place, InPrecision(precision), "cast")
    real = np.dtype(PRECISIONS[precision].real)
    X, W, dZ, kept = whole(
        precision, (BATCH, INSIDE), (OUTSIDE, INSIDE), (BATCH, OUTSIDE), (BATCH, INSIDE)
    )
    b, drop = np.arange(OUTSIDE, dtype=real), Dropout(0.5, np.array([5, 3]), 2)

    def results() -> list[Array]:
        Y, saved = backend.linear_forward(X, W, b, "gelu", drop)
        dX, db = backend.linear_dgrad(dZ, W, kept, "gelu", drop)
        return [Y, saved, dX, db, backend.linear_wgrad(dZ, X)]

    expected = results()
    with only("cublaslt"), noted() as products:
        got = results()
    assert products == ["linear_forward", "linear_dgrad", "linear_wgrad"]
    for ours, theirs in zip(expected[:3] + expected[4:], got[:3] + got[4:], strict=True):
        assert np.array_equal(ours, theirs)
    np.testing.assert_allclose(got[3], expected[3], rtol=1e-5)  # of other runs of rows


def test_loss_scale_is_read_on_the_device(library: FakeLibrary) -> None:
    backend: Any = adapter(installed, InPrecision("fp16"), "cast")
    dZ, X = whole("fp16", (BATCH, OUTSIDE), (BATCH, INSIDE))
    for scale in (4.0, 0.5):
        backend.module.set_loss_scale(scale)
        with only("cublaslt"):
            dW = backend.linear_wgrad(dZ, X)
        assert np.array_equal(dW, dZ.T.astype(float) @ X / scale)
    assert [call["pointer mode"] for call in library.calls] == [1, 1]


def test_in_a_graph(library: FakeLibrary) -> None:
    """Every replay multiplies what it is given, in the workspace that the capture made."""
    import cupy

    X, W = whole("float32", (BATCH, INSIDE), (OUTSIDE, INSIDE))
    Y = cupy.empty((BATCH, OUTSIDE), F32)
    on_device = cupy.asarray(W)
    from backprop_kernels import cuda

    with only("cublaslt"):
        program = capture(
            lambda x: cuda.linear_forward(x, on_device, out=(Y, None)) and None, cupy.asarray(X)
        )
    for factor in (1, 2):
        program(cupy.asarray(X * F32.type(factor)))
        assert np.array_equal(Y.get(), factor * (X @ W.T))
    assert [call["captured"] for call in library.calls] == [True]


def test_what_cublaslt_cannot_do_is_no_candidate(library: FakeLibrary) -> None:
    def names(*given: Any) -> list[str]:
        with tuning.deciding(lambda found: found[0]._replace(reason=str([c.name for c in found]))):
            return list(eval(choose(*given).reason))

    shape = "linear_forward", BATCH, OUTSIDE, INSIDE
    assert names(*shape, "bf16", 80, True)[0] == "ampere small"
    assert names(*shape, "bf16", 80, True)[1:] == [
        "ampere wide",
        "ampere large",
        "cublaslt of its own",
    ]
    assert "cublaslt of its own" not in names(*shape, "bf16", 80, False)  # rows not on 16 bytes
    assert "cublaslt of its own" not in names(*shape, "bf16x6", 80, True)
    library.found = 0
    X, W = whole("float32", (BATCH, INSIDE), (OUTSIDE, INSIDE))
    with only("cublaslt"), pytest.raises(DeviceUnavailableError) as error:
        adapter(installed).linear_forward(X, W)
    assert str(error.value) == (
        "linear_forward: cuBLASLt: expected an algorithm for 70 × 24 elements in float32, found "
        "none"
    )


def test_without_the_library_there_are_the_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise DeviceUnavailableError("device: cuBLASLt was not found")

    monkeypatch.setattr(cublaslt, "library", missing)
    assert not cublaslt.available()
    with tuning.deciding(lambda found: found[-1]):
        last = choose("linear_forward", BATCH, OUTSIDE, INSIDE, "bf16", 80, True)
    assert last.name == "ampere large"


@pytest.fixture
def tuned(
    library: FakeLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, float]:
    """Seconds that a product by each kernel is said to take; what is asked for is counted."""
    import cupy

    properties = {"name": b"an emulated GPU"}
    monkeypatch.setattr(
        cupy.cuda.runtime, "getDeviceProperties", lambda _: properties, raising=False
    )
    monkeypatch.setattr(machine_code_cache, "folder", lambda _: tmp_path)
    monkeypatch.setattr(tuning.nvrtc, "nvrtc_version", lambda: "13.4")
    monkeypatch.setattr(tuning, "REPEATS", 1)
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    tuning._name.cache_clear()
    seconds = {
        "ampere small": 3e-6,
        "ampere wide": 1e-6,
        "ampere large": 4e-6,
        "cublaslt of its own": 2e-6,
    }
    measure = tuning.measured

    def measured(choice: Choice) -> float:
        assert 0 < measure(choice) < np.inf  # what was said stands in for it
        seconds["asked"] = seconds.get("asked", 0) + 1
        return seconds[choice.name]

    monkeypatch.setattr(tuning, "measured", measured)
    return seconds


QUESTION = "linear_wgrad", BATCH, OUTSIDE, INSIDE, "bf16", 80, True


def test_the_fastest_is_taken_remembered_and_explained(
    tuned: dict[str, float], tmp_path: Path
) -> None:
    by_shape = choose(*QUESTION)
    with tuning.autotuned():
        first = choose(*QUESTION)
        assert (first.name, tuned["asked"]) == ("ampere wide", 4)
        tuned["ampere wide"] = 5e-6
        assert choose(*QUESTION) == first and tuned["asked"] == 4
        assert first.why == (
            "linear_wgrad of 70 × 24 elements, 40 terms each, in bf16: the fastest measured here, "
            "ampere wide 1.0 µs, cublaslt of its own 2.0 µs, ampere small 3.0 µs, ampere large "
            "4.0 µs"
        )
        (file,) = tmp_path.glob("choices_*")
        file.write_bytes(file.read_bytes()[:-1])  # damaged: measured again
        assert choose(*QUESTION).tile is LIBRARY and tuned["asked"] == 8
    assert choose(*QUESTION) == by_shape and DECIDE.get() is None


def test_processes_do_not_forget_for_one_another(tuned: dict[str, float]) -> None:
    with tuning.autotuned():
        choose(*QUESTION)
        before = tuning.remembered()
        tuning.remember({"of another process": {"ampere wide": 1.0}})
        assert tuning.remembered() == {**before, "of another process": {"ampere wide": 1.0}}


def test_other_sources_or_another_gpu_are_measured_anew(
    tuned: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {tuning._file()}
    headers = tuning.nvrtc.headers()
    for change in (
        lambda: monkeypatch.setattr(tuning.nvrtc, "headers", lambda: {**headers, "a.cuh": "x"}),
        lambda: monkeypatch.setattr(tuning.nvrtc, "nvrtc_version", lambda: "13.5"),
        lambda: monkeypatch.setattr(cublaslt, "version", lambda: 130500),
    ):
        change()
        tuning._name.cache_clear()
        names.add(tuning._file())
    assert len(names) == 4


def test_training_by_what_was_measured(tuned: dict[str, float], library: FakeLibrary) -> None:
    """The numbers are those of the other kernels but for their roundings."""
    for name in list(tuned):
        tuned[name] = 1e-6 if name.startswith("cublaslt") else 2e-6
    for tile in ("simt large", "simt small", "hopper ping-pong", "hopper cooperative"):
        tuned[tile] = 2e-6
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((32, 16)).astype(F32), rng.integers(0, 4, 32)
    losses = []
    for autotune in (False, True):
        model = bp.MLP([16, 24, 4], activation="gelu", device="cuda", seed=1)
        step = bp.TrainStep(model, "cross_entropy", "SGD", 32, autotune=autotune)
        losses.append([float(step(X, y)) for _ in range(3)])
        assert bool(library.calls) == autotune
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_autotune_is_for_gpus() -> None:
    with pytest.raises(bp.OptionError, match='autotune: expected False on device "cpu", got True'):
        bp.fit(bp.MLP([3, 1], device="cpu"), np.zeros((4, 3)), np.zeros((4, 1)), autotune=True)
