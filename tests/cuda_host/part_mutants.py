"""Bugs for batches that come in parts, and the checks that must notice them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import backprop as bp
from tests.cuda_host.mutants import F32, Mutant
from tests.cuda_host.parts import ROWS, Training, data, in_one_run, on, same_bits


def in_runs() -> None:
    with on("sm_80"):
        same_bits(loss="cross_entropy")


def chained() -> None:
    with on("sm_80"), in_one_run():
        same_bits()


def chained_on_tensor_cores() -> None:
    with on("sm_80"), in_one_run():
        same_bits(precision="bf16")


def on_hopper() -> None:
    with on("sm_90"):
        same_bits(precision="bf16")


def chained_on_hopper() -> None:
    with on("sm_90"), in_one_run():
        same_bits(precision="bf16")


def weighed() -> None:
    """Parts of different weights, some rows of which count for nothing; a step of fewer parts."""
    X, ids = data(3, "cross_entropy")
    weight = np.where(np.arange(len(X)) % 7 == 0, 0, np.arange(len(X)) / len(X) + 0.1)
    made_of = [bp.Linear(16, 24, "relu"), bp.Linear(24, 8)]
    with on("sm_80"):
        for count in (3, 2):
            one, several = (
                Training(parts, whole, lambda: bp.SGD(lr=1.0), "cross_entropy", made_of=made_of)
                for parts, whole in ((count, True), (3, False))
            )
            end = count * ROWS
            for step in range(2):
                y = ids if step == 0 else np.full_like(ids, -100)  # nothing at all
                one(X[:end], y[:end], weight[:end])
                losses = several(X[:end], y[:end], weight[:end])
                total = several.step.state_dict().get("accumulated")
                if total is not None:
                    masses = [weight[i : i + ROWS].sum() * (step == 0) for i in (0, ROWS)]
                    mean = sum(m * float(v) for m, v in zip(masses, losses, strict=True))
                    np.testing.assert_allclose([total.mass, total.loss], [sum(masses), mean])
                several.step.flush()
                found, expected = (t.model.parameters.get() for t in (several, one))
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            assert several.step.steps == 2


def refused() -> None:
    """A part whose loss is not finite, though its gradient is, parts behind it, and a good step."""
    X, y = data(6)
    made_of = [bp.Linear(16, 24, bias=False), bp.BatchNorm(24, "relu"), bp.Linear(24, 8)]
    with on("sm_80"):
        step, twin = (Training(3, False, made_of=made_of) for _ in range(2))
        before = twin.bits()
        bad = np.where(np.arange(len(X))[:, None] // ROWS == 1, y * F32.type(1e25), y)
        losses = step(X, bad)
        assert np.isfinite(float(losses[0]))
        for loss in losses[1:]:
            with pytest.raises(bp.NonFiniteError):
                float(loss)
        assert step.bits() == before
        for training in (step, twin):
            training(X, y)
        assert step.bits() == twin.bits()


TILE, HOPPER, STEP = (
    partial(Mutant, file) for file in ("one_tile.cuh", "hopper_product.cuh", "stepping.cu")
)
PARTS = [
    Mutant("corner.cuh", "return *before != 0;", "return true;", chained),
    TILE("runs.goes_on() && m < M", "m < M", chained),
    TILE("m < M && n < N) return", "m < M) return", chained),
    TILE("return runs.earlier[m * N + n];", "return runs.earlier[m * N];", chained),
    Mutant("product.cuh", "f(corner.m + Tile::row(i), corner.n", "f(corner.m, corner.n", chained),
    Mutant("tensor_product.cuh", "n + j * 8 + e % 2)", "n + j * 8)", chained_on_tensor_cores),
    HOPPER("begun || i > 0", "i > 0", chained_on_hopper),
    HOPPER("down = p * BOX + half * 8", "down = p * BOX + half", chained_on_hopper),
    HOPPER("j * 4 + half * 2 + e", "j * 4 + half + e * 2", chained_on_hopper),
    HOPPER("down < below && j", "down < 2 * below && j", chained_on_hopper),
    HOPPER("work.run() == 0 && cut.goes_on()", "cut.goes_on()", on_hopper),
    HOPPER("ADD ? row[j * 8 + e] + sum : row", "row", on_hopper),
    Mutant("column_sums.cu", "before && *before ? sums[n]", "before ? sums[n]", in_runs),
    Mutant("column_sums.cu", "before && *before ? sums[n] : real(0)", "real(0)", in_runs),
    Mutant("philox.cuh", "before ? *before : 0;", "0;", in_runs),
    Mutant("epilogue.cuh", "keep(keep.rows() * columns + element)", "keep(element)", in_runs),
    Mutant("epilogue.cuh", "(keep.rows() + row) * columns", "row * columns", in_runs),
    Mutant("loss_sums.cu", "(whole ? double(whole) : total)", "total", in_runs),
    Mutant("loss_sums.cu", "*mass = total;", "*mass = double(rows);", weighed),
    Mutant("part.cu", "real(double(whole) / *mass)", "real(*mass / double(whole))", weighed),
    Mutant("part.cu", " || *mass == 0", "", weighed),
    STEP("state[MASS] += *mass;", "state[MASS] = *mass;", weighed),
    STEP("state[SHARES] += value[0];", "", weighed),
    STEP("if (*mass != 0) value[0] *= whole / *mass;", "", in_runs),
    STEP("state[MASS] = state[SHARES] = 0;", "", in_runs),
    STEP("    *before = 0;", "", in_runs),
    STEP("*before += room;", "*before += room - 1;", in_runs),
    STEP("if (!fine) state[STOPPED] = 1;", "", refused),
    STEP("state[APPLIED] = fine;", "state[APPLIED] = 1;", refused),
    STEP("i < words && *rows_before == 0", "i < words", refused),
]
