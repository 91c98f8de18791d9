"""The progress line: where it is shown, and what it says."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest

import backprop as bp
from backprop.progress import Progress

X, y = np.ones((8, 2)), np.ones(8)
LINE = r"epoch (\d)/2 100%  [\d,]+ rows/s  loss \d+\.\d{4}(  val_loss \d+\.\d{4})?  ETA \d+:\d\d\n"


def test_lines_on_stderr_only_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model = bp.MLP([2, 1], device="reference")
    bp.fit(model, X, y, epochs=2, eval_set=(X, y), progress="lines")
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(LINE * 2, err)
    for nobody_watches in (True, False):
        bp.fit(model, X, y, epochs=2, progress=nobody_watches)
        assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_is_redrawn_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("backprop.progress.time.monotonic", lambda: float(next(clock)))
    stream = Terminal()
    progress = Progress(2, 100, True, stream)
    progress.update(0, 50, 0.25, None)
    progress.end_epoch(0, 0.2, 0.3)
    assert stream.getvalue() == (
        f"\r{'epoch 1/2  50%  2 rows/s  loss 0.2500  ETA 1:00':<78}"
        f"\r{'epoch 1/2 100%  3 rows/s  loss 0.2000  val_loss 0.3000  ETA 0:30':<78}\n"
    )


def test_a_resumed_fit_tells_the_rate_of_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("backprop.progress.time.monotonic", lambda: float(next(clock)))
    stream = Terminal()
    Progress(2, 100, True, stream, before=50).update(0, 90, 0.25, None)  # 40 rows in 20 s
    assert stream.getvalue().strip() == "epoch 1/2  90%  2 rows/s  loss 0.2500  ETA 0:55"


def test_a_notebook_keeps_one_line() -> None:
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    progress = Progress(2, 100, True, stream)
    progress.end_epoch(0, 0.2, None)
    progress.end_epoch(1, 0.1, None)
    first, second = stream.getvalue().split("\r")[1:]
    assert not first.endswith("\n") and second.endswith("\n")


def test_other_values_are_refused() -> None:
    with pytest.raises(bp.OptionError, match='progress: expected True, False or "lines", got'):
        bp.fit(bp.MLP([2, 1], device="reference"), X, y, progress="line")
