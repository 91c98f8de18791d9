"""The operators as functions of arrays, with the backend picked by the arrays' type.

Any layout is taken: what is not C-contiguous is copied here, once, so that the kernels never have
to; only what an operator writes to must be C-contiguous. Shapes, dtypes and formulas:
`backprop_kernels.operators`, docs/derivations.md.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from backprop_kernels import reference
from backprop_kernels.operators import OPERATORS

from backprop.dispatch import for_arrays
from backprop.memory import contiguous, on_gpu

WRITTEN = ("P", "state", "running_mean", "running_var", "out")  # a copy would take the update


def _operator(name: str) -> Callable[..., Any]:
    signature = inspect.signature(getattr(reference, name))

    @functools.wraps(getattr(reference, name))
    def call(*arguments: Any, **options: Any) -> Any:
        given = signature.bind(*arguments, **options).arguments
        backend = for_arrays(name, *(a for a in given.values() if getattr(a, "shape", ())))
        return getattr(backend, name)(
            **{k: a if k in WRITTEN else _contiguous(a) for k, a in given.items()}
        )

    return call


def _contiguous(value: Any) -> Any:
    if (isinstance(value, np.ndarray) or on_gpu(value)) and not value.flags.c_contiguous:
        return contiguous(value, value.dtype)
    return value


_FUNCTIONS = {name: _operator(name) for row in OPERATORS for name in row.functions}
globals().update(_FUNCTIONS)
__all__ = list(_FUNCTIONS)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"backprop.ops has {', '.join(__all__)}; got {name!r}")
