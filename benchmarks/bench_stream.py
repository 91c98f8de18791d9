"""Data larger than memory beside the same data in it: `make bench-stream`.

The flights' shape, 155-256-128-1 in batches of 1,024, on made-up rows: three epochs of fit, predict
and evaluate, on an array, a memory map and HDF5 datasets of the same numbers, interleaved. The
files have just been written: they come from the page cache, as fast as anything can deliver them.
Prints rows a second and their ratio to memory's, and appends a line to results/stream.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from backprop_kernels.arrays import Array
from backprop_kernels.cpu.threads import available_cpus
from common import append, in_turns, machine

import backprop as bp

COLUMNS, HIDDEN, BATCH, EPOCHS = 155, (256, 128), 1024, 3
RESULTS = Path(__file__).parent / "results" / "stream.csv"


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    bp.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((options.rows, COLUMNS), dtype=np.float32)
    # Nothing to learn: a loss near 0 would mean denormal gradients, several times slower.
    y = rng.integers(0, 2, options.rows).astype(np.float32)
    row = {"rows": str(options.rows), "threads": str(options.threads)}
    with tempfile.TemporaryDirectory() as folder:
        sources = {
            "memory": X,
            "memmap": mapped(Path(folder), X),
            "hdf5": hdf5(Path(folder) / "piece.h5", X, None),
            "chunks": hdf5(Path(folder) / "chunks.h5", X, (BATCH, COLUMNS)),
        }
        print(f"{'':<12}" + "".join(f"{name:>16}" for name in sources))
        for task, make in (("fit", fitting), ("predict", predicting), ("evaluate", evaluating)):
            contenders = {name: make(source, y) for name, source in sources.items()}
            times = in_turns(contenders, options.rounds)
            line = f"{task:<12}"
            passes = EPOCHS * options.rows if task == "fit" else options.rows
            for name, seconds in times.items():
                line += f"{passes / seconds:>11,.0f} {times['memory'] / seconds:4.2f}"
                row[f"{task}_{name}_rows_per_s"] = f"{passes / seconds:.0f}"
            print(line, flush=True)
    append(RESULTS, {**row, **machine("h5py")})


def mapped(folder: Path, X: Array) -> Array:
    """The same numbers in a file, mapped."""
    np.save(folder / "rows.npy", X)
    mapping: Array = np.load(folder / "rows.npy", mmap_mode="r")
    return mapping


def hdf5(file: Path, X: Array, chunks: tuple[int, int] | None) -> Any:
    """The same numbers in an HDF5 dataset, of one piece or in chunks of rows."""
    with h5py.File(file, "w") as writing:
        writing.create_dataset("X", data=X, chunks=chunks)
    return h5py.File(file)["X"]


def fitting(X: Any, y: Array) -> Callable[[], object]:
    """A short fit, from checking the data on."""
    model = bp.MLP([COLUMNS, *HIDDEN, 1])
    return lambda: bp.fit(
        model, X, y, "bce_with_logits", epochs=EPOCHS, batch_size=BATCH, progress=False
    )


def predicting(X: Any, y: Array) -> Callable[[], object]:
    """All rows once."""
    model = bp.MLP([COLUMNS, *HIDDEN, 1])
    return lambda: model.predict(X)


def evaluating(X: Any, y: Array) -> Callable[[], object]:
    """The loss of all rows."""
    model = bp.MLP([COLUMNS, *HIDDEN, 1])
    return lambda: bp.evaluate(model, X, y, "bce_with_logits")


if __name__ == "__main__":
    main()
