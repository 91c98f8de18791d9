"""Cubins read back: what NVRTC's disassembler says they are made of."""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec

import pytest

NEEDS_NVRTC = pytest.mark.skipif(
    find_spec("cuda") is None or find_spec("cuda.pathfinder") is None,
    reason="needs NVRTC: pip install cuda-pathfinder 'cuda-toolkit[nvrtc,nvdisasm]==13.4.*'",
)


@cache
def _nvdisasm() -> str:
    from cuda.pathfinder import find_nvidia_binary_utility

    path = find_nvidia_binary_utility("nvdisasm")
    assert path is not None, "pip install 'cuda-toolkit[nvdisasm]==13.4.*'"
    return str(path)


def instructions(cubin: bytes) -> dict[str, set[str]]:
    """The instructions of each kernel, with their modifiers: "FFMA", "F2F.F32.F64"."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run(
            [_nvdisasm(), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {}
    for section in sass.split("\t.section\t.text.")[1:]:
        entry, _, body = section.partition(",")
        body = body.partition("\t.section\t")[0]
        found[entry] = set(
            re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", body, re.M)
        )
    return found
