"""g++ for the pieces of CUDA code that are plain C++: a text in, a loaded library out."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import backprop_kernels
import pytest

INCLUDE = Path(backprop_kernels.__file__).parent / "cuda" / "include"
# A float promoted to double would be a float64 instruction on the GPU.
FLAGS = ("-std=c++17", "-O1", "-march=native", "-Wdouble-promotion", "-Wall", "-Werror",
         "-Wno-unused-function", "-shared", "-fPIC")  # fmt: skip
STANDS_FOR_PTX = "#include <math.h>\n#define DEVICE inline\n"


def library(text: str, folder: Path) -> ctypes.CDLL:
    """Compile `text`, which may include anything in cuda/include but the PTX wrappers."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++, which compiles the kernels' text for the CPU")
    (folder / "ptx.cuh").write_text(STANDS_FOR_PTX)
    source = folder / f"{len(list(folder.iterdir()))}.cpp"
    source.write_text(text)
    target = source.with_suffix(".so")
    command = ["g++", *FLAGS, f"-I{folder}", f"-I{INCLUDE}", source, "-o", target]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(target))
