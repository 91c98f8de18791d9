"""Gaussian noise on the input: no batch shows a row twice as it was."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np
from backprop_kernels.arrays import Array
from backprop_kernels.errors import OptionError

from backprop.memory import Memory


class InputNoise:
    """X + std · N(0, 1), in a buffer of its own; a pure function of seed, batch number and X."""

    def __init__(
        self, std: float, shape: tuple[int, int], dtype: Any, memory: Memory, seed: int
    ) -> None:
        number = isinstance(std, int | float) and not isinstance(std, bool)
        if not (number and std >= 0 and isfinite(std)):
            raise OptionError(f"fit: input_noise: expected a number ≥ 0, got {std!r}")
        self.std, self.memory, self.seed = std, memory, seed
        self._buffer = np.empty(shape if std else (0, 0), dtype)

    def __call__(self, X: Array, number: int) -> Array:
        """The batch `number` of the fit with its noise."""
        if not self.std:
            return X
        noise = self._buffer[: len(X)]
        draw = np.random.default_rng((self.seed, 1, number))
        draw.standard_normal(dtype=noise.dtype.type, out=noise)
        noise *= noise.dtype.type(self.std)
        noisy = self.memory.place(noise)
        noisy += X
        return noisy
