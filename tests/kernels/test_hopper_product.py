"""Products on Hopper: what is chosen and why; as the Ampere generation, bit for bit; replays.

That they are right, `test_precision.py` shows, with tiles of both generations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.arrays import Array, Dropout
from backprop_kernels.cuda import by_tiles, tuning
from backprop_kernels.cuda.in_precision import InPrecision
from backprop_kernels.cuda.tiles import COOPERATIVE, DECIDE, PING_PONG, Choice, Tile, choose
from backprop_kernels.cuda.transpose import padded, transposed
from backprop_kernels.errors import ShapeError
from backprop_kernels.precisions import round_to, widen

from tests.cuda_host import build, hopper
from tests.cuda_host.backend import adapter, installed, on_gpu
from tests.gpu import GPU

EACH = "bf16", "tf32"


@pytest.fixture(params=["emulator", *GPU], scope="module")
def products(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The backend by precision."""
    if request.param == "gpu":
        on = on_gpu.place
    elif reason := build.problem():
        pytest.skip(f"the CUDA emulator {reason}")
    else:
        on = installed
    with on():
        return {name: adapter(on, InPrecision(name)) for name in EACH}


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
    for operator in ("linear_forward", "linear_dgrad", "linear_wgrad"):
        chosen, other = (choose(operator, *[8192] * 3, p, 90, can_map=True) for p in EACH)
        assert chosen.tile == other.tile and (chosen.along_k, other.along_k) == (False, True)
        assert "in tf32: Hopper's tensor cores by wgmma, " in other.why


@pytest.mark.parametrize(
    ("size", "precision", "capability", "can_map", "why"),
    [
        ((8192, 4096), "bf16", 90, False, "; not by wgmma, as rows do not all start on 16 bytes"),
        ((512, 512), "bf16", 90, True, "; not by wgmma, which would give less than 64 blocks"),
        (
            (8192, 4096),
            "tf32",
            90,
            False,
            "; not by wgmma, as rows do not all start on 16 bytes: make widths multiples of 4",
        ),
        (
            (8192, 4096),
            "bf16x3",
            90,
            True,
            "; not by wgmma, which takes numbers as they lie in memory, and no planes of them",
        ),
        ((8192, 4096), "tf32", 80, True, ""),
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


@pytest.mark.parametrize(
    ("operator", "precision"),
    [
        ("linear_forward", "bf16"), ("linear_wgrad", "tf32"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("linear_forward", "tf32"), ("linear_dgrad", "bf16"), ("linear_dgrad", "tf32"),
                ("linear_wgrad", "bf16"),
            )
        ),
    ],
)  # fmt: skip
def test_autotune_can_measure_them(products: Any, operator: str, precision: str) -> None:
    with products[precision].place(), hopper.on_hopper(hopper.SHARED):
        choice = choose(operator, 64, 72, 200, precision, 90, can_map=True)
        assert choice.tile is hopper.SHARED
        assert 0 < tuning.measured(choice) < np.inf


def both(backend: Any, tile: Tile, name: str, *given: Any) -> list[Any]:
    """What Hopper's generation and Ampere's give."""
    with hopper.on_hopper(tile):
        mine = getattr(backend, name)(*given)
    return [mine, getattr(backend, name)(*given)]


def whole(precision: str, rng: np.random.Generator, *shape: int) -> Array:
    return round_to(rng.integers(-3, 4, shape).astype(np.float32), precision)


@pytest.mark.parametrize("precision", EACH)
@pytest.mark.parametrize(
    "tile",
    [hopper.TALL_IN_TURN, pytest.param(hopper.SHARED, marks=pytest.mark.long)],
    ids=lambda tile: tile.name,
)
@pytest.mark.parametrize("activation", ["relu", pytest.param("gelu", marks=pytest.mark.long)])
def test_epilogue_is_that_of_ampere(
    products: Any, tile: Tile, activation: str, precision: str
) -> None:
    """Sums of whole numbers are the same, and so is all that follows: bias, activation, dropout,
    what is saved; act', mask. Sums of columns are added in another order."""
    rng, backend = np.random.default_rng(0), products[precision]
    X, W, dZ = (whole(precision, rng, *shape) for shape in ((200, 72), (40, 72), (200, 40)))
    b, drop = rng.standard_normal(40).astype(np.float32), Dropout(0.5, np.array([5, 3]), 2)
    mine, other = both(backend, tile, "linear_forward", X, W, b, activation, drop)
    for got, expected in zip(mine, other, strict=True):
        assert np.array_equal(got, expected)
    below = whole(precision, rng, 200, 8), whole(precision, rng, 72, 8)
    _, saved = backend.linear_forward(*below, None, activation, drop)
    mine, other = both(backend, tile, "linear_dgrad", dZ, W, saved, activation, drop)
    assert np.array_equal(mine[0], other[0]) and np.any(mine[0])
    np.testing.assert_allclose(mine[1], other[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("precision", EACH)
def test_replays_of_a_batch_in_runs(products: Any, precision: str) -> None:
    """Tensor maps and turns outlast a launch, and so do copies: each replay of a graph reads what
    it is given."""
    rng, backend = np.random.default_rng(1), products[precision]
    stored = backend.module.stored
    with hopper.on_hopper(hopper.SHARED):
        dW = np.empty((64, 72), np.float32)
        program = backend.capture(
            lambda dZ, X: backend.linear_wgrad(dZ, X, out=dW),
            np.empty((200, 64), stored), np.empty((200, 72), stored),
        )  # fmt: skip
        for _ in range(3):
            dZ, X = whole(precision, rng, 200, 64), whole(precision, rng, 200, 72)
            program(dZ, X)
            assert np.array_equal(dW, widen(dZ).T @ widen(X))


@pytest.mark.parametrize("precision", EACH)
def test_no_bit_depends_on_the_number_of_multiprocessors(
    products: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs join in their order, whichever block they are given to."""
    rng = np.random.default_rng(2)
    dZ, X = (
        round_to(rng.standard_normal((501, n)).astype(np.float32), precision) for n in (136, 72)
    )
    seen = set()
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(by_tiles, "multiprocessors", lambda _, n=count: n)
        with hopper.on_hopper(hopper.SHARED):
            seen.add(products[precision].linear_wgrad(dZ, X).tobytes())
    assert len(seen) == 1


def rounded(x: Array) -> Array:
    """The nearest tf32, ties away from zero."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & ~np.uint32(0x1FFF)).view(np.float32)


@pytest.mark.parametrize(
    ("tile", "activation"),
    [
        (hopper.TALL_IN_TURN, "relu"),
        *(
            pytest.param(tile, "gelu", marks=pytest.mark.long)
            for tile in (hopper.IN_CLUSTERS, hopper.IN_TURN, COOPERATIVE)
        ),
        *(
            pytest.param(hopper.SHARED, activation, marks=pytest.mark.long)
            for activation in ACTIVATIONS
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_the_next_products_read_is_rounded_and_copied(
    products: Any, tile: Tile, activation: str
) -> None:
    """To the bit what is written otherwise, rounded; its transpose; nothing beside it. Copies that
    other kernels make are the same, and so are the products that read them."""
    rng, drop = np.random.default_rng(4), Dropout(0.5, np.array([5, 3]), 2)
    backend = products["tf32"].module
    for batch, inside, outside in ((67, 36, 140), (200, 72, 136), (1, 8, 4), (130, 12, 100)):
        X, W, dZ = (
            rng.standard_normal(shape).astype(np.float32)
            for shape in ((batch, inside), (outside, inside), (batch, outside))
        )
        with products["tf32"].place(), hopper.on_hopper(tile):
            import cupy

            placed = [cupy.asarray(a) for a in (X, W, dZ)]
            after = activation, drop._replace(stream=cupy.asarray(drop.stream))
            Y, saved = backend.linear_forward(*placed[:2], None, *after)
            below = _saved(backend, placed[0], *after), *after
            dZ_prev, db = backend.linear_dgrad(placed[2], placed[1], *below)
            for by_epilogue in (True, False):
                rooms = [cupy.asarray(np.full((n, padded(batch) + 4), np.nan, np.float32))
                         for n in (outside, inside)]  # fmt: skip
                copies = [room[:, :batch] for room in rooms]
                if by_epilogue:
                    mine = backend.linear_forward(
                        *placed[:2], None, *after, Y_rounded=True, copy=copies[0]
                    )
                    back = backend.linear_dgrad(
                        placed[2], placed[1], *below, dZ_prev_rounded=True, copy=copies[1]
                    )
                    assert np.array_equal(mine[0].get(), rounded(Y.get()))
                    assert np.array_equal(back[0].get(), rounded(dZ_prev.get()))
                    for got, expected in ((mine[1], saved), (back[1], db)):
                        assert expected is None or np.array_equal(got.get(), expected.get())
                else:
                    transposed(Y, copies[0]), transposed(dZ_prev, copies[1])
                for room, of in zip(rooms, (Y, dZ_prev), strict=True):
                    expected = np.full(room.shape, np.nan, np.float32)
                    expected[:, :batch] = rounded(of.get()).T
                    assert np.array_equal(room.get(), expected, equal_nan=True)
                given = dZ_prev, Y, None, (copies[1], copies[0])
                assert np.array_equal(
                    backend.linear_wgrad(*given).get(), backend.linear_wgrad(dZ_prev, Y).get()
                )


def _saved(backend: Any, X: Any, activation: str, drop: Dropout) -> Any:
    """What a layer with the outputs X may have kept."""
    import cupy

    unit = cupy.asarray(np.eye(X.shape[1], dtype=np.float32))
    return backend.linear_forward(X, unit, None, activation, drop)[1]


def test_what_cannot_be_a_copy_is_refused(products: Any) -> None:
    with products["tf32"].place():
        import cupy

        X, W = (cupy.asarray(np.zeros((5, 8), np.float32)) for _ in range(2))
        for wrong in (np.zeros((5, 8), np.float32), np.zeros((5, 5), np.float32),
                      np.zeros((5, 8), np.float64)[:, :5]):  # fmt: skip
            with pytest.raises(ShapeError, match=r"copy: expected float32 of shape \(5, 5\), rows"):
                products["tf32"].module.linear_forward(X, W, copy=cupy.asarray(wrong))
