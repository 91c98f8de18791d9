"""Every kernel that can make a product, beside the one that is chosen unasked.

`python benchmarks/gpu/bench_choices.py`: as `autotune=True` measures them, with their epilogues, on
N(0, 1) numbers in a CUDA graph; cuBLASLt among them where it is installed. Rows whose `chosen` is
not the fastest are where the rules of tiles.py should change.
"""

from __future__ import annotations

from measure import Table, device, options

GRID = [(8192, 4096), (8192, 8192), (8192, 2048), (8192, 1024), (4096, 4096), (1024, 1024),
        (65536, 1024), (16384, 8192), (1024, 4096), (256, 1024), (65536, 128)]  # fmt: skip
PRECISIONS = ("bf16", "tf32", "bf16x6", "bf16x3", "float32", "fp16")


def main() -> None:
    """Measure every row, print, append."""
    given = options(__doc__)
    table = Table(given.out / "choices.csv")
    with device(given.dry_run) as cupy:
        from backprop_kernels.cuda import tuning
        from backprop_kernels.cuda.tiles import Choice, choose

        capability = int(cupy.cuda.Device().compute_capability)
        asked: list[list[Choice]] = []

        def listed(candidates: list[Choice]) -> Choice:
            asked.append(candidates)
            return candidates[0]

        with tuning.deciding(listed):
            for precision in PRECISIONS[:1] if given.dry_run else PRECISIONS:
                for batch, width in [(40, 24)] if given.dry_run else GRID:
                    for operator, *shape in (
                        ("linear_forward", batch, width, width),
                        ("linear_dgrad", batch, width, width),
                        ("linear_wgrad", width, width, batch),
                    ):
                        choose(operator, *shape, precision, capability, True)
        for candidates in asked:
            chosen = candidates[0]
            times = {c.name: tuning.measured(c) for c in candidates}
            for name, seconds in sorted(times.items(), key=lambda item: item[1]):
                table.add(
                    operator=chosen.operator, precision=chosen.precision.name,
                    rows=chosen.rows, columns=chosen.columns, terms=chosen.terms, kernel=name,
                    us=seconds * 1e6, chosen=name == chosen.name,
                    by_chosen=seconds / times[chosen.name],
                )  # fmt: skip


if __name__ == "__main__":
    main()
