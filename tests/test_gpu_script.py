"""benchmarks/gpu/run_all.py: what can be shown of it without a GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.cuda_host import build, cupy_stand_in

pytestmark = pytest.mark.skipif(bool(build.problem()), reason=f"emulator: {build.problem()}")
FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "run_all.py"), "--dry-run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


@pytest.mark.long
def test_every_part_of_a_dry_run_leaves_its_table(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": done in ") == 6
    with (tmp_path / "check.csv").open(newline="") as stream:
        checks = list(csv.DictReader(stream))
    assert len(checks) > 20 and all(row["good"] == "True" for row in checks)
    summary = (tmp_path / "summary.md").read_text()
    assert "- device: none: a dry run in the emulator" in summary and "- commit: " in summary
    for table in ("step.csv", "mlp_step.csv", "operators.csv", "targets.csv", "choices.csv"):
        header = (tmp_path / table).read_text().splitlines()[0]
        assert "| " + " | ".join(header.split(",")) + " |" in summary


@pytest.mark.usefixtures("emulator")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_products_are_called_as_they_are_now(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the launchers' own parameters, some of them."""
    monkeypatch.syspath_prepend(FOLDER)
    bench = import_module("bench_operators")
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return cupy_stand_in.asarray(rng.standard_normal(shape, np.float32))

    called = []
    for work in bench.products(cupy_stand_in, normal, precision, 40, 30, 20):
        work.call()
        called.append(work.operator)
    assert sorted(called) == sorted(
        f"linear_{name}{way}" for name in ("forward", "dgrad", "wgrad") for way in ("", " bare")
    )


def test_a_part_beyond_its_time_is_cut_off_and_what_it_wrote_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    run_all = import_module("run_all")
    (tmp_path / "slow.csv").write_text("a,b\n1,2\n")
    slow = run_all.Part("slow", 1.0, [sys.executable, "-c", "import time; time.sleep(60)"])
    part = slow._replace(table="slow.csv")
    outcome = run_all.run(part, tmp_path, 0.5, dry=True)
    assert outcome == "cut off after 0.0 minutes; what it had written is kept"
    run_all.write_summary(tmp_path, {"device": "none"}, [(part, outcome)])
    assert (
        (tmp_path / "summary.md")
        .read_text()
        .endswith(f"## slow\n\n{outcome}\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    )


def test_failed_and_impossible_parts_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    run_all = import_module("run_all")
    part = run_all.Part("bad", 1.0, [sys.executable, "-c", "raise SystemExit(3)"])
    assert run_all.run(part, tmp_path, 30, dry=True).endswith("with status 3, see bad.log")
    assert run_all.without("numpy")() == ""
    assert run_all.without("numpy", "no_such_module")() == "needs no_such_module"


def test_targets_are_held_against_the_rows_they_are_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    targets = import_module("targets")
    step = "batch,widths,precision,graph_us,bare_us,compiled_us\n"
    step += "8192,4096-4096-4096-10,bf16,111,100,130\n8192,4096-4096-4096-10,tf32,900,100,900\n"
    step += "8192,8192-8192-8192-10,bf16,107,100,\n"
    (tmp_path / "step.csv").write_text(step)
    products = "operator,shape,precision,us,yardstick_us\nloss mse,65536x256,float32,1,1\n"
    products += "linear_wgrad bare,8192x4096x4096,bf16,104,100\nlinear_wgrad,1x1x1,bf16,1,1\n"
    (tmp_path / "operators.csv").write_text(products)
    monkeypatch.setattr(sys, "argv", ["targets.py", "--out", str(tmp_path)])
    targets.main()
    with (tmp_path / "targets.csv").open(newline="") as stream:
        rows = [(r["target"], r["ratio"], r["met"]) for r in csv.DictReader(stream)]
    assert ("bare product by cuBLAS, width 4096 and more", "1.04", "False") in rows
    assert ("step by bare products, width 4096", "1.11", "True") in rows
    assert ("step by bare products, width 8192", "1.07", "False") in rows
    assert ("step by PyTorch compiled, width 4096", "0.8538", "True") in rows
    assert ("step by PyTorch compiled, width 8192", "not measured", "") in rows
    assert len(rows) == len(targets.TARGETS)


def test_a_roof_is_what_clocks_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100's: 132 multiprocessors at 1.98 GHz, 5120 bits at 2.619 GHz."""
    monkeypatch.syspath_prepend(FOLDER)
    roofline = import_module("roofline")

    class Device:
        compute_capability = "90"
        attributes: ClassVar = {
            "MultiProcessorCount": 132, "ClockRate": 1_980_000, "MemoryClockRate": 2_619_000,
            "GlobalMemoryBusWidth": 5120,
        }  # fmt: skip

    roof = roofline.roof(SimpleNamespace(cuda=SimpleNamespace(Device=Device)), dry=False)
    assert roof.flops["bf16"] == pytest.approx(1070.5e12, rel=1e-3)
    assert roof.bandwidth == pytest.approx(3.352e12, rel=1e-3)
    assert roof.seconds(1070.5e12, "bf16", 1.0) == pytest.approx(1, rel=1e-3)
    assert roof.seconds(1070.5e12, "bf16x6", 1.0) == pytest.approx(6, rel=1e-3)
    assert roof.seconds(1.0, "bf16", 3.352e12) == pytest.approx(1, rel=1e-3)
