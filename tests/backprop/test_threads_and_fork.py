"""Several threads and forked children: a web server's and a data loader's way of using a model."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np
import pytest

import backprop as bp

rng = np.random.default_rng(0)
# Wide enough that a step and a prediction are worth several threads of the engine's own.
X = rng.standard_normal((512, 64)).astype(np.float32)
ids = rng.integers(0, 10, 512)


def trained(seed: int) -> bytes:
    model = bp.MLP([64, 256, 10], "gelu", dropout=0.1, seed=seed)
    bp.fit(model, X, ids, loss="cross_entropy", epochs=2, batch_size=256, progress=False)
    bits: bytes = model.parameters.tobytes() + model.predict(X).tobytes()
    return bits


def test_predict_from_many_threads_is_predict_from_one() -> None:
    model = bp.MLP([64, 256, 256, 10], norm="batch")
    serial = [model.predict(X[i:]).tobytes() for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = list(pool.map(lambda i: model.predict(X[i:]).tobytes(), range(8)))
            assert together == serial


def test_fits_in_several_threads_do_not_meet() -> None:
    serial = [trained(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(trained, range(4))) == serial


def send_trained(pipe: Connection) -> None:
    pipe.send(trained(1))
    pipe.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_child_trains_after_its_parent_did() -> None:
    expected = trained(1)
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=send_trained, args=(theirs,))
        child.start()
        theirs.close()
        assert ours.poll(60), "the child hangs"
        assert ours.recv() == expected
        child.join(60)
        assert child.exitcode == 0
    assert trained(1) == expected  # and the parent still does


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_while_another_thread_trains() -> None:
    expected = trained(1)
    context = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(1) as pool:
        background = pool.submit(lambda: [trained(2) for _ in range(20)])
        for _ in range(3):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=send_trained, args=(theirs,))
            child.start()
            theirs.close()
            assert ours.poll(60), "the child hangs"
            assert ours.recv() == expected
            child.join(60)
            assert child.exitcode == 0
        assert len(set(background.result())) == 1


BRIEF = """
import numpy as np
from backprop_kernels import cpu
X, index = np.ones((3000, 155), np.float32), np.arange(600)
for _ in range(5000):
    assert cpu.gather_rows(X, index).sum() == 600 * 155
"""


def test_programs_of_two_threads_that_live_for_one_call() -> None:
    """A worker may leave a program's last barrier after the program's memory is another's."""
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", BRIEF], check=True, timeout=120, env=paths)
