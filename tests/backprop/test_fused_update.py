"""The update where weight gradients are made: the bits of a pass of its own, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from backprop_kernels.cuda import fused_update, tiles, tuning
from backprop_kernels.optimizers import OPTIMIZERS

import backprop as bp
from tests.cuda_host import cupy_stand_in
from tests.cuda_host.fake_cublaslt import fake_cublaslt
from tests.cuda_host.fused import (
    BAD,
    ROWS,
    Training,
    adamw,
    applied,
    bad_batch,
    batch,
    gpu,
    layers,
    momentum,
    refused,
    same,
    trained,
)
from tests.cuda_host.hopper import IN_CLUSTERS, IN_TURN, SHARED

APART = "a pass of its own, as "
LONG = pytest.mark.long


@pytest.fixture(autouse=True)
def small(emulator: None) -> Iterator[None]:
    with gpu():
        yield


def making(
    rule: Callable[[], bp.Optimizer], net: Any = None, precision: str | None = None, **options: Any
) -> Callable[[bool], Training]:
    """The training, fused or not."""
    return lambda fused: Training(fused, net or layers(), rule, precision, **options)


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_bits_and_norm_are_those_of_a_pass_of_its_own(rule: str) -> None:
    """Over batches of two sizes, at a rate that changes."""
    make = making(lambda: bp.Optimizer(rule, weight_decay=0.1))
    fused, apart = trained(make, [batch(), batch(rows=33)])
    for training in (fused, apart):
        training.step.optimizer.lr *= 3
    given = batch()
    assert [float(training(*given)) for training in (fused, apart)]
    same(fused, apart)
    assert fused.step.update.why == "3 of 3 weights in their gradient's kernel"
    assert apart.step.update.why == APART + "fused_update is False"


@pytest.mark.parametrize(
    "precision", ["tf32", *(pytest.param(p, marks=LONG) for p in ("bf16", "bf16x3", "bf16x6"))]
)
@pytest.mark.parametrize("rule", [adamw, pytest.param(momentum, marks=LONG)])
def test_on_tensor_cores_as_well(precision: str, rule: Callable[[], bp.Optimizer]) -> None:
    trained(making(rule, None, precision), [batch(), batch(rows=33)])


@pytest.mark.parametrize("rule", [adamw, pytest.param(momentum, marks=LONG)])
@pytest.mark.parametrize(
    "tile",
    [SHARED, *(pytest.param(tile, marks=LONG) for tile in (IN_CLUSTERS, IN_TURN))],
    ids=lambda tile: tile.name,
)
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_on_hopper_as_well(
    precision: str, tile: tiles.Tile, rule: Callable[[], bp.Optimizer]
) -> None:
    """A batch of four runs that take turns; one of a single run."""
    with gpu(90, tile):
        make = making(rule, layers(8), precision, rows=200)
        trained(make, [batch(8, 8, 200), batch(8, 8, 64)])


GROUPS = {
    "layers.0": {"lr_scale": 0.3, "l1": 0.01},
    "layers.1.weight": {"weight_decay": 0.3, "l2": 0.1},
}
RULES: dict[str, Callable[[], bp.Optimizer]] = {
    "groups": lambda: bp.AdamW(lr=1e-2, groups=GROUPS),
    "penalties": lambda: bp.SGD(lr=1e-2, l1=0.01, l2=0.1),
    "values clipped": lambda: bp.Adam(lr=1e-2, clip_value=1e-3),
    "rows limited": lambda: bp.SGD(lr=0.3, max_norm=0.5),
}


@pytest.mark.parametrize("name", RULES)
def test_a_tensor_is_treated_as_its_row_says(name: str) -> None:
    trained(making(RULES[name]), [batch(), batch()])


@pytest.mark.parametrize(
    ("norm", "precision"),
    [
        (bp.BatchNorm, None), (bp.LayerNorm, "bf16"),
        pytest.param(bp.BatchNorm, "bf16", marks=LONG),
        pytest.param(bp.LayerNorm, None, marks=LONG),
    ],
)  # fmt: skip
def test_norms_and_dropout(norm: Any, precision: str | None) -> None:
    """Whose numbers no product has written, of the input too."""
    net = [
        bp.Dropout(0.1), bp.Linear(6, 40), norm(40, "relu"), bp.Dropout(0.25),
        bp.Linear(40, 136, "leaky_relu"), bp.Dropout(0.25), bp.Linear(136, 5),
    ]  # fmt: skip
    trained(making(adamw, net, precision), [batch(), batch()])


@pytest.mark.parametrize("frozen", ["layers.0", "layers.1.weight", "layers.2.weight"])
def test_frozen_weights_stay(frozen: str) -> None:
    fused, _ = trained(making(adamw, freeze=frozen), [batch(), batch()], untouched=2)
    assert fused.step.update.why.startswith("2 of 2 weights")


def test_classes_and_sample_weights() -> None:
    X, _ = batch()
    given = X, np.arange(ROWS) % 5, np.linspace(0, 2, ROWS, dtype=np.float32)
    trained(making(adamw, loss="cross_entropy"), [given, given])


def test_what_runs_cut_is_updated_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary kernels add up the runs of a long batch elsewhere."""
    monkeypatch.setitem(tiles.BLOCKS_WANTED, "simt", 8)
    monkeypatch.setitem(tiles.LEAST_TERMS, "simt", 16)
    fused, _ = trained(making(adamw), [batch(), batch()], untouched=1)
    assert fused.step.update.why == "1 of 3 weights in their gradient's kernel"
    cut = {"layers.0.weight", "layers.2.weight"}
    assert fused.written() == cut
    for kind in ("sums of the lowest weights", "NaN in X"):
        refused(making(momentum), 6, 5, kind, cut)


def test_what_the_library_multiplies_is_updated_afterwards() -> None:
    """It leaves sums alone; forward and dgrad read them, and find the largest all the same."""

    def decide(found: Any) -> tiles.Choice:
        weight = found[0].operator == "linear_wgrad"
        return found[0 if weight and found[0].rows != 136 else -1]

    with fake_cublaslt(), tuning.deciding(decide):
        make = making(momentum, layers(8), "bf16")
        fused, _ = trained(make, [batch(8, 8)], untouched=2)
        assert fused.written() == {"layers.1.weight"}
        refused(make, 8, 8, "sums of the lowest weights", fused.written())


@pytest.mark.parametrize("kind", BAD)
def test_a_step_that_is_refused_changes_nothing(kind: str) -> None:
    refused(making(momentum), 6, 5, kind)


def test_a_step_that_is_refused_on_hopper_changes_nothing() -> None:
    with gpu(90, SHARED):
        for kind in ("sums of the lowest weights", "the lowest deltas", "infinity in X"):
            refused(making(momentum, layers(8), "bf16"), 8, 8, kind)
        applied(making(momentum, layers(8), "bf16"), 8, 8)


def test_finite_without_a_bound_is_applied() -> None:
    applied(making(momentum), 6, 5)


def test_what_rounding_makes_infinite_is_refused() -> None:
    """The largest float32 is no tf32; here forward hides it, its delta is 0, and dW is NaN."""
    net = [bp.Linear(6, 37, "relu"), bp.Linear(37, 1, bias=False)]
    training = making(momentum, net, "tf32")(True)
    training.put(layers_0=-0.1, layers_1=1e-6)
    X, y = np.zeros((ROWS, 6), np.float32), np.zeros((ROWS, 1), np.float32)
    X[0] = np.finfo(np.float32).max
    before = training.bits()
    with pytest.raises(bp.NonFiniteError, match="gradient norm nan"):
        float(training(X, y))
    assert training.bits() == before


def test_an_unknown_class_is_refused() -> None:
    """Its loss is NaN, and every gradient finite."""
    training = making(adamw, loss="cross_entropy")(True)
    X, ids = batch()[0], np.arange(ROWS) % 5
    ids[3] = 5
    before = training.bits()
    with pytest.raises(bp.LabelError, match="got 5 at row 3"):
        float(training(*map(cupy_stand_in.asarray, (X, ids))))
    assert training.bits() == before
    assert np.isfinite(float(training(X, np.arange(ROWS) % 5)))


def test_after_a_refused_step_none_is_applied_until_it_is_known() -> None:
    training = making(adamw)(True)
    float(training(*batch()))
    before = training.bits()
    X, y = batch()
    losses = [training(X * np.float32(np.nan), y), *(training(X, y) for _ in range(3))]
    assert training.step.steps == 5
    for loss in losses:
        with pytest.raises(bp.DataError, match="NaN at row 0"):
            float(loss)
    assert training.step.steps == 1 and training.bits() == before


def options(**given: Any) -> bp.TrainStep:
    """A step of ordinary options but for these, captured."""
    precision, dtype = given.pop("precision", None), given.pop("dtype", "float32")
    model = bp.MLP([6, 37, 5], device="cuda", dtype=dtype)
    step = bp.TrainStep(
        model, "mse", given.pop("rule", "AdamW"), ROWS, precision=precision, **given
    )
    for _ in range(given.get("accumulate", 1)):
        float(step(*batch()))
    return step


OTHERS: dict[str, dict[str, Any]] = {
    "clipping needs the whole gradient first": {"clip_norm": 1.0},
    "with recompute weight gradients come before all deltas are known": {"recompute": 2},
    "parameters are float64": {"dtype": "float64"},
    "one kernel makes all gradients": {"precision": "bf16"},
    "fused_update is False": {"fused_update": False},
    "the gradients of several batches are added up first": {"accumulate": 2},
}


@pytest.mark.parametrize("reason", OTHERS)
def test_a_pass_of_its_own_says_why(reason: str) -> None:
    assert options(**OTHERS[reason]).update.why == APART + reason


def test_clipping_by_tensor_needs_the_whole_gradient() -> None:
    step = options(rule=bp.SGD(clip_tensor_norm=0.1))
    assert step.update.why == APART + "clipping needs the whole gradient first"


@pytest.mark.parametrize(
    "given",
    [{"accumulate": 2, "precision": "fp16"}, {"precision": "fp16"}, {"rule": bp.Muon()}],
    ids=str,
)
def test_where_the_host_takes_part_it_says_so(given: dict[str, Any]) -> None:
    assert options(**given).update.why == APART + "the host takes part in a step"


def test_health_sees_gradients() -> None:
    health, why = bp.Health(every=1), []

    class Watch(bp.Callback):
        def fit_end(self, training: Any) -> None:
            why.append(training.step.update.why)

    model = bp.MLP([6, 37, 5], device="cuda")
    bp.fit(model, *batch(), loss="mse", epochs=1, callbacks=[health, Watch()], progress=False)
    assert why == [APART + "gradients are looked at after a step"]
    assert np.isfinite(health.samples["gradient"][0]).all()


def test_it_is_fused_where_that_saves_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What must be read to be certain comes off: here X and the last deltas."""
    monkeypatch.setattr(fused_update, "SAVED", 12)
    read, saved = 4 * (6 + 5) * ROWS, 12 * 37 * (6 + 5)
    assert options().update.why == "2 of 2 weights in their gradient's kernel" and saved > read
    monkeypatch.setattr(fused_update, "SAVED", 4)
    assert options().update.why == (
        f"{APART}it would save {saved // 3:,} bytes and read {read:,} to be certain that the "
        "gradient is finite"
    )
    monkeypatch.setattr(fused_update, "LONGEST_SUM", 39)
    assert options().update.why == APART + "sums of more than 39 rows have no bound"


def test_where_every_batch_is_cut_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.LEAST_TERMS, "simt", 16)
    why = options().update.why
    assert why.startswith(
        f"{APART}no kernel has a weight's whole gradient at once: linear_wgrad of"
    )
    assert "in 3 runs" in why


def test_a_step_in_pieces_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has no room for the whole batch: the host adds up its pieces."""
    training = making(adamw)(True)
    training.step._room.rows = 20
    training.step._make_room()
    float(training(*batch()))
    assert training.written() == set(training.weights)


def test_bad_batches_are_what_they_say() -> None:
    """Each has finite numbers, but for those that name another."""
    for name, given in BAD.items():
        X, y = (a.get() for a in bad_batch(6, 5, **{"X": 1, **given}))
        assert np.isfinite(X).all() == ("in X" not in name)
        assert np.isfinite(y).all() == ("in y" not in name)
