"""The threads that kernels run on: an own small pool, safe to use from any thread and after fork.

A worker waits inside compiled code, without the GIL, for a few milliseconds after its last program,
so that the next step starts in a microsecond; then it sleeps there and costs nothing. A thread that
finds the pool busy runs its program alone: results do not depend on how many took part.
"""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from backprop_kernels.cpu.compile import call, code
from backprop_kernels.errors import OptionError

# Words of the control block, each on its own cache line. Every worker has a line of its own, from
# WORKERS on: the number of its latest order, and the number it has taken.
TABLE, SYNC, THREADS, RUN, WORKERS = 0, 8, 16, 24, 32
ORDERED, TAKEN = 0, 1
# Where the threads meet (`sync`): the barrier's two words, how many sleep, and what they sleep on,
# a POSIX mutex and condition, with more room than any system's take.
COUNT, GENERATION, SLEEPERS, MUTEX, CONDITION, MEETING_WORDS = 0, 8, 16, 24, 40, 56
NO_MORE = 2**40  # in a ticket counter: no work is left; times the rows of a piece no overflow
WAIT_SPINS = 40_000  # ~2 ms: longer than the Python between two steps, shorter than is rude

_lock = threading.Lock()
_limit: int | None = None
_pool: _Pool | None = None
_scratch = np.zeros(2, np.int64)  # where Numba's convention puts a result that nobody reads
_SCRATCH = int(_scratch.ctypes.data)


def available_cpus() -> int:
    """CPUs this process may use: the affinity mask, cut by the cgroup's CPU quota."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    return max(1, min(cpus, int(_cgroup_quota() or cpus)))


def _cgroup_quota(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> float | None:
    """CPUs that this process's cgroup and those around it allow, or None where none sets a quota.

    A line of `membership` is "0::/path" (version 2) or "4:cpu,cpuacct:/path" (version 1).
    """
    quotas = []
    try:
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "cpu" if controllers else root
            inner = top / path.strip("/")
            quotas += [_quota(folder) for folder in (inner, *inner.parents) if folder >= top]
    except (OSError, ValueError):  # not Linux, or nothing that is known
        return None
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(folder: Path) -> float | None:
    """CPUs that one cgroup allows by itself."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such file; "max"
        return None


def set_num_threads(count: int) -> None:
    """Use at most `count` threads from now on. Results do not change, only time."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1024:
        raise OptionError(f"set_num_threads: count: expected an integer in 1 … 1024, got {count!r}")
    global _limit, _pool
    with _lock:
        _limit = count
        if _pool is not None:
            _pool.close()
            _pool = None


def get_num_threads() -> int:
    """How many threads a large program runs on.

    Unless `set_num_threads` said so: the available CPUs, or fewer where OMP_NUM_THREADS asks for
    it, as joblib does in its workers so that they do not crowd one another.
    """
    global _limit
    if _limit is None:
        asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
        _limit = min(available_cpus(), int(asked) if asked.isdecimal() and int(asked) else 1024)
    return _limit


def core_to_spare() -> bool:
    """Whether a process besides this one may use a core, and one has nothing else to do now."""
    try:  # …, how many threads of the system run or could, "/" how many there are, …
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):  # not Linux
        running = 1
    return get_num_threads() > 1 and running < (os.cpu_count() or 1)


def run(runner: int, table: int, wanted: int) -> None:
    """Run the program at `table` on up to `wanted` threads, this one among them."""
    global _pool
    count = min(wanted, get_num_threads())
    if count == 1 or not _lock.acquire(blocking=False):
        call(runner)(_SCRATCH, _SCRATCH, table, 0, 0, 1, 0)  # alone it meets no barrier
        return
    try:
        if _pool is None:
            _pool = _Pool(get_num_threads(), runner)
        _pool.run(runner, table, count)
    finally:
        _lock.release()


def run_aside(work: Callable[[], None], stop: Callable[[], None]) -> None:
    """`work()` on a thread of its own, so that this one, the main thread, can answer signals.

    Where a signal's handler raises, `stop` is called, the end of `work` waited for, and the
    exception goes on.
    """
    ended = _thread.allocate_lock()
    ended.acquire()
    problems: list[BaseException] = []
    done = False

    def run() -> None:
        nonlocal done
        try:
            work()
        except BaseException as problem:
            problems.append(problem)
        finally:
            done = True
            ended.release()

    # A signal is answered when a call returns: whatever a handler raises, the thread has started.
    start = partial(_thread.start_new_thread, run, ())
    act: Callable[[], object] = start
    while not done:
        try:
            act()
        except BaseException as problem:
            if act is start and isinstance(problem, RuntimeError):  # no thread is to be had
                raise
            problems.append(problem)
            stop()
        act = ended.acquire
    if problems:
        raise problems[0]


class _Pool:
    def __init__(self, size: int, runner: int) -> None:
        self._size = size
        self._control = np.zeros(WORKERS + 8 * size, np.int64)
        self._control[RUN] = runner
        # Where threads meet is the pool's, not a program's: a worker may still be on its way out of
        # the last barrier when the program is gone and its memory another's.
        self._sync = np.zeros(MEETING_WORDS, np.int64)
        self._control[SYNC] = self._sync.ctypes.data
        self._address = int(self._control.ctypes.data)
        self._start = call(code(_starter, 3).address())
        self._start(_SCRATCH, _SCRATCH, self._address, 0, 0, 0, 0)
        entry = call(code(_worker, 2).address())
        for index in range(1, size):
            worker = threading.Thread(
                target=self._work, args=(entry, index), daemon=True, name=f"backprop-{index}"
            )
            worker.start()

    def _work(self, entry: Callable[..., int], index: int) -> None:
        entry(_SCRATCH, _SCRATCH, self._address, index, 0, 0, 0)  # until the pool is closed

    def run(self, runner: int, table: int, count: int) -> None:
        self._start(_SCRATCH, _SCRATCH, self._address, table, count, 0, 0)

    def close(self) -> None:
        """Let the workers end."""
        self._start(_SCRATCH, _SCRATCH, self._address, 0, self._size, 0, 0)


def _after_fork() -> None:
    """A child has this thread alone: forget the pool and a lock that another may have held."""
    global _lock, _pool
    _lock = threading.Lock()
    _pool = None


def _starter() -> Callable[..., None]:
    """Order a program, or with no table the end, and run this thread's part.

    For no threads at all: make what they will sleep on.
    """
    from backprop_kernels.cpu.memory import (
        atomic_add,
        call_kernel,
        new_condition,
        new_mutex,
        wake,
    )

    def start(control, table, threads):
        if threads == 0:
            new_mutex(control[SYNC] + 8 * MUTEX, 0)
            new_condition(control[SYNC] + 8 * CONDITION, 0)
            return
        control[TABLE] = table
        control[THREADS] = threads
        for index in range(1, threads):
            atomic_add(control, WORKERS + 8 * index + ORDERED, 1)
        wake(control[SYNC])
        if table != 0:
            call_kernel(control[RUN], table, control[SYNC], 0, threads)

    return start


def _worker() -> Callable[..., None]:
    """Take orders, until one is to end."""
    from backprop_kernels.cpu.memory import call_kernel, wait

    def work(control, index):
        me = WORKERS + 8 * index
        while True:
            wait(control[SYNC], control, me + ORDERED, control[me + TAKEN], WAIT_SPINS)
            control[me + TAKEN] += 1
            if control[TABLE] == 0:
                return
            call_kernel(control[RUN], control[TABLE], control[SYNC], index, control[THREADS])

    return work


os.register_at_fork(after_in_child=_after_fork)
