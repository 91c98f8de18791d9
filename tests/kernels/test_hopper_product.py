"""Products on Hopper: what is chosen and why; as the Ampere generation, bit for bit; replays.

That they are right, `test_precision.py` shows, with tiles of both generations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda import by_tiles, tuning
from backprop_kernels.cuda.in_precision import InPrecision
from backprop_kernels.cuda.tiles import COOPERATIVE, DECIDE, PING_PONG, Choice, Tile, choose
from backprop_kernels.precisions import round_to

from tests.cuda_host import build, hopper
from tests.cuda_host.backend import adapter, installed, on_gpu
from tests.gpu import GPU

BF16 = np.dtype(np.uint16)


@pytest.fixture(params=["emulator", *GPU], scope="module")
def bf16(request: pytest.FixtureRequest) -> Any:
    if request.param == "gpu":
        on = on_gpu.place
    elif reason := build.problem():
        pytest.skip(f"the CUDA emulator {reason}")
    else:
        on = installed
    with on():
        return adapter(on, InPrecision("bf16"))


def test_choice_explains_itself() -> None:
    forward = choose("linear_forward", 8192, 4096, 4096, "bf16", 90, can_map=True)
    assert forward.tile == PING_PONG
    assert forward.why == (
        "linear_forward of 8192 × 4096 elements, 4096 terms each, in bf16: Hopper's tensor cores "
        "by wgmma, 2048 block(s) of 128 × 128, the largest tile that gives 64 blocks or more"
    )
    wgrad = choose("linear_wgrad", 1024, 1024, 8192, "fp16", 90, can_map=True)
    assert (wgrad.tile, wgrad.blocks, wgrad.run) == (COOPERATIVE, 32, 2048)
    assert "32 block(s) of 128 × 256, in 4 runs" in wgrad.why


@pytest.mark.parametrize(
    ("size", "precision", "capability", "can_map", "why"),
    [
        ((8192, 4096), "bf16", 90, False, "; not by wgmma, as rows do not all start on 16 bytes"),
        ((512, 512), "bf16", 90, True, "; not by wgmma, which would give less than 64 blocks"),
        (
            (8192, 4096),
            "tf32",
            90,
            True,
            "; not by wgmma, which takes no others than 16-bit numbers",
        ),
        ((8192, 4096), "bf16", 80, True, ""),
        ((8192, 4096), "bf16", 100, True, ""),
        ((8192, 4096), "bf16", 120, True, ""),
    ],
)
def test_elsewhere_the_ampere_generation_serves(
    size: tuple[int, int], precision: str, capability: int, can_map: bool, why: str
) -> None:
    chosen = choose("linear_forward", *size, 4096, precision, capability, can_map)
    assert chosen.tile.generation == "ampere"
    assert why in chosen.why and ("wgmma" in chosen.why) == bool(why)


def test_autotune_is_given_both_generations() -> None:
    seen: list[str] = []

    def decide(candidates: Sequence[Choice]) -> Choice:
        seen.extend(c.name for c in candidates)
        return candidates[1]

    token = DECIDE.set(decide)
    try:
        for capability, can_map in ((90, True), (90, False), (100, True)):
            seen.clear()
            second = choose("linear_forward", 8192, 4096, 64, "fp16", capability, can_map)
            ampere = ["ampere wide", "ampere large", "ampere small"]
            if (capability, can_map) == (90, True):
                assert second.tile == COOPERATIVE and second.run == 64
                mine = ["hopper ping-pong", "hopper cooperative", "hopper narrow"]
                assert seen[:6] == [*mine, *ampere]
            else:
                assert seen[:3] == ampere
    finally:
        DECIDE.reset(token)


def test_autotune_can_measure_them(bf16: Any) -> None:
    with bf16.place(), hopper.on_hopper(hopper.SHARED):
        choice = choose("linear_wgrad", 64, 72, 200, "bf16", 90, can_map=True)
        assert choice.tile is hopper.SHARED
        assert 0 < tuning.measured(choice) < np.inf


def both(bf16: Any, tile: Tile, name: str, *given: Any) -> list[Any]:
    """What Hopper's generation and Ampere's give."""
    with hopper.on_hopper(tile):
        mine = getattr(bf16, name)(*given)
    return [mine, getattr(bf16, name)(*given)]


def whole(rng: np.random.Generator, *shape: int) -> Array:
    return round_to(rng.integers(-3, 4, shape).astype(np.float32), "bf16")


@pytest.mark.parametrize(
    "tile",
    [hopper.TALL_IN_TURN, pytest.param(hopper.SHARED, marks=pytest.mark.long)],
    ids=lambda tile: tile.name,
)
@pytest.mark.parametrize("activation", ["relu", pytest.param("gelu", marks=pytest.mark.long)])
def test_epilogue_is_that_of_ampere(bf16: Any, tile: Tile, activation: str) -> None:
    """Sums of whole numbers are the same, and so is all that follows: bias, activation, dropout,
    what is saved; act', mask. Sums of columns are added in another order."""
    rng = np.random.default_rng(0)
    X, W, dZ = whole(rng, 200, 72), whole(rng, 40, 72), whole(rng, 200, 40)
    b, drop = rng.standard_normal(40).astype(np.float32), Dropout(0.5, np.array([5, 3]), 2)
    mine, other = both(bf16, tile, "linear_forward", X, W, b, activation, drop)
    for got, expected in zip(mine, other, strict=True):
        assert np.array_equal(got, expected)
    below = whole(rng, 200, 8), whole(rng, 72, 8)
    _, saved = bf16.linear_forward(*below, None, activation, drop)
    mine, other = both(bf16, tile, "linear_dgrad", dZ, W, saved, activation, drop)
    assert np.array_equal(mine[0], other[0]) and np.any(mine[0])
    np.testing.assert_allclose(mine[1], other[1], rtol=1e-5, atol=1e-4)


def test_replays_of_a_batch_in_runs(bf16: Any) -> None:
    """Tensor maps and turns outlast a launch: each replay of a graph reads what it is given."""
    rng = np.random.default_rng(1)
    with hopper.on_hopper(hopper.SHARED):
        dW = np.empty((64, 72), np.float32)
        program = bf16.capture(
            lambda dZ, X: bf16.linear_wgrad(dZ, X, out=dW),
            np.empty((200, 64), BF16), np.empty((200, 72), BF16),
        )  # fmt: skip
        for _ in range(3):
            dZ, X = whole(rng, 200, 64), whole(rng, 200, 72)
            program(dZ, X)
            exact = (dZ.astype(np.uint32) << 16).view(np.float32).T @ (
                X.astype(np.uint32) << 16
            ).view(np.float32)
            assert np.array_equal(dW, exact)


def test_no_bit_depends_on_the_number_of_multiprocessors(
    bf16: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs join in their order, whichever block they are given to."""
    rng = np.random.default_rng(2)
    dZ, X = (
        round_to(rng.standard_normal((500, n)).astype(np.float32), "bf16") for n in (136, 72)
    )  # fmt: skip
    seen = set()
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(by_tiles, "multiprocessors", lambda _, n=count: n)
        with hopper.on_hopper(hopper.SHARED):
            seen.add(bf16.linear_wgrad(dZ, X).tobytes())
    assert len(seen) == 1
