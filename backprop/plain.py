"""Plain data to and from a file's tensors and text: what a run needs to go on, and no code.

Plain are None, booleans, integers, floats, text, arrays, and lists and dicts of those. Arrays
become tensors; the rest becomes JSON that names them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
from backprop_kernels.arrays import Array
from backprop_kernels.errors import CheckpointFormatError, KindError

from backprop.tensor_header import parse_text

TENSOR = "tensor"  # {"tensor": name} stands for an array
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.]")
LONGEST_NAME = 180


def encode(data: Mapping[str, Any], prefix: str) -> tuple[dict[str, Array], str]:
    """(tensors, text) of plain data; the tensors' names begin with `prefix` and a dot.

    Arrays of a device are copied from it.
    """
    tensors: dict[str, Array] = {}
    text = json.dumps(_encoded(data, prefix, tensors), allow_nan=False)
    parse_text(text, f"checkpoint: {prefix}")  # what could not be read is not written
    return tensors, text


def _encoded(value: Any, place: str, tensors: dict[str, Array]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if hasattr(value, "__cuda_array_interface__"):
        value = value.get()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and isfinite(value):
        return value  # JSON's shortest decimals give the same bits back
    if isinstance(value, np.ndarray | float):
        name = NOT_IN_NAMES.sub("_", place)[:LONGEST_NAME]
        if name in tensors:
            name = f"{name}.{len(tensors)}"
        tensors[name] = np.asarray(value)
        return {TENSOR: name}
    if isinstance(value, list | tuple):
        return [_encoded(item, f"{place}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        if TENSOR in value:
            raise KindError(f"checkpoint: {place}: expected another key than {TENSOR!r}; rename it")
        return {key: _encoded(item, f"{place}.{key}", tensors) for key, item in value.items()}
    raise KindError(
        f"checkpoint: {place}: expected None, numbers, text, arrays, or lists and dicts (by text) "
        f"of those, got {type(value).__name__}"
    )


def decode(text: str, tensors: Mapping[str, Array], where: str) -> dict[str, Any]:
    """The data that `encode` made `text` and `tensors` of; CheckpointFormatError for any other."""
    try:
        data = _decoded(parse_text(text, where), tensors)
        if not isinstance(data, dict):
            raise ValueError("no object")
    except (ValueError, KeyError, TypeError) as problem:
        if isinstance(problem, CheckpointFormatError):
            raise
        raise CheckpointFormatError(
            f"{where}: expected the state of a run, got {problem!r}"
        ) from None
    return data


def _decoded(value: Any, tensors: Mapping[str, Array]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {TENSOR}:
        array = tensors[value[TENSOR]]
        return array.item() if array.dtype == np.float64 and array.ndim == 0 else array
    return {key: _decoded(item, tensors) for key, item in value.items()}
