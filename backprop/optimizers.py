"""Optimizers as data: a rule from the optimizer table and its options.

Names, defaults and arithmetic are PyTorch's. The moments belong to the `TrainStep`, so one
optimizer object can serve several models. What `COMMON` lists, every rule takes; `update.py` says
how it is applied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from backprop_kernels import checks
from backprop_kernels.errors import KindError, OptionError
from backprop_kernels.optimizers import OPTIMIZERS

BELOW_ONE = ("betas", "alpha")  # decay rates: 1 would never forget
COMMON: dict[str, Any] = {
    "l1": 0.0,  # adds l1 Σ|w| to what is minimised, over the weights of Linear layers
    "l2": 0.0,  # adds l2/2 Σw²
    "clip_value": None,  # each element of the gradient to ± this
    "clip_tensor_norm": None,  # each tensor's gradient to this L2 norm
    "max_norm": None,  # each neuron's incoming weights to this L2 norm, after the step
    "groups": {},  # name or pattern of tensors: {option of `GROUP`: value}
}
NAMES = (*OPTIMIZERS, "Muon")  # what `resolve_optimizer` knows
GROUP = ("lr_scale", "weight_decay", "l1", "l2", "max_norm")


class Optimizer:
    """An update rule with its options. `lr` may be changed between steps."""

    def __init__(self, rule: str, **options: Any) -> None:
        checks.choice("Optimizer", "rule", rule, OPTIMIZERS)
        known = OPTIMIZERS[rule].options
        for name, value in options.items():
            if name not in known and name not in COMMON:
                expected = ", ".join([*known, *COMMON])
                raise OptionError(f"{rule}: expected options {expected}; got {name!r}")
            if name == "groups":
                _check_groups(rule, value, known)
            elif name in known:
                check_option(rule, name, value, known[name])
            else:
                _check_common(rule, name, value)
        self.rule = rule
        self.operator_rule = rule  # what `optimizer_step` applies
        self.common = {**COMMON, **{k: v for k, v in options.items() if k in COMMON}}
        self.options: dict[str, Any] = {
            **known, **{k: v for k, v in options.items() if k in known}
        }  # fmt: skip

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.options["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        check_option(self.rule, "lr", value, 0.0)
        self.options["lr"] = value

    def scalars(self, step: int, **changes: Any) -> tuple[float, ...]:
        """The numbers of step `step` (from 1), with other values for some options."""
        return OPTIMIZERS[self.operator_rule].scalars(step, **{**self.options, **changes})

    def settings(self) -> dict[str, Any]:
        """What fits of one run agree on: everything but the learning rate."""
        return {name: v for name, v in (self.options | self.common).items() if name != "lr"}

    def state_dict(self) -> dict[str, Any]:
        """What a callback may change during a fit, as plain data."""
        return dict(self.options)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; what is out of range is refused and changes nothing."""
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in state.items()}
        Optimizer(self.operator_rule, **options)
        self.options.update(options)

    def __repr__(self) -> str:
        shown = self.options | {k: v for k, v in self.common.items() if v != COMMON[k]}
        return f"{self.rule}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"


def _check_common(rule: str, name: str, value: Any) -> None:
    """A penalty or a scale is ≥ 0; a limit is above 0, or None."""
    if COMMON.get(name, 0.0) is None:
        if value is not None and not (_number(value) and value > 0):
            raise OptionError(f"{rule}: {name}: expected a number > 0 or None, got {value!r}")
    elif not (_number(value) and value >= 0):
        raise OptionError(f"{rule}: {name}: expected a number ≥ 0, got {value!r}")


def _check_groups(rule: str, groups: Any, known: Mapping[str, Any]) -> None:
    if not isinstance(groups, Mapping):
        raise KindError(
            f'{rule}: groups: expected tensors and their options, such as {{"layers.0": '
            f'{{"lr_scale": 0.1}}}}, got {type(groups).__name__}'
        )
    for pattern, options in groups.items():
        where = f"{rule}: groups[{pattern!r}]"
        if not isinstance(options, Mapping):
            raise KindError(f"{where}: expected options, got {type(options).__name__}")
        for name, value in options.items():
            if name not in GROUP or (name == "weight_decay" and name not in known):
                raise OptionError(f"{where}: expected options {', '.join(GROUP)}; got {name!r}")
            _check_common(where, name, value)


def check_option(rule: str, name: str, value: Any, default: Any) -> None:
    """Refuse a value that is not of the default's kind, or out of range."""
    if isinstance(default, bool):
        good, expected = isinstance(value, bool), "True or False"
    elif isinstance(default, tuple):
        good = isinstance(value, tuple | list) and len(value) == len(default)
        good = good and all(map(share, value))
        expected = f"{len(default)} numbers in [0, 1)"
    else:
        high = 1.0 if name in BELOW_ONE else float("inf")
        good, expected = _number(value) and 0 <= value < high, f"a number in [0, {high})"
    if not good:
        raise OptionError(f"{rule}: {name}: expected {expected}, got {value!r}")


def share(value: Any) -> bool:
    """Whether it is a number in [0, 1): a decay that still forgets."""
    return _number(value) and 0 <= value < 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _constructor(rule: str) -> Callable[..., Optimizer]:
    """`Adam(lr=…)` for the row "Adam", with the table's signature and formula as help."""

    def make(lr: float = OPTIMIZERS[rule].options["lr"], **options: Any) -> Optimizer:
        return Optimizer(rule, lr=lr, **options)

    make.__name__ = make.__qualname__ = rule
    make.__doc__ = (
        f"{OPTIMIZERS[rule].formula}\n\nOptions and defaults are PyTorch's; weight_decay spares "
        "biases and norms.\nEvery rule also takes l1, l2, clip_value, clip_tensor_norm, max_norm "
        "and groups: docs/regularisation.md."
    )
    make.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
            if name == "lr"
            else inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
            for name, default in {**OPTIMIZERS[rule].options, **COMMON}.items()
        ]
    )
    return make


SGD = _constructor("SGD")
RMSprop = _constructor("RMSprop")
Adam = _constructor("Adam")
AdamW = _constructor("AdamW")
Adagrad = _constructor("Adagrad")
Lion = _constructor("Lion")


def resolve_optimizer(optimizer: str | Optimizer, **options: Any) -> Optimizer:
    """An `Optimizer`, from one or from its name ("adam", "AdamW", "muon") and options."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    if not isinstance(optimizer, str):
        raise KindError(
            f"optimizer: expected a name or an optimizer such as Adam(lr=1e-3), "
            f"got {type(optimizer).__name__}"
        )
    if optimizer.lower() in ("lbfgs", "l-bfgs"):
        raise OptionError("optimizer: rule: expected one of small batches, got L-BFGS: bp.minimize")
    names = {name.lower(): name for name in NAMES}
    checks.choice("optimizer", "rule", optimizer.lower(), names)
    if names[optimizer.lower()] == "Muon":
        from backprop.muon import Muon

        return Muon(**options)
    return Optimizer(names[optimizer.lower()], **options)
