"""Bugs planted in the CUDA sources, one by one: the checks below must notice each of them.

Each check is what the operators' tests do, on the smallest shapes that reach every line of a
kernel: several blocks, ragged edges, each schedule of the emulator. A bug shows as a wrong number,
an access beyond an array, an unwritten element or a deadlock; a text that does not compile is no
bug.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from backprop_kernels import reference
from backprop_kernels.arrays import Dropout
from backprop_kernels.cuda import compile as nvrtc
from backprop_kernels.cuda import limits, rows
from backprop_kernels.errors import LabelError
from backprop_kernels.optimizers import OPTIMIZERS
from backprop_kernels.reference.epilogue import as_bits

from tests import saved as kept
from tests.cuda_host import build
from tests.cuda_host.backend import Mirror, backend, installed
from tests.cuda_host.fused_mutants import FUSED
from tests.cuda_host.hopper_mutants import HOPPER
from tests.cuda_host.mlp_mutants import MLP_STEP
from tests.cuda_host.mutants import (
    BARRIER,
    F32,
    Mutant,
    each_check,
    forget,
    normal,
    noticed,
    one_of_each,
    planted,
    whole,
)
from tests.cuda_host.part_mutants import PARTS
from tests.cuda_host.product_mutants import TENSOR_CORES
from tests.cuda_host.ptx_mutants import PTX
from tests.cuda_host.steps import steps

pytestmark = pytest.mark.skipif(bool(build.problem()), reason=build.problem())
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}
HALF = Dropout(0.5, np.array([5, 3]), 2)


def same(name: str, *arguments: Any, **exactly: Any) -> None:
    """The operator gives what the reference gives in float64."""

    def wide(value: Any) -> Any:
        return value.astype(float) if getattr(value, "dtype", None) == F32 else value

    got = getattr(backend, name)(*kept.arguments(backend, name, arguments))
    expected = getattr(reference, name)(*map(wide, arguments))
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for computed, true in pairs:
        if computed is not None and true is not None:
            if computed.dtype == np.uint32:
                true = as_bits(true, next(a for a in arguments if isinstance(a, str)))
            np.testing.assert_allclose(computed, true, **(exactly or CLOSE))


EXACT = {"rtol": 0, "atol": 0}


def products() -> None:
    X, W, b, dZ, tall_dZ, tall_X = whole((70, 37), (45, 37), (45,), (70, 45), (700, 5), (700, 34))
    same("linear_forward", X, W, b, "relu", HALF, **EXACT)
    saved = np.abs(X) - 1
    same("linear_dgrad", dZ, W, saved, "relu", HALF, **EXACT)
    same("linear_wgrad", tall_dZ, tall_X, **EXACT)


def epilogues() -> None:
    X, W, saved = normal((9, 3), (5, 3), (9, 3))
    same("linear_forward", X, W, None, "gelu", HALF)
    same("linear_dgrad", X @ W.T, W, saved, "gelu", HALF)
    rate = float.fromhex("0x1.e36f0bfcp-1")  # of words that lie around the threshold
    same("linear_forward", *whole((40, 1), (33, 1)), None, "identity", HALF._replace(rate=rate))


def threshold() -> None:
    """An element whose word equals the threshold is kept."""
    from backprop_kernels.reference.philox import philox

    word = int(philox(np.array([0, 0, 3, 2], np.uint64)[:, None], (5, 0))[0, 0])
    at = Dropout(word / 2**32, np.array([5, 3]), 2)
    same("linear_forward", *whole((1, 1), (1, 1)), np.ones(1, F32), "identity", at)


def gather() -> None:
    X = whole((70, 37))[0]
    same("gather_rows", X, np.array([0, 69, 70, -1, 5] * 3), **EXACT)
    same("gather_rows", X[:, :2].copy(), np.arange(70), **EXACT)


def update(size: int = 9000, scale: float = 1.0, **options: Any) -> None:
    P, G, *start = normal(*[(size,)] * 4)
    state = [np.abs(s) for s in start]
    G *= F32.type(scale)
    scalars = np.array([0.5, *OPTIMIZERS["Adam"].scalars(1, **OPTIMIZERS["Adam"].options)])
    scalars[0] *= scale
    results = []
    for module in (backend, reference):
        arrays = [a.copy() for a in (P, G, *state)]
        norm = module.optimizer_step(*arrays[:2], arrays[2:], scalars, "Adam", **options)
        results.append([norm, *arrays])
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-7)


def updates() -> None:
    update()
    update(33, scale=1e30)
    update(1, scale=1e-3)
    update(100, guard=np.array(np.nan))


def refused() -> None:
    P, G, *state = normal(*[(600,)] * 4)
    G[599] = np.inf
    held = [P.copy(), *(s.copy() for s in state)]
    scalars = np.array([0.5, *OPTIMIZERS["Adam"].scalars(1, **OPTIMIZERS["Adam"].options)])
    backend.optimizer_step(held[0], G, held[1:], scalars, "Adam")
    assert [a.tobytes() for a in held] == [a.tobytes() for a in (P, *state)]


def unclipped() -> None:
    P, G, state = normal(*[(40,)] * 3)
    numbers = OPTIMIZERS["SGD"].scalars(1, **OPTIMIZERS["SGD"].options)
    table = np.array([[1e3, np.inf, 0.1, 0.0, *numbers], [1e3, 0.5, 0.0, 0.1, *numbers]])
    expected, buffer = P.copy(), state.copy()
    spans = [(3, 17, 1), (20, 39, 0)]
    reference.optimizer_step(expected, G, [buffer], table, "SGD", spans=spans)
    backend.optimizer_step(P, G, [state], table, "SGD", spans=spans)
    np.testing.assert_allclose(P, expected, rtol=1e-6)
    np.testing.assert_allclose(state, buffer, rtol=1e-6)


def limited() -> None:
    """Long and short tensors and rows, NaN, a step that was refused; a tensor of many blocks."""
    for size, limit in ((700, 5.0), (700, 99.0), (200_000, 100.0)):
        G = normal((size,))[0]
        expected = G * min(1, limit / np.linalg.norm(G.astype(float)))
        limit_on_device("limit_tensor", G, limit)
        np.testing.assert_allclose(G, expected, rtol=1e-6)
    G[-1] = np.inf
    kept = G.copy()
    limit_on_device("limit_tensor", G, 1.0)
    np.testing.assert_array_equal(G, kept)
    W = normal((5, 300))[0] * np.array([[0], [0.1], [1], [2], [0.5]], F32)
    expected = W * np.minimum(1, 10 / np.maximum(np.linalg.norm(W, axis=1, keepdims=True), 1))
    for norm, guard in ((np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0)):
        kept = W.copy()
        limit_on_device("limit_rows", W, 10.0, np.array(norm), np.array(guard))
        assert W.tobytes() == kept.tobytes()
    limit_on_device("limit_rows", W, 10.0, np.array(1.0), np.array(1.0))
    np.testing.assert_allclose(W, expected, rtol=1e-6)


def limit_on_device(name: str, *arguments: Any) -> None:
    """A function of cuda/limits.py, on copies of NumPy arrays that are copied back."""
    with installed():
        mirror = Mirror()
        getattr(limits, name)(*map(mirror.to_device, arguments))
        mirror.download()


def losses() -> None:
    Z, T, weight = normal((130, 3), (130, 3), (130,))
    weight = np.abs(weight)
    weight[7] = 0
    Z[7] = np.inf
    same("loss", Z, T, "huber", {}, "identity", weight)
    Z[7] = 0
    same("loss", Z, T, "mse", {}, "tanh")
    same("loss", Z, T, "mse", {}, "tanh", 0 * weight)
    same("loss", *normal((33, 40), (33, 40)), "mse", {}, "tanh")


def likelihood() -> None:
    same("loss", *normal((70, 6), (70, 3)), "gaussian_nll", {}, "tanh")


def classes() -> None:
    Z, P = normal((101, 37), (101, 37))
    ids = np.arange(101) % 37
    ids[5] = -100
    options = {"class_weight": np.arange(37) / 10, "label_smoothing": 0.1}
    same("loss", Z, ids, "cross_entropy", options, "tanh", np.abs(Z[:, 0]))
    P = np.exp(P) / np.exp(P).sum(axis=1, keepdims=True)
    same("loss", Z, P, "cross_entropy", {"label_smoothing": 0.2})
    same("loss", Z, 0 * ids, "cross_entropy", {"class_weight": np.arange(37) / 10})
    sure = np.array([[0, -np.inf, 30, 0, 90.0]], F32)
    same("loss", sure, np.array([4]), "cross_entropy")
    for wrong in (37, -1):
        with pytest.raises(LabelError):
            backend.loss(Z, np.where(ids == 3, wrong, ids), "cross_entropy")


def batch_norm() -> None:
    X, dZ, gamma, beta, saved = normal((150, 35), (150, 35), (35,), (35,), (150, 35))
    X += np.arange(35, dtype=F32)
    got, expected = ([np.zeros(35, F32), np.ones(35, F32)] for _ in range(2))
    Y, _, mean, rstd = backend.batch_norm_forward(X, gamma, beta, *got, activation="tanh")
    exact = reference.batch_norm_forward(X, gamma, beta, *expected, activation="tanh")
    for computed, true in zip(
        (Y, mean, rstd, *got), (exact[0], *exact[2:], *expected), strict=True
    ):
        np.testing.assert_allclose(computed, true, rtol=2e-4, atol=2e-4)
    same("batch_norm_backward", dZ, X, gamma, mean, rstd, np.tanh(saved), "tanh", HALF,
         rtol=2e-4, atol=2e-4)  # fmt: skip
    frozen = normal((35,), (35,))
    same("batch_norm_forward", X, gamma, beta, frozen[0], np.abs(frozen[1]), False)


def layer_norm() -> None:
    for features, centred in ((35, True), (35, False), (5, True)):
        shape = 21, features
        X, dZ, gamma, beta, saved = normal(shape, shape, shape[1:], shape[1:], shape)
        X += 2
        arguments = X, gamma, beta, 1e-5, "tanh", HALF, None, centred
        same("layer_norm_forward", *arguments)
        _, _, mean, rstd = reference.layer_norm_forward(*arguments)
        same("layer_norm_backward", dZ, X, gamma, mean, rstd, np.tanh(saved), "tanh", HALF, None,
             centred, rtol=1e-4, atol=1e-4)  # fmt: skip


def bits() -> None:
    """One bit for each element: ragged words, rows narrower than a word, several rows in a warp."""
    for columns in (5, 70):
        X, W = whole((9, 3), (columns, 3))
        Z = X @ W.T
        same("linear_forward", X, W, None, "hardtanh", HALF, **EXACT)
        same("linear_dgrad", X, W.T.copy(), Z, "leaky_relu", HALF)
        gamma, beta, mean = normal((columns,), (columns,), (columns,))
        running = mean, np.abs(mean) + 1
        norm = Z, gamma, beta, *running, False, 0.1, 1e-5, "leaky_relu", HALF
        same("batch_norm_forward", *norm)
        same("layer_norm_forward", Z, gamma, beta, 1e-5, "leaky_relu", HALF)


def wide_rows() -> None:
    X, gamma, beta = normal((2, 1030), (1030,), (1030,))
    same("layer_norm_forward", X, gamma, beta)


def few_blocks() -> None:
    """Each thread takes several rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "MOST_BLOCKS", 3)
        batch_norm()


def sines() -> None:
    same("linear_forward", *normal((60, 1), (5, 1)), 9 * normal((5,))[0], "sin")


def many_rows() -> None:
    """More rows of tiles than a group, the last group not full; several columns of tiles."""
    same("linear_forward", *whole((300, 5), (70, 5)), **EXACT)


MUTANTS = [
    Mutant("reduce.cuh", "bits = lanes / 2; bits;", "bits = lanes / 4; bits;", layer_norm),
    Mutant("reduce.cuh", BARRIER + "  // the last call's sums may still be read", "", wide_rows),
    Mutant("reduce.cuh", "] = x;\n    " + BARRIER, "] = x;", updates),
    Mutant("reduce.cuh", "i < THREADS / WARP; ++i", "i < THREADS / WARP - 1; ++i", updates),
    Mutant("reduce.cuh", "i < count; i += THREADS", "i < count; i += WARP", updates),
    Mutant("reduce.cuh", "] = sum;\n        " + BARRIER, "] = sum;", losses),
    Mutant("reduce.cuh", "}\n        " + BARRIER + "\n    }\n}", "}\n    }\n}", losses),
    Mutant("reduce.cuh", "k < down; ++k", "k < down - 1; ++k", losses),
    Mutant("reduce.cuh", "if (j < columns)\n            for", "for", losses),
    Mutant("reduce.cuh", "i < last; i += down) sum", "i <= last; i += down) sum", losses),
    Mutant("reduce.cuh", "i < last; i += down) f", "i < last; i += down + 1) f", few_blocks),
    Mutant("reduce.cuh", "if (y == 0 && j < columns)", "if (y == 0)", losses),
    Mutant("column_sums.cu", "i < rows;", "i < rows - 1;", losses),
    Mutant("column_sums.cu", "if (n >= columns) return;", "", losses),
    Mutant("gather_rows.cu", "wanted >= rows ? rows - 1", "wanted > rows ? rows - 1", gather),
    Mutant("gather_rows.cu", "if (r >= count) return;", "", gather),
    Mutant("gather_rows.cu", "w += side", "w += side + 1", gather),
    Mutant("optimizer_step.cu", "|| (guard && !isfinite(guard[0]))", "", updates),
    Mutant("optimizer_step.cu", "!isfinite(length) || ", "", refused),
    Mutant("reduce.cuh", "double(x[i]) * double(x[i])", "double(x[i] * x[i])", updates),
    Mutant("optimizer_step.cu", "rounded_product(G[i], clip)", "G[i] / clip", updates),
    Mutant("optimizer_step.cu", "most < 1.0 ? most : 1.0", "most", unclipped),
    Mutant("optimizer_step.cu", "if (STATES == 2) state1[i] = s[1];", "", updates),
    Mutant("optimizer_step.cu", "i < stop;", "i <= stop;", updates),
    Mutant("optimizer_step.cu", "+ 2] * (1 + SCALARS)", "+ 2] * SCALARS", unclipped),
    Mutant("aim.cuh", "real a, b;", "real b, a;", classes),
    Mutant("loss_sums.cu", "if (label == ignored) return 0.0;", "", classes),
    Mutant("loss_sums.cu", "label < classes", "label <= classes", classes),
    Mutant("loss_sums.cu", "weight == 0 || total == 0 ?", "weight == 0 ?", classes),
    Mutant("loss_sums.cu", "&& weight > 0)", "&& weight > 2)", classes),
    Mutant("elementwise_loss.cuh", "if (w != 0) {", "{", losses),
    Mutant("elementwise_loss.cuh", "* mean * w", "/ mean * w", losses),
    Mutant("loss.cu", "sum / double(columns)", "sum", losses),
    Mutant("loss_gaussian_nll.cu", "derivative(SAVES == 1 ? y : z)", "derivative(z)", likelihood),
    Mutant("loss_gaussian_nll.cu", "real(1) - square", "square - real(1)", likelihood),
    Mutant("loss_gaussian_nll.cu", "j < half ? j : j - half", "j", likelihood),
    Mutant("cross_entropy.cuh", "if (q_j != 0) value", "value", classes),
    Mutant("cross_entropy.cuh", "* p + uniform", "* p - uniform", classes),
    Mutant("loss_cross_entropy.cu", "here ? row : first", "row", classes),
    Mutant("cross_entropy.cuh", "(z[j]) - top)", "(z[j]))", classes),
    Mutant("cross_entropy.cuh", "lane_sum(weight, lanes)", "weight", classes),
    Mutant("batch_norm.cu", "sum[j] / count", "sum[j] * count", batch_norm),
    Mutant("batch_norm.cu", " + count * d * d", " + d * d", batch_norm),
    Mutant("batch_norm.cu", "max(rows - 1, 1ll)", "rows", batch_norm),
    Mutant("batch_norm.cu", "rows - b * rows_per_block)", "rows)", batch_norm),
    Mutant("batch_norm.cu", " - dbeta[j] * share", "", batch_norm),
    Mutant("batch_norm.cu", "sqrt(running_var[j] + eps)", "sqrt(running_var[j])", batch_norm),
    Mutant("layer_norm.cu", "if (i >= rows) return;", "", layer_norm),
    Mutant("layer_norm.cu", "if (centred)\n", "", layer_norm),
    Mutant("layer_norm.cu", "if (!centred) shift = real(0);", "", layer_norm),
    Mutant("layer_norm.cu", "dZ[e] * ((X[e] - mean[i]) * rstd[i])", "dZ[e]", layer_norm),
    Mutant("layer_norm.cu", "- x_hat * slope", "+ x_hat * slope", layer_norm),
    Mutant("epilogue.cuh", "y * scale", "y", epilogues),
    Mutant("epilogue.cuh", "SAVES == 1 ? y : z", "SAVES == 1 ? z : y", epilogues),
    Mutant("epilogue.cuh", "? g * scale : real(0)", "? g * scale : g * scale", epilogues),
    *(Mutant("epilogue.cuh", old, new, bits) for old, new in (
        ("if (columns < WORD) bits &= (1u << columns) - 1;", ""),
        (">> threadIdx.x % WORD", ""),
        ("inside && derivative(z) != FLAT", "derivative(z) != FLAT"),
        ("inside && derivative(z) != FLAT", "inside && y != real(0)"),
        ("inside && column % WORD == 0", "inside && column % 16 == 0"),
        ("row * words(columns) + column / WORD] = kept", "row + column / WORD] = kept"),
        ("? STEEP : FLAT", "? FLAT : STEEP"),
        ("saved.bits >> column % WORD & 1", "saved.bits >> column % 16 & 1"),
    )),
    Mutant("layer_norm.cu", "j / WARP * WARP < columns", "j < columns", bits),
    Mutant("reduce.cuh", "i + y < last && j + x < columns", "j + x < columns", bits),
    Mutant("philox.cuh", ">= threshold", "> threshold", threshold),
    Mutant("philox.cuh", "round < 10", "round < 9", epilogues),
    Mutant("philox.cuh", "element & 1 ? w1 : w0", "element & 1 ? w0 : w1", epilogues),
    Mutant("philox.cuh", "if (element / 4 != block) ", "if (block < 0) ", epilogues),
    Mutant("sine.cuh", "quadrant >= real(2) ? -y : y", "y", sines),
    Mutant("product.cuh", BARRIER + "\n        now ^= 1;", "now ^= 1;", products),
    Mutant("product.cuh", "i < size && at < k_end", "i < size", products),
    Mutant("product.cuh", "i < size && at < k_end", "at < k_end", products),
    Mutant("product.cuh", "a.store(s_A[now ^ 1])", "a.store(s_A[now])", products),
    Mutant("product.cuh", "if (m < M) element", "element", products),
    Mutant("product.cuh", "at[r][j];\n        }\n        " + BARRIER, "at[r][j];\n        }",
           products),
    Mutant("product.cuh", "[column]);\n        }\n        " + BARRIER, "[column]);\n        }",
           products),
    Mutant("linear_forward.cu", "sum + bias", "sum", products),
    Mutant("corner.cuh", "(N + T::N - 1) / T::N", "(N + 1) / T::N", many_rows),
    Mutant("corner.cuh", "(M + T::M - 1) / T::M", "M / T::M", many_rows),
    Mutant("corner.cuh", "first * across", "first", many_rows),
    Mutant("corner.cuh", "min(GROUP, down - first)", "max(GROUP, down - first)",
           many_rows),
    Mutant("one_tile.cuh", "min(k0 + runs.length, K)", "k0 + runs.length", products),
    Mutant("one_tile.cuh", "blockIdx.y * M * N", "blockIdx.y * M", products),
    Mutant("limits.cu", "length <= limit) return;  // NaN", "false) return;  // NaN", limited),
    Mutant("limits.cu", "!isfinite(length) || ", "", limited),
    Mutant("limits.cu", "G[i] *= factor", "G[i] /= factor", limited),
    Mutant("limits.cu", "!isfinite(norm[0]) || ", "", limited),
    Mutant("limits.cu", " || !isfinite(guard[0])", "", limited),
    Mutant("limits.cu", "W + blockIdx.x * columns", "W", limited),
    Mutant("limits.cu", "    if (length <= limit) return;\n    const real factor",
           "    const real factor", limited),
    Mutant("limits.cu", "row[j] *= factor", "row[j] *= factor * factor", limited),
    Mutant("limits.cu", "j < columns; j += THREADS) row", "j < 256; j += THREADS) row", limited),
    Mutant("stepping.cu", "state[STEPS] + 1, state", "state[STEPS], state", steps),
    Mutant("stepping.cu", "stream[1] = (long long)state[STEPS]", "stream[1] = 0", steps),
    Mutant("stepping.cu", "state[RATE] * o[0]", "state[RATE]", steps),
    Mutant("stepping.cu", "table + r * width + first", "table + r * width", steps),
    Mutant("stepping.cu", 'state[STOPPED] != 0 ? nan("") : value[0]', "value[0]", steps),
    Mutant("stepping.cu", "        state[STOPPED] = 1;\n", "", steps),
    Mutant("stepping.cu", " && state[APPLIED] == 0", "", steps),
    Mutant("stepping.cu", "if (i < words && state", "if (i < words - 300 && state", steps),
    Mutant("stepping.cu", "if (i < words && *rows", "if (i < 256 && *rows", steps),
    Mutant("one_tile.cuh", "= total;\n        " + BARRIER, "= total;", products),
    Mutant("one_tile.cuh", "i = 1; i < PARTS", "i = 2; i < PARTS", products),
    *TENSOR_CORES,
    *HOPPER,
    *FUSED,
    *PARTS,
    *PTX,
    *MLP_STEP,
]  # fmt: skip


@pytest.fixture
def fresh() -> Iterator[None]:
    """No module that was compiled from other sources, before and after."""
    forget()
    yield
    forget()


@pytest.mark.parametrize("mutant", one_of_each(MUTANTS))
@pytest.mark.usefixtures("fresh")
def test_bug_is_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    planted(monkeypatch, mutant)
    assert noticed(monkeypatch, mutant.check)


@pytest.mark.parametrize("check", each_check(MUTANTS))
@pytest.mark.usefixtures("fresh")
def test_without_a_bug_nothing_is_noticed(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[], None]
) -> None:
    assert noticed(monkeypatch, check) == ""


def test_every_file_has_a_planted_bug() -> None:
    files = {path.name for path in nvrtc.FOLDER.rglob("*.cu*")}
    assert files == {m.file for m in MUTANTS}
