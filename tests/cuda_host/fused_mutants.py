"""Bugs for the update where weight gradients are made, and the checks that must notice them."""

from __future__ import annotations

from functools import partial

from tests.cuda_host.backend import installed
from tests.cuda_host.fused import BAD, Training, adamw, applied, batch, gpu, layers, momentum
from tests.cuda_host.fused import refused as refuse
from tests.cuda_host.fused import trained as train
from tests.cuda_host.hopper import IN_CLUSTERS, SHARED
from tests.cuda_host.mutants import Mutant


def ordinary(fused: bool) -> Training:
    return Training(fused, layers(), momentum)


def two_moments(fused: bool) -> Training:
    return Training(fused, layers(), adamw)


def of_16_bits(fused: bool) -> Training:
    return Training(fused, layers(8), momentum, "bf16", rows=200)


def trained() -> None:
    with installed(), gpu():
        train(two_moments, [batch(), batch(rows=33)])


def refused() -> None:
    with installed(), gpu():
        for kind in list(BAD)[-4:]:  # where all that is given is finite
            refuse(ordinary, 6, 5, kind)


def unbounded() -> None:
    with installed(), gpu():
        applied(ordinary, 6, 5)


def on_tensor_cores() -> None:
    with installed():
        for capability, tile in ((80, None), (90, SHARED), (90, IN_CLUSTERS)):
            with gpu(capability, tile):
                train(of_16_bits, [batch(8, 8, 200)])


def refused_in_16_bits() -> None:
    with installed(), gpu():
        refuse(of_16_bits, 8, 8, "sums of the lowest weights")


KERNEL, STEP = partial(Mutant, "linear_wgrad_update.cu"), partial(Mutant, "fused_update.cu")
FUSED = [
    KERNEL("square += double(g) * double(g);", "", trained),
    KERNEL("if (!apply) {", "if (!apply && g == of.w) {", refused),
    KERNEL("dW[i] = g;", "dW[i] = of.w;", unbounded),
    KERNEL("if (n >= N) return real(0);", "", trained),
    KERNEL("m * N + min(n, N - 1)", "m * N + n", on_tensor_cores),
    KERNEL("if (STATES == 2) moment1[i] = s[1];", "", trained),
    KERNEL("moment0[i] = s[0];", "moment0[i] = s[1];", trained),
    KERNEL("square = lane_sum(square);", "", trained),
    KERNEL("tile * (WRITERS / WARP) + warp", "tile * (WRITERS / WARP) + warp / 2", trained),
    KERNEL("at.m / SUMMED_ROWS * ((N", "at.m / SUMMED_ROWS + 0 * ((N", trained),
    KERNEL("c[k] = real(scalars[k])", "c[k] = real(scalars[0])", trained),
    STEP("(!guard || isfinite(guard[0]))", "true", refused),
    STEP("as_float(cells[0]) <= LARGEST_FLOAT", "true", refused),
    STEP("double(batch) * dZ * X <= most", "dZ * X <= most", refused),
    STEP("double(LARGEST_FLOAT) / 4", "double(LARGEST_FLOAT) * 1e9", refused),
    STEP("cells[i] = 0", "cells[i] += 0", unbounded),
    STEP("__any_sync(0xffffffffu, !good)", "!good", refused),
    STEP("k < n_pairs; k += WARP", "k < 1; k += WARP", refused),
    STEP("i < count; i += WARP", "i < 1; i += WARP", unbounded),
    STEP("largest.see(real(values[i]));", "if (i < 64) largest.see(real(values[i]));", refused),
    STEP("largest.keep();", "", refused),
    STEP("spans[3 * span + 1] : size", "spans[3 * span] : size", refused),
    Mutant("largest.cuh", "bits = 16; bits;", "bits = 8; bits;", refused),
    Mutant("largest.cuh", "top = max(top, as_bits(x)", "top = min(top, as_bits(x)", refused),
    Mutant("largest.cuh", "& 0x7fffffffu", "", refused),
    Mutant("largest.cuh", "if (threadIdx.x % 32 == 0) raise_to", "if (threadIdx.x == 0) raise_to",
           refused),
    Mutant("linear_forward.cu", "largest.see(real(result(y)))", "largest.see(0 * real(result(y)))",
           refused),
    Mutant("linear_dgrad.cu", "largest.see(real(result(g)));", "", refused),
    Mutant("cast.cu", "largest.see(real(out[i]));", "", refused_in_16_bits),
    Mutant("optimizer_step.cu", "        n_spans = n_left;\n", "", trained),
    Mutant("optimizer_step.cu", "sum += done[i]", "sum += 0 * done[i]", trained),
    Mutant("optimizer_step.cu", "left[3 * k + 1] - left[3 * k]", "left[3 * k + 1]", trained),
    Mutant("one_tile.cuh", "WRITERS = Tile::THREADS", "WRITERS = 32", trained),
    Mutant("hopper_product.cuh", "WRITERS = GROUP", "WRITERS = 2 * GROUP", on_tensor_cores),
]  # fmt: skip
