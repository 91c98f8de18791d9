"""How fast a GPU could be: its peaks by its own clocks, and what a kernel could take at least."""

from __future__ import annotations

from math import inf, nan
from typing import Any, NamedTuple

# Multiplications and additions per clock and multiprocessor, dense, sums in float32; by capability.
# From NVIDIA's figures for the A100 (312 TFLOP/s in bf16, 108 × 1.41 GHz) and for the H100.
PER_CLOCK = {
    80: {"float64": 64, "float32": 128, "tf32": 1024, "bf16": 2048, "fp16": 2048},
    90: {"float64": 128, "float32": 256, "tf32": 2048, "bf16": 4096, "fp16": 4096},
}
PRODUCTS = {"bf16x3": 3, "bf16x6": 6}  # of bfloat16 in one of float32


class Roof(NamedTuple):
    """FLOP per second by precision, and bytes per second; NaN and infinite where not known."""

    flops: dict[str, float]
    bandwidth: float

    def seconds(self, flop: float, precision: str, moved: float) -> float:
        """What that much work takes at least."""
        rate = self.flops.get(precision, nan)
        if precision in PRODUCTS:
            rate = self.flops.get("bf16", nan) / PRODUCTS[precision]
        return max(flop / rate, moved / self.bandwidth) if flop else moved / self.bandwidth


def roof(cupy: Any, dry: bool) -> Roof:
    """Of the current device, at the highest clocks that it names; it may run at lower ones."""
    if dry:
        return Roof({}, inf)
    device = cupy.cuda.Device()
    found = device.attributes
    clocks = found["MultiProcessorCount"] * found["ClockRate"] * 1e3
    rates = PER_CLOCK.get(int(device.compute_capability), {})
    # Twice a clock, as many bits as the bus is wide.
    bandwidth = 2 * found["MemoryClockRate"] * 1e3 * found["GlobalMemoryBusWidth"] / 8
    return Roof({name: rate * clocks for name, rate in rates.items()}, bandwidth)
