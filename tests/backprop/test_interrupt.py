"""Ctrl-C: answered soon, and the step it meets is applied whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from backprop_kernels.cpu import program, threads

import backprop as bp
from backprop.generations import STATE, Generations

pytestmark = pytest.mark.alone

rng = np.random.default_rng(0)


@contextmanager
def interrupted_after(seconds: float) -> Iterator[list[float]]:
    """SIGINT to this process after so many seconds; gives the CPU time at which it was sent."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, send)
    timer.start()
    try:
        yield sent
    finally:
        timer.cancel()
        timer.join()


def bits(step: bp.TrainStep) -> tuple[int, list[bytes]]:
    """Everything that a step moves."""
    arrays = [step.model.parameters, *step.state.values(), *step.model.statistics.values()]
    return step.steps, [array.tobytes() for array in arrays]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_step_is_applied_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(program, "LONG", 0)
    monkeypatch.setattr(program, "PATIENCE", 0)
    X, ids = rng.standard_normal((512, 256)).astype(np.float32), rng.integers(0, 9, 512)

    def new_step() -> bp.TrainStep:
        model = bp.MLP([256, 256, 256, 9], "gelu", norm="batch", dropout=0.1)
        return bp.TrainStep(model, "cross_entropy", "Adam", 512)

    before = threads.get_num_threads()
    threads.set_num_threads(count)
    try:
        step, twin = new_step(), new_step()
        step.prepare(X, ids)
        states, seconds = [bits(twin)], 1.0
        for _ in range(12):
            started = time.perf_counter()
            twin(X, ids)
            seconds = min(seconds, time.perf_counter() - started)
            states.append(bits(twin))
        stopped = 0
        while step.steps < 11:
            known = step.steps
            try:
                with interrupted_after(rng.uniform(0, seconds)):
                    step(X, ids)
                    time.sleep(2 * seconds)  # not to be met by a signal that came late
            except KeyboardInterrupt:
                stopped += step.steps == known
            assert bits(step) == states[step.steps]
            if stopped > 20:
                break
        while step.steps < 12:  # and everything still works
            step(X, ids)
        assert bits(step) == states[12]
        assert stopped
    finally:
        threads.set_num_threads(before)


def test_answered_within_a_second_in_a_long_step() -> None:
    """In CPU time of two threads, which a busy machine does not stretch; the step takes 3 s."""
    X, y = np.ones((4096, 4096), np.float32), np.ones((4096, 1), np.float32)
    step = bp.TrainStep(bp.MLP([4096, 4096, 4096, 1]), "mse", "SGD", 4096)
    step.prepare(X, y)
    before = bits(step)
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.3) as sent:
        step(X, y)
    assert time.process_time() - sent[0] < 1
    assert bits(step) == before


def test_a_handler_that_raises_nothing_lets_the_step_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "LONG", 0)
    monkeypatch.setattr(program, "PATIENCE", 0)
    X, y = np.ones((2048, 512), np.float32), np.ones((2048, 1), np.float32)
    step = bp.TrainStep(bp.MLP([512, 512, 1]), "mse", "SGD", 2048)
    step.prepare(X, y)
    calls, seen = 0, []
    previous = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with interrupted_after(0.002):
            while not seen or not calls:  # the signal may be there before the first call
                step(X, y)
                calls += 1
    finally:
        signal.signal(signal.SIGINT, previous)
    assert step.steps == calls


def test_predict_and_fit_are_stopped() -> None:
    """A fit returns: its model is that of the last whole step."""
    X, y = np.ones((30_000, 1024), np.float32), np.zeros(30_000, np.float32)
    model = bp.MLP([1024, 2048, 2048, 1])
    model.predict(X[:512])  # compiled
    bp.TrainStep(model, batch_size=512)(X[:512], y[:512])
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.3) as sent:
        model.predict(X, batch_size=len(X))
    assert time.process_time() - sent[0] < 1
    with interrupted_after(0.3) as sent:
        history = bp.fit(model, X, y, epochs=1000, batch_size=8192, progress=False)
    assert time.process_time() - sent[0] < 1
    assert history.interrupted and np.isfinite(model.parameters).all()


def test_a_long_validation_is_broken_off() -> None:
    """The epoch's steps are made; its validation, of 3 s, is not waited for."""
    X = np.ones((8192, 4096), np.float32)
    y = np.ones((len(X), 1), np.float32)
    model = bp.MLP([4096, 4096, 4096, 1])
    seen: list[tuple[int, float]] = []

    def send(steps: int) -> None:
        seen.append((steps, time.process_time()))
        os.kill(os.getpid(), signal.SIGINT)

    class Validating(bp.Callback):
        def validation_begin(self, training: bp.Training) -> None:
            threading.Timer(0.3, send, [training.step.steps]).start()

    history = bp.fit(
        model, X[:8], y[:8], eval_set=(X, y), batch_size=8, epochs=9, callbacks=[Validating()],
        progress=False,
    )  # fmt: skip
    ((steps, sent),) = seen
    assert time.process_time() - sent < 1
    assert steps == 1 and history.epochs == 0 and history.interrupted


LONG_STEPS = """
import sys
import numpy as np
import backprop as bp

class Ready(bp.Callback):
    def step_begin(self, training):
        print(training.step.steps, flush=True)

X = np.ones((4096, 1024), np.float32)
ids = np.zeros(len(X), int)
bp.fit(bp.MLP([1024, 2048, 2048, 10]), X, ids, "cross_entropy", epochs=100, batch_size=len(X),
       callbacks=[Ready()], checkpoint=bp.Checkpoint(sys.argv[1], seconds=1e9), progress=False)
"""


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_sigterm_leaves_a_checkpoint_within_five_seconds(tmp_path: Path) -> None:
    """In CPU time, from the middle of a step of 2 s to the end; 76 MB are written."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", LONG_STEPS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
        begun = cpu_seconds(process.pid)
        while cpu_seconds(process.pid) - begun < 0.5:
            time.sleep(0.01)
        sent = cpu_seconds(process.pid)
        process.terminate()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stdout.read() == ""
    assert process.returncode == -signal.SIGTERM
    assert used.ru_utime + used.ru_stime - sent < 5
    found = Generations(tmp_path).newest()
    assert found is not None and '"steps": 1,' in found[2][STATE]
    assert np.isfinite(bp.load(tmp_path).parameters).all()


def test_a_problem_on_the_other_thread_is_raised_here() -> None:
    def fails() -> None:
        raise ZeroDivisionError("there")

    with pytest.raises(ZeroDivisionError, match="there"):
        threads.run_aside(fails, lambda: None)
