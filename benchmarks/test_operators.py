"""The operators' cases for pytest-benchmark, beside an earlier run: `make bench-regressions`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from backprop_kernels.operators import OPERATORS

sys.path.insert(0, str(Path(__file__).parent))
CASES = [
    pytest.param(case.ours, id=f"{row.name} {case.shape}")
    for row in OPERATORS
    for case in import_module(f"bench_{row.name}").cases("float32")
]


@pytest.mark.parametrize("ours", CASES)
def test_operator(
    benchmark: Callable[[Callable[[], object]], object], ours: Callable[[], object]
) -> None:
    benchmark(ours)
