"""The products of linear layers on tensor cores: every precision, tile and ragged edge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backprop_kernels import reference
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda import tiles
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.epilogue import plain_variant
from backprop_kernels.cuda.in_precision import InPrecision
from backprop_kernels.cuda.launch import launch
from backprop_kernels.cuda.tiles import COOPERATIVE, HOPPERS, NARROW, PING_PONG, TILES, choose
from backprop_kernels.errors import KindError, OptionError
from backprop_kernels.precisions import PRECISIONS, round_to, widen
from backprop_kernels.reference.epilogue import as_bits

from tests.cuda_host import build, hopper
from tests.cuda_host.backend import adapter, installed, on_gpu
from tests.gpu import GPU
from tests.guarded import Guards
from tests.saved import as_kept
from tests.tolerances import assert_within, gamma

NAMES = ("bf16", "fp16", "tf32", "bf16x3", "bf16x6")
OPERATORS = ("linear_forward", "linear_dgrad", "linear_wgrad")
F32 = np.dtype(np.float32)
# (batch, in_features, out_features): whole tiles, rows on 16 bytes, ragged, tiny, long sums.
ON_HOPPER = (*hopper.TINY, PING_PONG, COOPERATIVE, NARROW)
WHOLE_ROWS = (  # all on 16 bytes
    (64, 64, 64), (8, 8, 8), (1, 16, 8), (200, 72, 136), (130, 328, 40), (300, 8, 264),
)  # fmt: skip
NARROW_ROWS = (1, 4, 12), (67, 36, 140), (99, 132, 4), (201, 12, 260)  # of float32
SHAPES = (
    (64, 64, 64), (1, 1, 1), (3, 8, 16), (65, 40, 72), (67, 33, 65), (130, 136, 24), (33, 7, 129),
    (17, 257, 3), (600, 16, 8), (0, 5, 3), (5, 0, 3),
)  # fmt: skip


@pytest.fixture(params=["emulator", *GPU], scope="module")
def products(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The backend in each precision, for NumPy arrays."""
    if request.param == "gpu":
        on = on_gpu.place
    elif reason := build.problem():
        pytest.skip(f"the CUDA emulator {reason}")
    else:
        on = installed
    with on():
        return {name: adapter(on, InPrecision(name), "cast") for name in NAMES}


def tf32(x: Array) -> Array:
    """To 11 bits, ties away from zero, as operands are rounded."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def stored(x: Array, precision: str) -> Array:
    return round_to(x.astype(np.float32), precision)


def operands(x: Array, precision: str) -> Array:
    """What is multiplied, of what is stored; planes as the numbers that they stand for."""
    return (tf32(x) if precision == "tf32" else widen(x)).astype(np.float64)


def additions(terms: int, precision: str) -> int:
    """How many roundings a sum of so many products goes through, as docs/precision.md has it."""
    products = PRECISIONS[precision].products
    return terms + 1 if products == 1 else 17 * products + -(-terms // 16) + 2


def run(products: Any, name: str, A: Array, B: Array, shape: tuple[int, int]) -> Array:
    """A product into float32 where it can be, else into `stored`; on guarded arrays."""
    guards = Guards(shape[0] % 2)
    given = guards.input(A), guards.input(B)
    if name == "linear_dgrad":
        out = guards.output(shape, A.dtype), guards.output(shape[1:], F32)
        products.linear_dgrad(*given, out=out)
        guards.check()
        return out[0]
    C = guards.output(shape, F32)
    if name == "linear_forward":
        products.linear_forward(*given, out=(C, None))
    else:
        products.linear_wgrad(*given, out=C)
    guards.check()
    return C


def factors(name: str, rng: np.random.Generator, sizes: tuple[int, int, int], whole: bool) -> Any:
    """A, B as the operator takes them, and the exact product's function of their values."""
    batch, in_features, out_features = sizes
    shapes = {
        "linear_forward": ((batch, in_features), (out_features, in_features)),
        "linear_dgrad": ((batch, out_features), (out_features, in_features)),
        "linear_wgrad": ((batch, out_features), (batch, in_features)),
    }[name]
    product = {
        "linear_forward": lambda A, B: A @ B.T,
        "linear_dgrad": lambda A, B: A @ B,
        "linear_wgrad": lambda A, B: A.T @ B,
    }[name]
    draw = (lambda s: rng.integers(-3, 4, s)) if whole else rng.standard_normal
    return *(draw(s).astype(np.float32) for s in shapes), product


def cases(*short: tuple[str, str, str]) -> list[Any]:
    """(operator, precision, tile): all, those not in `short` marked as long."""
    return [
        pytest.param(name, precision, tile, id=f"{name}-{precision}-{tile.name}",
                     marks=[] if (name, precision, tile.name) in short else [pytest.mark.long])
        for name in OPERATORS for precision in NAMES
        for tile in (*TILES[precision], *(ON_HOPPER if precision in HOPPERS else ()))
    ]  # fmt: skip


@pytest.fixture
def one_tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let every product use this tile."""

    def only(tile: tiles.Tile) -> None:
        if tile.generation == "hopper":
            stack.enter_context(hopper.on_hopper(tile))
        else:
            monkeypatch.setattr(tiles, "TILES", dict.fromkeys(tiles.TILES, (tile,)))

    with ExitStack() as stack:
        yield only


@pytest.mark.parametrize(
    ("name", "precision", "tile"),
    cases(
        ("linear_forward", "bf16", "small"), ("linear_dgrad", "bf16", "wide"),
        ("linear_wgrad", "bf16", "small"), ("linear_forward", "fp16", "small"),
        ("linear_dgrad", "tf32", "small"), ("linear_wgrad", "tf32", "small"),
        ("linear_forward", "bf16x6", "small"), ("linear_wgrad", "bf16x3", "small"),
        ("linear_forward", "fp16", "tall, in turn"), ("linear_wgrad", "bf16", "in clusters"),
        ("linear_forward", "tf32", "in turn"), ("linear_dgrad", "tf32", "in clusters"),
        ("linear_wgrad", "tf32", "shared"),
    ),
)  # fmt: skip
def test_products(products: Any, one_tile: Any, name: str, precision: str, tile: Any) -> None:
    """Whole numbers are exact; others within the precision's bound, also of unrounded factors."""
    one_tile(tile)
    rng = np.random.default_rng(0)
    row = PRECISIONS[precision]
    unit = 2.0**-row.digits
    shapes = (*WHOLE_ROWS, *NARROW_ROWS) if precision == "tf32" else WHOLE_ROWS
    for sizes in shapes if tile.generation == "hopper" else SHAPES:
        A, B, product = factors(name, rng, sizes, whole=True)
        exact = product(A, B)
        C = run(products[precision], name, stored(A, precision), stored(B, precision), exact.shape)
        expected = exact if C.dtype == F32 else round_to(exact, precision)
        assert np.array_equal(C, expected), sizes

        A, B, product = factors(name, rng, sizes, whole=False)
        given = stored(A, precision), stored(B, precision)
        C = run(products[precision], name, *given, exact.shape)
        got = C if C.dtype == F32 else widen(C)
        terms = sizes[{"linear_forward": 1, "linear_dgrad": 2, "linear_wgrad": 0}[name]]
        rounded = 0.0 if C.dtype == F32 else unit
        checked = [((1 + unit) ** 2 - 1, [A.astype(float), B.astype(float)])]
        if row.products == 1:  # of planes some products are left out
            checked.append((0.0, [operands(x, precision) for x in given]))
        for factor_error, (left, right) in checked:
            true, size = product(left, right), product(np.abs(left), np.abs(right))
            # Twice γ: tensor cores may cut digits off where others round.
            sums = (2 * gamma(additions(terms, precision), F32) + factor_error) * size
            bound = sums + rounded * (np.abs(true) + sums) + row.smallest
            assert_within(got.astype(float), true, bound, f"{name} {precision} {sizes}")


def test_planes_hold_every_bit(products: Any) -> None:
    """Numbers of 24 bits, from the smallest to the largest, by a factor of one bit."""
    rng = np.random.default_rng(4)
    X = (1 + rng.integers(0, 2**23, (40, 16)) * 2.0**-23) * 2.0 ** rng.integers(-100, 127, (40, 1))
    X[0], X[1] = np.finfo(np.float32).max, 2.0**-133
    X = (X * rng.choice([-1, 1], X.shape)).astype(np.float32)
    Y = np.empty((40, 16), np.float32)
    products["bf16x6"].linear_forward(X, np.eye(16, dtype=np.float32), out=(Y, None))
    assert np.array_equal(Y, X)
    X[0] = 1e38  # of the largest, two planes round up to infinity
    products["bf16x3"].linear_forward(X, np.eye(16, dtype=np.float32), out=(Y, None))
    assert (np.abs(Y.astype(float) - X) <= 2.0**-16 * np.abs(X)).all() and (Y != X).any()


def test_infinity_and_nan_stay_in_their_row(products: Any) -> None:
    X, W = np.ones((5, 9), np.float32), np.ones((3, 9), np.float32)
    X[1, 4], X[2, 8] = np.nan, np.inf
    for precision in ("bf16", "fp16", "bf16x3", "bf16x6"):
        given = stored(X, precision), stored(W, precision)
        Y = np.empty((5, 3), np.float32)
        products[precision].linear_forward(*given, out=(Y, None))
        assert np.isnan(Y[1]).all() and np.isinf(Y[2]).all()
        assert np.isfinite(Y[[0, 3, 4]]).all()


@pytest.mark.parametrize(
    "precision", ["bf16", *(pytest.param(p, marks=pytest.mark.long) for p in NAMES[1:])]
)
@pytest.mark.parametrize("activation", ["gelu", pytest.param("relu", marks=pytest.mark.long)])
def test_epilogue_is_that_of_the_other_kernels(
    products: Any, precision: str, activation: str
) -> None:
    """Bias, activation, dropout, what is saved; act' and column sums backward."""
    rng = np.random.default_rng(1)
    row = PRECISIONS[precision]
    near: dict[str, Any] = {"rtol": 4 * 2.0**-row.digits, "atol": 16 * 2.0**-row.digits}
    X, W, b = (rng.standard_normal(s).astype(np.float32) for s in ((70, 24), (19, 24), (19,)))
    W /= 5
    given, drop = (stored(X, precision), stored(W, precision)), Dropout(0.5, np.array([5, 3]), 2)
    values = [operands(x, precision) for x in given]
    Y, saved = products[precision].linear_forward(*given, b, activation, drop)
    expected = reference.linear_forward(*values, b.astype(float), activation, drop)
    np.testing.assert_allclose(widen(Y), expected[0], **near)
    assert np.array_equal(widen(Y) == 0, expected[0] == 0)  # the same elements are dropped
    if saved.dtype == np.uint32:
        assert np.array_equal(saved, as_bits(expected[1], activation))
    else:
        np.testing.assert_allclose(widen(saved), expected[1], **near)

    dZ = rng.standard_normal((70, 19)).astype(np.float32)
    kept = widen(stored(rng.standard_normal((70, 24)), precision))
    bits = as_kept(products[precision], activation, kept)
    below = (stored(kept, precision) if bits is kept else bits), activation, drop
    dZ_prev, db_prev = products[precision].linear_dgrad(stored(dZ, precision), given[1], *below)
    true = reference.linear_dgrad(
        operands(stored(dZ, precision), precision), values[1], kept.astype(float), *below[1:]
    )
    np.testing.assert_allclose(widen(dZ_prev), true[0], **near)
    # Of float32 values; of planes, each element has lost a little.
    lost = 0.0 if row.products == 1 else len(dZ) * 16 * 2.0**-row.digits
    np.testing.assert_allclose(db_prev, true[1], rtol=1e-5, atol=1e-5 + lost)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["batch_norm", "layer_norm"])
def test_norms(products: Any, name: str, precision: str) -> None:
    """Of stored numbers, computed in float32: as exact as what they are stored in, and its sums
    are true under a loss scale."""
    rng = np.random.default_rng(5)
    row, backend, scale = PRECISIONS[precision], products[precision], 1.0
    if row.loss_scaling:
        scale = 64.0
        with backend.place():
            backend.module.set_loss_scale(scale)
    near = {"rtol": 2 * 2.0**-row.digits, "atol": 2.0**-16}
    X, dZ = (stored(rng.standard_normal((150, 35)) + 1, precision) for _ in range(2))
    wide, of_dZ = widen(X).astype(float), widen(dZ).astype(float)
    gamma, beta = (rng.standard_normal(35).astype(np.float32) for _ in range(2))
    running = [np.zeros(35, np.float32), np.ones(35, np.float32)] if name == "batch_norm" else []
    expected = [a.astype(float) for a in running]
    drop = Dropout(0.5, np.array([5, 3]), 2)
    keys: dict[str, Any] = {"activation": "gelu", "dropout": drop}
    Y, saved, mean, rstd = getattr(backend, f"{name}_forward")(X, gamma, beta, *running, **keys)
    exact = getattr(reference, f"{name}_forward")(
        wide, gamma.astype(float), beta.astype(float), *expected, **keys
    )
    assert (Y.dtype, mean.dtype) == (X.dtype, F32)
    for got, true in ((widen(Y), exact[0]), (widen(saved), exact[1])):
        np.testing.assert_allclose(got, true, **near)
    for got, true in ((mean, exact[2]), (rstd, exact[3]), *zip(running, expected, strict=True)):
        np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-6)

    plain = np.empty(X.shape, np.float32)
    out = (plain, None, np.empty_like(mean), np.empty_like(rstd))
    getattr(backend, f"{name}_forward")(X, gamma, beta, *running, out=out)
    true = getattr(reference, f"{name}_forward")(
        wide, gamma.astype(float), beta.astype(float), *expected
    )
    np.testing.assert_allclose(plain, true[0], rtol=1e-5, atol=1e-5)  # nothing was rounded

    below = stored(rng.standard_normal((150, 35)), precision)
    scaled = stored(of_dZ * scale, precision)
    got = getattr(backend, f"{name}_backward")(scaled, X, gamma, mean, rstd, below, "gelu", drop)
    true = getattr(reference, f"{name}_backward")(
        of_dZ,
        wide,
        gamma.astype(float),
        exact[2],
        exact[3],
        widen(below).astype(float),
        "gelu",
        drop,
    )
    np.testing.assert_allclose(widen(got[0]) / scale, true[0], **near)
    lost = 150 * 2.0**-row.digits / 8  # of deltas that were rounded before they were added
    np.testing.assert_allclose(got[1], true[1], rtol=1e-4, atol=1e-4 + lost)
    np.testing.assert_allclose(got[2], true[2], rtol=1e-4, atol=1e-4)
    if row.loss_scaling:
        with backend.place():
            backend.module.set_loss_scale(1.0)


def test_unscaled_gradients(products: Any) -> None:
    """With a loss scale, what is a gradient of a parameter is the true one."""
    rng = np.random.default_rng(2)
    dZ, X, W = (rng.integers(-3, 4, s).astype(np.float16) for s in ((300, 5), (300, 7), (5, 7)))
    scale = 64.0
    fp16 = products["fp16"]
    with fp16.place():
        fp16.module.set_loss_scale(scale)
    scaled = dZ * np.float16(scale)
    dW = fp16.linear_wgrad(scaled, X)
    dZ_prev, db_prev = fp16.linear_dgrad(scaled, W)
    with fp16.place():
        fp16.module.set_loss_scale(1.0)
    exact = dZ.astype(float) @ W.astype(float)
    assert np.array_equal(dW, dZ.T.astype(float) @ X.astype(float))
    assert np.array_equal(db_prev, exact.sum(axis=0))
    assert np.array_equal(dZ_prev, exact * scale)


@pytest.mark.parametrize("precision", NAMES)
def test_rounding(products: Any, precision: str) -> None:
    """`cast` is round_to, for every kind of number."""
    bits = np.random.default_rng(3).integers(0, 2**32, 3000, np.uint64).astype(np.uint32)
    edges = [0, 1, 0x80000000, 0x33000000, 0x33000001, 0x38800000, 0x477FEFFF, 0x477FF000,
             0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000, 0x7F7FFFFF, 0x7F800000]  # fmt: skip
    x = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    out = np.empty(x.shape, PRECISIONS[precision].stored)
    products[precision].cast(x, out)
    finite = ~np.isnan(x)
    assert np.array_equal(out[finite], round_to(x, precision)[finite])
    assert np.isnan(widen(out[~finite])).all()


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("by_k", [False, True], ids=["along K", "across K"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_no_two_rows_meet_in_a_bank(products: Any, precision: str, by_k: bool, size: int) -> None:
    """Of a strip in shared memory, by its addresses: the banks hold 8 × 16 bytes at a time."""
    choice = choose("linear_forward", 1, 1, 1, precision, 80)
    width = np.dtype(PRECISIONS[precision].stored).itemsize
    rows, columns = (64 // width, size) if by_k else (size, 64 // width)
    chunks = columns * width // 16
    unit = Unit(
        str(Path(__file__).parent / "strip_places.cu"), plain_variant("float32", choice.types)
    )
    with products[precision].place():
        import cupy

        placed = cupy.asarray(np.zeros((rows, chunks), np.int64))
        launch(unit, "strip_places", (1,), (32,), placed, size, int(by_k))
        places = placed.get()
    assert sorted(places.ravel()) == list(range(0, size * 64, 16))  # each chunk has its own place
    group = places // 16 % 8  # which 16 of the 128 bytes of a line
    eight = np.arange(8)
    for c in range(chunks):  # ldmatrix: eight rows of one column of chunks
        if not (by_k and width == 4):
            for first in range(0, rows, 8):
                assert len(set(group[first + eight, c])) == 8
        elif c % 2 == 0:  # element by element: four rows, eight neighbours in each
            for first in range(0, rows, 4):
                assert len(set(group[first : first + 4, c : c + 2].ravel())) == 8
    in_order = group.ravel().reshape(-1, 8)  # cp.async: eight threads, neighbouring chunks
    assert (np.sort(in_order, axis=1) == eight).all()


def test_choice_explains_itself() -> None:
    few = choose("linear_forward", 256, 10, 784, "float32", 75)
    assert (few.tile.generation, few.tile.name) == ("simt", "small")
    assert few.why == (
        "linear_forward of 256 × 10 elements, 784 terms each, in float32: ordinary arithmetic, "
        "8 block(s) of 32 × 32, the smallest tile, as no tile gives 64 blocks"
    )
    many = choose("linear_wgrad", 4096, 4096, 8192, "bf16", 80)
    assert (many.tile.generation, many.tile.name) == ("ampere", "wide")
    assert "tensor cores by mma.sync, 512 block(s) of 128 × 256" in many.why
    assert choose("linear_wgrad", 4096, 4096, 8192, "bf16", 120) == many  # the same bits
    assert choose("linear_dgrad", 1024, 1024, 8, "tf32", 80).tile.name == "large"


def test_gpu_without_tensor_cores_is_refused() -> None:
    with pytest.raises(OptionError) as error:
        choose("linear_forward", 8, 8, 8, "bf16", 75)
    assert str(error.value) == (
        'linear_forward: precision: "bf16" needs a GPU of compute capability 8.0 or more, got 7.5; '
        "use float32"
    )


def test_arrays_of_another_precision_are_refused(products: Any) -> None:
    X, W = np.zeros((3, 4), np.float32), np.zeros((2, 4), np.uint16)
    with pytest.raises(KindError, match=r"linear_forward: X: expected dtype uint16, got float32"):
        products["bf16"].linear_forward(X, W)
    with pytest.raises(KindError, match=r"linear_wgrad: X: expected dtype float16, got float32"):
        products["fp16"].linear_wgrad(np.zeros((3, 4), np.float16), X)
