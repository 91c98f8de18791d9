"""Kernels that walk over rows: any division of the work, any schedule, wide rows, far offsets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from backprop_kernels import cuda
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda import rows
from backprop_kernels.optimizers import OPTIMIZERS

from tests.cuda_host import build, cupy_stand_in
from tests.cuda_host.backend import backend, installed
from tests.kernels import (
    test_batch_norm,
    test_gather_rows,
    test_layer_norm,
    test_loss,
    test_optimizer_step,
)

pytestmark = pytest.mark.skipif(bool(build.problem()), reason=build.problem())
F32 = np.dtype(np.float32)


def test_blocks_cover_the_rows_once() -> None:
    for count in (1, 2, 31, 255, 256, 257, 4096, 131_073, 10**9):
        for columns in (1, 2, 3, 31, 32, 33, 1000):
            work = rows.division(count, columns)
            assert (work.blocks - 1) * work.rows_per_block < count
            assert count <= work.blocks * work.rows_per_block
            assert 1 <= work.blocks <= rows.MOST_BLOCKS
            assert rows.THREADS % work.across == 0 and work.across <= rows.WARP
            assert columns <= work.across or work.across == rows.WARP
        assert 1 <= rows.blocks_for(count) <= rows.MOST_BLOCKS
    assert rows.division(0, 5).blocks == rows.division(0, 0).blocks == rows.blocks_for(0) == 0


def loss_of_ids(backend: SimpleNamespace) -> None:
    options = {"class_weight": test_loss.CLASS_WEIGHT, "label_smoothing": 0.1}
    test_loss.check_case(backend, F32, 700, 6, "cross_entropy", options, True)


CHECKS: dict[str, Callable[[SimpleNamespace], None]] = {
    "loss": lambda b: test_loss.check_case(b, F32, 700, 3, "huber", {}, True),
    "loss_of_ids": loss_of_ids,
    "gaussian_nll": lambda b: test_loss.check_case(b, F32, 200, 4, "gaussian_nll", {}, False),
    "optimizer_step": lambda b: test_optimizer_step.test_five_steps_agree_with_a_loop_over_scalars(
        b, F32, "Adam", {}
    ),
    "batch_norm": lambda b: test_batch_norm.test_training_is_within_its_bound(b, F32, 1e-5),
    "batch_norm_backward": lambda b: test_batch_norm.test_backward_is_within_its_bound(b, F32),
    "layer_norm_backward": lambda b: test_layer_norm.test_backward_is_within_its_bound(b, F32),
}


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("name", CHECKS)
def test_few_blocks_do_the_work_of_many(
    monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    """As on arrays of more than MOST_BLOCKS blocks: threads stride, blocks take more rows."""
    monkeypatch.setattr(rows, "MOST_BLOCKS", most)
    CHECKS[name](backend)


def arrays(*shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.random(shape).astype(np.float32) for shape in shapes]


def optimizer() -> list[Array]:
    P, G, *state = arrays(*[(3000,)] * 4)
    scalars = np.array([0.5, *OPTIMIZERS["Adam"].scalars(1, **OPTIMIZERS["Adam"].options)])
    return [backend.optimizer_step(P, G, state, scalars, "Adam"), P, *state]


DROPOUT = Dropout(0.3, np.array([1, 2]), 3)
CALLS: dict[str, Callable[[], Any]] = {
    "loss": lambda: backend.loss(*arrays((300, 5), (300, 5)), "mse", None, "tanh"),
    "loss_of_ids": lambda: backend.loss(*arrays((300, 5)), np.arange(300) % 5, "cross_entropy"),
    "optimizer_step": optimizer,
    "batch_norm_forward": lambda: backend.batch_norm_forward(
        *arrays((300, 5), (5,), (5,), (5,), (5,)), activation="gelu", dropout=DROPOUT
    ),
    "batch_norm_backward": lambda: backend.batch_norm_backward(
        *arrays((300, 5), (300, 5), (5,), (5,), (5,), (300, 5)), "gelu", DROPOUT
    ),
    "layer_norm_forward": lambda: backend.layer_norm_forward(*arrays((40, 70), (70,), (70,))),
    "layer_norm_backward": lambda: backend.layer_norm_backward(
        *arrays((40, 70), (40, 70), (70,), (40,), (40,), (40, 70)), "gelu", DROPOUT
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_schedule_gives_the_same_bits(name: str) -> None:
    """The emulator runs each launch under another order of warps and threads than the last."""
    first = [np.asarray(a).tobytes() for a in CALLS[name]() if a is not None]
    for _ in range(cupy_stand_in.SCHEDULES):
        again = [np.asarray(a).tobytes() for a in CALLS[name]() if a is not None]
        assert again == first


def test_wide_rows_are_shared_by_a_block(dtype: np.dtype) -> None:
    for shape in ((1, 1025), (3, 1500)):
        test_layer_norm.check_backward(backend, shape, dtype, "tanh")
        X, gamma, beta, _ = test_layer_norm.drawn(shape, dtype)
        got = test_layer_norm.forward(backend, X, gamma, beta)
        exact = test_layer_norm.exact_forward(X, gamma, beta, 1e-5)
        for computed, true in zip((got[0], *got[2:]), exact, strict=True):
            assert (np.abs(computed - true) <= 200 * np.finfo(dtype).eps * (1 + np.abs(true))).all()


def test_more_spans_than_the_grid_is_high(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuda.optimizer_step.__globals__, "MOST_SPANS", 2)
    P, G, buffer = np.zeros(40, F32), np.ones(40, F32), np.zeros(40, F32)
    numbers = OPTIMIZERS["SGD"].scalars(1, **OPTIMIZERS["SGD"].options)
    lr = np.arange(1.0, 6.0)
    table = np.array([[np.inf, np.inf, 0, 0, rate, *numbers[1:]] for rate in lr])
    spans = [(8 * i, 8 * i + 7, i) for i in range(5)]
    backend.optimizer_step(P, G, [buffer], table, "SGD", spans=spans)
    expected = np.concatenate([[-rate] * 7 + [0] for rate in lr])
    assert np.array_equal(P, expected)


def test_offsets_beyond_two_to_the_31(tmp_path: Path) -> None:
    """A sparse file stands for 8 GiB of device memory, of which a few rows are touched."""
    count = 2**31 + 9
    X = np.memmap(tmp_path / "X", np.float32, "w+", shape=(count, 1))
    index = np.array([count - 1, 0, 2**31 - 1, 2**31, count + 5])
    X[index.clip(0, count - 1), 0] = [9, 1, 2, 3, 9]
    with installed():
        far = cupy_stand_in.ndarray(X.view(np.ndarray), None)
        Y = cuda.gather_rows(far, cupy_stand_in.asarray(index)).get()
    assert Y[:, 0].tolist() == [9, 1, 2, 3, 9]


def test_gather_rows_of_any_width() -> None:
    for width in (1, 2, 3, 31, 32, 33, 300):
        test_gather_rows.test_every_row_is_the_row_asked_for(backend, (70, width), "float32")
