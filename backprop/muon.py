"""Muon: momentum, made orthogonal, for the matrices of hidden layers (Jordan et al. 2024).

The update of a matrix is the orthogonal matrix nearest to its momentum, by five Newton–Schulz
steps: every direction is learned at the same pace. Biases, norms and the last layer, where that
makes no sense, are left to another optimizer. Both are updated by `optimizer_step`; the products
in between are array code.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from backprop_kernels.arrays import Array
from backprop_kernels.errors import KindError, OptionError

from backprop.arena import Layout
from backprop.memory import Memory
from backprop.optimizers import Optimizer, check_option, share
from backprop.update import Update, matching

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic; all singular values to about 1
ITERATIONS = 5


class Muon(Optimizer):
    """`Muon(lr=0.02, momentum=0.95)`; names and arithmetic are those of `torch.optim.Muon`.

    Args:
        lr: of the matrices; a step has length lr √rank, whatever the gradient.
        momentum, nesterov: of the average that is made orthogonal.
        weight_decay: decoupled, of the matrices.
        matrices: pattern of the weights to treat so; all but the last Linear layer's unless given.
        others: the optimizer of everything else. A schedule scales both.
    """

    def __init__(
        self,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        matrices: str | None = None,
        others: Optimizer | None = None,
    ) -> None:
        for name, value, default in (("lr", lr, 0.0), ("nesterov", nesterov, True),
                                     ("weight_decay", weight_decay, 0.0)):  # fmt: skip
            check_option("Muon", name, value, default)
        if not share(momentum):
            raise OptionError(f"Muon: momentum: expected a number in [0, 1), got {momentum!r}")
        if others is not None and not isinstance(others, Optimizer):
            raise KindError(f"Muon: others: expected an optimizer, got {type(others).__name__}")
        # p − lr (g + decay p): with an orthogonal g, plain SGD is Muon's last line.
        super().__init__("SGD", lr=lr, weight_decay=weight_decay)
        self.rule = "Muon"
        self.momentum, self.nesterov, self.matrices = momentum, nesterov, matrices
        self.others = Optimizer("AdamW", lr=3e-4) if others is None else others

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "momentum": self.momentum, "nesterov": self.nesterov, "matrices": self.matrices,
            "others": (self.others.rule, self.others.settings()),
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "others": self.others.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.others.load_state_dict(state["others"])
        super().load_state_dict({name: v for name, v in state.items() if name != "others"})

    def __repr__(self) -> str:
        return (
            f"Muon(lr={self.lr!r}, momentum={self.momentum!r}, nesterov={self.nesterov!r}, "
            f"weight_decay={self.options['weight_decay']!r}, others={self.others!r})"
        )


class MuonUpdate(Update):
    """`Update` for `Muon`: of the matrices, with another inside for the other tensors."""

    fused = unattended = False

    def __init__(
        self,
        optimizer: Muon,
        layout: Layout,
        parameters: Array,
        gradient: Array,
        clip_norm: float | None,
        frozen: Collection[str],
        memory: Memory,
    ) -> None:
        if clip_norm is not None:
            raise OptionError(
                "Muon: clip_norm: expected None, got a limit; the length of Muon's step does not "
                "depend on the gradient's"
            )
        weights = [name for name, shape in layout.shapes.items() if len(shape) == 2]
        chosen = weights[:-1]
        if optimizer.matrices is not None:
            chosen = [n for n in matching(optimizer.matrices, layout.shapes, "Muon: matrices")
                      if n in weights]  # fmt: skip
        chosen = [name for name in chosen if name not in frozen]
        if not chosen:
            raise OptionError(
                "Muon: model: expected a hidden layer's matrix to train, got none; use AdamW, or "
                'matrices="*.weight"'
            )
        given = (layout, parameters, gradient, None)
        rest = {name for name in layout.shapes if name not in chosen}
        super().__init__(optimizer, *given, rest, memory)
        self.rest = None
        if rest - set(frozen):
            self.rest = Update(optimizer.others, *given, {*chosen, *frozen}, memory)
        self.momentum, self.nesterov = optimizer.momentum, optimizer.nesterov
        average = memory.zeros(layout.size, parameters.dtype)
        # In place of what SGD keeps: without momentum that is of no use to a later step.
        self.state = {"muon_momentum": average, **(self.rest.state if self.rest else {})}
        views, averages = layout.views(gradient), layout.views(average)
        self._matrices = [(views[name], averages[name]) for name in chosen]
        self._following: list[Array] = []  # the averages, once this step is applied

    def prepare(self, step: int, steps: int = 1) -> None:
        super().prepare(step)
        if self.rest is not None:
            self.rest.lr_factor = self.lr_factor
            self.rest.prepare(step)

    def before(self) -> None:
        """Each matrix's gradient becomes its step."""
        square = (self.gradient.astype("float64") ** 2).sum()
        if not math.isfinite(float(square)):
            return  # the operators refuse it
        self._following = []
        for G, average in self._matrices:
            new = average * self.momentum + G * (1 - self.momentum)
            mixed = G * (1 - self.momentum) + new * self.momentum if self.nesterov else new
            G[...] = orthogonal(mixed) * math.sqrt(max(1.0, G.shape[0] / G.shape[1]))
            self._following.append(new)
        if self.rest is not None:
            self.rest.before()

    def operator(self, backend: ModuleType, guard: Array) -> None:
        super().operator(backend, guard)
        if self.rest is not None:
            self.rest.operator(backend, guard)

    def after(self) -> None:
        super().after()
        for (_, average), new in zip(self._matrices, self._following, strict=True):
            average[...] = new
        if self.rest is not None:
            self.rest.after()


def orthogonal(M: Array) -> Array:
    """U Vᵀ of M = U S Vᵀ, to about ± 0.3 in each singular value, which is what training needs."""
    a, b, c = COEFFICIENTS
    X = M.T if M.shape[0] > M.shape[1] else M
    X = X / max(float((X * X).sum()) ** 0.5, 1e-7)
    for _ in range(ITERATIONS):
        A = X @ X.T
        X = X * a + (A * b + (A @ A) * c) @ X
    return X.T if M.shape[0] > M.shape[1] else X
