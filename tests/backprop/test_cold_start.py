"""The first step on a machine and in a process: its time, and the folder of compiled kernels.

Times are CPU time, which the machine's other work does not stretch.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "kernels" / "backprop_kernels"
PATHS = [ROOT, ROOT / "kernels"]

# A kernel and the runner: seconds less to compile than a step's.
GATHER = """
import json, os, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import numpy as np
    from backprop_kernels import cpu
    X = np.arange(12.0).reshape(4, 3)
    right = (cpu.gather_rows(X, np.array([3, 0])) == X[[3, 0]]).all()
print(json.dumps({
    "right": bool(right), "numba": "numba" in sys.modules,
    "warnings": [f"{w.category.__name__}: {w.message}" for w in caught],
}))
"""
FIT = """
import json, sys, time
import numpy as np
import backprop as bp
started = time.process_time()
rng = np.random.default_rng(0)
X, y = rng.standard_normal((256, 784)).astype(np.float32), rng.integers(0, 10, 256)
model = bp.MLP([784, 256, 10])
bp.fit(model, X, y, loss="cross_entropy", optimizer="Adam", batch_size=128, progress=False)
print(json.dumps([time.process_time() - started, "numba" in sys.modules]))
"""


def also(*cases: Any) -> list[Any]:
    """Cases for `make test-long`: each starts an interpreter that compiles for two seconds."""
    return [pytest.param(case, marks=pytest.mark.long) for case in cases]


def start(code: str, cache: Path, paths: list[Path] = PATHS, umask: int = 0o022) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        umask=umask, cwd="/", env={
            "PYTHONPATH": os.pathsep.join(map(str, paths)), "XDG_CACHE_HOME": str(cache),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )  # fmt: skip


def result(process: Any) -> Any:
    out, problems = process.communicate(timeout=300)
    assert process.returncode == 0, problems
    return json.loads(out)


def objects(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.o"))


def test_first_fit_of_an_install_and_of_a_process(tmp_path: Path) -> None:
    """The first compiles fourteen kernels at most (how long: below, and `make bench-start`)."""
    assert result(start(FIT, tmp_path))[1]
    kept = objects(tmp_path)
    assert len(kept) <= 14
    made = [file.stat().st_mtime_ns for file in kept]
    later = [result(start(FIT, tmp_path)) for _ in range(3)]
    assert min(later)[0] < 0.5
    assert not any(numba for _, numba in later)  # they load what the first compiled
    assert [file.stat().st_mtime_ns for file in objects(tmp_path)] == made


@pytest.mark.long  # nine seconds where the machine is quick, more where others slow it
def test_first_fit_of_an_install_takes_ten_seconds(tmp_path: Path) -> None:
    # The machine's other work only ever adds, up to a half to CPU time as well: the best of three.
    for attempt in range(3):
        cache = tmp_path / str(attempt)
        seconds, _ = result(start(FIT, cache))
        if seconds < 10:
            break
    assert seconds < 10


EVERY_KERNEL = """
import json, sys
import numpy as np
import backprop as bp
rng = np.random.default_rng(0)
X, y = np.eye(20, dtype=np.float32)[rng.integers(0, 20, 256)], rng.integers(0, 2, 256)
for norm in (None, "batch", "layer"):  # of X the zeros are skipped, and its noise is dense
    for noise in (0.0, 0.1):
        model = bp.MLP([20, 16, 2], "gelu", dropout=0.1, norm=norm)
        bp.fit(model, X, y, "cross_entropy", batch_size=128, input_noise=noise, progress=False)
        model.predict(X)
print(json.dumps("numba" in sys.modules))
"""


def test_no_kernel_needs_numba_where_it_is_compiled() -> None:
    """In the cache that all tests share, so that little of it is left to be compiled here."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    result(start(EVERY_KERNEL, cache))
    assert not result(start(EVERY_KERNEL, cache))


def test_eight_processes_start_cold_at_once(tmp_path: Path) -> None:
    right = {"right": True, "numba": True, "warnings": []}
    facts = [result(p) for p in [start(GATHER, tmp_path) for _ in range(8)]]
    assert all({**fact, "numba": True} == right for fact in facts)
    kept = objects(tmp_path)
    assert len(kept) == 2
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == kept  # no half of one
    assert result(start(GATHER, tmp_path)) == {**right, "numba": False}


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("umask", [0o000, *also(0o002, 0o077)])
def test_the_folder_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    assert result(start(GATHER, tmp_path / "cache", umask=umask))["warnings"] == []
    top = tmp_path / "cache" / "fused-backprop"
    for path in (top, *top.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the kernels of GATHER are."""
    cache = tmp_path_factory.mktemp("cache")
    result(start(GATHER, cache))
    return cache


@pytest.mark.parametrize("damage", ["empty", "flipped bit", *also("another kernel", "a folder")])
def test_damaged_code_is_compiled_again(compiled: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(compiled, cache)
    for file in objects(cache):
        data = bytearray(file.read_bytes())
        if damage == "a folder":
            file.unlink()
            file.mkdir()
        elif damage != "another kernel":
            data[len(data) // 2] ^= 1
            file.write_bytes(b"" if damage == "empty" else data)
    if damage == "another kernel":  # its checksum is right, its symbol is not there
        files = objects(cache)
        shutil.copy(files[0], files[1])
    facts = result(start(GATHER, cache))
    assert facts["right"] and facts["numba"]
    assert len(facts["warnings"]) == (damage == "a folder")
    if damage != "a folder":
        assert [f.read_bytes() for f in objects(cache)] == [
            f.read_bytes() for f in objects(compiled)
        ]


def test_an_edited_source_does_not_meet_old_code(compiled: Path, tmp_path: Path) -> None:
    cache, copy = tmp_path / "cache", tmp_path / "packages"
    shutil.copytree(compiled, cache)
    shutil.copytree(KERNELS, copy / KERNELS.name, ignore=shutil.ignore_patterns("__pycache__"))
    assert not result(start(GATHER, cache, [copy]))["numba"]  # the same sources elsewhere
    with (copy / KERNELS.name / "cpu" / "vector_math.py").open("a") as source:
        source.write("\n# edited\n")
    assert result(start(GATHER, cache, [copy]))["numba"]
    assert len(objects(cache)) == 2 * len(objects(compiled))


@pytest.mark.parametrize(
    "place", ["others may write", "below a file", *also("a link", "not absolute")]
)
def test_one_warning_where_nothing_private_can_be_written(tmp_path: Path, place: str) -> None:
    cache = tmp_path / "cache"
    if place == "others may write":
        (cache / "fused-backprop").mkdir(parents=True)
        (cache / "fused-backprop").chmod(0o777)
    elif place == "a link":
        (tmp_path / "elsewhere").mkdir()
        cache.mkdir()
        (cache / "fused-backprop").symlink_to(tmp_path / "elsewhere")
    elif place == "below a file":
        cache.touch()
    else:
        cache = Path("here")
    facts = result(start(GATHER, cache))
    assert facts["right"]
    [warning] = facts["warnings"]
    assert warning.startswith("RuntimeWarning: kernels are not cached (")
    assert objects(tmp_path) == []


def test_one_warning_where_the_disk_is_full(tmp_path: Path) -> None:
    full = (
        "import resource\n"
        "import signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    )
    facts = result(start(full + GATHER, tmp_path))
    assert facts["right"]
    [warning] = facts["warnings"]
    assert warning.startswith("RuntimeWarning: kernels are not cached (") and "too large" in warning
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
