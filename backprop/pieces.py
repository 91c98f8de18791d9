"""A batch for which the device has no room at once: some rows at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from backprop_kernels.arrays import Array
from backprop_kernels.errors import DeviceMemoryError

from backprop.losses import in_host_memory

if TYPE_CHECKING:
    from backprop.gradients import Gradients

Result = TypeVar("Result")


class Room:
    """How many `rows` the device has room for at once: half as many whenever it has none.

    `whole`: the rows belong together, so that there is nothing to halve.
    """

    def __init__(self, where: str, rows: int, whole: bool = False) -> None:
        self.where, self.rows, self.whole = where, rows, whole

    def attempt(self, work: Callable[[], Result], make_room: Callable[[], None]) -> Result:
        """`work()`, which takes up to `rows` rows; `make_room` lets go of buffers for more."""
        while True:
            try:
                return work()
            except DeviceMemoryError as problem:
                if self.rows == 1 or self.whole:
                    raise
                shortage = str(problem)
            self.rows = -(-self.rows // 2)  # out here nothing holds on to what was allocated
            make_room()
            warnings.warn(
                f"{self.where}: {shortage}. It goes on in pieces of {self.rows} rows, slower",
                RuntimeWarning,
                stacklevel=4,
            )


class Pieces:
    """In place of a program for a batch: leaves gradient and loss of the whole batch, as it does.

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
