"""Several batches whose gradients make one step: what they sum up to until then."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from backprop_kernels.arrays import Array


class Accumulated(NamedTuple):
    """What the batches towards the next step sum up to. Replaced, never changed.

    A device that steps by itself divides from the start by what its batches will weigh, where all
    rows weigh the same (`Queue`); the host, which knows what each batch weighs, at the end.
    """

    gradient: Any = None  # Σ weights · gradient / divided
    mass: float = 0.0  # Σ weights
    loss: float = 0.0  # Σ weights · loss
    batches: int = 0
    lr_factor: float = 1.0  # when the first of them began
    divided: float = 1.0

    def plus(self, gradient: Array, mass: float, loss: float, lr_factor: float) -> Accumulated:
        """With one more batch; nothing of it where a signal breaks this off."""
        more = gradient * gradient.dtype.type(mass)
        if self.batches:
            more += self.gradient
            lr_factor = self.lr_factor
        total = self.loss + mass * loss
        return Accumulated(more, self.mass + mass, total, self.batches + 1, lr_factor)

    def mean(self, out: Array) -> float:
        """Of all their rows: the gradient is written to `out`, the loss returned."""
        mass = self.mass or 1.0  # 0 where every row was ignored: so is the gradient
        np.multiply(self.gradient, out.dtype.type(1 / mass), out=out)
        return self.loss / mass

    def by(self, divided: float) -> Accumulated:
        """The same with a gradient that is divided by this."""
        if divided == self.divided:
            return self
        factor = self.gradient.dtype.type(self.divided / divided)
        return self._replace(gradient=self.gradient * factor, divided=divided)
