"""benchmarks/gpu/run_all.py: what can be shown of it without a GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.cuda_host import build

pytestmark = pytest.mark.skipif(bool(build.problem()), reason=f"emulator: {build.problem()}")
FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "run_all.py"), "--dry-run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


@pytest.mark.long
def test_every_part_of_a_dry_run_leaves_its_table(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": done in ") == 3
    with (tmp_path / "check.csv").open(newline="") as stream:
        checks = list(csv.DictReader(stream))
    assert len(checks) > 20 and all(row["good"] == "True" for row in checks)
    summary = (tmp_path / "summary.md").read_text()
    assert "- device: none: a dry run in the emulator" in summary and "- commit: " in summary
    for table in ("step.csv", "operators.csv"):
        header = (tmp_path / table).read_text().splitlines()[0]
        assert "| " + " | ".join(header.split(",")) + " |" in summary


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
