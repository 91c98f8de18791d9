"""Freezing by name and depth, new heads, warm starts and their report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backprop as bp

rng = np.random.default_rng(0)
X, ids = rng.standard_normal((32, 5)), rng.integers(0, 2, 32)


def network(device: str = "reference", outputs: int = 3) -> bp.Sequential:
    layers = [
        bp.Linear(5, 8), bp.BatchNorm(8, "relu"), bp.Dropout(0.1), bp.Linear(8, 6, "tanh"),
        bp.Linear(6, outputs),
    ]  # fmt: skip
    return bp.Sequential(layers, device=device, seed=1)


FIRST = {"layers.0.weight", "layers.0.bias", "norms.0.weight", "norms.0.bias"}
SECOND = {"layers.1.weight", "layers.1.bias"}
LAST = {"layers.2.weight", "layers.2.bias"}


@pytest.mark.parametrize(
    ("names", "depth", "expected"),
    [
        ((), None, FIRST | SECOND | LAST),
        ((), 0, set()),
        ((), 1, FIRST),
        ((), 2, FIRST | SECOND),
        ((), 9, FIRST | SECOND | LAST),
        (("layers.1",), None, SECOND),
        (("norms.0.bias", "layers.2.*"), None, {"norms.0.bias"} | LAST),
        (("*.bias",), 1, FIRST | {"layers.1.bias", "layers.2.bias"}),
    ],
)
def test_names_and_depth(names: tuple[str, ...], depth: int | None, expected: set[str]) -> None:
    model = network()
    model.freeze(*names, depth=depth)
    assert model.frozen == expected
    model.unfreeze("layers.1.bias")
    assert model.frozen == expected - {"layers.1.bias"}
    model.unfreeze()
    assert model.frozen == set()


def test_a_frozen_trunk_keeps_its_bits_in_a_fit_and_then_learns(device: str) -> None:
    model = network(device, 2)
    model.freeze(depth=2)
    before = model.state_dict()
    options: Any = {"epochs": 3, "progress": False}
    bp.fit(model, X, ids, "cross_entropy", bp.AdamW(lr=0.1, weight_decay=1.0), **options)
    after = model.state_dict()
    assert {n for n in after if after[n].tobytes() != before[n].tobytes()} == LAST
    model.unfreeze()
    bp.fit(model, X, ids, "cross_entropy", bp.AdamW(lr=0.1), **options)
    assert all(model.state_dict()[n].tobytes() != before[n].tobytes() for n in FIRST | SECOND)


def test_a_new_head_on_the_same_trunk(device: str) -> None:
    model = network(device)
    model.statistics["norms.0.running_mean"][...] = 0.5
    model.freeze(depth=1)
    new = model.with_head(7, activation="sigmoid", seed=3)
    old, state = model.state_dict(), new.state_dict()
    assert new.out_features == 7 and new.layers[-1].activation == "sigmoid"  # type: ignore[union-attr]
    assert all(state[n].tobytes() == old[n].tobytes() for n in old if not n.startswith("layers.2"))
    assert new.frozen == FIRST and new.device == model.device and new.dtype == model.dtype
    assert state["layers.2.weight"].any() and not state["layers.2.bias"].any()
    other = model.with_head(7, seed=4).state_dict()["layers.2.weight"]
    assert other.tobytes() != state["layers.2.weight"].tobytes()
    assert not model.with_head(3, init="zeros").state_dict()["layers.2.weight"].any()
    assert model.state_dict()["layers.2.weight"].tobytes() == old["layers.2.weight"].tobytes()


def test_only_a_linear_end_is_a_head() -> None:
    model = bp.Sequential([bp.Linear(5, 4), bp.LayerNorm(4)])
    with pytest.raises(bp.KindError, match="with_head: model: expected a Linear layer at its end"):
        model.with_head(2)


def test_warm_start_takes_what_fits_and_reports_the_rest(tmp_path: Path, device: str) -> None:
    source = network(device)
    source.save(tmp_path / "m.safetensors")
    for given in (source, tmp_path / "m.safetensors", str(tmp_path / "m.safetensors")):
        model = bp.Sequential([bp.Linear(5, 8), bp.Linear(8, 9), bp.Linear(9, 3)], device=device)
        before = model.state_dict()
        match = model.warm_start(given)
        assert match.matched == ["layers.0.weight", "layers.0.bias", "layers.2.bias"]
        assert match.differing == {
            "layers.1.weight": ((9, 8), (6, 8)), "layers.1.bias": ((9,), (6,)),
            "layers.2.weight": ((3, 9), (3, 6)),
        }  # fmt: skip
        assert match.missing == [] and match.unused == [
            "norms.0.weight", "norms.0.bias", "norms.0.running_mean", "norms.0.running_var",
        ]  # fmt: skip
        state, old = model.state_dict(), source.state_dict()
        for name in state:
            expected = old if name in match.matched else before
            assert state[name].tobytes() == expected[name].tobytes(), name
    assert str(match).splitlines()[0] == f"matched      {', '.join(match.matched)}"
    assert "layers.1.bias (here (9,), there (6,))" in str(match)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ({"a": np.ones(3)}, bp.CheckpointMismatchError, "expected a tensor of the same name and"),
        (3, bp.KindError, "warm_start: source: expected a model, a file or a state_dict, got int"),
        ({"layers.0.bias": "x"}, bp.KindError, "layers.0.bias: expected numbers"),
    ],
)
def test_warm_start_from_nothing_changes_nothing(source: Any, kind: Any, message: str) -> None:
    model = network()
    before = model.parameters.tobytes()
    with pytest.raises(kind, match=message.replace(".", r"\.")):
        model.warm_start(source)
    assert model.parameters.tobytes() == before


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    model = network()
    with pytest.raises(bp.OptionError, match=r"freeze: names: .* of layers.0.weight, .* 'layer.0'"):
        model.freeze("layer.0")
    with pytest.raises(bp.OptionError, match="unfreeze: depth: expected an integer ≥ 0, got -1"):
        model.unfreeze(depth=-1)
    assert model.frozen == set()
