"""Every operator on the device beside the reference in float64: `python benchmarks/gpu/check.py`.

Needs NumPy and CuPy only. Products of whole numbers must agree bit for bit, everything else to a
few roundings; repeated calls must give the same bits; a class id out of range must leave the
context usable; a training run must follow the reference's loss curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from measure import Table, device, options

DTYPES = ("float32", "float64")
REPEATS = 100


def main() -> None:
    """Run every check, write a row for each, end with an error if one failed."""
    given = options(__doc__)
    sizes = (33, 17, 40) if given.dry_run else (130, 70, 257)
    table = Table(given.out / "check.csv")
    failed = 0
    with device(given.dry_run) as cupy:
        if given.small:
            cupy.cuda.set_allocator(None)  # the sanitizer then knows where each array ends
        for name, check in checks(cupy, sizes, given.dry_run or given.small):
            try:
                worst, problem = float(check()), ""
            except Exception as error:  # the other checks still count
                worst, problem = float("nan"), f"{type(error).__name__}: {error}".splitlines()[0]
            good = not problem and worst <= 1
            failed += not good
            table.add(check=name, good=good, error_by_bound=worst, problem=problem)
    print(f"{failed} failed")
    raise SystemExit(failed > 0)


Check = tuple[str, Callable[[], float]]


def checks(cupy: Any, sizes: tuple[int, int, int], few: bool) -> Iterator[Check]:
    """(name, a function that gives the largest error divided by its bound)."""
    from backprop_kernels.activations import ACTIVATIONS
    from backprop_kernels.losses import LOSSES
    from backprop_kernels.optimizers import OPTIMIZERS

    some = ["relu", "gelu", "tanh"] if few else list(ACTIVATIONS)
    for dtype in map(np.dtype, DTYPES[: 1 if few else 2]):
        yield f"whole products {dtype}", lambda d=dtype: products(cupy, sizes, d)
        for act in some:
            yield f"layer {act} {dtype}", lambda d=dtype, a=act: layer(cupy, sizes, d, a)
        yield f"functions {dtype}", lambda d=dtype: functions(cupy, d)
        for norm in ("batch_norm", "layer_norm"):
            yield f"{norm} {dtype}", lambda d=dtype, n=norm: normalised(cupy, sizes, d, n)
        for loss in LOSSES:
            yield f"loss {loss} {dtype}", lambda d=dtype, n=loss: losses(cupy, sizes, d, n)
        for rule in OPTIMIZERS:
            yield f"update {rule} {dtype}", lambda d=dtype, r=rule: updated(cupy, d, r)
    for precision in ("bf16", "fp16", "tf32", "bf16x3", "bf16x6"):
        yield f"whole products {precision}", lambda p=precision: in_precision(cupy, sizes, p, few)
    for precision in ("float32", "tf32", "bf16"):
        yield f"fused update {precision}", lambda p=precision: fused(p, few)
    yield "a whole network", lambda: whole_network(cupy)
    yield "same bits", lambda: repeated(cupy, sizes, 3 if few else REPEATS)
    yield "a wrong class id", lambda: wrong_class(cupy)
    yield "training", trained


def both(
    cupy: Any, name: str, arguments: list[Any], slack: float = 8.0, exact: bool = False
) -> float:
    """The operator on the device and in the reference: the largest error by its bound."""
    from backprop_kernels import cuda, reference
    from backprop_kernels.activations import ACTIVATIONS
    from backprop_kernels.reference.epilogue import as_bits

    dtype = next(a.dtype for a in arguments if isinstance(a, np.ndarray) and a.dtype.kind == "f")

    def wide(value: Any) -> Any:
        return value.astype(float) if getattr(value, "dtype", None) == dtype else value

    given = list(arguments)
    if name == "linear_dgrad" and len(given) > 2 and ACTIVATIONS[given[3]].slopes:
        given[2] = as_bits(given[2], given[3])
    got = getattr(cuda, name)(*(placed(cupy, a) for a in given))
    expected = getattr(reference, name)(*map(wide, arguments))
    worst = 0.0
    for computed, true in zip(as_tuple(got), as_tuple(expected), strict=True):
        if computed is None or true is None or np.size(true) == 0:
            continue
        if computed.dtype == np.uint32:
            true = as_bits(true, arguments[3])
        error = np.abs(computed.get().astype(float) - true)
        # 16 u of the largest result; tests/kernels have bounds of every element.
        bound = 0 if exact else slack * np.finfo(dtype).eps * np.abs(true).max()
        with np.errstate(all="ignore"):
            ratio = np.where(error == 0, 0, error / bound)
        worst = max(worst, float(np.nan_to_num(ratio, nan=np.inf).max()))
    return worst


def placed(cupy: Any, value: Any) -> Any:
    """Arrays on the device; everything else as it is."""
    if hasattr(value, "stream"):
        return value._replace(stream=cupy.asarray(value.stream))
    return cupy.asarray(value) if isinstance(value, np.ndarray) else value


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def normal(dtype: Any, *shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def products(cupy: Any, sizes: tuple[int, int, int], dtype: Any) -> float:
    """Whole numbers, ragged and tile-exact shapes: no rounding anywhere."""
    from backprop_kernels.arrays import Dropout

    rng = np.random.default_rng(0)
    half = Dropout(0.5, np.array([5, 3]), 2)
    worst = 0.0
    for n, i, o in (sizes, (1, 1, 1), (128, 64, 128), (sizes[2], sizes[0], sizes[1])):
        X, W, b, dZ, saved = (
            rng.integers(-8, 9, s).astype(dtype) for s in ((n, i), (o, i), (o,), (n, o), (n, i))
        )
        worst = max(
            worst,
            both(cupy, "linear_forward", [X, W, b, "relu", half], exact=True),
            both(cupy, "linear_dgrad", [dZ, W, saved, "relu", half], exact=True),
            both(cupy, "linear_wgrad", [dZ, X], exact=True),
        )
    return worst


def in_precision(cupy: Any, sizes: tuple[int, int, int], precision: str, few: bool) -> float:
    """Whole numbers on tensor cores, up to the largest tile: exact but for the stored dZ_prev."""
    from backprop_kernels.cuda.in_precision import InPrecision
    from backprop_kernels.precisions import round_to, widen

    rng = np.random.default_rng(0)
    backend = InPrecision(precision)
    equal = True
    for n, i, o in [sizes, (1, 1, 1), (128, 64, 128), *([] if few else [(8192, 300, 520)])]:
        X, W, dZ = (rng.integers(-2, 3, s).astype(np.float32) for s in ((n, i), (o, i), (n, o)))
        x, w, dz = (cupy.asarray(round_to(a, precision)) for a in (X, W, dZ))
        Y = cupy.empty((n, o), np.float32)
        backend.linear_forward(x, w, out=(Y, None))
        dX, db = backend.linear_dgrad(dz, w)
        exact = dZ @ W
        equal &= np.array_equal(Y.get(), X @ W.T) and np.array_equal(db.get(), exact.sum(axis=0))
        equal &= np.array_equal(backend.linear_wgrad(dz, x).get(), dZ.T @ X)
        equal &= np.array_equal(widen(dX.get()), widen(round_to(exact, precision)))
    return 0.0 if equal else np.inf


def layer(cupy: Any, sizes: tuple[int, int, int], dtype: Any, activation: str) -> float:
    n, i, o = sizes
    X, W, b, dZ, saved = normal(dtype, (n, i), (o, i), (o,), (n, o), (n, i))
    W /= dtype.type(i**0.5)
    forward = both(cupy, "linear_forward", [X, W, b, activation])
    return max(forward, both(cupy, "linear_dgrad", [dZ, W, np.abs(saved) / 4, activation]))


def functions(cupy: Any, dtype: Any) -> float:
    """exp, tanh, expm1 (by elu) and our own sine: within 2 ulp, as cuda/code.py states."""
    from backprop_kernels import cuda

    x = np.random.default_rng(0).uniform(-9, 9, (100_000 if cupy.__name__ == "cupy" else 1000, 1))
    X, W = x.astype(dtype), np.ones((1, 1), dtype)
    wide = X.astype(np.longdouble)
    true = {
        "exp": np.exp(wide), "tanh": np.tanh(wide), "sin": np.sin(wide),
        "elu": np.where(wide > 0, wide, np.expm1(wide)),
    }  # fmt: skip
    worst = 0.0
    for name, exact in true.items():
        got = cuda.linear_forward(cupy.asarray(X), cupy.asarray(W), None, name)[0].get()
        ulp = np.spacing(np.abs(exact).astype(dtype)).astype(np.longdouble)
        worst = max(worst, float((np.abs(got - exact) / ulp).max()))
    return worst / 2


def normalised(cupy: Any, sizes: tuple[int, int, int], dtype: Any, name: str) -> float:
    n, f, _ = sizes
    X, gamma, beta, dZ, saved = normal(dtype, (n, f), (f,), (f,), (n, f), (n, f))
    per = (f,) if name == "batch_norm" else (n,)
    running = [np.zeros(f, dtype), np.ones(f, dtype)] if name == "batch_norm" else []
    mean, rstd = normal(dtype, per, per)
    forward = both(cupy, f"{name}_forward", [X, gamma, beta, *running])
    backward = [dZ, X, gamma, mean / 9, np.abs(rstd), np.tanh(saved), "tanh"]
    return max(forward, both(cupy, f"{name}_backward", backward, 32.0))


def losses(cupy: Any, sizes: tuple[int, int, int], dtype: Any, name: str) -> float:
    n, f, _ = sizes
    f += f % 2
    Z, real, weight = normal(dtype, (n, f), (n, f), (n,))
    targets = {
        "counts": np.floor(np.abs(real)), "probability": np.abs(np.tanh(real)),
        "binary": (real > 0).astype(dtype), "sign": np.where(real > 0, 1, -1).astype(dtype),
        "classes": np.arange(n) % f,
    }  # fmt: skip
    from backprop_kernels.losses import LOSSES

    target = targets.get(LOSSES[name].targets, real)
    if name == "gaussian_nll":
        target = real[:, : f // 2].copy()
    return both(cupy, "loss", [Z, target, name, {}, "identity", np.abs(weight)])


def updated(cupy: Any, dtype: Any, rule: str) -> float:
    from backprop_kernels import cuda, reference
    from backprop_kernels.optimizers import OPTIMIZERS

    row = OPTIMIZERS[rule]
    P, G, *state = normal(dtype, *[(5000,)] * (2 + len(row.state)))
    state = [np.abs(s) for s in state]
    scalars = np.array([1.0, *row.scalars(3, **row.options)])
    on_device = [cupy.asarray(a) for a in (P, G, scalars, *state)]
    cuda.optimizer_step(on_device[0], on_device[1], on_device[3:], on_device[2], rule)
    reference.optimizer_step(P, G, state, scalars, rule)
    bound = 64 * float(np.finfo(dtype).eps)
    pairs = zip((on_device[0], *on_device[3:]), (P, *state), strict=True)
    return max(float(np.abs(a.get() - b).max()) / bound / 8 for a, b in pairs)


def whole_network(cupy: Any) -> float:
    """Whole numbers through one kernel in bf16: exact, ragged tiles and widths, several blocks."""
    from backprop_kernels import reference
    from backprop_kernels.arrays import LinearLayer
    from backprop_kernels.cuda.in_precision import InPrecision

    rng = np.random.default_rng(0)
    layers = [LinearLayer(20, 72, 0, 1440, "relu"), LinearLayer(72, 16, 1512, 2664, "identity")]
    X, P = rng.integers(-2, 3, (1024, 20)), rng.integers(-1, 2, 2680)
    P[rng.random(P.size) < 0.9] = 0  # few terms a sum, so that nothing grows beyond 8 bits
    Z = np.maximum(X @ P[:1440].reshape(72, 20).T + P[1440:1512], 0)
    Z = Z @ P[1512:2664].reshape(16, 72).T + P[2664:]
    given = [a.astype(np.float32) for a in (X, Z - rng.integers(-2, 3, Z.shape), P)]
    weight = (np.arange(1024) < 512).astype(np.float32)
    got = InPrecision("bf16").mlp_step(
        *(cupy.asarray(a) for a in given), layers, "mse", None, cupy.asarray(weight)
    )
    wide = (a.astype(float) for a in given)
    expected = reference.mlp_step(*wide, layers, "mse", None, weight.astype(float))
    same = all(np.array_equal(a.get(), b) for a, b in zip(got, expected, strict=True))
    return 0.0 if same else float("inf")


def fused(precision: str, few: bool) -> float:
    """The update where weight gradients are made has the bits of a pass of its own."""
    from backprop_kernels.cuda import fused_update

    import backprop as bp

    rng, saved = np.random.default_rng(0), fused_update.SAVED
    batch, widths = (70, [24, 40, 136, 8]) if few else (4096, [512, 1024, 1000, 16])
    X, y = (rng.standard_normal((batch, n)).astype(np.float32) for n in (widths[0], widths[-1]))
    found = []
    fused_update.SAVED = 1 << 40
    try:
        for apart in (False, True):
            model = bp.MLP(widths, activation="gelu", device="cuda", seed=1)
            step = bp.TrainStep(
                model, "mse", bp.AdamW(weight_decay=0.1), batch, precision=precision,
                fused_update=not apart,
            )  # fmt: skip
            losses = [float(step(X, y)) for _ in range(3)]
            found.append((losses, model.parameters.get(), *(m.get() for m in step.state.values())))
            if step.update.why.startswith("a pass of its own") != apart:
                raise RuntimeError(f"the update was {step.update.why}")
    finally:
        fused_update.SAVED = saved
    same = all(np.array_equal(one, other) for one, other in zip(*found, strict=True))
    return 0.0 if same else float("inf")


def repeated(cupy: Any, sizes: tuple[int, int, int], times: int) -> float:
    """Bitwise the same, however often: no sum depends on which block comes first."""
    from backprop_kernels import cuda

    n, i, o = sizes
    dZ, X, W = (cupy.asarray(a) for a in normal(np.float32, (9 * n, o), (9 * n, i), (o, i)))
    seen = set()
    for _ in range(times):
        results = [
            cuda.linear_wgrad(dZ, X), *cuda.linear_dgrad(dZ, W),
            *cuda.loss(dZ, dZ, "log_cosh", None, "tanh"),
        ]  # fmt: skip
        seen.add(b"".join(r.get().tobytes() for r in results))
    return float(len(seen))


def wrong_class(cupy: Any) -> float:
    from backprop_kernels import cuda
    from backprop_kernels.errors import LabelError

    Z = cupy.asarray(np.zeros((300, 3), np.float32))
    try:
        cuda.loss(Z, cupy.asarray(np.arange(300)), "cross_entropy")
    except LabelError:
        good = cuda.loss(Z, cupy.asarray(np.arange(300) % 3), "cross_entropy")[0]
        return abs(float(good) - float(np.log(3))) / 1e-6
    return float("inf")


def trained() -> float:
    """Ten epochs on the device and in the reference: the same weights, data and dropout masks."""
    import backprop as bp

    rng = np.random.default_rng(0)
    X = rng.standard_normal((300, 9)).astype(np.float32)
    y = (X[:, 0] * X[:, 1] > 0).astype(int) + (X[:, 2] > 0)
    curves = []
    for where in ("cuda", "reference"):
        model = bp.MLP([9, 32, 16, 3], activation="gelu", dropout=0.1, device=where, seed=1)
        history = bp.fit(
            model, X, y, loss="cross_entropy", optimizer=bp.AdamW(lr=1e-3), epochs=10,
            batch_size=64, progress=False, seed=1,
        )  # fmt: skip
        curves.append(np.array(history["loss"]))
    return float(np.abs(curves[0] / curves[1] - 1).max() / 1e-4)


if __name__ == "__main__":
    main()
