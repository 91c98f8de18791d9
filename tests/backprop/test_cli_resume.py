"""`backprop fit` that is stopped and goes on, and the options of training."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

import backprop as bp
from backprop.callbacks import Training
from backprop.cli import main, tables
from tests.backprop.test_cli import write_rows

OPTIONS = (
    "--target late --drop kind,delay --hidden 8 --epochs 4 --batch-size 32 --device reference "
    "--optimizer AdamW --lr 0.01 --schedule cosine --warmup 1 --patience 3 --ema 0.9 "
    "--accumulate 2 --metrics auc,accuracy --class-weight balanced --input-noise 0.01 "
    "--clip-norm 1"
)


@pytest.fixture
def fit(tmp_path: Path) -> list[str]:
    return ["fit", str(write_rows(tmp_path / "people.csv")), *OPTIONS.split()]


def test_interrupted_and_resumed(
    fit: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    assert main([*fit, "-q", "-o", str(whole)]) == 0
    saved = [*fit, "-o", str(part), "--checkpoint", str(tmp_path / "run"), "--resume"]

    class Interrupt(bp.Callback):
        def epoch_end(self, training: Training) -> None:
            if training.epoch == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(tables, "_logs", lambda options: [Interrupt()])
        assert main(saved) == 130
    out, err = capsys.readouterr()
    assert "wrote" in out and err.endswith("backprop: interrupted\n")
    assert bp.History.read(part.with_suffix(".history.json")).epochs == 2
    assert main([*saved, "-q"]) == 0
    assert part.read_bytes() == whole.read_bytes()
    curves = [bp.History.read(path.with_suffix(".history.json")) for path in (whole, part)]
    for name in curves[0]:
        if name != "seconds":
            np.testing.assert_array_equal(curves[0][name], curves[1][name])
    assert {"val_auc", "val_accuracy"} <= set(curves[0])


def test_what_is_refused(
    fit: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = str(tmp_path / "run"), ["-o", str(tmp_path / "m")]
    assert main([*fit, *output, "-q", "--checkpoint", run]) == 0
    for more, message in [
        (["--resume"], "fit: resume: expected checkpoint="),
        (["--checkpoint", run], "resume=True goes on from there"),
        (["--checkpoint", run, "--resume", "--batch-size", "16"], "batch_size: 32 there, 16 here"),
        (["--schedule", "plateau", "--warmup", "9"], "warmup: expected less than the 4 epochs"),
        (["--valid-fraction", "0"], "EarlyStopping: monitor: expected"),
    ]:
        assert main([*fit, *output, "-q", *more]) == 2
        assert message in capsys.readouterr().err
