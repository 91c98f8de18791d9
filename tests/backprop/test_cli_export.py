"""`backprop export`, both ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import backprop as bp
from backprop.cli import main
from tests.backprop.test_cli import SMALL, write_rows

pytest.importorskip("onnx")


def test_export_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(write_rows(tmp_path / "people.csv"))
    ours, there, torch, back = (
        str(tmp_path / name)
        for name in ("o.safetensors", "m.onnx", "t.safetensors", "b.safetensors")
    )
    assert main(["fit", data, "--target", "kind", "-o", ours, "-q", *SMALL]) == 0
    X = np.random.default_rng(0).normal(size=(5, bp.load(ours).in_features))
    expected = bp.load(ours).predict(X)
    assert main(["export", ours, there]) == 0
    assert "named in the file's metadata" in capsys.readouterr().out
    assert main(["export", ours, torch]) == 0
    assert "nn.Sequential(nn.Linear(" in capsys.readouterr().out
    for source in (there, torch):
        assert main(["export", source, back]) == 0
        np.testing.assert_array_equal(bp.load(back).predict(X), expected)
    capsys.readouterr()
    for command, message in [
        ([ours, "m.pt"], "expected a name ending in .onnx or .safetensors, got m.pt"),
        ([ours, torch, "--probabilities"], "--probabilities: expected an .onnx file"),
        ([torch, there, "--activation", "rely"], "from_torch: activation: expected"),
        (["absent.onnx", back], "No such file"),
    ]:
        assert main(["export", *command]) == 2
        assert message in capsys.readouterr().err
