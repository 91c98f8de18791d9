"""What the project set out to reach on a Hopper GPU, beside what step.csv and operators.csv say.

`python benchmarks/gpu/targets.py --out FOLDER`, after bench_step.py and bench_operators.py.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from measure import Table, options

Row = dict[str, str]


class Target(NamedTuple):
    """Every row of `table` for which `of` holds should have `ratio` ≤ `most`."""

    name: str
    table: str
    of: Callable[[Row], bool]
    ratio: Callable[[Row], float]
    most: float


def square(row: Row, batch: tuple[int, ...], widths: tuple[int, ...]) -> bool:
    """A step of bf16 with one hidden width."""
    sizes = row["widths"].split("-")
    return (
        row["precision"] == "bf16" and int(row["batch"]) in batch
        and len(set(sizes[:-1])) == 1 and int(sizes[0]) in widths
    )  # fmt: skip


def bare(row: Row, least: int, most: int) -> bool:
    """A product of bf16 without an epilogue, of at least 1024 rows."""
    if not (row["operator"].endswith("bare") and row["precision"] == "bf16"):
        return False
    batch, width, _ = map(int, row["shape"].split("x"))
    return batch >= 1024 and least <= width <= most


def by(above: str, below: str) -> Callable[[Row], float]:
    return lambda row: float(row[above]) / float(row[below])


LARGE = (8192, 16384, 65536)
TARGETS = [
    Target("bare product by cuBLAS, width 4096 and more", "operators.csv",
           lambda r: bare(r, 4096, 1 << 20), by("us", "yardstick_us"), 1 / 0.97),
    Target("bare product by cuBLAS, width up to 2048", "operators.csv",
           lambda r: bare(r, 1024, 2048), by("us", "yardstick_us"), 1.0),
    Target("step by bare products, width 8192", "step.csv",
           lambda r: square(r, LARGE, (8192,)), by("graph_us", "bare_us"), 1.06),
    Target("step by bare products, width 4096", "step.csv",
           lambda r: square(r, (8192,), (4096,)), by("graph_us", "bare_us"), 1.12),
    Target("step by bare products, width 1024 to 2048", "step.csv",
           lambda r: square(r, (8192,), (1024, 2048)), by("graph_us", "bare_us"), 1.25),
    Target("step by PyTorch compiled, width 8192", "step.csv",
           lambda r: square(r, LARGE, (8192,)), by("graph_us", "compiled_us"), 1 / 1.05),
    Target("step by PyTorch compiled, width 4096", "step.csv",
           lambda r: square(r, (8192,), (4096,)), by("graph_us", "compiled_us"), 1 / 1.15),
    Target("step by PyTorch compiled, width 1024 to 2048", "step.csv",
           lambda r: square(r, (8192,), (1024, 2048)), by("graph_us", "compiled_us"), 1 / 1.25),
    Target("small network by PyTorch compiled, batch 2^18", "step.csv",
           lambda r: square(r, (1 << 18,), (64, 128)), by("graph_us", "compiled_us"), 1 / 5),
]  # fmt: skip


def main() -> None:
    """A row for each row that a target is about; a target without any says so."""
    given = options(__doc__)
    table = Table(given.out / "targets.csv")
    for target in TARGETS:
        found = 0
        for row, ratio in measured(target, given.out):
            found += 1
            table.add(
                target=target.name, row=row, ratio=ratio, at_most=target.most,
                met=ratio <= target.most,
            )  # fmt: skip
        if not found:
            table.add(
                target=target.name, row="", ratio="not measured", at_most=target.most, met=""
            )  # fmt: skip


def measured(target: Target, folder: Path) -> Iterator[tuple[str, float]]:
    """(the row in words, its ratio)."""
    file = folder / target.table
    if not file.exists():
        return
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if target.of(row):
                try:
                    ratio = target.ratio(row)
                except (KeyError, ValueError, TypeError):  # a contender that was not there
                    continue
                size = row.get("shape") or f"{row['batch']} {row['widths']}"
                yield f"{row.get('operator', 'step')} {size} {row['precision']}", ratio


if __name__ == "__main__":
    main()
