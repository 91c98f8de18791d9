"""The CUDA kernels as machine code: what NVRTC and its disassembler say, without a GPU.

The recorder calls every launcher; each unit it saw is compiled for each architecture and compared
with how it is launched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.cuda import compile as nvrtc
from backprop_kernels.cuda import cublaslt
from backprop_kernels.cuda.compile import Unit
from backprop_kernels.cuda.tiles import COOPERATIVE, HOPPER, HOPPERS, PING_PONG
from backprop_kernels.errors import KernelCompileError
from backprop_kernels.optimizers import OPTIMIZERS
from backprop_kernels.precisions import PRECISIONS

from tests.cuda_host import recorder
from tests.cuda_host.machine_code import NEEDS_NVRTC, Job, all_problems, body, problems, real
from tests.cuda_host.recorder import Asked, Record

WIDEST = ("identity", "relu", "gelu", "sin")  # activations: the least and the most registers, bits
ARCHITECTURES = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120")

pytestmark = NEEDS_NVRTC


def jobs(record: Record, arch: str, disassembled: Callable[[Unit], bool]) -> Iterator[Job]:
    """Every unit. The SASS is read of the first one of each file and dtype: what makes the others
    differ, their formulas, stands in the PTX."""
    seen = set()
    for unit, entries in record.items():
        kind = unit.file, real(unit)
        yield Job(unit, entries, arch, kind not in seen and disassembled(unit))
        seen.add(kind)


def test_representative_kernels_compile_as_they_are_launched() -> None:
    """One activation, two losses and a rule, for the oldest GPU and for Hopper."""
    rows = (("gelu",), ("mse", "cross_entropy"), ("AdamW",))
    chosen = [
        job
        for dtype, arch in (("float32", "sm_75"), ("float64", "sm_90"))
        for job in jobs(
            recorder.everything((dtype,), *rows), arch, lambda u: u.file.startswith("linear_")
        )
    ]
    assert len(chosen) > 30
    assert not all_problems(chosen)


def test_bits_are_saved_by_a_vote() -> None:
    record = recorder.products("bf16", ("relu",), recorder.EACH_TILE[:1])
    forward = {
        unit: asked
        for unit, asked in record.items()
        if "using kept = u32" in unit.variant and unit.file.startswith("linear_")
    }
    chosen = list(jobs(forward, "sm_90", lambda u: u.file == "linear_forward.cu"))
    assert len(chosen) == 2
    assert not all_problems(chosen)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_as_it_is_launched(arch: str) -> None:
    chosen = list(jobs(recorder.everything(*recorder.whole()), arch, lambda _: True))
    print(f"{len(chosen)} units for {arch}")
    assert not all_problems(chosen)


def test_products_on_tensor_cores_compile_as_they_are_launched() -> None:
    """No spills within their registers and shared memory; the instructions they are for."""
    record = recorder.products("bf16", ("identity",), recorder.EACH_TILE[-1:])
    chosen = list(jobs(record, "sm_80", lambda u: u.file.startswith("linear_")))
    assert len(chosen) > 4
    assert not all_problems(chosen)


def test_products_on_hopper_compile_as_they_are_launched() -> None:
    """Within 168 registers a thread at the start, and what their roles hand over, no spills; of the
    activation that leaves the fewest."""
    record = recorder.hopper_products("bf16", ("gelu",), (PING_PONG,))
    assert sum("hopper_product.cuh" in unit.variant for unit in record) == 7
    chosen = list(jobs(record, "sm_90a", lambda u: u.file == "linear_dgrad.cu"))
    assert not all_problems(chosen)


def test_products_of_tf32_on_hopper_compile_as_they_are_launched() -> None:
    """The same, also where the result is written twice: two tensor maps go to the kernel."""
    record = recorder.hopper_products("tf32", ("gelu",), (PING_PONG,))
    assert sum("#define TRANSPOSED" in unit.variant for unit in record) == 2
    chosen = list(jobs(record, "sm_90a", lambda u: "TRANSPOSED" in u.variant))
    assert [256 in asked.sizes for job in chosen for asked in job.entries.values()].count(True) == 2
    assert not all_problems(chosen)


def test_updates_in_weight_gradients_compile_as_they_are_launched() -> None:
    """W and its moments on the way to registers that sums fill: of 128 × 256 elements."""
    hopper = recorder.hopper_products("bf16", (), (COOPERATIVE,))
    ampere = recorder.products("tf32", (), recorder.EACH_TILE[-1:])
    chosen = [
        job
        for record, arch in ((hopper, "sm_90a"), (ampere, "sm_80"))
        for job in jobs(record, arch, lambda _: True)
        if job.unit.file in ("linear_wgrad_update.cu", "fused_update.cu")
    ]
    assert sum("linear_wgrad_update" in job.entries for job in chosen) == 2
    assert not all_problems(chosen)


def test_sums_that_go_on_compile_as_they_are_launched() -> None:
    """Those of the part before on the way to the registers that theirs are added to."""
    hopper = recorder.hopper_products("bf16", (), (COOPERATIVE, PING_PONG))
    hopper |= recorder.hopper_products("tf32", (), (COOPERATIVE,))
    ampere = recorder.products("tf32", ()) | recorder.products("bf16x6", ())
    simt = recorder.everything(("float32", "float64"), (), ("mse",), ())
    chosen = [
        job
        for record, arch in ((hopper, "sm_90a"), (ampere, "sm_80"), (simt, "sm_80"))
        for job in jobs(record, arch, lambda unit: "SUMS_FROM" in unit.variant)
        if re.search("SUMS_FROM (CHAINED|ADDED)", job.unit.variant)
    ]
    assert len(chosen) == 6 + 5 + 2
    assert not all_problems(chosen)


@pytest.mark.parametrize(
    "rule", [r if r == "AdamW" else pytest.param(r, marks=pytest.mark.long) for r in OPTIMIZERS]
)
def test_an_update_is_the_same_arithmetic_wherever_it_is_made(rule: str) -> None:
    """What becomes a fused multiply-add in one kernel does in the other: the same bits."""

    def arithmetic(unit: Unit, entry: str) -> list[str]:
        ptx = body(nvrtc.compile_unit(unit, "sm_90").ptx, entry)
        return re.findall(r"\b(?:fma|mul|add|sub|div|sqrt)[.\w]*\.f32\b", ptx)

    record = recorder.everything(("float32",), ("relu",), ("mse",), (rule,))
    apart = {
        rule_of(unit): arithmetic(unit, "optimizer_update")
        for unit in record if unit.file == "optimizer_step.cu"
    }  # fmt: skip
    fused = [unit for unit in record if unit.file == "linear_wgrad_update.cu"]
    assert len(apart) == 2 and {rule_of(unit) for unit in fused} == set(apart)
    for unit in fused:
        found, whole = arithmetic(unit, "linear_wgrad_update"), apart[rule_of(unit)]
        element = whole[len(whole) - whole[::-1].index("mul.rn.f32") :]  # after it is clipped
        assert len(element) > 2 and found[-len(element) :] == element


def rule_of(unit: Unit) -> str:
    """The formula that is compiled into a kernel."""
    return unit.variant[unit.variant.index("DEVICE void update") :]


@pytest.mark.long
def test_every_product_on_hopper_compiles() -> None:
    chosen = [
        job
        for precision in HOPPERS
        for job in jobs(
            recorder.hopper_products(precision, tuple(ACTIVATIONS), HOPPER["linear_dgrad"]),
            "sm_90a",
            lambda _: True,
        )
    ]
    print(f"{len(chosen)} units for sm_90a")
    assert not all_problems(chosen)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_follows_a_product_of_the_library_compiles(arch: str) -> None:
    """It multiplies nothing, so its instructions are not looked at."""
    chosen = [
        job
        for precision in (cublaslt.KINDS if arch != "sm_75" else ("float32", "float64"))
        for job in jobs(recorder.given_products(precision, WIDEST), arch, lambda _: False)
    ]
    assert sum("given_product.cuh" in job.unit.variant for job in chosen) > 10
    assert not all_problems(chosen)


@pytest.mark.long
@pytest.mark.parametrize("arch", ("sm_90a", *ARCHITECTURES[1:]))
def test_every_product_on_tensor_cores_compiles(arch: str) -> None:
    chosen = [
        job
        for row in PRECISIONS.values()
        if row.tensor_cores
        for job in jobs(recorder.products(row.name, WIDEST), arch, lambda _: True)
    ]
    print(f"{len(chosen)} units for {arch}")
    assert not all_problems(chosen)


def test_a_whole_network_compiles_as_it_is_launched() -> None:
    """The one that leaves the fewest registers."""
    record = recorder.networks(90, ("gelu",), ("mse",), networks=recorder.NETWORKS[:1])
    chosen = list(jobs(record, "sm_90a", lambda u: u.file == "mlp_step.cu"))
    assert len(chosen) == 2  # and the sum of the loss
    assert not all_problems(chosen)


@pytest.mark.long
@pytest.mark.parametrize("arch", ("sm_90a", *ARCHITECTURES[1:]))
def test_every_kind_of_whole_network_compiles(arch: str) -> None:
    capability = int(arch.removeprefix("sm_").rstrip("a"))
    record = recorder.networks(capability, ("gelu", "mish"), ("cross_entropy",))
    chosen = list(jobs(record, arch, lambda _: True))
    print(f"{len(chosen)} units for {arch}")
    assert not all_problems(chosen)


def test_every_cu_file_and_entry_is_launched() -> None:
    """So that nothing escapes these checks."""
    record = recorder.everything(("float32",), ("gelu",), ("mse", "cross_entropy", "gaussian_nll"),
                                 ("SGD",))  # fmt: skip
    more = recorder.networks(90, ("relu",), ("mse",), networks=((3, 5),))
    launched: dict[str, set[str]] = {}
    more |= recorder.products("bf16", ("gelu",)) | recorder.products("tf32", ("gelu",))
    for unit, entries in (record | more).items():
        launched.setdefault(unit.file, set()).update(entries)
    written = {
        path.name: set(re.findall(r"^(\w+)\(", path.read_text(encoding="utf-8"), re.M))
        for path in nvrtc.FOLDER.glob("*.cu")
    }
    assert {file: names & launched.get(file, set()) for file, names in written.items()} == launched
    assert set(launched) == set(written)


WRONG = {  # what is found: in which kernel f, launched with how many bytes and threads
    "takes [8, 8] bytes, is launched with [8, 4]": ("x[0] = 1;", [8, 4], 32),
    "float64 in the PTX": ("x[1] = x[0] * 0.1;", [8, 8], 32),
    "48000 + 4096 bytes of shared memory": (
        "__shared__ float s[12000]; s[threadIdx.x] = x[0]; __syncthreads(); x[1] = s[count];",
        [8, 8], 32,
    ),
    "registers in 8192 threads": ("for (int i = 0; i < 9; ++i) x[i] += x[9 + i];", [8, 8], 8192),
    "Local memory used": (
        "int i[64] = {}; for (int k = 0; k < 64; ++k) i[int(x[k]) & 63] += k; x[1] = i[count];",
        [8, 8], 32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_must_not_be_in_a_kernel_is_found(message: str, tmp_path: Path) -> None:
    statements, sizes, threads = WRONG[message]
    file = tmp_path / "f.cu"
    file.write_text(f'extern "C" __global__ void f(float* x, long long count) {{ {statements} }}')
    asked = Asked(sizes, {threads}, 4096 if "shared" in message else 0)
    (found,) = problems(Job(Unit(str(file), ""), {"f": asked}, "sm_90", False))
    assert message in found


def test_error_of_a_kernel_names_file_options_and_log() -> None:
    with pytest.raises(KernelCompileError) as error:
        nvrtc.compile_unit(Unit("column_sums.cu", "using real = nonsense;"), "sm_90")
    text = str(error.value)
    assert text.startswith("column_sums.cu for sm_90: NVRTC_ERROR_COMPILATION")
    assert "-arch=sm_90" in text and "nonsense" in text


def test_gpu_newer_than_nvrtc_gets_the_newest_ptx() -> None:
    unit = Unit("column_sums.cu", "using real = float;")
    code = nvrtc.cubin(unit, "sm_999")
    newest = max(nvrtc._architectures())
    assert f".target sm_{newest}".encode() in code and code.endswith(b"\0")
    assert nvrtc.cubin(unit, "sm_90")[:4] == b"\x7fELF"


def test_cubin_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = Unit("column_sums.cu", f"using real = float;  // {uuid4()}")
    first = nvrtc.cubin(unit, "sm_90")
    monkeypatch.setattr(nvrtc, "compile_unit", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.cubin(unit, "sm_90") == first
