"""Where it is imported: cheaply, without Numba, without a home, without a GPU.

Each case runs in a process of its own, for what it must not find already imported.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import backprop as bp
from backprop.device import INSTALL

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parent.parent.parent
PATHS = [ROOT, ROOT / "kernels"]
TRAIN = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import backprop as bp
    model = bp.MLP([3, 8, 1], seed=1)
    step = bp.TrainStep(model, "mse", bp.SGD(lr=0.1), batch_size=4)
    X, y = [[1, 2, 3], [4, 5, 6], [-1, 0, 1], [0, 1, 0]], [1, 0, 0.5, 2]
    losses = [step(X, y) for _ in range(3)]
print(json.dumps({
    "backend": model.backend.__name__.rpartition(".")[2],
    "losses": losses,
    "warnings": [[w.category.__name__, str(w.message)] for w in caught],
}))
"""


def run(code: str, paths: list[Path] | None = None, **environment: str) -> Any:
    """What `code` prints as JSON, in a fresh interpreter with only this environment."""
    path = os.pathsep.join(map(str, PATHS if paths is None else paths))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True, text=True, timeout=300, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def losses_of_the_reference() -> list[float]:
    model = bp.MLP([3, 8, 1], seed=1, device="reference")
    step = bp.TrainStep(model, "mse", bp.SGD(lr=0.1), batch_size=4)
    X, y = [[1, 2, 3], [4, 5, 6], [-1, 0, 1], [0, 1, 0]], [1, 0, 0.5, 2]
    return [step(X, y) for _ in range(3)]


def test_import_costs_numpy_and_nothing_else() -> None:
    facts = run("""
import json, os, sys, threading, warnings
warnings.simplefilter("error")
before = dict(os.environ)
import backprop
import backprop_kernels.reference
print(json.dumps({
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "threads": threading.active_count(),
    "environment changed": dict(os.environ) != before,
}))
""")
    heavy = {"numba", "llvmlite", "cupy", "sklearn", "scipy", "matplotlib", "pandas", "pyarrow",
             "rich", "torch"}  # fmt: skip
    assert heavy & set(facts["modules"]) == set()
    assert facts["threads"] == 1 and not facts["environment changed"]


def test_import_takes_at_most_50_ms_more_than_numpys() -> None:
    code = """
import time, numpy, json
start = time.perf_counter()
import backprop
print(json.dumps(time.perf_counter() - start))
"""
    # The machine's other work only ever adds; bytecode is cached from the first run on.
    fastest = min(run(code, PYTHONDONTWRITEBYTECODE="") for _ in range(7))
    assert fastest <= 0.050


@pytest.mark.parametrize("how", ["absent", "broken"])
def test_reference_serves_where_numba_does_not(tmp_path: Path, how: str) -> None:
    paths = PATHS
    code = TRAIN
    if how == "absent":
        code = "import sys; sys.modules['numba'] = None\n" + TRAIN
    else:
        (tmp_path / "numba").mkdir()
        (tmp_path / "numba" / "__init__.py").write_text("raise SystemError('wrong ABI')\n")
        paths = [tmp_path, *PATHS]
    facts = run(code, paths, XDG_CACHE_HOME=str(tmp_path / "cache"), HOME=str(tmp_path))
    assert facts["backend"] == "reference"
    assert facts["losses"] == losses_of_the_reference()
    problem = "ImportError('numba is not installed')"
    if how == "broken":
        problem = "SystemError('wrong ABI')"
    assert facts["warnings"] == [
        [
            "RuntimeWarning",
            f"the CPU kernels need numba, which does not work here ({problem}); plain NumPy "
            "serves instead, slower. Mend it with: pip install --force-reinstall numba",
        ]
    ]


@pytest.mark.parametrize("home", ["none", pytest.param("a file", marks=pytest.mark.long)])
def test_trains_from_a_read_only_install_without_a_home(tmp_path: Path, home: str) -> None:
    copy = tmp_path / "site-packages"
    for package in (ROOT / "backprop", ROOT / "kernels" / "backprop_kernels"):
        shutil.copytree(package, copy / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*copy.rglob("*"), copy]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "file").touch()
    # Tests may run as root, who can write anywhere but below a file.
    unusable = str(tmp_path / "file" / "below")
    environment = {"HOME": unusable, "XDG_CACHE_HOME": unusable}
    facts = run(TRAIN, [copy], **(environment if home == "a file" else {}))
    assert facts["backend"] == "cpu"
    assert facts["losses"] == pytest.approx(losses_of_the_reference(), rel=1e-6)
    if home == "a file":
        [[category, message]] = facts["warnings"]
        assert category == "RuntimeWarning"
        assert message.startswith("kernels are not cached (") and message.endswith(
            "so every process compiles them again; point XDG_CACHE_HOME at a folder that only "
            "you can write"
        )


def cupy(driver: Any, devices: Any) -> ModuleType:
    """A stand-in whose runtime answers, or raises, what it is given."""

    def answer(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    module = ModuleType("cupy")
    runtime = SimpleNamespace(
        driverGetVersion=lambda: answer(driver), getDeviceCount=lambda: answer(devices)
    )
    module.cuda = SimpleNamespace(runtime=runtime)  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [
        (None, f"cupy is not installed; {INSTALL}"),
        (
            cupy(RuntimeError("libcuda.so.1: cannot open"), 0),
            "the NVIDIA driver is missing or does not answer (libcuda.so.1: cannot open); install "
            "the driver",
        ),
        (
            cupy(0, 0),
            "the NVIDIA driver is missing; install it from your distribution or nvidia.com",
        ),
        (
            cupy(11040, 1),
            "the NVIDIA driver is too old: expected CUDA 12.0 or newer, got 11.4",
        ),
        (
            cupy(12040, 0),
            "the NVIDIA driver is installed but there is no device; see nvidia-smi",
        ),
        (
            cupy(12040, RuntimeError("cudaErrorNoDevice")),
            "the NVIDIA driver reports no usable device (cudaErrorNoDevice); see nvidia-smi",
        ),
    ],
)
def test_cuda_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, stand_in: ModuleType | None, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(bp.DeviceUnavailableError) as error:
            bp.MLP([2, 1], device=device)
        assert str(error.value) == f'device "{device}": {reason}'


def test_cupy_that_does_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise OSError('libnvrtc.so.12')\n")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(bp.DeviceUnavailableError) as error:
        bp.MLP([2, 1], device="cuda")
    assert str(error.value) == (
        f'device "cuda": cupy is installed but does not import (libnvrtc.so.12); {INSTALL}'
    )


def test_unknown_device() -> None:
    for device in ("gpu", "cuda:", "cuda:x", "CPU", ""):
        with pytest.raises(bp.OptionError) as error:
            bp.MLP([2, 1], device=device)
        assert str(error.value) == (
            f'device: expected "auto", "cpu", "cuda", "cuda:N" or "reference", got {device!r}'
        )
