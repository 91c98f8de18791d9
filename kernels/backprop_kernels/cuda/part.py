"""A batch that is a part of a larger one, whose parts come one after the other.

Inside `part_of(…)` a kernel makes for its rows what it would make for them in the whole batch: the
whole one's number of rows decides how it computes, dropout counts rows from there, losses are
divided by what all rows would weigh, and gradients of parameters go on from where the part before
has left them. Where each part holds as many rows as every kernel adds up at once, or a multiple,
the gradient after the last part has the bits of the whole batch's; `why` says whether it does.

The end of a part: stepping.cu. Parts that do not weigh as many rows as the whole has: part.cu.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from backprop_kernels.arrays import Array

STRIP = 64  # rows that linear_wgrad multiplies at once, at most


class Part:
    """`rows` rows of `whole`. On the device: how many came `before`, int64 (1,), and the
    `mass` of these, float64 (1,)."""

    def __init__(self, rows: int, whole: int, before: Array, mass: Array) -> None:
        self.rows, self.whole, self.before, self.mass = rows, whole, before, mass
        self.weighted = False  # whether rows may weigh differently
        self._most, self._what = 0, ""  # rows that are added up at once, where none divides a part

    def adds_up(self, rows: int, what: str) -> None:
        """A kernel adds up so many rows at once, before it adds the sum to others."""
        if self.rows % rows and rows > self._most:
            self._most, self._what = rows, what

    @property
    def why(self) -> str:
        """Whether parts like this one give the whole batch's bits, in words."""
        whole = f"one batch of {self.whole:,} rows"
        if self.weighted:
            return f"as {whole} but for rounding, as rows have weights"
        if self._what:
            return (
                f"as {whole} but for rounding, as {self._what} adds up {self._most:,} rows at a "
                f"time, and a part has {self.rows:,}"
            )
        return f"with the bits of {whole}"


PART: ContextVar[Part | None] = ContextVar("PART", default=None)


@contextmanager
def part_of(part: Part) -> Iterator[Part]:
    """Let this thread's kernels be launched for a part."""
    token = PART.set(part)
    try:
        yield part
    finally:
        PART.reset(token)


def rows_of_whole(rows: int) -> int:
    """By how many rows to decide how to compute: of the batch that these are a part of, or all of.

    Where they are no whole strips they cannot have its bits, and are best served as they are.
    """
    part = PART.get()
    return rows if part is None or part.rows % STRIP else part.whole


def rows_before() -> Array | None:
    """() int64: how many rows came before this part, where it is one."""
    part = PART.get()
    return None if part is None else part.before


def adds_up(rows: int, what: str) -> None:
    """`Part.adds_up` of this part, where it is one."""
    part = PART.get()
    if part is not None:
        part.adds_up(rows, what)
