"""A batch for which the device has no room at once: its gradient, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from backprop_kernels.arrays import Array

from backprop.losses import in_host_memory

if TYPE_CHECKING:
    from backprop.gradients import Gradients


class Pieces:
    """In place of a captured program: leaves gradient and loss of the whole batch, as it does.

    Each piece weighs as its rows do, so the sums are those of the whole batch but for the order in
    which they are added. Dropout draws another mask for each piece than for the whole.
    """

    def __init__(
        self, gradients: Gradients, rows: int, prepare: Callable[..., Callable[..., None]],
        arrays: Sequence[Array],
    ) -> None:  # fmt: skip
        self.gradients, self.rows, self.prepare = gradients, rows, prepare
        self._total = gradients.memory.zeros(gradients.flat.shape, gradients.flat.dtype)
        for piece in self._cut(arrays):
            prepare(*piece)

    def __call__(self, *arrays: Array) -> None:
        made, total = self.gradients, self._total
        pieces = list(self._cut(arrays))
        masses = [made.loss.mass(*map(in_host_memory, piece[1:])) for piece in pieces]
        whole = sum(masses) or 1.0  # 0 where every row is ignored
        total.fill(0)
        value = 0.0
        for number, (piece, mass) in enumerate(zip(pieces, masses, strict=True)):
            made.set_piece(number)
            self.prepare(*piece)(*piece)
            made.flat *= made.flat.dtype.type(mass / whole)
            total += made.flat
            value += mass / whole * float(made.value)
        made.set_piece(0)
        made.flat[...] = total
        made.value[...] = value

    def _cut(self, arrays: Sequence[Array]) -> Iterator[list[Array]]:
        for start in range(0, len(arrays[0]), self.rows):
            yield [array[start : start + self.rows] for array in arrays]
