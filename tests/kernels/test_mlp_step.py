"""mlp_step: loss and gradients of a whole network; in bf16 by one kernel."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from backprop_kernels import reference
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import LinearLayer
from backprop_kernels.cuda import mlp_fit
from backprop_kernels.cuda.in_precision import InPrecision
from backprop_kernels.cuda.mlp_fit import choose
from backprop_kernels.errors import KindError, LabelError, OptionError, ShapeError

from tests.cuda_host import build
from tests.cuda_host.backend import adapter, installed, on_gpu
from tests.cuda_host.threads import RACE_FOUND, under_thread_sanitizer
from tests.gpu import GPU
from tests.networks import F32, Network, check, expect_exact, run, whole_numbers


@pytest.fixture(params=["emulator", *GPU], scope="module")
def bf16(request: pytest.FixtureRequest) -> Any:
    """The backend in bf16, for NumPy arrays."""
    if request.param == "gpu":
        on = on_gpu.place
    elif reason := build.problem():
        pytest.skip(f"the CUDA emulator {reason}")
    else:
        on = installed
    with on():
        return adapter(on, InPrecision("bf16"), "cast")


# ---- one kernel

RAGGED = (1, 15, 63, 64, 65, 129, 200)


@pytest.mark.parametrize("widths", [(16, 16, 16), pytest.param((128,) * 3, marks=pytest.mark.long)])
def test_whole_numbers_are_exact(
    bf16: Any, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of a ragged batch, to the last bit; blocks take two tiles."""
    monkeypatch.setattr(mlp_fit, "TILES", (32,))
    for rows in RAGGED:
        expect_exact(bf16, rows, widths)


def test_ragged_widths_and_batches(bf16: Any) -> None:
    """Widths that are filled up, a layer of one neuron, one without a bias; 0 rows too."""
    options = {"label_smoothing": 0.1, "class_weight": np.arange(1, 6) / 3}
    for rows in RAGGED:
        check(bf16, (3, 100, 1, 33, 5), rows, ("gelu", "relu", "exp", "tanh"), "cross_entropy",
              options, weighted=rows > 1, without_bias=(1,))  # fmt: skip
    network = Network.of((3, 100, 1, 33, 5), ("gelu", "relu", "exp", "tanh"), (1,))
    given = np.zeros((0, 3), F32), np.zeros(0, np.int64), np.ones(network.size, F32)
    value, G = run(bf16, network, *given, "cross_entropy")
    assert value == 0 and not G.any()


@pytest.mark.long
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce_with_logits"])
@pytest.mark.parametrize("depth", range(1, 7))
def test_depths(bf16: Any, depth: int, loss: str) -> None:
    widths = (16, *(48, 16, 64, 3, 32)[: depth - 1], 7)
    for rows in (1, 65, 130):
        check(bf16, widths, rows, loss=loss, weighted=rows == 65)


@pytest.mark.long
@pytest.mark.parametrize("width", [1, 3, 16, 64, 100, 128])
def test_widths(bf16: Any, width: int) -> None:
    """Of the input, a hidden layer and the output."""
    for widths in ((width, 20, 5), (9, width, 5), (9, 20, width)):
        check(bf16, widths, 70, "gelu")
    check(bf16, (width,) * 3, 130, "tanh", "cross_entropy")


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, len(ACTIVATIONS), 4))
def test_every_activation(bf16: Any, first: int) -> None:
    """Hidden and of the output."""
    for names in (list(ACTIVATIONS)[first : first + 4], [list(ACTIVATIONS)[first]]):
        check(bf16, (9, *[20] * len(names)), 130, names)


@pytest.fixture
def case() -> Any:
    network, rng = Network.of((40, 30, 20, 3), "gelu"), np.random.default_rng(0)
    X, P, t = (rng.standard_normal(s).astype(F32) for s in ((330, 40), network.size, (330, 3)))
    return network, (X, t, P / 4)


def just(network: Network, tile: int) -> int:
    """So much shared memory that a tile fits, in KiB, and nothing can be fetched ahead."""
    needed = mlp_fit._fit(network.layers, "mse", tile, False).shared + mlp_fit.STATIC
    return -(-needed // 1024)


@pytest.mark.long
def test_neither_the_tile_nor_where_sums_lie_changes_a_bit(
    bf16: Any, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp_fit, "LEAST_ROWS", 128)
    seen = set()
    for tile in mlp_fit.TILES:
        monkeypatch.setattr(mlp_fit, "TILES", (tile,))
        for fours, kilobytes in ((39, 227), (12, 227), (0, 227), (39, just(case[0], tile))):
            monkeypatch.setattr(mlp_fit, "IN_REGISTERS", fours)
            monkeypatch.setattr(mlp_fit, "SHARED", {90: kilobytes})
            _, G = run(bf16, case[0], *case[1])
            seen.add(G.tobytes())
    assert len(seen) == 1


def test_with_little_memory_the_bits_are_the_same(
    bf16: Any, case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, given = case
    _, expected = run(bf16, network, *given)
    monkeypatch.setattr(mlp_fit, "IN_REGISTERS", 8)
    monkeypatch.setattr(mlp_fit, "TILES", (32,))
    monkeypatch.setattr(mlp_fit, "SHARED", {90: just(network, 32)})
    fit, why = choose(network.layers, "mse", "bf16", 90, 330)
    assert fit is not None and "gradients of 1 of 3 layers in registers" in why
    assert "32 rows at a time, " in why and "ahead" not in why
    np.testing.assert_array_equal(run(bf16, network, *given)[1], expected)


RACE = """
import sys
sys.path[:0] = {paths!r}
from backprop_kernels.cuda import compile as nvrtc, mlp_fit
from backprop_kernels.cuda.in_precision import InPrecision
from tests.cuda_host.backend import installed
from tests.cuda_host.cupy_stand_in import asarray
from tests.networks import whole_numbers

text, barrier = nvrtc.text, {barrier!r}
assert not barrier or text("mlp_step.cu").count(barrier) == 1
nvrtc.text = lambda file: text(file).replace(barrier, "") if barrier else text(file)
mlp_fit.TILES, mlp_fit.IN_REGISTERS = (32,), 5
network, (X, target, P, name, options, _) = whole_numbers(70, (20, 40, 16))
with installed():
    given = (asarray(a) for a in (X, target, P))
    InPrecision("bf16").mlp_step(*given, network.layers, name, options)
"""
BARRIERS = (
    "the copies of all threads are there", "the input is complete", "Z is complete",
    "the deltas are complete", "the activations below have been read",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("why", ["", *BARRIERS])
def test_threads_race_without_any_of_the_barriers(why: str) -> None:
    """And with all of them do not."""
    if build.problem():
        pytest.skip(f"the CUDA emulator {build.problem()}")
    barrier = f"__syncthreads();  // {why}" if why else ""
    done = under_thread_sanitizer(RACE.format(paths=sys.path, barrier=barrier))
    if not why:
        assert done.returncode == 0, done.stderr[-3000:]
        return
    assert done.returncode == RACE_FOUND and "data race" in done.stderr, done.stderr[-3000:]


def test_a_row_with_nan_stays_alone_until_the_sums(bf16: Any) -> None:
    """With weight 0 it changes nothing; else loss and gradients are not finite."""
    network, given = whole_numbers(200, (16, 16, 16))
    X, target, P, *_, weight = given
    bad = target.copy()
    bad[7] = np.nan
    weight[7] = 0
    weight[100] = 2
    same = [run(bf16, network, X, t, P, "mse", None, weight) for t in (target, bad)]
    assert same[0][0] == same[1][0] and np.array_equal(same[0][1], same[1][1])
    weight[7] = 1
    value, G = run(bf16, network, X, bad, P, "mse", None, weight)
    assert np.isnan(value) and np.isnan(G).any()


def test_rows_that_are_not_there_stay_out(bf16: Any) -> None:
    """Their activations, of the bias alone, would be infinite."""
    network = Network.of((1, 1, 1), "exp")
    P = np.zeros(network.size, F32)
    for (W, b), bias in zip(network.tensors(P), (100, 0), strict=True):
        W[...], b[...] = 1, bias
    value, G = run(bf16, network, np.full((4, 1), -100, F32), np.zeros((4, 1), F32), P)
    assert value == 1
    assert sorted(G[network.used()]) == [-200, 2, 2, 2]


def test_wrong_class_ids_are_refused_before_anything_is_written(bf16: Any) -> None:
    network = Network.of((16, 16, 16))
    X, P = np.ones((9, 16), F32), np.ones(network.size, F32)
    G = np.full(network.size, 7, F32)
    with pytest.raises(LabelError, match=r"expected class ids 0 … 15, got 16 at row 3"):
        bf16.mlp_step(X, np.where(np.arange(9) == 3, 16, 0), P, network.layers, "cross_entropy",
                      out=(None, G))  # fmt: skip
    assert (G == 7).all()


# ---- every backend


def test_gradient_is_that_of_complex_step() -> None:
    network = Network.of((3, 4, 5, 2), ("gelu", "tanh", "sigmoid"), (1,))
    rng = np.random.default_rng(0)
    X, P, t = (rng.standard_normal(s) for s in ((7, 3), network.size, (7, 2)))
    weight = rng.random(7)
    _, G = reference.mlp_step(X, t, P, network.layers, "huber", {"delta": 0.7}, weight)
    for p in range(network.size):
        nudged = P.astype(complex)
        nudged[p] += 1e-200j
        value, _ = reference.mlp_step(
            X.astype(complex), t, nudged, network.layers, "huber", {"delta": 0.7}, weight
        )
        assert abs(value.imag / 1e-200 - G[p]) < 1e-14
        assert network.used()[p] or G[p] == 0


def test_every_backend_agrees_with_the_reference(backend: ModuleType, dtype: np.dtype) -> None:
    """Loss and gradients beside float64's, as far as three layers' roundings go."""
    network, rng = Network.of((9, 20, 13, 3)), np.random.default_rng(0)
    X, P = (rng.standard_normal(s).astype(dtype) for s in ((70, 9), network.size))
    ids = rng.integers(0, 3, 70)
    value, G = run(backend, network, X, ids, P, "cross_entropy")
    wide = X.astype(float), ids, P.astype(float)
    exact = reference.mlp_step(*wide, network.layers, "cross_entropy")
    bound = 64 * float(np.finfo(dtype).eps)
    assert value == pytest.approx(float(exact[0]), rel=bound)
    np.testing.assert_allclose(G, exact[1], rtol=0, atol=bound * np.abs(exact[1]).max())
    made = backend.mlp_step(X, ids, P, network.layers, "cross_entropy")
    np.testing.assert_array_equal(np.where(network.used(), made[1], 0), G)


WRONG = {
    r"mlp_step: layers\[1\]: expected in_features=4, what it is given; got 5": lambda n: n._replace(
        layers=[n.layers[0], LinearLayer(5, 2, 0, None, "relu")]
    ),
    r"mlp_step: layers\[0\]: weight: expected 12 of the 45 parameters, got 40 … 52": lambda n: (
        n._replace(layers=[LinearLayer(3, 4, 40, None, "relu")])
    ),
    r"mlp_step: layers\[0\]: bias: expected 4 of the 45 parameters, got -1 … 3": lambda n: (
        n._replace(layers=[LinearLayer(3, 4, 0, -1, "relu")])
    ),
    r"mlp_step: layers: expected at least one, got none": lambda n: n._replace(layers=[]),
}


@pytest.mark.parametrize("message", WRONG)
def test_layers_that_do_not_fit_are_refused(backend: ModuleType, message: str) -> None:
    network = WRONG[message](Network.of((3, 4, 2)))
    X, P = np.zeros((5, 3), F32), np.zeros(45, F32)
    with pytest.raises(ShapeError, match=f"^{message}$"):
        backend.mlp_step(X, np.zeros((5, 2), F32), P, network.layers)


def test_arrays_of_another_kind_are_refused(backend: ModuleType) -> None:
    network = Network.of((3, 4, 2))
    X, P = np.zeros((5, 3), F32), np.zeros(45, F32)
    with pytest.raises(KindError, match=r"^mlp_step: P: expected dtype float32, got float64$"):
        backend.mlp_step(X, np.zeros((5, 2), F32), P.astype(float), network.layers)
    with pytest.raises(ShapeError, match=r"^loss mse: target: expected shape"):
        backend.mlp_step(X, np.zeros((5, 3), F32), P, network.layers)
    with pytest.raises(OptionError, match=r"layers\[0\]: activation: expected one of identity"):
        backend.mlp_step(X, X, P, [LinearLayer(3, 3, 0, None, "nonsense")])


# ---- what fits


def test_choice_explains_itself() -> None:
    layers = Network.of((64, 64, 64, 10)).layers
    fit, why = choose(layers, "cross_entropy", "bf16", 90, 2**18)
    assert fit is not None and fit.tile == 128
    assert why == (
        "network 64-64-64-10 in bf16: one kernel, 128 rows at a time, the next ones fetched ahead, "
        f"{fit.shared:,} of 231,424 bytes of shared memory, gradients of 3 of 3 layers in registers"
    )
    few, _ = choose(layers, "cross_entropy", "bf16", 90, 100)
    assert few is not None and few.tile == 64  # a block takes 64 rows
    reasons = {
        "a layer is 129 wide, more than 128": ((129, 4, 2), "mse", "bf16"),
        "one kernel for all is there for bf16 alone": ((9, 4, 2), "mse", "tf32"),
        "the loss is gaussian_nll": ((9, 4, 2), "gaussian_nll", "bf16"),
    }
    for reason, (widths, loss, precision) in reasons.items():
        fit, why = choose(Network.of(widths).layers, loss, precision, 90, 100)
        shown = "-".join(map(str, widths))
        assert fit is None
        assert why == f"network {shown} in {precision}: layer by layer, as {reason}"


def test_shared_memory_decides() -> None:
    """The smaller a GPU's shared memory the fewer rows at a time, until nothing fits."""
    layers = Network.of((128, 128, 128, 10)).layers
    tiles = [choose(layers, "mse", "bf16", gpu, 2**18).fit for gpu in (90, 80, 89)]
    assert [fit.tile if fit else 0 for fit in tiles] == [128, 64, 16]
    fit, why = choose(Network.of((128,) * 4).layers, "mse", "bf16", 89, 2**18)
    assert fit is None and "as one kernel needs" in why and "this GPU has 100,352" in why


def test_what_does_not_fit_is_refused(bf16: Any) -> None:
    network = Network.of((129, 2))
    X, P = np.zeros((5, 129), F32), np.zeros(network.size, F32)
    with pytest.raises(OptionError, match=r"^mlp_step: layers: expected what fits one kernel, got"):
        bf16.mlp_step(X, np.zeros((5, 2), F32), P, network.layers)


@pytest.mark.parametrize("width", [16, 40, 64, 100, 128])
def test_no_two_rows_meet_in_a_bank(width: int) -> None:
    """Eight rows of 16 bytes, as ldmatrix reads them, lie in all 32 banks."""
    stride = mlp_fit.matrix_bytes(1, width)
    assert stride % 16 == 0 and len({row * stride // 16 % 8 for row in range(8)}) == 8


def test_places_in_shared_memory_are_apart() -> None:
    """Whatever a layer has lies before the next thing, on 16 bytes."""
    layers = Network.of((100, 33, 128, 7), "gelu").layers
    fit = mlp_fit._fit(layers, "cross_entropy", 64, True)
    starts = {fit.z_at, fit.d_at, fit.ahead_at, fit.shared}
    for place in fit.places:
        starts |= {place.weights_at, place.bias_at, place.input_at, place.output_at}
        starts |= {at for at in (place.kept_at, place.sums_at) if at > 0}
    assert all(start % 16 == 0 for start in starts)
    sizes = {place.weights_at: mlp_fit.matrix_bytes(mlp_fit.padded(x.out_features), x.in_features)
             for place, x in zip(fit.places, layers, strict=True)}  # fmt: skip
    sizes |= {place.input_at: mlp_fit.matrix_bytes(64, x.in_features)
              for place, x in zip(fit.places, layers, strict=True)}  # fmt: skip
    for start, size in sizes.items():
        assert start + size <= min(s for s in starts if s > start)
