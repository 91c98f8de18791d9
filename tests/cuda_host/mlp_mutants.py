"""Bugs for the kernel of a whole network, and the checks that must notice them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from backprop_kernels.cuda import mlp_fit

from tests.cuda_host.mutants import BARRIER, F32, Mutant
from tests.cuda_host.product_mutants import mixed
from tests.networks import Network, check, expect_exact, run


@contextmanager
def fitted(**limits: object) -> Iterator[None]:
    """Other limits of what fits."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(mlp_fit, name, value)
        yield


def whole_networks() -> None:
    """As many blocks as are added up side by side, of two tiles; the widths are filled up."""
    with fitted(TILES=(32,)):
        for rows in (950, 10):
            expect_exact(mixed("bf16"), rows, (20, 72, 8, 16))


def curved_networks() -> None:
    """Z is saved, in a network whose sums lie in shared memory."""
    options = {"label_smoothing": 0.1, "class_weight": np.arange(1, 6) / 3}
    with fitted(TILES=(16,), IN_REGISTERS=3):
        check(mixed("bf16"), (9, 120, 120, 5), 70, "gelu", "cross_entropy", options, True)


def rows_that_are_not_there() -> None:
    network = Network.of((1, 1, 1), "exp")
    P = np.zeros(network.size, F32)
    for (W, b), bias in zip(network.tensors(P), (100, 0), strict=True):
        W[...], b[...] = 1, bias
    _, G = run(mixed("bf16"), network, np.full((3, 1), -100, F32), np.zeros((3, 1), F32), P)
    assert np.isfinite(G).all()


MLP_STEP = [
    *(Mutant("mlp_step.cu", old, new, whole_networks) for old, new in (
        (BARRIER + "  // the input is complete", ""),
        (BARRIER + "  // the deltas are complete", ""),
        ("r < rows && i < IN ? from", "i < IN ? from"),
        ("r < rows && i < IN ? from", "r < rows ? from"),
        ("OF_B ? other : one", "one"),
        ("OF_B ? one : other", "one"),
        ("k < TILE; k += 16", "k < TILE - 16; k += 16"),
        ("n += ACROSS", "n += ACROSS + 1"),
        ("f(r + 8, c, left[2]", "f(r + 4, c, left[2]"),
        ("o < Of::OUT && i < Of::IN;", "i < Of::IN;"),
        ("here && j < OUT ? d[j] : 0.0f", "j < OUT ? d[j] : 0.0f"),
        ("first + at, here, shares ? shares[first + at]", "at, here, shares ? shares[at]"),
        ("{0x3f803f80, 0x3f803f80}", "{0x3f803f80, 0}"),
        ("at[k][2]", "at[k][1]"),
        ("y * Act::derivative(from_bf16(saved >> 16))", "y * Act::derivative(from_bf16(saved))"),
        ("z1 = y + bias[column + 1]", "z1 = y + bias[column]"),
        ("        copy_async_wait<0>();\n", ""),
        (BARRIER + "  // the copies of all threads are there", ""),
        ("X + next * Layer<0>::IN", "X + next"),
        ("rows_of_tile(next));", "TILE);"),
        ("X + first * Layer<0>::IN", "X"),
        ("row += TILE", "row += 2 * TILE"),
        ("slices + blockIdx.x * parameters", "slices"),
        ("    loss = block_sum(loss);\n", ""),
        ("min(first + some, blocks)", "first + some"),
        (" || !belongs<0>(p)", ""),
        ("[lane()] = sum;\n    " + BARRIER, "[lane()] = sum;"),
        ("i < WARPS; ++i) sum", "i < WARPS - 1; ++i) sum"),
    )),
    *(Mutant("mlp_step.cu", old, new, curved_networks) for old, new in (
        (BARRIER + "  // Z is complete", ""),
        ("X) % 16 == 0", "X) % 4 == 0"),
        (BARRIER + "  // the activations below have been read", ""),
        ("++i, kept += Mine::ROW * THREADS", "++i"),
        ("pair(first ? z0 : 0.0f, second ? z1 : 0.0f)", "pair(first ? z0 : 0.0f, 0.0f)"),
        ("if constexpr (Act::SAVES == 2) saved", "if constexpr (Act::SAVES == 1) saved"),
    )),
    Mutant("mlp_step.cu", "first = row < rows && column < Of::OUT", "first = column < Of::OUT",
           rows_that_are_not_there),
]  # fmt: skip
