"""In which precision a model's products are computed, and the loss scale that float16 needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from backprop_kernels import checks
from backprop_kernels.arrays import LinearLayer
from backprop_kernels.errors import OptionError
from backprop_kernels.precisions import PRECISIONS

from backprop.layers import Linear

if TYPE_CHECKING:
    from backprop.model import Sequential

LARGEST, SMALLEST = 2.0**16, 1.0  # loss scales
PATIENCE = 2000  # steps without an overflow, after which the scale is doubled


def products(model: Sequential, precision: str | None, where: str) -> Any:
    """The model's backend, its linear layers computed in `precision`.

    None is the model's own dtype. Raises OptionError for what this model, or the device it is on,
    cannot do; no other precision ever stands in.
    """
    own = str(model.dtype)
    if precision is None or precision == own:
        return model.backend
    checks.choice(where, "precision", precision, PRECISIONS)
    row = PRECISIONS[precision]
    if not row.tensor_cores or own != row.real:
        low = ", ".join(f'"{r.name}"' for r in PRECISIONS.values() if r.tensor_cores)
        raise OptionError(
            f'{where}: precision: expected "{own}", the dtype of the model'
            + (f", or one that sums in it ({low})" if own == "float32" else "")
            + f', got "{precision}"; make the model with dtype="{row.real}"'
        )
    if not model.device.startswith("cuda"):
        raise OptionError(
            f'{where}: precision: expected "{own}" on device "{model.device}", got "{precision}", '
            'which needs a GPU: device="cuda"'
        )
    from backprop_kernels.cuda.in_precision import InPrecision

    with model.memory:
        return InPrecision(precision)


def one_kernel(
    model: Sequential, loss: str, backend: Any, rows: int, frozen: Collection[str], watched: bool,
    part: bool = False,
) -> tuple[list[LinearLayer] | None, str]:  # fmt: skip
    """The layers for `mlp_step`, where one kernel trains the whole network on batches of `rows`.

    Else None. Either way a sentence that says why. `part`: of a larger batch, whose sums go on.
    """
    others = [type(x).__name__ for x in model.layers if not isinstance(x, Linear)]
    reason = ""
    if not hasattr(backend, "one_kernel"):
        reason = f"{model.dtype} on {model.device} has no kernel for all"
    elif others:
        reason = f"one kernel for all knows Linear layers alone, and there is {others[0]}"
    elif frozen:
        reason = f"{min(frozen)} is frozen"
    elif watched:
        reason = "activations are looked at after a step"
    elif part:
        reason = "the gradients of several batches are added up"
    if reason:
        return None, f"layer by layer, as {reason}"
    offsets = model.layout.offsets
    layers = [
        LinearLayer(
            layer.in_features, layer.out_features, offsets[f"{name}.weight"],
            offsets.get(f"{name}.bias"), layer.activation,
        )
        for name, layer in zip(model.layout.prefixes, model.layers, strict=True)
        if isinstance(layer, Linear)
    ]  # fmt: skip
    fit, why = backend.one_kernel(layers, loss, rows, model.parameters)
    return (None if fit is None else layers), why


class LossScale:
    """A power of two by which the deltas are multiplied, lest they vanish in float16.

    A batch whose gradient overflows is computed again with half the scale, until it does not; so
    no batch is left out. After PATIENCE steps without one the scale is doubled.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.load_state_dict({"scale": LARGEST, "steps": 0})

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale, self._steps = float(state["scale"]), int(state["steps"])
        self._backend.set_loss_scale(self.scale)

    def step(self) -> None:
        """A step was made at this scale."""
        if self._steps + 1 < PATIENCE or self.scale >= LARGEST:
            self._steps += 1
        else:
            self.load_state_dict({"scale": self.scale * 2, "steps": 0})

    def halve(self) -> bool:
        """Take half the scale; False where it is as small as it gets."""
        if self.scale <= SMALLEST:
            return False
        self.load_state_dict({"scale": self.scale / 2, "steps": 0})
        return True
