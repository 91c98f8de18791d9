"""Small networks, trained by one kernel, on a GPU: `python benchmarks/gpu/bench_mlp_step.py`.

Beside it the same step layer by layer, and PyTorch, eager and compiled in a CUDA graph with fused
AdamW, under autocast to bf16. All is on the device; inputs are N(0, 1).
"""

from __future__ import annotations

from bench_step import SECONDS, ours, theirs
from measure import Clock, Table, device, options, torch_device

# batch, widths: 64 and 128 wide, from where a step is all launches to where it is all work
NETWORKS = [
    (2**18, [64, 64, 64, 64, 64, 16]),
    (2**18, [64, 128, 128, 16]),
    (2**18, [128, 128, 128, 10]),
    (2**14, [64, 64, 64, 64, 64, 16]),
    (2**14, [64, 128, 128, 16]),
    (2**10, [64, 64, 64, 10]),
    (2**21, [64, 64, 64, 64, 64, 16]),
]


def main() -> None:
    """Measure every network, print, append."""
    given = options(__doc__)
    torch, where = torch_device(given.dry_run)
    table = Table(given.out / "mlp_step.csv")
    with device(given.dry_run) as cupy:
        clock = Clock(cupy, torch, given.dry_run)
        for batch, widths in [(70, [9, 12, 3])] if given.dry_run else NETWORKS:
            contenders = {
                "one_kernel": ours("bf16", batch, widths)["graph"],
                "by_layers": ours("bf16", batch, widths, by_layers=True)["graph"],
            }
            if torch is not None:
                contenders |= theirs(torch, where, "bf16", batch, widths, given.dry_run)
                del contenders["bare"]
            times = clock.interleaved(contenders, 0.0 if given.dry_run else SECONDS)
            best = times["one_kernel"]
            table.add(
                batch=batch, widths="-".join(map(str, widths)),
                **{f"{name}_us": t * 1e6 for name, t in times.items()},
                samples_per_second=batch / best,
                **{f"{n}_by_one_kernel": t / best for n, t in times.items() if n != "one_kernel"},
            )  # fmt: skip


if __name__ == "__main__":
    main()
