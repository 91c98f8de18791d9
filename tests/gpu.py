"""Whether this machine has a GPU to run the tests' CUDA half on."""

from __future__ import annotations

import pytest

from backprop.device import cuda_problem

# A parameter of fixtures where a GPU is; `pytest -m gpu` runs these alone.
GPU = [] if cuda_problem() else [pytest.param("gpu", marks=pytest.mark.gpu)]
