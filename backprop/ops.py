"""The operators as functions of arrays, with the backend picked by the arrays' type.

Any layout is taken: what is not C-contiguous is copied here, once, so that the kernels never have
to. Shapes, dtypes and formulas: `backprop_kernels.operators`, docs/derivations.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from backprop_kernels import reference
from backprop_kernels.operators import OPERATORS

from backprop.dispatch import for_arrays


def _operator(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(reference, name))
    def call(*arguments: Any, **options: Any) -> Any:
        # In-place arguments keep their identity: a copy would take the update and be lost.
        backend = for_arrays(name, *(a for a in arguments if hasattr(a, "dtype")))
        return getattr(backend, name)(*(_contiguous(a) for a in arguments), **options)

    return call


def _contiguous(value: Any) -> Any:
    if isinstance(value, np.ndarray) and not value.flags.c_contiguous:
        return np.ascontiguousarray(value)
    return value


_FUNCTIONS = {name: _operator(name) for row in OPERATORS for name in row.functions}
globals().update(_FUNCTIONS)
__all__ = list(_FUNCTIONS)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"backprop.ops has {', '.join(__all__)}; got {name!r}")
