"""History: files, what is refused, and pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import backprop as bp
from backprop.checkpoint import read_tensors, write_tensors
from backprop.cli import main
from backprop.generations import STATE
from backprop.history import plot
from backprop.resume import history_of


def test_history_file_round_trip(tmp_path: Path) -> None:
    history = bp.History()
    history.append(loss=0.1, lr=1e-3)
    history.append(loss=1 / 3, lr=1e-3)
    history.save(tmp_path / "h.json")
    assert json.loads((tmp_path / "h.json").read_text()) == {
        "loss": [0.1, 1 / 3], "lr": [1e-3, 1e-3],
    }  # fmt: skip
    assert bp.History.read(tmp_path / "h.json") == history


def test_history_plots_to_a_picture(tmp_path: Path) -> None:
    history = bp.History(loss=[3.0, 2.0, 1.0], val_loss=[3.0, 2.5, 2.0])
    history.plot(tmp_path / "h.png", title="loss")
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    history.plot(tmp_path / "h.svg")
    assert "<svg" in (tmp_path / "h.svg").read_text()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("h.json", "[1]"),
        ("h.json", '{"loss": 1}'),
        ("h.json", '{"loss": [1, 2], "lr": [1]}'),
        ("h.json", '{"loss": ["a"]}'),
        ("h.json", '{"loss": [true]}'),
        ("h.json", '{"loss": [1'),
        ("h.csv", "epoch,loss\n1,x\n"),
        ("h.csv", "epoch,loss\n1\n"),
        ("h.jsonl", '{"epoch": 1, "loss": 2}\n{"epoch": 2}\n'),
        ("h.jsonl", "[1]\n"),
        ("h.json", "\udcff"),
    ],
)
def test_other_files_are_no_history(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(bp.DataError, match=rf"History: .*{name}: expected a history"):
        bp.History.read(tmp_path / name)


def test_curves_and_panels() -> None:
    from matplotlib import pyplot

    history = bp.History(loss=[3.0, 2.0], val_loss=[3.0, 2.5], lr=[1.0, 1.0], seconds=[1.0, 1.0])
    axes = history.plot(title="late")
    assert [line.get_label() for line in axes.lines] == ["training", "validation"]
    assert [list(line.get_ydata()) for line in axes.lines] == [[3.0, 2.0], [3.0, 2.5]]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2], [1, 2]]  # epochs
    assert axes.get_title() == "late" and axes.get_xlabel() == "epoch"
    assert axes.figure is pyplot.gcf()  # what a notebook shows
    losses, others = bp.History(history, val_auc=[0.5, 0.75]).plot()
    assert len(losses.lines) == 2 and list(others.lines[0].get_ydata()) == [0.5, 0.75]
    pyplot.close("all")


def test_several_runs_share_a_picture(tmp_path: Path) -> None:
    runs = {"a": bp.History(loss=[3.0, 2.0], val_loss=[3.0, 2.5]), "b": bp.History(loss=[1.0])}
    axes = plot(runs, tmp_path / "both.png")
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["a training", "a validation", "b training"]
    assert [line.get_color() for line in axes.lines] == ["C0", "C0", "C1"]


def test_no_curves_and_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(bp.DataError, match="expected a history with losses"):
        bp.History(lr=[1.0]).plot(tmp_path / "h.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(bp.MissingExtraError, match=r'pip install "fused-backprop\[plot\]"'):
        bp.History(loss=[1.0]).plot(tmp_path / "h.png")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = bp.History(loss=[3.0, 2.0], lr=[1.0, 1.0])
    history.save(tmp_path / "m.history.json")
    (tmp_path / "m.safetensors").write_bytes(b"")
    (tmp_path / "run").mkdir()
    history.save(tmp_path / "run" / "history.json")
    (tmp_path / "log.csv").write_text("epoch,loss\n1,3\n2,2\n")
    runs = [str(tmp_path / name) for name in ("m.safetensors", "run", "log.csv")]
    assert main(["plot", *runs, "-o", str(tmp_path / "all.png")]) == 0
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", runs[0]]) == 0
    assert "wrote" in capsys.readouterr().out and (tmp_path / "m.png").exists()
    assert main(["plot", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "expected checkpoints in this folder, got none" in message and str(tmp_path) in message


def test_the_command_reads_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, X = tmp_path / "run", np.zeros((8, 2))
    model = bp.MLP([2, 1], device="reference")
    history = bp.fit(model, X, X[:, 0], epochs=3, checkpoint=run, progress=False)
    (newest,) = [file for file in run.iterdir() if "3" in file.name]
    assert history_of(run) == history == history_of(newest)
    for path in (run, newest):
        assert main(["plot", str(path), "-o", str(tmp_path / "p.png")]) == 0
    assert main(["plot", str(run)]) == 0 and (tmp_path / "run.png").exists()
    model.save(tmp_path / "m.safetensors")
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "m.safetensors")]) == 2
    assert "got a model alone; name its history or a log" in capsys.readouterr().err
    tensors, metadata = read_tensors(newest)
    for text in ("{}", '{"history": 3}', '{"history": {"loss": 3}}'):
        write_tensors(newest, tensors, {**metadata, STATE: text})
        with pytest.raises(bp.CheckpointFormatError, match="expected a history, got"):
            history_of(newest)
