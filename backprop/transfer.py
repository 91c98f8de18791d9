"""Starting from what another network has learned: freeze, take over, replace the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from backprop_kernels import checks
from backprop_kernels.arrays import Array
from backprop_kernels.errors import CheckpointMismatchError, KindError

from backprop.layers import Linear
from backprop.losses import as_numbers
from backprop.update import matching

if TYPE_CHECKING:
    from backprop.model import Sequential


@dataclass
class Match:
    """What `warm_start` took and what it left, by the names of tensors."""

    matched: list[str] = field(default_factory=list)
    differing: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # of the model, not in the source
    unused: list[str] = field(default_factory=list)  # of the source, not in the model

    def __str__(self) -> str:
        shapes = [
            f"{n} (here {here}, there {there})" for n, (here, there) in self.differing.items()
        ]
        lines = {
            "matched": self.matched, "other shape": shapes, "missing": self.missing,
            "unused": self.unused,
        }  # fmt: skip
        return "\n".join(
            f"{what:<11}  {', '.join(names)}" for what, names in lines.items() if names
        )


def tensors_of(
    model: Sequential, names: tuple[str, ...], depth: int | None, where: str
) -> set[str]:
    """The parameters that names, patterns, or a depth of so many Linear layers mean; else all."""
    if depth is None and not names:
        return set(model.layout.shapes)
    found = {n for name in names for n in matching(name, model.layout.shapes, f"{where}: names")}
    if depth is not None:
        checks.integer(where, "depth", depth, 0)
        linears = 0
        for layer, prefix in zip(model.layers, model.layout.prefixes, strict=True):
            linears += isinstance(layer, Linear)
            if linears > depth:
                break
            found |= {n for n in model.layout.shapes if n.startswith(f"{prefix}.") and prefix}
    return found


def warm_start(model: Sequential, source: Any) -> Match:
    """Copy every tensor of `source` whose name and shape are those of one of the model's."""
    state = _state(source)
    tensors = {**model.layout.views(model.parameters), **model.statistics}
    match = Match()
    for name, tensor in tensors.items():
        if name not in state:
            match.missing.append(name)
        elif state[name].shape != tensor.shape:
            match.differing[name] = tensor.shape, state[name].shape
        else:
            match.matched.append(name)
    match.unused = [name for name in state if name not in tensors]
    if not match.matched:
        raise CheckpointMismatchError(
            f"warm_start: source: expected a tensor of the same name and shape, got none\n{match}"
        )
    for name in match.matched:
        model.memory.fill(tensors[name], state[name])
    return match


def _state(source: Any) -> dict[str, Array]:
    """The tensors of a model, of a file, or of a mapping."""
    from backprop.model import Sequential

    if isinstance(source, Sequential):
        return source.state_dict()
    if isinstance(source, str | PathLike):
        from backprop.checkpoint import read_tensors

        return read_tensors(source)[0]
    if not isinstance(source, Mapping):
        raise KindError(
            f"warm_start: source: expected a model, a file or a state_dict, got "
            f"{type(source).__name__}"
        )
    return {name: as_numbers("warm_start", name, value) for name, value in source.items()}


def with_head(
    model: Sequential, out_features: int, activation: str | None, init: str | None, seed: int
) -> Sequential:
    """A copy of `model` with a fresh last Linear layer of `out_features` outputs."""
    from backprop.model import Sequential

    place = max(i for i, layer in enumerate(model.layers) if isinstance(layer, Linear))
    old = model.layers[place]
    if not isinstance(old, Linear) or place + 1 < len(model.layers):
        raise KindError(
            f"with_head: model: expected a Linear layer at its end, got {model.layers[-1]!r} there"
        )
    head = replace(
        old, out_features=out_features, activation=activation or old.activation,
        init=init or old.init,
    )  # fmt: skip
    new = Sequential(
        [*model.layers[:place], head], dtype=str(model.dtype), device=model.device, seed=seed
    )
    trunk = {
        name: value
        for name, value in model.state_dict().items()
        if not name.startswith(f"{model.layout.prefixes[place]}.")
    }
    if trunk:
        warm_start(new, trunk)
    new.frozen = {name for name in model.frozen if name in trunk}
    return new
