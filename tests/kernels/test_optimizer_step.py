from __future__ import annotations

from math import copysign, sqrt
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from backprop_kernels.arrays import Array
from backprop_kernels.optimizers import OPTIMIZERS

from tests.guarded import Guards
from tests.tolerances import unit

SIZES = (1, 2, 7, 16, 17, 63, 1000, 4099, 20011)  # the last is several chunks of work
STEPS = 5
CASES: list[tuple[str, dict[str, Any]]] = [
    *((rule, {}) for rule in OPTIMIZERS),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.5}),
    ("Adam", {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.05, "weight_decay": 0.5}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.1, "eps": 1e-3}),
    ("Lion", {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.5}),
]
IDS = [f"{rule}-{'-'.join(options) or 'defaults'}" for rule, options in CASES]


def by_hand(rule: str, p: float, g: float, state: list[float], step: int, o: Any) -> Any:
    """One parameter's update, line by line from PyTorch's pages (Lion: Chen et al. 2023, Alg. 2).

    Changes `state` in place and returns the parameter.
    """
    lr, decay = o["lr"], o["weight_decay"]
    if rule == "SGD":
        g = g + decay * p
        if o["momentum"]:
            state[0] = o["momentum"] * state[0] + g if step > 1 else g
            g = g + o["momentum"] * state[0] if o["nesterov"] else state[0]
        return p - lr * g
    if rule == "RMSprop":
        g = g + decay * p
        state[0] = o["alpha"] * state[0] + (1 - o["alpha"]) * g**2
        move = g / (sqrt(state[0]) + o["eps"])
        if o["momentum"]:
            state[1] = move = o["momentum"] * state[1] + move
        return p - lr * move
    if rule in ("Adam", "AdamW"):
        beta1, beta2 = o["betas"]
        if rule == "Adam":
            g = g + decay * p
        else:
            p = p - lr * decay * p
        state[0] = beta1 * state[0] + (1 - beta1) * g
        state[1] = beta2 * state[1] + (1 - beta2) * g**2
        m_hat, v_hat = state[0] / (1 - beta1**step), state[1] / (1 - beta2**step)
        return p - lr * m_hat / (sqrt(v_hat) + o["eps"])
    if rule == "Adagrad":
        g = g + decay * p
        state[0] = state[0] + g**2
        return p - lr / (1 + (step - 1) * o["lr_decay"]) * g / (sqrt(state[0]) + o["eps"])
    assert rule == "Lion"
    beta1, beta2 = o["betas"]
    c = beta1 * state[0] + (1 - beta1) * g
    state[0] = beta2 * state[0] + (1 - beta2) * g
    return p - lr * ((copysign(1, c) if c else 0) + decay * p)


def scalars(rule: str, options: dict[str, Any], step: int, max_norm: float = np.inf) -> Array:
    row = OPTIMIZERS[rule]
    return np.array([max_norm, *row.scalars(step, **{**row.options, **options})])


def states(rule: str, like: Array) -> list[Array]:
    return [np.zeros_like(like) for _ in OPTIMIZERS[rule].state]


@pytest.mark.parametrize(("rule", "options"), CASES, ids=IDS)
def test_five_steps_agree_with_a_loop_over_scalars(
    backend: ModuleType, dtype: np.dtype, rule: str, options: dict[str, Any]
) -> None:
    complete = {**OPTIMIZERS[rule].options, **options}
    for size in SIZES:
        rng = np.random.default_rng(size)
        start, *gradients = (rng.standard_normal(size).astype(dtype) for _ in range(1 + STEPS))
        guards = Guards(size % 2)
        P = guards.inout(start)
        state = [guards.inout(s) for s in states(rule, start)]
        for step, G in enumerate(gradients, 1):
            norm = guards.output((), np.dtype(np.float64))
            numbers = guards.input(scalars(rule, options, step))
            backend.optimizer_step(P, guards.input(G), state, numbers, rule, None, out=norm)
            guards.check()
            assert abs(norm - np.linalg.norm(G.astype(np.float64))) <= 4 * unit(dtype) * norm

        for i in range(0, size, max(1, size // 97)):  # a prime stride meets every lane
            p, own = float(start[i]), [0.0] * len(state)
            for step, G in enumerate(gradients, 1):
                p = by_hand(rule, p, float(G[i]), own, step, complete)
            # Each step rounds p and a move a handful of times; |p| and the moves are of order 1.
            slack = 16 * STEPS * unit(dtype)
            assert abs(P[i] - p) <= slack * (abs(start[i]) + abs(p - start[i])), (size, i)
            for array, value in zip(state, own, strict=True):
                if rule == "SGD" and not complete["momentum"]:
                    continue  # without momentum PyTorch keeps no buffer
                if rule == "RMSprop" and not complete["momentum"] and array is state[1]:
                    continue
                assert abs(array[i] - value) <= slack * max(1, abs(value)), (size, i)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_one_non_finite_gradient_changes_nothing(
    backend: ModuleType, dtype: np.dtype, rule: str, bad: float
) -> None:
    for size in (1, 17, 20011):
        rng = np.random.default_rng(0)
        P, G, *state = (
            rng.random(size).astype(dtype) for _ in range(2 + len(OPTIMIZERS[rule].state))
        )
        for place in {0, size // 2, size - 1}:
            poisoned = G.copy()
            poisoned[place] = bad
            guards = Guards()
            held = [guards.inout(a) for a in (P, *state)]
            norm = backend.optimizer_step(held[0], poisoned, held[1:], scalars(rule, {}, 1), rule)
            guards.check()
            assert not np.isfinite(norm)
            assert [a.tobytes() for a in held] == [a.tobytes() for a in (P, *state)]


@pytest.mark.parametrize("guard", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_non_finite_loss_changes_nothing(
    backend: ModuleType, dtype: np.dtype, rule: str, guard: float
) -> None:
    P = np.random.default_rng(0).random(33).astype(dtype)
    before, state = P.copy(), states(rule, P)
    norm = backend.optimizer_step(P, P.copy(), state, scalars(rule, {}, 1), rule, np.array(guard))
    assert abs(norm - np.linalg.norm(before.astype(float))) <= 4 * unit(dtype) * norm
    assert P.tobytes() == before.tobytes() and not any(s.any() for s in state)
    backend.optimizer_step(P, P.copy(), state, scalars(rule, {}, 1), rule, np.array(1.5))
    assert P.tobytes() != before.tobytes()


def test_longer_gradients_are_scaled_to_max_norm(backend: ModuleType, dtype: np.dtype) -> None:
    G = np.array([3, 4, 0], dtype)
    for max_norm, factor in ((2.5, 2.5 / (5 + 1e-6)), (5.1, 1), (np.inf, 1), (1e-3, 2e-4)):
        P = np.zeros(3, dtype)
        numbers = scalars("SGD", {"lr": 1.0}, 1, max_norm)
        norm = backend.optimizer_step(P, G, states("SGD", P), numbers, "SGD")
        assert norm == 5.0
        np.testing.assert_allclose(P, -G * factor, rtol=1e-6 if factor < 1 else 0)
    P = np.zeros(1000, dtype)
    G = np.random.default_rng(0).standard_normal(1000).astype(dtype)
    backend.optimizer_step(P, G, states("SGD", P), scalars("SGD", {"lr": 1.0}, 1, 2.0), "SGD")
    assert abs(np.linalg.norm(P.astype(float)) - 2) < 1e-6


def test_norm_of_huge_and_tiny_gradients(backend: ModuleType, dtype: np.dtype) -> None:
    for scale in (1e-30, 1e30):  # their squares leave the range of float32
        G = np.full(100, scale, dtype)
        P = np.zeros(100, dtype)
        norm = backend.optimizer_step(P, G, states("Lion", P), scalars("Lion", {}, 1), "Lion")
        assert abs(norm - 10 * float(G[0])) <= 1e-6 * norm
        assert np.array_equal(P, np.full(100, -1e-4, dtype))


def test_padding_stays_zero(backend: ModuleType, dtype: np.dtype) -> None:
    """The arena's gaps between tensors hold zeros; no rule may move a zero without gradient."""
    for rule in OPTIMIZERS:
        P, G = np.zeros(32, dtype), np.zeros(32, dtype)
        P[:5], G[:5] = 1, 1
        state = states(rule, P)
        for step in range(1, 4):
            backend.optimizer_step(P, G, state, scalars(rule, {}, step), rule)
        assert not P[5:].any() and not any(s[5:].any() for s in state), rule
        assert P[:5].all() and (P[:5] != 1).all()


def test_empty_arena_is_left_alone(backend: ModuleType, dtype: np.dtype) -> None:
    P = np.zeros(0, dtype)
    assert backend.optimizer_step(P, P, states("Adam", P), scalars("Adam", {}, 1), "Adam") == 0


SPANS = [(0, 0, 1), (0, 5, 2), (5, 16, 0), (48, 9000, 1), (9001, 20000, 2)]  # a gap of 32, and of 1


def spanned_scalars(rule: str, step: int, max_norm: float = np.inf) -> Array:
    """Three rows: every one clips and penalises in its own way."""
    penalties = ([0.5, 0.0, 0.0], [np.inf, 0.25, 0.125], [0.25, 0.0, 0.5])
    rows = [scalars(rule, {"lr": lr}, step) for lr in (0.1, 0.2, 0.0)]
    return np.array([[max_norm, *p, *r[1:]] for p, r in zip(penalties, rows, strict=True)])


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_each_span_is_updated_by_its_row(backend: ModuleType, dtype: np.dtype, rule: str) -> None:
    rng = np.random.default_rng(3)
    P, *gradients = (rng.standard_normal(20011).astype(dtype) for _ in range(3))
    P[::7] = 0  # where |p| has no derivative
    guards = Guards()
    whole, state = guards.inout(P), [guards.inout(s) for s in states(rule, P)]
    parts = [P[start:stop].copy() for start, stop, _ in SPANS]
    moments = [states(rule, part) for part in parts]
    for step, G in enumerate(gradients, 1):
        numbers = spanned_scalars(rule, step)
        backend.optimizer_step(whole, G, state, numbers, rule, None, None, SPANS)
        for (start, stop, row), part, moment in zip(SPANS, parts, moments, strict=True):
            max_value, l1, l2 = numbers[row, 1:4].astype(dtype)
            g = np.clip(G[start:stop], -max_value, max_value) + l1 * np.sign(part) + l2 * part
            plain = numbers[row, [0, *range(4, numbers.shape[1])]]
            backend.optimizer_step(part, g, moment, plain, rule)
    guards.check()
    touched = np.zeros(len(P), bool)
    for (start, stop, _), part, moment in zip(SPANS, parts, moments, strict=True):
        touched[start:stop] = True
        for actual, expected in zip((whole, *state), (part, *moment), strict=True):
            # One rounding apart where a backend fuses a product with a sum.
            slack = 8 * unit(dtype) * (1 + np.abs(expected))
            assert (np.abs(actual[start:stop] - expected) <= slack).all(), (rule, start)
    assert np.array_equal(whole[~touched], P[~touched])
    assert not any(s[~touched].any() for s in state)


def test_spans_share_the_norm_of_everything(backend: ModuleType, dtype: np.dtype) -> None:
    P, G = np.zeros(4, dtype), np.array([0, 3, 0, 4], dtype)
    numbers = np.array([[2.5, np.inf, 0, 0, *scalars("SGD", {"lr": 1.0}, 1)[1:]]])
    norm = backend.optimizer_step(P, G, states("SGD", P), numbers, "SGD", None, None, [(0, 2, 0)])
    assert norm == 5.0
    np.testing.assert_allclose(P, [0, -1.5, 0, 0], rtol=1e-6)
    G[3] = np.nan  # outside the span: still no step
    before = P.tobytes()
    backend.optimizer_step(P, G, states("SGD", P), numbers, "SGD", None, None, [(0, 2, 0)])
    assert P.tobytes() == before


@pytest.mark.parametrize(
    "spans", [[(0, 5, 0)], [(-1, 2, 0)], [(2, 1, 0)], [(0, 2, 1)], [(0, 3, 0), (2, 4, 0)], [(0, 1)]]
)
def test_spans_outside_the_arena_are_refused(
    backend: ModuleType, dtype: np.dtype, spans: list[Any]
) -> None:
    P = np.ones(4, dtype)
    numbers = spanned_scalars("SGD", 1)[:1]
    with pytest.raises(ValueError, match=r"spans\[\d\]: expected \(start, stop, row\) with"):
        backend.optimizer_step(P, P.copy(), states("SGD", P), numbers, "SGD", None, None, spans)
    assert (P == 1).all()
