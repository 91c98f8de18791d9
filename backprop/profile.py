"""Where a training step's time goes: a table of its operators that sums to the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.errors import KindError, OptionError

from backprop.step import TrainStep

WARM_UP = 3  # steps before the first that counts


@dataclass(frozen=True)
class Phase:
    """One operator of the step."""

    operator: str
    shape: str
    flops: int  # of its matrix product; 0 for the others, which memory bounds
    bytes: int  # of every array it reads or writes, once
    seconds: float = 0.0


@dataclass(frozen=True)
class Profile:
    """The phases of a step in the order they run, and what the step took.

    `rest` is what no kernel takes: Python before and after the compiled program, and waking a
    thread. A phase whose arrays lie in a cache may move more bytes than memory can.
    """

    phases: list[Phase]
    seconds: float
    steps: int  # what the times are the mean of
    threads: int
    dtype: str

    @property
    def rest(self) -> float:
        """Seconds of the step outside every kernel."""
        return self.seconds - sum(phase.seconds for phase in self.phases)

    @property
    def peak_flops(self) -> float:
        """Flops a second that this machine does at most; measured when first asked for."""
        from backprop_kernels.cpu import peaks

        return peaks.flops(self.dtype)

    @property
    def peak_bandwidth(self) -> float:
        """Bytes a second from and to memory, likewise."""
        from backprop_kernels.cpu import peaks

        return peaks.bandwidth()

    def __str__(self) -> str:
        lines = [
            f"{'operator':<22}{'shape':<22}{'us':>10}{'share':>8}{'GFLOP/s':>10}{'of peak':>9}"
            f"{'GB/s':>8}{'of peak':>9}"
        ]
        for p in self.phases:
            seconds = max(p.seconds, 1e-9)
            line = f"{p.operator:<22}{p.shape:<22}{p.seconds * 1e6:10.1f}{self._share(p.seconds)}"
            rate = p.flops / seconds
            line += f"{rate / 1e9:10.1f}{rate / self.peak_flops:9.0%}" if p.flops else " " * 19
            rate = p.bytes / seconds
            lines.append(f"{line}{rate / 1e9:8.1f}{rate / self.peak_bandwidth:9.0%}")
        for name, seconds in (("rest", self.rest), ("step", self.seconds)):
            lines.append(f"{name:<44}{seconds * 1e6:10.1f}{self._share(seconds)}")
        lines.append(
            f"mean of {self.steps} steps on {self.threads} thread(s); peaks here: "
            f"{self.peak_flops / 1e9:.0f} GFLOP/s, {self.peak_bandwidth / 1e9:.0f} GB/s"
        )
        return "\n".join(lines)

    def _share(self, seconds: float) -> str:
        return f"{seconds / self.seconds:8.1%}"


def profile(
    step: TrainStep, X: Any, y: Any, sample_weight: Any = None, seconds: float = 1.0
) -> Profile:
    """Train on (X, y) again and again for `seconds`, and say where the time went.

    The slower half of the steps, where the machine did something else, is left out. Parameters,
    moments and running statistics are afterwards what they were.
    """
    if not isinstance(step, TrainStep):
        raise KindError(f"profile: step: expected a TrainStep, got {type(step).__name__}")
    backend = step.model.backend
    if backend.__name__ != "backprop_kernels.cpu":
        raise KindError(
            f'profile: step: expected a model on device="cpu", got one on {backend.__name__}'
        )
    if not seconds > 0:
        raise OptionError(f"profile: seconds: expected a number > 0, got {seconds!r}")
    inputs = step.gradients.inputs(X, y, sample_weight, "profile", finite=True)
    from backprop_kernels.cpu import threads

    program, calls = _capture(step, inputs)
    moved = [step.model.parameters, *step.state.values(), *step.model.statistics.values()]
    before = [array.copy() for array in moved]
    rounds: list[tuple[float, Array]] = []
    try:
        end = time.perf_counter() + seconds
        while len(rounds) < 2 * WARM_UP or time.perf_counter() < end:
            started = time.perf_counter()
            step.update.prepare(step.steps + 1)
            nanoseconds = program.timed(*inputs)
            rounds.append((time.perf_counter() - started, nanoseconds))
    finally:
        for array, value in zip(moved, before, strict=True):
            array[...] = value
    quick = sorted(rounds[WARM_UP:], key=lambda r: r[0])[: max(1, len(rounds[WARM_UP:]) // 2)]
    kernels = iter(np.mean([nanoseconds for _, nanoseconds in quick], axis=0) / 1e9)
    return Profile(
        [replace(phase, seconds=float(sum(islice(kernels, n)))) for phase, n in calls],
        float(np.mean([total for total, _ in quick])), len(quick),
        threads.get_num_threads(), str(step.model.dtype),
    )  # fmt: skip


def _capture(step: TrainStep, inputs: list[Array]) -> tuple[Any, list[tuple[Phase, int]]]:
    """The step as a program of its own, and its operators with how many kernels each has."""
    from backprop_kernels.cpu.program import recorded

    model, backend = step.model, step.model.backend
    calls: list[tuple[Phase, int]] = []

    class Noting:
        """The backend, with a note of every operator that is called."""

        def __getattr__(self, name: str) -> Callable[..., Any]:
            function = getattr(backend, name)

            def call(*arguments: Any, **options: Any) -> Any:
                first = recorded()
                result = function(*arguments, **options)
                calls.append((_phase(name, arguments, options), recorded() - first))
                return result

            return call

    noting: Any = Noting()
    model.backend = noting
    try:
        gradients = step.gradients.operators(len(inputs[0]))

        def operators(*arrays: Array) -> None:
            gradients(*arrays)
            step.update.operator(noting, step.gradients.value)

        return backend.capture(operators, *inputs), calls
    finally:
        model.backend = backend


def _phase(name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Phase:
    A, B = arguments[:2]
    shape, flops = f"{A.shape[0]} x {A.size // max(A.shape[0], 1)}", 0
    if name.startswith("linear"):  # forward: X Wᵀ, dgrad: dZ W, wgrad: dZᵀ X
        inner = {"linear_forward": B.shape[1], "linear_dgrad": B.shape[0]}.get(name, len(A))
        rows = A.shape[1] if name == "linear_wgrad" else len(A)
        columns = B.size // inner
        shape, flops = f"{rows} x {inner} x {columns}", 2 * rows * inner * columns
    arrays = {a.ctypes.data: a.nbytes for a in _arrays([arguments, list(options.values())])}
    return Phase(name, shape, flops, sum(arrays.values()))


def _arrays(value: Any) -> Iterator[Array]:
    """Every array in nested lists and tuples; dropout's seed and step are none that count."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, list | tuple) and not isinstance(value, Dropout):
        for item in value:
            yield from _arrays(item)
