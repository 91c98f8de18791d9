"""Kernels with a real thread for each CUDA thread, in a child process under ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RACE_FOUND = 66


def under_thread_sanitizer(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code; its exit status is RACE_FOUND where two threads raced."""
    library = subprocess.check_output(["g++", "-print-file-name=libtsan.so"], text=True).strip()
    if not os.path.isabs(library):
        pytest.skip("g++ has no libtsan")
    environment = {
        **os.environ, "LD_PRELOAD": library, "CUDA_HOST_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "TSAN_OPTIONS": f"exitcode={RACE_FOUND} halt_on_error=1 report_signal_unsafe=0",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
