"""Dropout is fused into four operators; each must drop what the reference's Philox says."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.reference.philox import keep_mask, philox

from tests import saved as kept
from tests.guarded import Guards

SHAPES = ((1, 1), (1, 3), (3, 1), (5, 7), (17, 33), (64, 64), (13, 129))


def stream(seed: int, step: int) -> Array:
    return np.array([seed, step], np.int64)


def test_philox_gives_the_published_answers() -> None:
    # The known-answer vectors that come with Random123 (Salmon et al., SC'11).
    for counter, key, words in (
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        assert philox(np.array(counter, np.uint64)[:, None], key)[:, 0].tolist() == words


def test_mask_is_philox_of_seed_step_layer_and_element() -> None:
    seed, step, layer, rate = (7 << 32) + 5, 3, 2, 0.25
    mask = keep_mask((3, 5), Dropout(rate, stream(seed, step), layer))
    for element in range(15):
        counter = np.array([element // 4, 0, step, layer], np.uint64)[:, None]
        word = philox(counter, (5, 7))[element % 4, 0]
        assert mask.flat[element] == (word >= rate * 2**32)


def forward_mask(backend: ModuleType, dtype: np.dtype, shape: tuple[int, int], d: Dropout) -> Array:
    """Y of a layer whose every Z is 1."""
    guards = Guards()
    Y = guards.output(shape, dtype)
    saved = kept.output(guards, backend, "relu", shape, dtype)
    X, W = np.ones((shape[0], 1), dtype), np.ones((shape[1], 1), dtype)
    backend.linear_forward(guards.input(X), guards.input(W), None, "relu", d, out=(Y, saved))
    guards.check()
    # What backward differentiates comes before dropout.
    assert np.array_equal(saved, kept.as_kept(backend, "relu", np.ones(shape, dtype)))
    return Y


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.75, 1e-9, math.nextafter(1, 0)])
def test_forward_drops_what_the_reference_drops(
    backend: ModuleType, dtype: np.dtype, rate: float
) -> None:
    for number, shape in enumerate(SHAPES):
        for seed, step in ((0, 0), (1, 2), (2**40 + 9, 2**31), (-1, 2**33 + 1)):
            d = Dropout(rate, stream(seed, step), number)
            Y = forward_mask(backend, dtype, shape, d)
            expected = np.where(keep_mask(shape, d), dtype.type(1 / (1 - rate)), 0)
            assert np.array_equal(Y, expected), (shape, seed, step)


def test_element_at_the_threshold_is_kept(backend: ModuleType, dtype: np.dtype) -> None:
    word = int(philox(np.array([0, 0, 3, 2], np.uint64)[:, None], (5, 0))[0, 0])
    for above, stays in ((0, True), (1, False)):
        d = Dropout((word + above) / 2**32, stream(5, 3), 2)
        assert bool(forward_mask(backend, dtype, (1, 1), d)[0, 0]) == stays


def test_rate_zero_drops_nothing_and_scales_nothing(backend: ModuleType, dtype: np.dtype) -> None:
    assert (forward_mask(backend, dtype, (9, 33), Dropout(0.0, stream(1, 2), 0)) == 1).all()


def test_step_is_read_from_the_stream_at_each_call(backend: ModuleType, dtype: np.dtype) -> None:
    counter = stream(3, 0)
    d = Dropout(0.5, counter, 1)
    first = forward_mask(backend, dtype, (33, 17), d)
    counter[1] = 1
    second = forward_mask(backend, dtype, (33, 17), d)
    assert not np.array_equal(first, second)
    counter[1] = 0
    assert np.array_equal(forward_mask(backend, dtype, (33, 17), d), first)


def test_dropped_elements_are_zero_even_where_the_activation_is_infinite(
    backend: ModuleType,
) -> None:
    dtype = np.dtype(np.float32)
    d = Dropout(0.5, stream(4, 4), 0)
    X, W = np.full((9, 1), 1000, dtype), np.ones((21, 1), dtype)
    Y, _ = backend.linear_forward(X, W, None, "exp", d)
    assert np.array_equal(Y, np.where(keep_mask((9, 21), d), np.inf, 0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_dropout_compose(
    backend: ModuleType, dtype: np.dtype, activation: str
) -> None:
    rng = np.random.default_rng(0)
    X, W = (rng.standard_normal(s).astype(dtype) for s in ((17, 9), (33, 9)))
    d = Dropout(0.5, stream(5, 6), 7)
    plain, saved_plain = backend.linear_forward(X, W, None, activation)
    Y, saved = backend.linear_forward(X, W, None, activation, d)
    assert np.array_equal(Y, np.where(keep_mask(Y.shape, d), 2 * plain, 0))
    if saved_plain is not None:
        assert np.array_equal(saved, saved_plain)


def test_backward_of_each_operator_uses_the_same_mask(backend: ModuleType, dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    n, f = 33, 47
    dZ, X = (rng.standard_normal((n, f)).astype(dtype) for _ in range(2))
    gamma, saved = rng.random(f).astype(dtype), rng.random((n, f)).astype(dtype)
    d = Dropout(0.5, stream(8, 9), 3)
    mean_n, rstd_n = X.mean(1), np.ones(n, dtype)
    mean_f, rstd_f = X.mean(0), np.ones(f, dtype)
    W = rng.standard_normal((f, f)).astype(dtype)
    calls = {
        "linear_dgrad": (dZ, W),
        "layer_norm_backward": (dZ, X, gamma, mean_n, rstd_n),
        "batch_norm_backward": (dZ, X, gamma, mean_f, rstd_f),
    }
    for name, arguments in calls.items():
        plain, *_ = getattr(backend, name)(*arguments, saved, "sigmoid")
        dropped, db, *_ = getattr(backend, name)(*arguments, saved, "sigmoid", d)
        expected = np.where(keep_mask((n, f), d), 2 * plain, 0)
        assert np.array_equal(dropped, expected), name
        slack = 64 * np.finfo(dtype).eps * np.abs(expected).sum(axis=0)
        assert (np.abs(db - expected.sum(axis=0, dtype=np.float64)) <= slack).all(), name


def test_forward_of_each_norm_uses_the_same_mask(backend: ModuleType, dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    X, gamma = rng.standard_normal((21, 34)).astype(dtype), rng.random(34).astype(dtype)
    beta, d = np.ones(34, dtype), Dropout(0.5, stream(8, 9), 3)
    mask = keep_mask(X.shape, d)
    plain = backend.layer_norm_forward(X, gamma, beta, 1e-5, "tanh")[0]
    dropped = backend.layer_norm_forward(X, gamma, beta, 1e-5, "tanh", d)[0]
    assert np.array_equal(dropped, np.where(mask, 2 * plain, 0))
    running = np.zeros(34, dtype), np.ones(34, dtype)
    plain = backend.batch_norm_forward(X, gamma, beta, *running, True, 0.1, 1e-5, "tanh")[0]
    dropped = backend.batch_norm_forward(X, gamma, beta, *running, True, 0.1, 1e-5, "tanh", d)[0]
    assert np.array_equal(dropped, np.where(mask, 2 * plain, 0))


def test_share_of_kept_elements_matches_the_rate() -> None:
    n = 100_000
    for rate in (0.1, 0.5, 0.9):
        kept = keep_mask((n, 1), Dropout(rate, stream(0, 0), 0)).mean()
        assert abs(kept - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / n)
