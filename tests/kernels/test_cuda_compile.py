"""The CUDA kernels as machine code: what NVRTC and its disassembler say, without a GPU.

The recorder calls every launcher; each unit it saw is compiled for each architecture and compared
with how it is launched.
"""

from __future__ import annotations

import re
from uuid import uuid4

import pytest
from backprop_kernels.cuda import compile as nvrtc
from backprop_kernels.cuda.compile import OPTIONS, Unit
from backprop_kernels.errors import KernelCompileError

from tests.cuda_host import recorder
from tests.cuda_host.machine_code import NEEDS_NVRTC, instructions
from tests.cuda_host.recorder import Asked

ARCHITECTURES = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
REGISTERS = 65536  # of a multiprocessor: a block that needs more cannot start
REGISTERS_PER_THREAD = 216
SHARED = 48 << 10  # bytes of static shared memory that any GPU gives a block

# Kernels that add or scale in float64 on purpose, whatever the dtype of their arrays.
FLOAT64 = {
    "gradient_squares", "loss", "loss_cross_entropy", "loss_gaussian_nll", "loss_shares",
    "loss_value", "loss_weights", "optimizer_update",
}  # fmt: skip
# What the inner loop of a product must be made of.
MULTIPLIES = {"float": "FFMA", "double": "DFMA"}
PARAMETER = {"u64": 8, "s64": 8, "b64": 8, "f64": 8, "u32": 4, "s32": 4, "b32": 4, "f32": 4}

pytestmark = NEEDS_NVRTC


def parameter_sizes(ptx: str, entry: str) -> list[int]:
    """In bytes, from the PTX entry."""
    found = re.search(rf"\.entry {entry}\((.*?)\)\s*[.{{]", ptx, re.S)
    assert found is not None, f"no entry {entry}"
    return [PARAMETER[kind] for kind in re.findall(r"\.param \.(\w+)", found[1])]


def usage(log: str, entry: str) -> tuple[int, int, int]:
    """(registers, bytes of shared memory, bytes of stack) by ptxas."""
    found = re.search(
        rf"properties for {entry}\n.*?(\d+) bytes stack frame.*?\n.*?Used (\d+) registers(.*)", log
    )
    assert found is not None, f"{entry}: not in {log}"
    shared = re.search(r"(\d+) bytes smem", found[3])
    return int(found[2]), int(shared[1]) if shared else 0, int(found[1])


def check(unit: Unit, entries: dict[str, Asked], arch: str) -> None:
    what = f"{unit.file} for {arch}"
    compiled = nvrtc.compile_unit(unit, arch, (*OPTIONS, "--ptxas-options=-v"))
    made_of = instructions(compiled.cubin)
    real = "double" if "using real = double" in unit.variant else "float"
    for entry, asked in entries.items():
        assert parameter_sizes(compiled.ptx, entry) == asked.sizes, f"{what}: {entry}: parameters"
        registers, shared, stack = usage(compiled.log, entry)
        assert stack == 0, f"{what}: {entry}: {stack} bytes of stack"
        most = min(REGISTERS_PER_THREAD, REGISTERS // max(asked.threads))
        assert registers <= most, f"{what}: {entry}: {registers} registers"
        assert shared + asked.shared <= SHARED, f"{what}: {entry}: {shared} bytes of shared memory"
        found = made_of[entry]
        kinds = {code.partition(".")[0] for code in found}
        assert not kinds & {"LDL", "STL"}, f"{what}: {entry}: local memory"
        if entry.startswith("linear_"):
            assert MULTIPLIES[real] in kinds, f"{what}: {entry}: no {MULTIPLIES[real]}"
        if real == "float" and entry not in FLOAT64:
            double = {c for c in found if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b", c) or "F64" in c}
            assert not double, f"{what}: {entry}: float64 in {sorted(double)}"


def test_representative_kernels_compile_as_they_are_launched() -> None:
    """One activation, two losses and a rule: float32 for old and new GPUs, float64 for Hopper."""
    rows = (("gelu",), ("mse", "cross_entropy"), ("AdamW",))
    record = recorder.everything(("float32",), *rows)
    for arch in ("sm_75", "sm_120"):
        for unit, entries in record.items():
            check(unit, entries, arch)
    for unit, entries in recorder.everything(("float64",), *rows).items():
        check(unit, entries, "sm_90")


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_as_it_is_launched(arch: str) -> None:
    for unit, entries in recorder.everything(*recorder.whole()).items():
        check(unit, entries, arch)


def test_every_cu_file_and_entry_is_launched() -> None:
    """So that nothing escapes these checks."""
    record = recorder.everything(("float32",), ("gelu",), ("mse", "cross_entropy", "gaussian_nll"),
                                 ("SGD",))  # fmt: skip
    launched: dict[str, set[str]] = {}
    for unit, entries in record.items():
        launched.setdefault(unit.file, set()).update(entries)
    written = {
        path.name: set(re.findall(r"^(\w+)\(", path.read_text(encoding="utf-8"), re.M))
        for path in nvrtc.FOLDER.glob("*.cu")
    }
    assert {file: names & launched.get(file, set()) for file, names in written.items()} == launched
    assert set(launched) == set(written)


def test_spill_is_an_error() -> None:
    """The options that forbid local memory do."""
    kernel = """
        using real = float;
        extern "C" __global__ void indexes_registers(const int* i, float* x) {
            float a[64] = {};
            for (int k = 0; k < 64; ++k) a[i[k] & 63] += x[k];
            for (int k = 0; k < 64; ++k) x[k] = a[k];
        }"""
    unit = Unit("column_sums.cu", kernel)
    with pytest.raises(KernelCompileError, match=r"Local memory used"):
        nvrtc.compile_unit(unit, "sm_90")


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
