"""Optimizers as data: a rule from the optimizer table and its options.

Names, defaults and arithmetic are PyTorch's. The moments belong to the `TrainStep`, so one
optimizer object can serve several models.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from math import isfinite
from typing import Any

from backprop_kernels import checks
from backprop_kernels.errors import KindError, OptionError
from backprop_kernels.optimizers import OPTIMIZERS

BELOW_ONE = ("betas", "alpha")  # decay rates: 1 would never forget


class Optimizer:
    """An update rule with its options. `lr` may be changed between steps."""

    def __init__(self, rule: str, **options: Any) -> None:
        checks.choice("Optimizer", "rule", rule, OPTIMIZERS)
        known = OPTIMIZERS[rule].options
        for name, value in options.items():
            if name not in known:
                raise OptionError(f"{rule}: expected options {', '.join(known)}; got {name!r}")
            _check(rule, name, value, known[name])
        self.rule = rule
        self.options: dict[str, Any] = {**known, **options}

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.options["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        _check(self.rule, "lr", value, 0.0)
        self.options["lr"] = value

    def scalars(self, step: int) -> tuple[float, ...]:
        """The numbers of step `step` (from 1) that are the same for all parameters."""
        return OPTIMIZERS[self.rule].scalars(step, **self.options)

    def __repr__(self) -> str:
        return f"{self.rule}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"


def _check(rule: str, name: str, value: Any, default: Any) -> None:
    if isinstance(default, bool):
        good, expected = isinstance(value, bool), "True or False"
    elif isinstance(default, tuple):
        good = isinstance(value, tuple | list) and len(value) == len(default)
        good = good and all(_number(v) and 0 <= v < 1 for v in value)
        expected = f"{len(default)} numbers in [0, 1)"
    else:
        high = 1.0 if name in BELOW_ONE else float("inf")
        good, expected = _number(value) and 0 <= value < high, f"a number in [0, {high})"
    if not good:
        raise OptionError(f"{rule}: {name}: expected {expected}, got {value!r}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _constructor(rule: str) -> Callable[..., Optimizer]:
    """`Adam(lr=…)` for the row "Adam", with the table's signature and formula as help."""

    def make(lr: float = OPTIMIZERS[rule].options["lr"], **options: Any) -> Optimizer:
        return Optimizer(rule, lr=lr, **options)

    make.__name__ = make.__qualname__ = rule
    make.__doc__ = f"{OPTIMIZERS[rule].formula}\n\nOptions and defaults are PyTorch's."
    make.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
            if name == "lr"
            else inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in OPTIMIZERS[rule].options.items()
        ]
    )
    return make


SGD = _constructor("SGD")
RMSprop = _constructor("RMSprop")
Adam = _constructor("Adam")
AdamW = _constructor("AdamW")
Adagrad = _constructor("Adagrad")
Lion = _constructor("Lion")


def resolve_optimizer(optimizer: str | Optimizer) -> Optimizer:
    """An `Optimizer`, from one or from the name of a rule ("adam", "AdamW", …)."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise KindError(
            f"optimizer: expected a name or an optimizer such as Adam(lr=1e-3), "
            f"got {type(optimizer).__name__}"
        )
    names = {name.lower(): name for name in OPTIMIZERS}
    checks.choice("optimizer", "rule", optimizer.lower(), names)
    return Optimizer(names[optimizer.lower()])
