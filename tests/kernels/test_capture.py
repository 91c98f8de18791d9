"""A captured program replays what its operators do, on what their arrays hold by then."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.errors import KindError
from backprop_kernels.optimizers import OPTIMIZERS


class Network:
    """Every operator once, on arrays of its own: a training step written out."""

    def __init__(self, backend: ModuleType, dtype: np.dtype, batch: int = 37) -> None:
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(dtype)

        self.backend = backend
        self.X, self.ids = draw(batch, 9), rng.integers(0, 5, batch)
        self.W1, self.b1, self.W2, self.b2 = draw(33, 9), draw(33), draw(5, 33), draw(5)
        self.gamma, self.beta = draw(33), draw(33)
        self.running = np.zeros(33, dtype), np.ones(33, dtype)
        self.arrays = {
            name: np.full(shape, np.nan, dtype)
            for name, shape in {
                "Y1": (batch, 33), "Z1": (batch, 33), "Y2": (batch, 33), "Z": (batch, 5),
                "mean_b": (33,), "rstd_b": (33,), "mean_l": (batch,), "rstd_l": (batch,),
                "Y3": (batch, 33), "kept2": (batch, 33), "kept3": (batch, 33),
                "dZ": (batch, 5), "db": (5,), "dZ3": (batch, 33), "db3": (33,),
                "dZ2": (batch, 33), "db2": (33,), "dgamma": (33,), "dZ1": (batch, 33),
                "db1": (33,), "dW1": (33, 9), "dW2": (5, 33), "dgamma_b": (33,),
            }.items()
        }  # fmt: skip
        self.value, self.norm = np.zeros(()), np.zeros(())
        self.stream = np.array([3, 0], np.int64)
        rule = OPTIMIZERS["Adam"]
        self.scalars = np.array([0.5, *rule.scalars(1, **rule.options)])
        self.state = np.zeros(33 * 9, dtype), np.zeros(33 * 9, dtype)

    def step(self, X: Array, ids: Array) -> None:
        k, a, drop = self.backend, self.arrays, Dropout(0.25, self.stream, 1)
        k.linear_forward(X, self.W1, self.b1, "gelu", None, out=(a["Y1"], a["Z1"]))
        k.batch_norm_forward(
            a["Y1"], self.gamma, self.beta, *self.running, True, 0.1, 1e-5, "tanh", drop,
            out=(a["Y2"], a["kept2"], a["mean_b"], a["rstd_b"]),
        )  # fmt: skip
        k.layer_norm_forward(
            a["Y2"], self.gamma, self.beta, 1e-5, "silu", None,
            out=(a["Y3"], a["kept3"], a["mean_l"], a["rstd_l"]),
        )  # fmt: skip
        k.linear_forward(a["Y3"], self.W2, self.b2, out=(a["Z"], None))
        k.loss(a["Z"], ids, "cross_entropy", out=(self.value, a["dZ"], a["db"]))
        k.linear_dgrad(a["dZ"], self.W2, a["kept3"], "silu", None, out=(a["dZ3"], a["db3"]))
        k.layer_norm_backward(
            a["dZ3"], a["Y2"], self.gamma, a["mean_l"], a["rstd_l"], a["kept2"], "tanh", drop,
            out=(a["dZ2"], a["db2"], a["dgamma"]),
        )  # fmt: skip
        k.batch_norm_backward(
            a["dZ2"], a["Y1"], self.gamma, a["mean_b"], a["rstd_b"], a["Z1"], "gelu", None,
            out=(a["dZ1"], a["db1"], a["dgamma_b"]),
        )  # fmt: skip
        k.linear_wgrad(a["dZ1"], X, out=a["dW1"])
        k.linear_wgrad(a["dZ"], a["Y3"], out=a["dW2"])
        k.optimizer_step(
            self.W1.reshape(-1), a["dW1"].reshape(-1), self.state, self.scalars, "Adam", self.value,
            out=self.norm,
        )  # fmt: skip

    def bits(self) -> list[bytes]:
        """Everything the step wrote."""
        written = [
            *self.arrays.values(),
            *self.running,
            *self.state,
            self.W1,
            self.value,
            self.norm,
        ]
        return [a.tobytes() for a in written]


def test_replay_gives_the_bits_of_calling(backend: ModuleType, dtype: np.dtype) -> None:
    direct, captured = Network(backend, dtype), Network(backend, dtype)
    replay: Callable[..., None] = backend.capture(captured.step, captured.X, captured.ids)
    rng = np.random.default_rng(1)
    for step in range(3):
        # Other arrays each time, then the contents of the same ones changed.
        X, ids = rng.standard_normal(direct.X.shape).astype(dtype), rng.integers(0, 5, 37)
        for _ in range(2):
            X += 1
            for network in (direct, captured):
                network.stream[1] = step
                network.scalars[0] = 0.5 + step
            direct.step(X, ids)
            replay(X, ids)
            assert captured.bits() == direct.bits(), f"step {step}"
    assert not any(np.isnan(a).any() for a in captured.arrays.values())


def test_capturing_computes_nothing_and_replaying_repeats_itself(
    backend: ModuleType, dtype: np.dtype
) -> None:
    runs = []
    for _ in range(2):
        network = Network(backend, dtype, batch=300)
        before = network.bits()
        replay = backend.capture(network.step, network.X, network.ids)
        assert network.bits() == before
        for _ in range(5):
            replay(network.X, network.ids)
        runs.append(network.bits())
    assert runs[0] == runs[1]


def test_no_bit_depends_on_the_number_of_threads(dtype: np.dtype) -> None:
    from backprop_kernels import cpu
    from backprop_kernels.cpu import threads

    before, results = threads.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5, 2):
            threads.set_num_threads(count)
            network = Network(cpu, dtype, batch=3001)  # ~7 Mflop: worth five threads
            replay = cpu.capture(network.step, network.X, network.ids)
            for _ in range(3):
                replay(network.X, network.ids)
            results.append(network.bits())
    finally:
        threads.set_num_threads(before)
    assert all(result == results[0] for result in results)


def rows(*arrays: Array) -> list[Array]:
    """Each with four rows like it below one another."""
    return [np.stack([a] * 4) for a in arrays]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [None, 0, 2, 3])
def test_turns_are_replays_with_the_next_rows(
    dtype: np.dtype, threads: int, bad: int | None
) -> None:
    """A loss that is not finite makes its turn the last; the next call begins with row 0 again."""
    from backprop_kernels import cpu
    from backprop_kernels.cpu.threads import get_num_threads, set_num_threads

    before = get_num_threads()
    set_num_threads(threads)
    try:
        one, many = Network(cpu, dtype, 1000), Network(cpu, dtype, 1000)
        replay = cpu.capture(one.step, one.X, one.ids)
        columns = streams, tables = rows(many.stream, many.scalars)
        results = values, norms = rows(many.value, many.norm)
        many.stream, many.scalars = streams[0], tables[0]
        many.value, many.norm = values[:1].reshape(()), norms[:1].reshape(())
        turns = cpu.capture(many.step, many.X, many.ids).turns(columns, results)
        for call, first in enumerate((0, 4)):
            streams[:, 1] = np.arange(first, first + 4)
            tables[:, 0] = np.arange(4) + 0.5
            for turn in range(4):
                one.stream[1], one.scalars[0] = streams[turn, 1], tables[turn, 0]
                if bad == turn and call == 0:
                    one.scalars[1], tables[turn, 1] = np.nan, np.nan  # W1, so the next loss
                replay(one.X, one.ids)
                if not (np.isfinite(one.value) and np.isfinite(one.norm)):
                    break
            assert turns(4, many.X, many.ids) == turn + 1
            many.value[...], many.norm[...] = values[turn], norms[turn]
            assert many.bits() == one.bits()
            one.scalars[1] = tables[:, 1] = 1e-3
            one.W1[...] = many.W1[...] = np.eye(33, 9)
            for network in (one, many):
                for moment in network.state:
                    moment[...] = 0
    finally:
        set_num_threads(before)


def test_two_programs_do_not_mix(backend: ModuleType, dtype: np.dtype) -> None:
    networks = Network(backend, dtype, 5), Network(backend, dtype, 70)
    programs = [backend.capture(n.step, n.X, n.ids) for n in networks]
    for i in (1, 0, 1, 0):
        programs[i](networks[i].X, networks[i].ids)
    for network in networks:
        alone = Network(backend, dtype, len(network.X))
        for _ in range(2):
            alone.step(alone.X, alone.ids)
        assert alone.bits() == network.bits()


def test_one_array_may_stand_for_two_inputs(backend: ModuleType, dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    first, Z, target, dZ = (rng.standard_normal((6, 6)).astype(dtype) for _ in range(4))
    value, db = np.zeros(()), np.zeros(6, dtype)

    def loss(Z: Array, target: Array) -> None:
        backend.loss(Z, target, "mse", out=(value, dZ, db))

    backend.capture(loss, first, first)(Z, target)
    assert value == backend.loss(Z, target, "mse")[0]
    assert np.array_equal(dZ, backend.loss(Z, target, "mse")[1])


def test_input_that_replaying_could_not_replace_is_refused() -> None:
    from backprop_kernels import cpu

    X, out = np.ones((3, 3)), np.ones((3, 3))

    def of_a_view(A: Array) -> None:  # a view keeps the address of its first array
        cpu.linear_forward(A[:], X, out=(out, None))

    with pytest.raises(KindError) as error:
        cpu.capture(of_a_view, X)
    assert str(error.value) == (
        "capture: inputs[0]: expected an array that an operator reads as it is, got one that is "
        "read through a view or not at all; replaying could not replace it"
    )


@pytest.mark.parametrize("bad", [-1, 3, 2**40, -(2**62)])
def test_class_id_out_of_range_makes_a_replayed_loss_nan(dtype: np.dtype, bad: int) -> None:
    """A program cannot raise, and must not use the id as an index."""
    from backprop_kernels import cpu

    Z, ids = np.zeros((5, 3), dtype), np.zeros(5, np.int64)
    value, dZ, db = np.zeros(()), np.zeros((5, 3), dtype), np.zeros(3, dtype)
    weight = {"class_weight": np.ones(3)}

    def loss(ids: Array) -> None:
        cpu.loss(Z, ids, "cross_entropy", weight, out=(value, dZ, db))

    replay = cpu.capture(loss, ids)
    ids[3] = bad
    replay(ids)
    assert np.isnan(value)
    ids[3] = 1
    replay(ids)
    assert value == pytest.approx(np.log(3), rel=1e-6)
