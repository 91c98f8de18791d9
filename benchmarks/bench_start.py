"""What the first step costs, on a machine and in a process: `make bench-start`.

Fresh interpreters, from import to the end of `bp.fit` of MLP [784, 256, 10], cross-entropy, Adam,
two batches of 128: with an empty cache (a fresh install), with a filled one (every later process),
and eight at once with an empty one. Prints a table and appends a line to results/start.csv.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import append, machine

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "start.csv"
COLD, WARM, CROWD = 3, 9, 8  # processes
FIT = """
import json, time
started = time.perf_counter()
import numpy as np
numpy = time.perf_counter()
import backprop as bp
imported = time.perf_counter()
rng = np.random.default_rng(0)
X, y = rng.standard_normal((256, 784)).astype(np.float32), rng.integers(0, 10, 256)
model = bp.MLP([784, 256, 10])
bp.fit(model, X, y, loss="cross_entropy", optimizer="Adam", batch_size=128, progress=False)
print(json.dumps([numpy - started, imported - numpy, time.perf_counter() - imported]))
"""


def main() -> None:
    """Measure, print, append."""
    with tempfile.TemporaryDirectory() as folder:
        cold = [finish(begin(Path(folder, str(i)))) for i in range(COLD)]
        warm = [finish(begin(Path(folder, "0"))) for _ in range(WARM)]
        started = time.perf_counter()
        together = [begin(Path(folder, "crowd")) for _ in range(CROWD)]
        for process in together:
            finish(process)
        crowd = time.perf_counter() - started
    numbers = {
        "import_numpy": median(numpy for numpy, _, _ in warm),
        "import_backprop": median(ours for _, ours, _ in warm),
        "first_fit_of_install": median(fit for _, _, fit in cold),
        "first_fit_of_process": median(fit for _, _, fit in warm),
        "eight_cold_at_once": crowd,
    }
    for name, seconds in numbers.items():
        print(f"{name.replace('_', ' '):<24}{seconds:8.3f} s")
    append(RESULTS, {**{name: f"{s:.4f}" for name, s in numbers.items()}, **machine()})


def begin(cache: Path) -> subprocess.Popen[str]:
    """A process that fits once, its compiled kernels kept in `cache`."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-c", FIT], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": paths, "XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> list[float]:
    """Seconds of NumPy's import, of ours, and of the fit."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the process failed with {process.returncode}")
    seconds: list[float] = json.loads(out)
    return seconds


if __name__ == "__main__":
    main()
