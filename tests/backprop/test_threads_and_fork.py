"""Several threads and forked children: a web server's and a data loader's way of using a model."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from backprop_kernels.cpu import threads

import backprop as bp
from tests.outside import outside

pytestmark = pytest.mark.alone

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
    outside(BRIEF)


def test_sleeping_workers_are_woken() -> None:
    """Between two programs a worker may be spinning, falling asleep, or asleep."""
    model = bp.MLP([64, 256, 256, 10])
    many = rng.standard_normal((4096, 64)).astype(np.float32)
    expected = model.predict(many).tobytes()
    for pause in np.tile(np.linspace(0, 0.004, 40), 5):
        time.sleep(pause)
        assert model.predict(many).tobytes() == expected


CROWDED = """
import os
import numpy as np
import backprop as bp
X, ids = np.random.default_rng(0).standard_normal((512, 64)).astype(np.float32), np.arange(512) % 10
def trained():
    model = bp.MLP([64, 256, 10], "gelu", dropout=0.1, seed=0)
    bp.fit(model, X, ids, loss="cross_entropy", epochs=20, batch_size=256, progress=False)
    return model.parameters.tobytes()
bp.set_num_threads(1)
alone = trained()
bp.set_num_threads(8)
assert trained() == alone
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
bp.set_num_threads(5)
assert trained() == alone
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_more_threads_than_cores() -> None:
    """A thread that waits for one without a core sleeps, and nobody misses being woken."""
    outside(CROWDED)


def test_training_and_predicting_at_once_change_no_bit() -> None:
    """One model trains while another predicts, from as many threads as a web server has."""
    server = bp.MLP([64, 256, 256, 10])
    expected, alone = server.predict(X).tobytes(), trained(0)
    with ThreadPoolExecutor(6) as pool:
        fits = [pool.submit(trained, 0) for _ in range(3)]
        answers = [pool.submit(lambda: server.predict(X).tobytes()) for _ in range(30)]
        assert {future.result() for future in answers} == {expected}
        assert {future.result() for future in fits} == {alone}


def test_number_of_threads_may_change_while_others_train() -> None:
    before, expected, stop = threads.get_num_threads(), trained(0), threading.Event()

    def change() -> None:
        count = 1
        while not stop.wait(0.002):
            bp.set_num_threads(count)
            count = count % 4 + 1

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            assert set(pool.map(trained, [0] * 6)) == {expected}
    finally:
        stop.set()
        changer.join()
        bp.set_num_threads(before)


PROCESSES = """
import multiprocessing, sys
import numpy as np
import backprop as bp

rng = np.random.default_rng(0)
X, ids = rng.standard_normal((512, 64)).astype(np.float32), rng.integers(0, 10, 512)

def trained(seed):
    model = bp.MLP([64, 256, 10], "gelu", dropout=0.1, seed=seed)
    bp.fit(model, X, ids, loss="cross_entropy", epochs=2, batch_size=256, progress=False)
    return model.parameters.tobytes() + model.predict(X).tobytes()

if __name__ == "__main__":
    expected = [trained(seed) for seed in range(4)]
    if sys.argv[1] in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(sys.argv[1]).Pool(3) as pool:
            assert pool.map(trained, range(4)) == expected
    else:
        from joblib import Parallel, delayed
        run = Parallel(n_jobs=3, backend=sys.argv[1])
        assert run(delayed(trained)(seed) for seed in range(4)) == expected
    assert trained(1) == expected[1]
"""


@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver", "loky", "threading"])
def test_workers_get_the_bits_of_their_parent(tmp_path: Path, how: str) -> None:
    """multiprocessing's pools after the parent trained, and joblib's."""
    if how in ("loky", "threading"):
        pytest.importorskip("joblib", reason="joblib is not installed")
    elif how not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {how}")
    outside(PROCESSES, how, folder=tmp_path)


COUNT = """
import json, os, sys, threading
import numpy as np
import backprop as bp
from backprop_kernels.cpu.threads import available_cpus, get_num_threads
X, y = np.ones((4096, 256), np.float32), np.ones((4096, 1), np.float32)
bp.TrainStep(bp.MLP([256, 256, 1]), "mse", "SGD", 4096)(X, y)
ours = [t.name for t in threading.enumerate() if t.name.startswith("backprop-")]
print(json.dumps([available_cpus(), get_num_threads(), len(ours)]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_affinity_and_omp_num_threads_are_obeyed() -> None:
    """A large step on as many threads as there are cores to run on, this one among them."""
    cores = os.sched_getaffinity(0)
    here = threads.available_cpus()
    assert json.loads(outside(COUNT, OMP_NUM_THREADS="")) == [here, here, here - 1]
    assert json.loads(outside(COUNT, OMP_NUM_THREADS="1")) == [here, 1, 0]
    assert json.loads(outside(COUNT, OMP_NUM_THREADS="1,2")) == [here, 1, 0]
    assert json.loads(outside(COUNT, OMP_NUM_THREADS="many")) == [here, here, here - 1]
    try:
        os.sched_setaffinity(0, {min(cores)})  # as taskset does, for the child
        assert json.loads(outside(COUNT)) == [1, 1, 0]
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"cpu.max": "400000 100000", "a/cpu.max": "max 100000"}, 4.0),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "800000 100000"}, 3.0),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/elsewhere", {}, None),
        ("0::/", {"cpu.max": "none of the known forms"}, None),
        (
            "5:memory:/m\n4:cpu,cpuacct:/docker/1\n0::/",
            {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("no colons", {}, None),
    ],
)
def test_cgroup_quota(
    tmp_path: Path, membership: str, files: dict[str, str], cpus: float | None
) -> None:
    (tmp_path / "membership").write_text(membership + "\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert threads._cgroup_quota(tmp_path, tmp_path / "membership") == cpus
    assert threads._cgroup_quota(tmp_path, tmp_path / "absent") is None


def test_quota_bounds_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for quota, expected in ((0.5, 1), (1.5, 1), (1000.0, None)):
        monkeypatch.setattr(threads, "_cgroup_quota", lambda quota=quota: quota)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        assert threads.available_cpus() == (expected or cores)


def test_idle_threads_burn_no_time() -> None:
    """Workers wait a few ms for the next step, then sleep; each step costs that once."""
    before = threads.get_num_threads()
    bp.set_num_threads(3)
    try:
        step = bp.TrainStep(bp.MLP([64, 512, 10]), "cross_entropy", "Adam", 512)
        for _ in range(3):
            step(X, ids)
        workers = [t for t in threading.enumerate() if t.name.startswith("backprop-")]
        assert len(workers) >= 2  # of this pool; a closed one's may still be on their way out
        used = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - used < 0.05
    finally:
        bp.set_num_threads(before)


CROWD = """
import json, time
import numpy as np
import backprop as bp
X, ids = np.ones((1024, 256), np.float32), np.zeros(1024, int)
step = bp.TrainStep(bp.MLP([256, 512, 10]), "cross_entropy", "SGD", 1024)
A = np.ones((700, 700))
def seconds(work):
    times = []
    for _ in range(15):
        started = time.process_time(), time.perf_counter()
        work()
        times.append((time.process_time() - started[0], time.perf_counter() - started[1]))
    return sorted(times)[7]
for work in (lambda: step(X, ids), lambda: A @ A):
    work()
alone = [seconds(lambda: A @ A), seconds(lambda: step(X, ids))]
together = seconds(lambda: (A @ A, step(X, ids)))
print(json.dumps([sum(cpu for cpu, _ in alone), together[0]]))
"""


def test_blas_between_steps_does_not_crowd() -> None:
    """NumPy's BLAS has threads of its own: in turns, both need no more CPU than apart."""
    apart, in_turns = json.loads(outside(CROWD))
    assert in_turns < 2 * apart + 0.01, (apart, in_turns)
