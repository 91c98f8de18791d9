"""The C++ that cuda/code.py writes, compiled by g++: every formula of every table, both dtypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array
from backprop_kernels.cuda import code
from backprop_kernels.errors import KindError
from backprop_kernels.losses import LOSSES
from backprop_kernels.optimizers import OPTIMIZERS
from backprop_kernels.reference import array_math

from tests import oracles, running_error
from tests.host_compiler import library
from tests.tolerances import unit

FUNCTIONS = ("exp", "expm1", "log", "log1p", "tanh", "erf", "sin", "cos", "sqrt", "abs", "sign")
COUNT = 4000


@dataclass(frozen=True)
class Case:
    """A formula of (m, *inputs), and how to draw inputs that make sense to it."""

    formula: Callable[..., Any]
    draw: Callable[[np.random.Generator], list[Array]]


def signed(rng: np.random.Generator) -> Array:
    """Both tails, and numbers down to 1e-12 of either sign."""
    magnitude = np.concatenate([np.geomspace(1e-12, 20, COUNT // 2), rng.uniform(0, 8, COUNT // 2)])
    return magnitude * rng.choice([-1.0, 1.0], COUNT)


def activation_cases() -> dict[str, Case]:
    cases = {}
    for name, row in ACTIVATIONS.items():

        def saved(rng: np.random.Generator, row: Any = row) -> list[Array]:
            z = signed(rng)
            return [row.forward(array_math, z) if row.saves == "Y" else z]

        cases[f"act_{name}"] = Case(row.forward, lambda rng: [signed(rng)])
        cases[f"slope_{name}"] = Case(row.derivative, saved)
    return cases


def loss_cases() -> dict[str, Case]:
    cases = {}
    for name, row in LOSSES.items():
        if row.value is None or row.gradient is None:
            continue

        def draw(rng: np.random.Generator, row: Any = row) -> list[Array]:
            target = oracles.targets(row.targets, rng, COUNT, 1, np.dtype(float))[:, 0]
            return [signed(rng), target, *(np.full(COUNT, v) for v in row.options.values())]

        cases[f"loss_{name}"] = Case(row.value, draw)
        cases[f"gradient_{name}"] = Case(row.gradient, draw)
    return cases


def update(rule: str, m: Any, p: Any, g: Any, *rest: Any) -> tuple[Any, ...]:
    """An update rule with its results in one tuple: p, then each state."""
    states = len(OPTIMIZERS[rule].state)
    p, state = OPTIMIZERS[rule].update(m, p, g, rest[:states], *rest[states:])
    return p, *state


def optimizer_cases() -> dict[str, Case]:
    cases = {}
    for rule, row in OPTIMIZERS.items():

        def draw(rng: np.random.Generator, row: Any = row) -> list[Array]:
            state = [rng.random(COUNT) for _ in row.state]  # squares are among them: not negative
            scalars = row.scalars(3, **row.options)
            constants = [np.full(COUNT, value) for value in scalars]
            return [rng.standard_normal(COUNT), rng.standard_normal(COUNT), *state, *constants]

        cases[f"update_{rule}"] = Case(lambda m, *inputs, rule=rule: update(rule, m, *inputs), draw)
    return cases


def function_cases() -> dict[str, Case]:
    def inputs(rng: np.random.Generator, name: str) -> list[Array]:
        x = signed(rng)
        return [np.abs(x) if name in ("log", "sqrt") else np.maximum(x, -0.999)]

    return {
        f"function_{name}": Case(
            lambda m, x, name=name: getattr(m, name)(x), lambda rng, name=name: inputs(rng, name)
        )
        for name in FUNCTIONS
    }


CASES = {**activation_cases(), **loss_cases(), **optimizer_cases(), **function_cases()}


def arity(case: Case) -> int:
    return len(case.draw(np.random.default_rng(0)))


def text(name: str, dtype: str) -> str:
    """The function as a kernel sees it, and a loop over arrays that C can call."""
    n = arity(CASES[name])
    inputs = [f"x{i}" for i in range(n)]
    body = code.function(name, inputs, lambda *x: CASES[name].formula(code, *x))
    results = body.count("real& r")
    loads = ", ".join(f"in[{i}][k]" for i in range(n))
    call = (
        f"{name}({loads}{''.join(f', out[{i}][k]' for i in range(results))})"
        if results
        else f"out[0][k] = {name}({loads})"
    )
    head = f'extern "C" void {dtype}_{name}(const real* const* in, real* const* out, long count)'
    return f"{body}\n{head} {{\n    for (long k = 0; k < count; ++k) {call};\n}}\n"


Run = Callable[[str, list[Array]], list[Array]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every case in one library; run(name, inputs) gives the results in the inputs' dtype."""
    folder = tmp_path_factory.mktemp("code")
    libraries = {
        dtype: library(code.variant(dtype, *(text(name, dtype) for name in CASES)), folder)
        for dtype in ("float32", "float64")
    }

    def run(name: str, inputs: list[Array]) -> list[Array]:
        dtype, count = inputs[0].dtype, len(inputs[0])
        inputs = [np.ascontiguousarray(x, dtype) for x in inputs]
        results = 1 + len(OPTIMIZERS[name[7:]].state) if name.startswith("update_") else 1
        outputs = [np.full(count, np.nan, dtype) for _ in range(results)]
        pointers = [
            (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
            for arrays in (inputs, outputs)
        ]
        getattr(libraries[str(dtype)], f"{dtype}_{name}")(*pointers, ctypes.c_long(count))
        return outputs

    return run


def of(case: Case, m: Any, inputs: list[Any]) -> list[Any]:
    """The formula's results in the namespace m, as a list."""
    result = case.formula(m, *inputs)
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", CASES)
def test_formula_is_within_its_running_error(compiled: Run, dtype: np.dtype, name: str) -> None:
    case = CASES[name]
    inputs = [x.astype(dtype) for x in case.draw(np.random.default_rng(1))]
    with np.errstate(all="ignore"):
        bounded = of(case, running_error, [running_error.Bounded.exact(x) for x in inputs])
    # Against float32 the value is exact; against float64 it has the same errors as the kernel.
    share = 1 if dtype == np.float32 else 2
    for number, (got, exact) in enumerate(zip(compiled(name, inputs), bounded, strict=True)):
        exact = running_error.Bounded.exact(inputs[0]).like(exact)
        error = np.abs(got.astype(np.float64) - exact.value)
        bad = ~(error <= share * exact.error)
        assert not bad.any(), (
            f"{name}, result {number}: {bad.sum()} of {COUNT}, first at "
            f"{[x[bad.argmax()] for x in inputs]}: {got[bad.argmax()]}"
        )
        # The bound itself must be worth something.
        assert (np.median(exact.error / np.maximum(np.abs(exact.value), 1e-3))) < 200 * exact.unit


def special(dtype: np.dtype) -> Array:
    info = np.finfo(dtype)
    numbers = [0.0, 1.0, float(info.smallest_subnormal), float(info.tiny), 3.0, 1e4, 1e18]
    numbers += [float(info.max), np.inf]
    return np.array([np.nan, *numbers, *(-x for x in numbers)], dtype)


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("update")])
def test_special_values_are_the_references(compiled: Run, dtype: np.dtype, name: str) -> None:
    """NaN, infinity, huge and denormal: NaN where the reference has it, the same infinities."""
    case = CASES[name]
    x = special(dtype)
    others = [np.full(len(x), v[0], dtype) for v in case.draw(np.random.default_rng(0))[1:]]
    with np.errstate(all="ignore"):
        expected = np.broadcast_to(of(case, array_math, [x, *others])[0], x.shape)
    (got,) = compiled(name, [x, *others])
    assert expected.dtype in (dtype, np.float64)
    assert np.array_equal(np.isnan(got), np.isnan(expected)), (x, got, expected)
    assert np.array_equal(got[np.isinf(expected)], expected[np.isinf(expected)]), (got, expected)
    finite = np.isfinite(expected)
    if name in ("function_sin", "function_cos", "act_sin", "slope_sin"):
        finite &= np.abs(x) <= 1e5
        assert (np.abs(got[np.isfinite(x)]) <= 1).all()
    x, got, expected = x[finite], got[finite], expected[finite]
    scale = np.fmax(np.fmax(1, np.abs(x)), np.abs(expected))
    with np.errstate(over="ignore"):
        assert (np.abs(got - expected) <= 64 * unit(dtype) * scale).all(), (x, got, expected)


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sine_over_its_range(compiled: Run, dtype: np.dtype, name: str) -> None:
    rng = np.random.default_rng(0)
    end = 1e5 if dtype == np.float32 else 1e9
    x = np.concatenate([
        rng.uniform(-end, end, 200_000),
        np.arange(-50_000, 50_000) * (np.pi / 2),  # near the zeros, where the reduction cancels
        rng.uniform(-1, 1, 1000) * 1e-30, [0.0, -0.0],
    ]).astype(dtype)  # fmt: skip
    (got,) = compiled(f"function_{name}", [x])
    exact = getattr(np, name)(x.astype(np.longdouble))
    ulp = np.spacing(np.abs(exact).astype(dtype)).astype(np.longdouble)
    assert (np.abs(got - exact) <= 2 * ulp).all()
    assert np.signbit(got[-1]) == (name == "sin")


def test_what_occurs_twice_is_computed_once() -> None:
    written = code.function(
        "f", ["z"], lambda z: code.exp(z) / (1.0 + code.exp(z)) + code.exp(z) / (1.0 + code.exp(z))
    )
    assert written == (
        "DEVICE real f(real z) {\n"
        "    const real v0 = exp(z);\n"
        "    const real v1 = real(1.0) + v0;\n"
        "    const real v2 = v0 / v1;\n"
        "    const real v3 = v2 + v2;\n"
        "    return v3;\n"
        "}\n"
    )


def test_several_results_are_references_and_a_number_is_a_literal() -> None:
    written = code.function("f", ["p", "g"], lambda p, g: (p - 0.5 * g, g, 1))
    assert (
        written.splitlines()[0] == "DEVICE void f(real p, real g, real& r0, real& r1, real& r2) {"
    )
    assert written.splitlines()[-3:-1] == ["    r1 = g;", "    r2 = real(1.0);"]


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (lambda z: 1.0 if z > 0 else 0.0, "formula: condition: expected no branch on a value"),
        (lambda z: (z > 0) + 1, "formula: operand: expected a number, got a comparison"),
        (lambda z: z + np.inf, "formula: constant: expected a finite number, got inf"),
        (lambda z: z * "2", "formula: constant: expected a finite number, got '2'"),
        (lambda z: code.where(z, 1, 0), "formula: condition: expected a comparison of values"),
    ],
)
def test_mistakes_in_a_formula_are_named(formula: Any, message: str) -> None:
    with pytest.raises(KindError, match=f"^{message}"):
        code.function("f", ["z"], formula)


def test_options_become_constants() -> None:
    written = code.variant("float64", "DEVICE …", SAVES_Y=1, SAVES_Z=False)
    assert "using real = double;\n" in written
    assert "constexpr int SAVES_Y = 1;\nconstexpr int SAVES_Z = 0;\n\nDEVICE …" in written
