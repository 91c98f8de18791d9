"""Arrays of more than 2³¹ elements: offsets that an int would not hold, in every kernel.

Of each launch the first and the last block run in the emulator, on memory that takes no room until
it is written. Everything is zero but the corners of each operand: what the corners of the results
must be is known, and what a short offset would read or write lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from backprop_kernels import cuda
from backprop_kernels.arrays import LinearLayer
from backprop_kernels.cuda import mlp_fit, tiles
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import column_sums, plain_variant
from backprop_kernels.cuda.fused_update import FusedUpdate
from backprop_kernels.cuda.in_precision import InPrecision
from backprop_kernels.cuda.launch import launch
from backprop_kernels.cuda.limits import limit_rows, limit_tensor
from backprop_kernels.cuda.linear_wgrad import WeightUpdate
from backprop_kernels.cuda.linear_wgrad import wgrad as wgrad_as
from backprop_kernels.cuda.optimizer_step import rule_text
from backprop_kernels.cuda.part import Part, part_of
from backprop_kernels.cuda.rows import THREADS, blocks_for
from backprop_kernels.cuda.transpose import transposed
from backprop_kernels.errors import ShapeError

from tests.cuda_host import cupy_stand_in
from tests.cuda_host.cupy_stand_in import empty_zeros, far
from tests.cuda_host.mutants import Mutant, forget, noticed, planted

pytestmark = pytest.mark.usefixtures("emulator")
ROWS, COLUMNS = 2**16 + 3, 2**15 + 8  # 2³¹ + 622,616 elements; rows of bfloat16 on 16 bytes
HUGE = ROWS, COLUMNS
assert ROWS * COLUMNS > 2**31


@pytest.fixture(autouse=True)
def sparse(emulator: None) -> Iterator[None]:
    with far():
        yield


def array(*shape: int, first: float = 0, last: float = 0, dtype: Any = np.float32) -> Any:
    """Zeros but for the first and the last element."""
    made = empty_zeros(shape, dtype)
    flat = made._host.reshape(-1)
    flat[0], flat[-1] = first, last
    return made


def ends(value: Any) -> tuple[float, float]:
    """The first and the last element."""
    flat = value._host.reshape(-1)
    return float(flat[0]), float(flat[-1])


def forward() -> None:
    """Y = relu(x w + b), and its bits."""
    b = array(COLUMNS, first=1, last=2)
    X, W = array(ROWS, 1, first=2, last=3), array(COLUMNS, 1, first=4, last=5)
    Y, saved = cuda.linear_forward(X, W, b, "relu")
    assert Y.shape == HUGE and ends(Y) == (9, 17)
    assert Y._host[-1, -2] == 0 and Y._host[-2, -1] == 2
    last_bit = 1 << (COLUMNS - 1) % 32
    assert saved._host[0, 0] & 1 and saved._host[-1, -1] == last_bit == saved._host[-2, -1]
    _, Z = cuda.linear_forward(X, W, b, "gelu")
    assert ends(Z) == (9, 17)


def forward_from_far() -> None:
    Y, _ = cuda.linear_forward(array(*HUGE, first=2, last=3), array(1, COLUMNS, first=4, last=5))
    assert ends(Y) == (8, 15)
    Y, _ = cuda.linear_forward(array(1, COLUMNS, first=2, last=3), array(*HUGE, first=4, last=5))
    assert ends(Y) == (8, 15)


def dgrad() -> None:
    """dZ_prev = (dz w) exp(z), and its column sums, of the blocks that ran."""
    dZ, W = array(ROWS, 1, first=2, last=3), array(1, COLUMNS, first=4, last=5)
    dZ_prev, db = cuda.linear_dgrad(dZ, W, array(*HUGE, first=0.5, last=0.25), "exp")
    assert dZ_prev.shape == HUGE and ends(dZ_prev) == (4, 3.75) == ends(db)


def dgrad_from_far() -> None:
    far_W = cuda.linear_dgrad(array(1, ROWS, first=2, last=3), array(*HUGE, first=4, last=5))[0]
    assert ends(far_W) == (8, 15)
    W = array(COLUMNS, 1, first=4, last=5)
    assert ends(cuda.linear_dgrad(array(*HUGE, first=2, last=3), W)[0]) == (8, 15)


def wgrad() -> None:
    dW = cuda.linear_wgrad(array(1, ROWS, first=2, last=3), array(1, COLUMNS, first=4, last=5))
    assert dW.shape == HUGE and ends(dW) == (8, 15)


def wgrad_from_far() -> None:
    dW = cuda.linear_wgrad(array(*HUGE, first=2, last=3), array(ROWS, 1, first=4, last=5))
    assert ends(dW) == (8, 15)
    dW = cuda.linear_wgrad(array(ROWS, 1, first=2, last=3), array(*HUGE, first=4, last=5))
    assert ends(dW) == (8, 15)


def tensor_cores() -> None:
    """Products of bfloat16, with their copies of whole chunks and of single elements. Not those of
    Hopper, whose every block walks through the whole array; TMA does the addressing there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "HOPPER_ALONE", 0)
        ampere_products()


def ampere_products() -> None:
    backend = InPrecision("bf16")
    one, two = 0x3F80, 0x4000  # 1 and 2 in bfloat16

    def bf16(*shape: int) -> Any:
        return array(*shape, first=one, last=two, dtype=np.uint16)

    def out(*shape: int) -> Any:
        return array(*shape), None

    side, few = 2**25 + 8, 72
    assert side * few > 2**31
    for shapes in (((ROWS, 1), (COLUMNS, 1)), ((side, few), (1, few)), ((1, few), (side, few))):
        X, W = (bf16(*shape) for shape in shapes)
        assert ends(backend.linear_forward(X, W, out=out(len(X), len(W)))[0]) == (1, 4)
    for shapes in (((ROWS, 1), (1, COLUMNS)), ((side, few), (few, 1)), ((1, few), (few, side))):
        dZ, W = (bf16(*shape) for shape in shapes)
        assert ends(backend.linear_dgrad(dZ, W)[0]) == (one, 0x4080)  # 4
    for shapes in (((1, ROWS), (1, COLUMNS)), ((few, side), (few, 1)), ((few, 1), (few, side))):
        assert ends(backend.linear_wgrad(*(bf16(*shape) for shape in shapes))) == (1, 4)


def sums() -> None:
    total = array(COLUMNS)
    column_sums(array(*HUGE, first=2, last=3), total)
    assert ends(total) == (2, 3)


def casts() -> None:
    """Every thread takes many elements, the last of them beyond 2³¹."""
    out = empty_zeros((2**31 + 1,), np.uint16)
    InPrecision("bf16").cast(array(2**31 + 1, first=1, last=2), out)
    assert ends(out) == (0x3F80, 0x4000)


def transposes() -> None:
    """The first tile and the last."""
    turned = transposed(array(*HUGE, first=2, last=3))
    assert turned.shape == HUGE[::-1] and (turned._host[0, 0], turned._host[-1, -1]) == (2, 3)


def gathers() -> None:
    index = cupy_stand_in.asarray(np.arange(ROWS) % 2)
    X = array(2, COLUMNS, first=2, last=3)
    Y = cuda.gather_rows(X, index)
    assert Y.shape == HUGE and Y._host[0, 0] == 2 and Y._host[-2, -1] == 3 and Y._host[-1, 0] == 2
    X = array(*HUGE, first=2, last=3)
    index = cupy_stand_in.asarray(np.array([ROWS - 1, 0]))
    assert cuda.gather_rows(X, index)._host[:, [0, -1]].tolist() == [[0, 3], [2, 0]]


def batch_norm() -> None:
    """Means of a column with one number in it, and what a backward pass makes of them."""
    X = array(*HUGE, first=ROWS, last=2 * ROWS)
    gamma, beta = (empty_zeros((COLUMNS,), np.float32) for _ in range(2))
    gamma._host[...], beta._host[...] = 1, 0.5
    running = [empty_zeros((COLUMNS,), np.float32) for _ in range(2)]
    Y, _, mean, rstd = cuda.batch_norm_forward(X, gamma, beta, *running)
    assert ends(mean) == (1, 2)
    x_hat = [(x - m) * r for x, m, r in zip(ends(X), ends(mean), ends(rstd), strict=True)]
    np.testing.assert_allclose(ends(Y), [x + 0.5 for x in x_hat], rtol=1e-6)
    dZ = array(*HUGE, first=1, last=2)
    dZ._host[0, 1], dZ._host[-1, -2] = 3, 4
    dZ_prev, _, dgamma = cuda.batch_norm_backward(dZ, X, gamma, mean, rstd)
    np.testing.assert_allclose(ends(dgamma), [d * x for d, x in zip((1, 2), x_hat, strict=True)])
    # In the columns beside X is 0: no x_hat, the gradient less its mean.
    beside = [
        float(dZ_prev._host[i, j]) / float(rstd._host[j]) for i, j in ((0, 1), (-1, COLUMNS - 2))
    ]
    np.testing.assert_allclose(beside, [3 - 3 / ROWS, 4 - 4 / ROWS], rtol=1e-6)


def layer_norm() -> None:
    X = array(*HUGE, first=COLUMNS, last=2 * COLUMNS)
    gamma, beta = (empty_zeros((COLUMNS,), np.float32) for _ in range(2))
    gamma._host[...] = 1
    Y, _, mean, rstd = cuda.layer_norm_forward(X, gamma, beta)
    assert ends(mean) == (1, 2)
    x_hat = [(x - m) * r for x, m, r in zip(ends(X), ends(mean), ends(rstd), strict=True)]
    np.testing.assert_allclose(ends(Y), x_hat, rtol=1e-6)
    dZ = array(*HUGE, first=1, last=2)
    dZ_prev, _, dgamma = cuda.layer_norm_backward(dZ, X, gamma, mean, rstd)
    np.testing.assert_allclose(ends(dgamma), [d * x for d, x in zip((1, 2), x_hat, strict=True)])
    assert all(ends(dZ_prev))


def losses() -> None:
    Z, target = array(*HUGE, first=3, last=5), array(*HUGE, first=1, last=2)
    value, dZ, db = cuda.loss(Z, target, "mse")
    np.testing.assert_allclose(float(value), (4 + 9) / (ROWS * COLUMNS), rtol=1e-6)
    gradient = [2 * d / (ROWS * COLUMNS) for d in (2, 3)]
    np.testing.assert_allclose([*ends(dZ), *ends(db)], gradient * 2, rtol=1e-6)
    target = array(*HUGE, first=1, last=2)
    Z = array(ROWS, 2 * COLUMNS, first=3)  # means, then logarithms of variances: 0
    Z._host[-1, COLUMNS - 1] = 5
    _, dZ, _ = cuda.loss(Z, target, "gaussian_nll")
    expected = [2 / (ROWS * COLUMNS), (1 - 9) / 2 / (ROWS * COLUMNS)]
    np.testing.assert_allclose(ends(dZ), expected, rtol=1e-6)


def classes() -> None:
    """Ids, then a probability for each class."""
    even = float(np.log(COLUMNS - 1))  # as much as all others together
    Z, ids = array(*HUGE, first=even, last=even + 1), array(ROWS, dtype=np.int64)
    ids._host[-1] = COLUMNS - 1
    counted = 256 + ROWS % 256  # rows whose weights the first and the last block added up
    for target, rows in ((ids, counted), (array(*HUGE, first=1, last=1), ROWS)):
        _, dZ, _ = cuda.loss(Z, target, "cross_entropy")
        p = 0.5, np.e / (np.e + 1)
        np.testing.assert_allclose(ends(dZ), [(q - 1) / rows for q in p], rtol=1e-4)


def update() -> None:
    """The last element is the first block's, at the end of its strides."""
    count = 2**31 + 1
    G, P = array(count, first=1, last=2), array(count, first=3, last=4)
    scalars = np.array([np.inf, 0.5, 0, 0, 1, 0])  # lr, momentum, weight_decay, own, carried
    norm = cuda.optimizer_step(P, G, (array(count),), cupy_stand_in.asarray(scalars), "SGD")
    assert ends(P) == (2.5, 3) and abs(float(norm) - 5**0.5) < 1e-12


def whole_network() -> None:
    """Far rows of X, in blocks of 64."""
    rows, width = 2**25, 128
    layers = [LinearLayer(width, 1, 0, None, "identity")]
    given = array(rows, width, first=2, last=3), array(rows, 1), array(width, first=1, last=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp_fit, "BLOCKS", rows)
        _, G = InPrecision("bf16").mlp_step(*given, layers)
    assert ends(G) == tuple(2 * x * z / rows for x, z in ((2, 2), (3, 12)))


def fused() -> None:
    """W and its moment at both ends, where it is sure; dW, where it is not."""
    rule = rule_text("SGD", 5, True)
    scalars = cupy_stand_in.asarray(np.array([0.5, 0, 0, 1, 0]))  # as above
    for certain in (1, 0):
        W, moment, dW = array(*HUGE, first=3, last=4), array(*HUGE), array(*HUGE)
        sure, squares = array(1, last=certain, dtype=np.uint32), array(2**21, dtype=np.float64)
        given = array(1, ROWS, first=2, last=3), array(1, COLUMNS, first=4, last=5)
        wgrad_as(
            None,
            None,
            *given,
            dW,
            update=WeightUpdate(rule, W, moment, None, scalars, sure, squares),
        )
        assert ends(W) == ((-1, -3.5) if certain else (3, 4))
        assert ends(moment) == ((8, 15) if certain else (0, 0))
        assert ends(dW) == ((0, 0) if certain else (8, 15))


def parts() -> None:
    """Sums that go on, and their mean."""
    before, mass = array(1, last=1, dtype=np.int64), array(1, last=4, dtype=np.float64)
    dW = array(*HUGE, first=3, last=4)
    with part_of(Part(1, 2, before, mass)):
        cuda.linear_wgrad(array(1, ROWS, first=2, last=3), array(1, COLUMNS, first=4, last=5), dW)
    assert ends(dW) == (11, 19)
    G = array(2**31 + 1, first=30, last=40)
    unit, grid = Unit("part.cu", plain_variant("float32")), (blocks_for(G.size),)
    launch(unit, "to_mean", grid, (THREADS,), G, mass, 2, G.size)
    assert ends(G) == (15, 20)


def largest() -> None:
    """The last element is the first block's."""
    step = FusedUpdate(cuda, 1)
    step._find(array(2**31 + 1, first=1, last=-2), None, step._cells[:1])
    assert step._cells._host.view(np.float32)[0] == 2


def limited() -> None:
    G = array(2**31 + 1, first=30, last=40)
    limit_tensor(G, 5.0)
    assert ends(G) == (3, 4)
    W, good = array(*HUGE, first=30, last=40), array(1, first=1, dtype=np.float64)
    limit_rows(W, 5.0, good, good)
    assert ends(W) == (5, 5)


def cut(file: str, text: str, check: Callable[[], None]) -> Mutant:
    """What stands in angle brackets is cut to an int."""
    new = text.replace("⟨", "int(").replace("⟩", ")")
    return Mutant(file, text.replace("⟨", "").replace("⟩", ""), new, check)


FETCH = "from[BY_K ? ⟨at * stride + i⟩ : ⟨i * stride + at⟩]"
MUTANTS = [
    *(cut("one_tile.cuh", "slice[⟨m * N + n⟩]", check) for check in (forward, dgrad, wgrad)),
    *(cut("product.cuh", FETCH, check)
      for check in (forward_from_far, dgrad_from_far, wgrad_from_far)),
    cut("tensor_product.cuh", "from + ⟨row * stride⟩ + column", tensor_cores),
    cut("epilogue.cuh", "saved[⟨element⟩]) : real(0)", dgrad),
    cut("epilogue.cuh", "saved[⟨element⟩] = kept", forward),
    cut("batch_norm.cu", "return real(X[⟨i * columns + j⟩]);", batch_norm),
    cut("batch_norm.cu", "Y[⟨e⟩] = result", batch_norm),
    cut("batch_norm.cu", "dZ_prev[⟨e⟩] = stored", batch_norm),
    cut("batch_norm.cu", "return dZ[⟨e⟩] * ((X", batch_norm),
    cut("layer_norm.cu", "Y[⟨e + j⟩] = result", layer_norm),
    cut("layer_norm.cu", "return dZ[⟨e⟩] * ((X", layer_norm),
    cut("layer_norm.cu", "dZ_prev[⟨e + j⟩] = stored", layer_norm),
    cut("column_sums.cu", "partial[⟨i * columns + n⟩]", sums),
    cut("cast.cu", "out[⟨i⟩] = stored", casts),
    cut("transpose.cu", "values[⟨(row + i) * columns + column + lane⟩]", transposes),
    cut("transpose.cu", "out[⟨(column + i) * pitch + row + lane⟩]", transposes),
    cut("gather_rows.cu", "Y[⟨r * words + w⟩]", gathers),
    cut("gather_rows.cu", "X[⟨source * words + w⟩]", gathers),
    cut("loss.cu", "dZ[⟨e⟩] = loss_element", losses),
    cut("loss.cu", "(Z[⟨e⟩], aim", losses),
    cut("elementwise_loss.cuh", "aim.target[⟨i * columns + j⟩]", losses),
    cut("loss_gaussian_nll.cu", "target[⟨i * half + k⟩]", losses),
    cut("loss_gaussian_nll.cu", "dZ[⟨i * columns + j⟩] = g", losses),
    cut("loss_cross_entropy.cu", "loss_row(Z + ⟨i * columns⟩", classes),
    cut("cross_entropy.cuh", "aim.target[⟨i * columns + j⟩]", classes),
    cut("mlp_step.cu", "X + ⟨first * Layer<0>::IN⟩", whole_network),
    cut("reduce.cuh", "double(x[⟨i⟩]) *", update),
    cut("limits.cu", "G[⟨i⟩] *=", limited),
    cut("limits.cu", "W + ⟨blockIdx.x * columns⟩", limited),
    cut("optimizer_step.cu", "P[⟨i⟩] = p", update),
    cut("linear_wgrad_update.cu", "Element{W[⟨i⟩], moment", fused),
    cut("linear_wgrad_update.cu", "moment0[⟨i⟩] = s", fused),
    cut("linear_wgrad_update.cu", "dW[⟨i⟩] = g", fused),
    cut("fused_update.cu", "values[⟨i⟩]", largest),
    cut("one_tile.cuh", "runs.earlier[⟨m * N + n⟩]", parts),
    cut("part.cu", "G[⟨i⟩] *=", parts),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}-{mutant.old}")
def test_offset_cut_to_an_int_is_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    forget()
    planted(monkeypatch, mutant)
    try:
        assert noticed(monkeypatch, mutant.check)
    finally:
        forget()


SHORT = (forward, wgrad, gathers)
LONG = (
    forward_from_far, dgrad, dgrad_from_far, wgrad_from_far, tensor_cores, sums, casts, transposes,
    batch_norm, layer_norm, losses, classes, update, fused, largest, limited, parts, whole_network,
)  # fmt: skip


@pytest.mark.parametrize(
    "check",
    [*SHORT, *(pytest.param(check, marks=pytest.mark.long) for check in LONG)],
    ids=lambda check: check.__name__,
)
def test_corners_of_huge_arrays(check: Callable[[], None]) -> None:
    check()


def test_a_grid_beyond_the_largest_is_refused() -> None:
    X = empty_zeros((2**38 + 1, 1), np.float32)
    with pytest.raises(ShapeError, match="linear_forward: expected a grid of at most"):
        cuda.linear_forward(X, array(1, 1))
