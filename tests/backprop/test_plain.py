"""Plain data there and back, what is refused, and hostile text."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import backprop as bp
from backprop.plain import decode, encode


def back(data: dict[str, Any]) -> dict[str, Any]:
    tensors, text = encode(data, "fit")
    return decode(text, tensors, "test")


scalars = st.none() | st.booleans() | st.integers(-(2**128), 2**128) | st.floats() | st.text(
    st.characters(exclude_categories=["Cs"])
)  # fmt: skip
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda k: k != "tensor")
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((depth(item) for item in inner), default=-1) if inner or inner == [] else 1


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.dictionaries(keys, values, max_size=5))
def test_any_plain_data_comes_back(data: dict[str, Any]) -> None:
    hypothesis.assume(depth(data) <= 5)
    assert repr(back(data)) == repr(data)


def test_arrays_keep_their_bits_and_names() -> None:
    data = {"a": {"layers.0.weight": np.arange(6.0).reshape(2, 3)}, "b/ü": np.array([np.nan, -0.0])}
    tensors, text = encode(data, "fit")
    assert list(tensors) == ["fit.a.layers.0.weight", "fit.b__"]
    found = decode(text, tensors, "test")
    assert found["b/ü"].tobytes() == data["b/ü"].tobytes()  # type: ignore[attr-defined]
    same = {"a": {"b": np.zeros(1)}, "a.b": np.ones(1), "x" * 300: np.full(1, 2), "x" * 301: 0.5}
    assert repr(back(same)) == repr(same)
    state = np.random.default_rng(0).bit_generator.state
    assert back({"rng": state}) == {"rng": state}
    assert back({"n": np.float64(0.1), "i": np.int32(3), "t": (1, 2)}) == {
        "n": 0.1, "i": 3, "t": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": [1, object()]}, r"fit\.a\.1: expected None, numbers, .* got object"),
        ({"a": {1: 2}}, r"fit\.a: expected .* got dict"),
        ({"a": {"tensor": 1}}, "expected another key than 'tensor'"),
        ({"a": {1, 2}}, "got set"),
    ],
)
def test_other_data_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(bp.KindError, match=message):
        encode(data, "fit")


def test_what_could_not_be_read_is_not_written() -> None:
    deep: Any = 1
    for _ in range(20):
        deep = [deep]
    for data in ({"a": deep}, {"a": ["x"] * 200_000}, {"a": [{}] * 30_000}):
        with pytest.raises(bp.CheckpointFormatError):
            encode(data, "fit")


HOSTILE = {
    "not JSON": "{",
    "no object": "[1]",
    "NaN": '{"a": NaN}',
    "infinite": '{"a": 1e999}',
    "a tensor that is not there": '{"a": {"tensor": "b"}}',
    "a tensor that is no name": '{"a": {"tensor": ["b"]}}',
    "one name twice": '{"a": 1, "a": 2}',
    "digits": '{"a": ' + "9" * 5000 + "}",
    "nested lists": '{"a": ' + "[" * 100_000,
    "many lists": '{"a": [' + "[]," * 1_000_000 + "1]}",
    "many strings": '{"a": [' + '"",' * 1_000_000 + "1]}",
    "many numbers": '{"a": [' + "1," * 1_500_000 + "1]}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_is_refused_cheaply(case: str) -> None:
    text = HOSTILE[case]
    best = float("inf")
    for _ in range(5):  # the machine may be busy
        started = time.process_time()
        with pytest.raises(bp.CheckpointFormatError):
            decode(text, {}, "test")
        best = min(best, time.process_time() - started)
    assert best < 0.1
    tracemalloc.start()
    with pytest.raises(bp.CheckpointFormatError):
        decode(text, {}, "test")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(text) + 16 * 2**20


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.data())
def test_changed_text_is_refused_or_plain(data: st.DataObject) -> None:
    tensors, text = encode({"a": [1, 0.5, None, "x", np.ones(2)], "b": {"c": True}}, "fit")
    at = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(at, min(at + 5, len(text))))
    changed = (
        text[:at] + data.draw(st.text('{}[]",:0123456789.eE-\\u nulltrue', max_size=5)) + text[end:]
    )
    try:
        found = decode(changed, tensors, "test")
    except bp.CheckpointFormatError:
        return
    assert isinstance(found, dict)
    json.dumps(found, default=lambda array: array.tolist(), allow_nan=False)
