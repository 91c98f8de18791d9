"""Elementary functions of the CPU kernels: ulp bounds, special values, one result on every path."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import mpmath
import numba
import numpy as np
import pytest
import scipy.special
from backprop_kernels.cpu import ir as kernel_ir
from backprop_kernels.cpu import vector_math
from backprop_kernels.cpu.vector_math import elementwise
from backprop_kernels.errors import KindError
from backprop_kernels.reference import array_math
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

NAMES = ("exp", "expm1", "log", "log1p", "tanh", "erf", "sin", "cos")
REFERENCE = {name: getattr(scipy.special if name == "erf" else np, name) for name in NAMES}

# Largest error in ulp that the docstring of vector_math promises.
ULP = {
    "float32": dict(zip(NAMES, (1.0, 1.5, 0.9, 1.4, 2.0, 1.3, 1.6, 1.6), strict=True)),
    "float64": dict(zip(NAMES, (1.0, 2.0, 0.9, 1.5, 2.2, 1.3, 1.6, 1.6), strict=True)),
}
TRIGONOMETRIC_END = {"float32": 1e5, "float64": 1e9}

# Where a formula changes its path, and its neighbourhood is worth a look.
BREAKPOINTS = (
    [0.0, 1.0, -1.0, 2**-0.5, 2**0.5, 0.84, 3.95, 5.95, 9.0, 18.0, 20.0, 38.0]
    + [k * np.log(2) / 2 for k in range(-5, 6)]
    + [k * np.pi / 4 for k in (1, 2, 3, 4, 5, 100, 1001, 79577)]
    + [88.72284, -87.33655, -103.97208, 709.782712893384, -708.3964185322641, -745.1332191019412]
)

KERNEL_OPTIONS = {"error_model": "numpy", "_nrt": False}


def function(name: str) -> Any:
    """The function of that name for Numba code."""
    return elementwise(lambda m, x: getattr(m, name)(x))


def over_array(function: Any) -> Any:
    """Kernel of `Y[i] = function(X[i])`."""

    @numba.njit(**KERNEL_OPTIONS)
    def kernel(X: Any, Y: Any) -> None:
        for i in range(X.shape[0]):
            Y[i] = function(X[i])

    return kernel


@pytest.fixture(scope="module")
def evaluate() -> Callable[[np.ndarray], np.ndarray]:
    """All functions of an array at once, one scalar after the other: rows in the order of NAMES."""
    exp, expm1, log, log1p, tanh, erf, sin, cos = (function(name) for name in NAMES)

    @numba.njit(**KERNEL_OPTIONS)
    def kernel(X: Any, Y: Any) -> None:
        for i in range(X.shape[0]):
            x = X[i]
            Y[0, i], Y[1, i], Y[2, i], Y[3, i] = exp(x), expm1(x), log(x), log1p(x)
            Y[4, i], Y[5, i], Y[6, i], Y[7, i] = tanh(x), erf(x), sin(x), cos(x)

    def run(X: np.ndarray) -> np.ndarray:
        Y = np.full((len(NAMES), X.size), -7.0, X.dtype)
        kernel(X, Y)
        return Y

    return run


def neighbours(x: np.ndarray, count: int) -> np.ndarray:
    """The `count` floats on either side of each finite x, by their bits."""
    integer = np.dtype(f"i{x.itemsize}")
    steps = np.arange(-count, count + 1, dtype=integer)
    near = (x.view(integer)[:, None] + steps).ravel().view(x.dtype)
    return np.concatenate([near, -near])


def float32_errors(X: np.ndarray, y: np.ndarray, name: str) -> np.ndarray:
    """Error in ulp of the true result. NaN and overflow must agree exactly: else infinite."""
    with np.errstate(all="ignore"):
        true = REFERENCE[name](X.astype(np.float64))
        rounded = true.astype(np.float32)
        ulp = np.ldexp(1.0, np.maximum(np.frexp(true)[1] - 24, -149))
        error = np.abs(y.astype(np.float64) - true) / ulp
    same = (y == rounded) | (np.isnan(y) & np.isnan(rounded))
    error[~np.isfinite(rounded) | ~np.isfinite(y)] = np.inf
    error[same & ~np.isfinite(rounded)] = 0.0
    if name in ("sin", "cos"):
        error[np.isfinite(X) & (np.abs(X) > TRIGONOMETRIC_END["float32"])] = 0.0
    return error


def assert_float32_accurate(X: np.ndarray, Y: np.ndarray) -> None:
    for name, y in zip(NAMES, Y, strict=True):
        error = float32_errors(X, y, name)
        worst = int(np.argmax(error))
        assert error[worst] <= ULP["float32"][name], (name, float(X[worst]), float(y[worst]))


def test_float32_accuracy(evaluate: Any) -> None:
    """Every 859th of the 2³² floats, and 500 on either side of every breakpoint."""
    breakpoints = np.array(BREAKPOINTS, np.float32)
    assert_float32_accurate(near := neighbours(breakpoints, 500), evaluate(near))
    for bits in np.array_split(np.arange(0, 2**32, 859, dtype=np.uint64), 8):
        X = bits.astype(np.uint32).view(np.float32)
        assert_float32_accurate(X, evaluate(X))


@pytest.mark.long
def test_float32_accuracy_of_every_float(evaluate: Any) -> None:
    for start in range(0, 2**32, 2**22):
        X = np.arange(start, start + 2**22, dtype=np.uint64).astype(np.uint32).view(np.float32)
        assert_float32_accurate(X, evaluate(X))


def float64_samples(name: str) -> np.ndarray:
    rng = np.random.default_rng(NAMES.index(name))
    samples = [
        rng.integers(0, 2**64, 400, dtype=np.uint64).view(np.float64),  # every exponent
        rng.normal(0.0, 2.0, 500),
        rng.choice([-1.0, 1.0], 300) * np.exp(rng.uniform(-40, 5, 300)),
        rng.uniform(0.2, 0.6, 300),  # where expm1, log1p and tanh are at their worst
        neighbours(np.array(BREAKPOINTS), 2),
    ]
    if name in ("sin", "cos"):  # near the zeros, where the reduction of the argument cancels
        samples += [rng.uniform(-1e9, 1e9, 300), rng.integers(0, 6 * 10**8, 300) * (np.pi / 2)]
        low, high = -TRIGONOMETRIC_END["float64"], TRIGONOMETRIC_END["float64"]
    elif name in ("log", "log1p"):
        shift = float(name == "log1p")
        samples.append(np.exp(-rng.uniform(0, 36, 500)) - shift)
        low, high = np.nextafter(-shift, 1.0), np.inf
    else:
        samples.append(rng.uniform(-750.0, 715.0, 500))
        low, high = -800.0, 800.0  # beyond, mpmath needs long for what the special values test
    x = np.concatenate(samples)
    return x[np.isfinite(x) & (low <= x) & (x <= high)]


def float64_error(name: str, x: float, y: float) -> float:
    """Error in ulp of the true result; an overflow must overflow."""
    with mpmath.workprec(250):
        true = getattr(mpmath, name)(mpmath.mpf(x))
        if abs(true) >= mpmath.mpf(2) ** 1024 - mpmath.mpf(2) ** 970:
            return 0.0 if y == np.copysign(np.inf, float(mpmath.sign(true))) else np.inf
        if not np.isfinite(y):
            return np.inf
        exponent = max(mpmath.frexp(true)[1] - 53, -1074)
        return float(abs(mpmath.mpf(y) - true) * mpmath.mpf(2) ** -exponent)


@pytest.mark.parametrize("name", NAMES)
def test_float64_accuracy(evaluate: Any, name: str) -> None:
    X = float64_samples(name)
    assert X.size > 1500
    for x, y in zip(X.tolist(), evaluate(X)[NAMES.index(name)].tolist(), strict=True):
        assert float64_error(name, x, y) <= ULP["float64"][name], (name, x, y)


@pytest.mark.long
def test_accuracy_without_fma() -> None:
    """The same bounds on the oldest CPU of this architecture, which multiplies and adds apart."""
    tests = f"{__file__}::test_float32_accuracy", f"{__file__}::test_float64_accuracy"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout


INF, NAN, ODD = np.inf, np.nan, ((0.0, 0.0), (-0.0, -0.0), ("tiny", "tiny"), (np.nan, np.nan))
SPECIAL: dict[str, tuple[tuple[Any, Any], ...]] = {
    "exp": (
        (0.0, 1.0),
        (-0.0, 1.0),
        (INF, INF),
        (-INF, 0.0),
        (-1e30, 0.0),
        (1e30, INF),
        (NAN, NAN),
    ),
    "expm1": (*ODD, (INF, INF), (-INF, -1.0), (-1e30, -1.0), (1e30, INF)),
    "log": (
        (0.0, -INF),
        (-0.0, -INF),
        (1.0, 0.0),
        (INF, INF),
        (-1.0, NAN),
        (-INF, NAN),
        (NAN, NAN),
    ),
    "log1p": (*ODD, (-1.0, -INF), (INF, INF), (-2.0, NAN), (-INF, NAN)),
    "tanh": (*ODD, (INF, 1.0), (-INF, -1.0), (1e30, 1.0), (-30.0, -1.0)),
    "erf": (*ODD, (INF, 1.0), (-INF, -1.0), (1e30, 1.0), (-30.0, -1.0)),
    "sin": (*ODD, (INF, NAN), (-INF, NAN)),
    "cos": ((0.0, 1.0), (-0.0, 1.0), ("tiny", 1.0), (INF, NAN), (-INF, NAN), (NAN, NAN)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values(evaluate: Any, name: str, dtype: str) -> None:
    """Infinities, NaN, the sign of zero, the smallest denormal."""
    tiny = np.finfo(dtype).smallest_subnormal
    pairs = [[tiny if v == "tiny" else v for v in pair] for pair in SPECIAL[name]]
    X, expected = np.array(pairs, dtype).T.copy()
    y = evaluate(X)[NAMES.index(name)]
    np.testing.assert_array_equal(y, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(y[number]), np.signbit(expected[number]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sine_and_cosine_stay_bounded(evaluate: Any, dtype: str) -> None:
    X = np.geomspace(1e5, np.finfo(dtype).max / 2, 100_000, dtype=dtype)
    Y = evaluate(np.concatenate([X, -X]))[-2:]
    assert np.max(np.abs(Y)) <= 1.0


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_vectors_give_the_bits_of_scalars(evaluate: Any, dtype: str, lanes: int) -> None:
    element = ir.FloatType() if dtype == "float32" else ir.DoubleType()
    pointer = ir.VectorType(element, lanes).as_pointer()
    size = np.dtype(dtype).itemsize

    @intrinsic
    def apply(typing_context: Any, source: Any, target: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, out, step = arguments
            x = builder.load(builder.inttoptr(address, pointer), align=size)
            for name in NAMES:
                y = getattr(vector_math, name)(kernel_ir.Value(builder, x))
                builder.store(y.ir, builder.inttoptr(out, pointer), align=size)
                out = builder.add(out, step)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp), generate

    @numba.njit(**KERNEL_OPTIONS)
    def kernel(X: Any, Y: Any) -> None:
        for i in range(0, X.shape[0], lanes):
            apply(X.ctypes.data + size * i, Y.ctypes.data + size * i, Y.strides[0])

    X = mixed_samples(dtype)
    Y = np.full((len(NAMES), X.size), -7.0, dtype)
    kernel(X, Y)
    np.testing.assert_array_equal(Y, evaluate(X))


def mixed_samples(dtype: str) -> np.ndarray:
    """4,096 ordinary and 4,096 arbitrary floats, among them NaN, infinities and denormals."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 256, 4096 * np.dtype(dtype).itemsize, dtype=np.uint8)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, 5e-324, 1.0], dtype)
    return np.concatenate([rng.normal(0, 3, 4088).astype(dtype), special, bits.view(dtype)])


@pytest.mark.parametrize("name", ["exp", "erf", "log1p", "sin", "tanh"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scalar_loops_vectorise(evaluate: Any, dtype: str, name: str) -> None:
    """A plain loop becomes packed instructions of that type alone, with the bits of a scalar."""
    kernel = over_array(function(name))
    array = types.Array(numba.from_dtype(np.dtype(dtype)), 1, "C")
    kernel.compile((array, array))
    (llvm,) = kernel.inspect_llvm().values()
    own, other = ("float", "double") if dtype == "float32" else ("double", "float")
    if "avx2" in numba.core.codegen.get_host_cpu_features():
        assert f"x {own}> @llvm.fmuladd" in llvm
        (assembly,) = kernel.inspect_asm().values()
        assert any(
            "vfmadd" in line and ("ymm" in line or "zmm" in line) for line in assembly.split("\n")
        )
    assert f" {other} " not in llvm
    X = mixed_samples(dtype)
    Y = np.empty_like(X)
    kernel(X, Y)
    np.testing.assert_array_equal(Y, evaluate(X)[NAMES.index(name)])


FORMULAS: dict[str, Callable[..., Any]] = {
    "arithmetic": lambda m, x: 0.1 + x * 3 - x / 7.0,
    "constants on the left": lambda m, x: 1.7 - 2 * x + 1 / x,
    "NumPy constant on the left": lambda m, x: np.float32(0.5) * x,
    "no reassociation": lambda m, x: (x + 1e8) - 1e8,
    "no fusing": lambda m, x: x * x - 2.0,
    "negation": lambda m, x: -x,
    "square root": lambda m, x: m.sqrt(m.abs(x)),
    "sign": lambda m, x: m.sign(x),
    "less": lambda m, x: m.where(x < 1, 1.0, 0.0),
    "less or equal": lambda m, x: m.where(x <= 1, 2, x),
    "greater": lambda m, x: m.where(x > 1, x, -0.3),
    "greater or equal": lambda m, x: m.where(x >= 1, x, -0.3),
    "equal": lambda m, x: m.where(x == 1, 0.25, -0.25),
    "not equal": lambda m, x: m.where(x != x, 0.25, -0.25),
    "nested": lambda m, x: m.where(x <= 0, 0.0, m.where(x >= 6, 0.5, 1.0)),
    "both": lambda m, x: m.where((x > 0) & (x < 1), 1.0, 0.0),
    "either": lambda m, x: m.where((x < 0) | (x > 1), x, 0.5),
    "a number": lambda m, x: 0.5,
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_formulas_mean_what_numpy_means(dtype: str, name: str) -> None:
    """Bit for bit: each operation is rounded once, in the arrays' type."""
    X = mixed_samples(dtype)
    Y = np.full_like(X, -7.0)
    over_array(elementwise(FORMULAS[name]))(X, Y)
    with np.errstate(all="ignore"):
        expected = np.broadcast_to(FORMULAS[name](array_math, X), X.shape).astype(dtype)
    np.testing.assert_array_equal(Y, expected)


def test_fma_rounds_once() -> None:
    """The rounding error of a product, which two roundings would lose."""
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    y = np.empty_like(x)
    over_array(elementwise(lambda m, v: kernel_ir.fma(v, v, -(v * v))))(x, y)
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(y, (wide * wide - (x * x)).astype(np.float32))


def test_two_arguments() -> None:
    slope = elementwise(lambda m, y, dY: m.where(y > 0, dY, 0.25 * dY), n_args=2)

    @numba.njit(**KERNEL_OPTIONS)
    def kernel(Y: Any, dY: Any, dZ: Any) -> None:
        for i in range(Y.shape[0]):
            dZ[i] = slope(Y[i], dY[i])

    Y, dY, dZ = np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32)
    kernel(Y, dY, dZ)
    np.testing.assert_array_equal(dZ, np.where(Y > 0, dY, dY / 4))


def test_arguments_must_share_a_float_type() -> None:
    add = elementwise(lambda m, x, y: x + y, n_args=2)
    with pytest.raises(numba.TypingError) as error:
        numba.njit(lambda x: add(x, 0.5))(np.float32(1))
    assert (
        "elementwise: arguments: expected 2 float32 or 2 float64 scalars, got float32, float64; "
        "give constants the type of the arrays" in str(error.value)
    )


def scratch(*kinds: ir.Type) -> list[kernel_ir.Value]:
    """Values of the given types in a module that is thrown away."""
    function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), kinds), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    return [kernel_ir.Value(builder, argument) for argument in function.args]


def test_what_a_formula_cannot_do() -> None:
    x, wide = scratch(ir.FloatType(), ir.DoubleType())
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: 1.0 if x > 0 else 0.0, "condition: expected no branch on a value; use m.where"),
        (lambda: 0 < x < 1, "condition: expected no branch on a value; use m.where"),
        (lambda: x + wide, "operands: expected one type, got float and double"),
        (lambda: x & 1, "operand: expected an integer for this operator, got float"),
        (lambda: x.bits * 2, "operand: expected a float for this operator, got i32"),
        (lambda: x.bits + 0.5, "constant: expected an integer, got 0.5"),
        (lambda: x + "1", "constant: expected a number, got '1'"),
    ]
    for case, message in cases:
        with pytest.raises(KindError) as error:
            case()
        assert str(error.value) == f"formula: {message}"
