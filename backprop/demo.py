"""The demo: will a flight from New York arrive late? `make demo`, or `python -m backprop.demo`.

Trains an MLP and, for comparison, a logistic regression on 2013's flights (`flights.py`), prints
how both do on flights they have not seen, and leaves the MLP, its history and learning curves in a
folder. The features are joined and computed from several tables, so the model file takes them as X.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backprop.cli import exit_status
from backprop.fit import fit
from backprop.flights import FlightsData, load
from backprop.history import History
from backprop.metrics import accuracy, auc, log_loss
from backprop.model import MLP
from backprop.optimizers import AdamW, Optimizer

HIDDEN = (256, 128)
# Peak learning rate and weight decay of the MLP. On days to come, what it remembers of single days
# misleads it, and strong decay forgets that; among days it has seen, the same memory serves it.
TRAINING = {"date": (1e-3, 10.0), "random": (3e-3, 0.0)}


@dataclass(frozen=True)
class Result:
    """A trained model and how it did on the validation part."""

    name: str
    model: MLP
    history: History
    seconds: float
    auc: float
    log_loss: float
    accuracy: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo with the given command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return exit_status(lambda: demo(options))


def demo(options: argparse.Namespace) -> None:
    """Load, train both models, print the comparison, write the files."""
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    data = load(options.split, options.seed)
    print(data.describe())
    print(f"read and encoded in {time.perf_counter() - started:.1f} s\n")
    lr, weight_decay = TRAINING[options.split]
    results = [
        train("MLP", HIDDEN, data, options, AdamW(lr=lr, weight_decay=weight_decay)),
        train("logistic regression", (), data, options, AdamW(lr=1e-2, weight_decay=0.0)),
    ]
    print("\n" + table(results, data))
    best = results[0]
    best.model.save(output / "model.safetensors")
    best.history.save(output / "history.json")
    best.history.plot(output / "curves.png", title=f"late flights, {options.split} split")
    print(f"\nwrote model.safetensors, history.json and curves.png to {output}/")


def train(
    name: str,
    hidden: Sequence[int],
    data: FlightsData,
    options: argparse.Namespace,
    optimizer: Optimizer,
) -> Result:
    """Train one network with these hidden widths and score it on the validation part."""
    sizes = [data.X_train.shape[1], *hidden, 1]
    model = MLP(sizes, device=options.device, seed=options.seed)
    print(f"{name} {'-'.join(map(str, sizes))}, {model.n_parameters:,} parameters", flush=True)
    started = time.perf_counter()
    history = fit(
        model, data.X_train, data.y_train, "bce_with_logits", optimizer, options.epochs,
        options.batch_size, eval_set=(data.X_valid, data.y_valid), progress="lines",
        seed=options.seed, schedule="cosine",
    )  # fmt: skip
    seconds = time.perf_counter() - started
    p = model.predict_proba(data.X_valid)[:, 0]
    return Result(
        name=name, model=model, history=history, seconds=seconds,
        auc=auc(data.y_valid, p),
        log_loss=log_loss(data.y_valid, p),
        accuracy=accuracy(data.y_valid, p >= 0.5),
    )  # fmt: skip


def table(results: Sequence[Result], data: FlightsData) -> str:
    """The comparison on the validation part; the last line is what knowing nothing scores."""
    late = float(data.y_valid.mean())
    lines = [f"{'validation':<20} {'AUC':>7} {'log loss':>9} {'accuracy':>9} {'seconds':>8}"]
    lines += [
        f"{r.name:<20} {r.auc:7.4f} {r.log_loss:9.4f} {r.accuracy:9.4f} {r.seconds:8.1f}"
        for r in results
    ]
    entropy = -late * math.log(late) - (1 - late) * math.log(1 - late)
    lines.append(f"{'the share of late':<20} {0.5:7.4f} {entropy:9.4f} {max(late, 1 - late):9.4f}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m backprop.demo", description=__doc__)
    parser.add_argument(
        "--split", choices=tuple(TRAINING), default="date",
        help="validate on the last days of the year (default), or on flights drawn at random",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default="runs/flights", help="folder for the files")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
