"""Code for CPUs that are not this one: assembled and read for NEON, run as well for AVX2."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numba
import pytest
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.cpu import compile, tile, vector_loop, vector_math


@dataclass(frozen=True)
class Target:
    """A CPU, and how its assembly writes what matters here."""

    feature: str  # the row of tile.SHAPES
    triple: str
    cpu: str
    fma: dict[str, str]  # dtype: a whole register's multiplication and addition
    wider: str  # registers it has not
    stack: str  # a vector register saved to or read from the stack
    call: str
    machine: int  # of its ELF files


X86 = {
    "stack": r"\(%rsp\).*%[yz]mm|%[yz]mm.*\(%rsp\)",
    "call": r"\tcall",
    "machine": 62,
    "triple": "x86_64-unknown-linux-gnu",
}
TARGETS = {
    "NEON": Target(
        "+neon", "aarch64-unknown-linux-gnu", "generic",
        {"float32": r"\tfmla\tv\d+\.4s", "float64": r"\tfmla\tv\d+\.2d"},
        r"\bz\d+\.", r"\t(ldr|str|ldp|stp)\tq.*\[sp", r"\tblr?\t", 183,
    ),
    "AVX2": Target(
        "+avx2", cpu="haswell", wider=r"%zmm",
        fma={"float32": r"\tvfmadd\d+ps\t.*%ymm\d+$", "float64": r"\tvfmadd\d+pd\t.*%ymm\d+$"},
        **X86,
    ),
    "AVX-512": Target(
        "+avx512f", cpu="skylake-avx512", wider=r"%tmm",
        fma={"float32": r"\tvfmadd\d+ps\t.*%zmm\d+", "float64": r"\tvfmadd\d+pd\t.*%zmm\d+"},
        **X86,
    ),
}  # fmt: skip


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    chosen = TARGETS[request.param]
    for module in (tile, vector_loop):
        monkeypatch.setattr(module, "host_shape", lambda: tile.SHAPES[chosen.feature])
    # Numba optimises for a CPU as well: not for the one that this happens to run on.
    monkeypatch.setattr(numba.config, "CPU_NAME", chosen.cpu)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", "")
    compile._text_generator.cache_clear()
    yield chosen
    compile._text_generator.cache_clear()


def assemble(target: Target, function: Callable[..., Any], parameters: int) -> str:
    """The assembly of a function of addresses and integers, as a product's kernel would hold it."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    text = compile.llvm_text("under_test", function, parameters)
    module = llvm.parse_assembly(re.sub(r"(?m)^target (triple|datalayout) = .*$", "", text))
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features="", opt=3
    )
    module.triple, module.data_layout = target.triple, str(machine.target_data)
    code = machine.emit_object(module)
    assert code[:4] == b"\x7fELF" and code[18] == target.machine
    return str(machine.emit_assembly(module))


def loop_with(assembly: str, instruction: str) -> str:
    """The basic block in which `instruction` stands most often."""
    blocks = re.split(r"(?m)^\.\w+:", assembly)
    return max(blocks, key=lambda block: len(re.findall(f"(?m){instruction}", block)))


@pytest.mark.parametrize("along", [True, False])
def test_tile_keeps_its_sums_in_registers(target: Target, dtype: Any, along: bool) -> None:
    """One multiplication per sum and step of K, on whole registers, and no trip to the stack."""
    shape = tile.SHAPES[target.feature]
    run = tile.make_tile(str(dtype), shape.rows, shape.registers, shape, along)

    # Numba's first parameter is a pointer in `compile`; the tile takes its address as a number.
    def entry(words, a_stride, B, b_k, C):  # type: ignore[no-untyped-def]
        run(words[0], a_stride, B, b_k, C, words[1], words[2], words[3], words[4])

    assembly = assemble(target, entry, 5)
    fma = target.fma[str(dtype)]
    loop = loop_with(assembly, fma)
    steps, rest = divmod(len(re.findall(f"(?m){fma}", loop)), shape.rows * shape.registers)
    assert steps >= 1 and rest == 0
    assert not re.search(target.stack, loop)
    assert not re.search(target.wider, assembly)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu", "softplus"])
def test_formulas_run_on_whole_registers(target: Target, dtype: Any, activation: str) -> None:
    """exp, tanh and erf are polynomials in registers: no call to a library, no lane by lane."""
    forward = ACTIVATIONS[activation].forward
    run = vector_loop.vector_loop(lambda z: (forward(vector_math, z),), str(dtype), 1)

    def entry(words, count):  # type: ignore[no-untyped-def]
        run((words[0], words[1]), (), count)

    assembly = assemble(target, entry, 2)
    loop = loop_with(assembly, target.fma[str(dtype)])
    assert len(re.findall(f"(?m){target.fma[str(dtype)]}", loop)) >= 8
    assert not re.search(target.call, assembly)
    assert not re.search(target.wider, assembly)


RUN = """
import numpy as np
from backprop_kernels import cpu, reference
from backprop_kernels.cpu.tile import SHAPES, host_shape
assert host_shape() == SHAPES["+avx2"], host_shape()
rng = np.random.default_rng(0)
for dtype, bound in ((BOUNDS),):
    for batch, i, o in ((1, 1, 1), (5, 7, 9), (6, 16, 16), (67, 33, 41), (300, 130, 70)):
        def draw(*shape):
            return rng.integers(-4, 5, shape).astype(dtype)
        X, W, b, dZ = draw(batch, i), draw(o, i), draw(o), draw(batch, o)
        assert np.array_equal(cpu.linear_forward(X, W, b)[0], reference.linear_forward(X, W, b)[0])
        assert np.array_equal(cpu.linear_wgrad(dZ, X), reference.linear_wgrad(dZ, X))
        for ours, right in zip(cpu.linear_dgrad(dZ, W), reference.linear_dgrad(dZ, W)):
            assert ours is right is None or np.array_equal(ours, right)
        for activation in ("relu", "gelu"):
            ours = cpu.linear_forward(X / 8, W / 8, b, activation)[0]
            right = reference.linear_forward(X / 8, W / 8, b, activation)[0]
            assert np.allclose(ours, right, rtol=bound, atol=bound)
    model_args = [rng.standard_normal((64, 32)).astype(dtype), rng.integers(0, 5, 64)]
    import backprop as bp
    losses = []
    for device in ("cpu", "reference"):
        model = bp.MLP([32, 48, 5], "gelu", dtype=np.dtype(dtype).name, device=device)
        step = bp.TrainStep(model, "cross_entropy", "Adam", 64)
        losses.append([step(*model_args) for _ in range(5)])
    assert np.allclose(*losses, rtol=bound), losses
print("right")
"""


@pytest.mark.parametrize(
    "bounds",
    ["np.float32, 1e-5", pytest.param("np.float64, 1e-13", marks=pytest.mark.long)],
    ids=["float32", "float64"],
)
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or "+avx2" not in compile.cpu_features(),
    reason="this CPU has no AVX2",
)
def test_avx2_code_is_right(bounds: str) -> None:
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace("BOUNDS", bounds)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "right\n", done.stderr
