"""`backprop fit`, `predict` and `evaluate`: from a file of raw rows to a model, and back.

What an encoder learns of the training rows travels in the model file, so the other two commands
take rows as they come.
"""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from backprop_kernels.errors import DataError, OptionError

from backprop.cli.config import optimizer
from backprop.fit import fit as train_model
from backprop.logs import CSVLog, JSONLog, Log, TensorBoard
from backprop.losses import resolve_loss
from backprop.metrics import accuracy, auc, log_loss, mae, r2, rmse
from backprop.model import MLP, Sequential, load
from backprop.optimizers import Optimizer
from backprop.schedules import Plateau, Schedule
from backprop.table import Encoder, Table, read_table

# What a network can be trained with, by task; the first is the default. Other losses want targets
# or outputs of another kind (counts, ±1, two outputs a target) than the encoder makes.
LOSSES_OF_TASK = {
    "binary": ("bce_with_logits", "focal"),
    "multiclass": ("cross_entropy",),
    "regression": ("mse", "mae", "huber", "log_cosh", "quantile"),
}
LOSS_NAMES = tuple(name for names in LOSSES_OF_TASK.values() for name in names)
SHOWN_REFUSALS = 5


def fit(options: Namespace) -> None:
    """Train on a table; write the model, its history and a picture of the learning curves."""
    say = _silent if options.quiet else print
    output, history_file, plot_file = _files(options)
    logs = _logs(options)
    train, valid, encoder = _read_training(options)
    loss = resolve_loss(options.loss or LOSSES_OF_TASK[encoder.task][0])
    if loss.name not in LOSSES_OF_TASK[encoder.task]:
        expected = " or ".join(LOSSES_OF_TASK[encoder.task])
        raise OptionError(
            f"fit: --loss: expected {expected} for {encoder.task}, got {loss.name}; "
            "--task says how to take the target"
        )
    chosen = _optimizer(options)
    sizes = [len(encoder.feature_names), *options.hidden, encoder.outputs]
    model = MLP(
        sizes, options.activation, options.dropout, options.norm,
        input_dropout=options.input_dropout, dtype=options.dtype, device=options.device,
        seed=options.seed,
    )  # fmt: skip
    model.encoder = encoder
    batch_size = options.batch_size or min(max(len(train) // 100, 16), 1024)
    say(_inferred(train, encoder))
    say(
        f"network {'-'.join(map(str, sizes))}, {options.activation}: {model.n_parameters:,} "
        f"parameters; {loss.name}, {repr(chosen).partition('(')[0]} lr {chosen.lr:g}, "
        f"batches of {batch_size:,}"
    )
    judged = {"val": valid} if valid is not None else {}
    for name, file in options.eval_set.items():
        judged[name] = _read_like(encoder, file, options.max_refused)
        _report_refused(judged[name])
    history = train_model(
        model, encoder.transform(train), encoder.encode_target(train), loss, chosen,
        options.epochs, batch_size,
        eval_set={k: (encoder.transform(v), encoder.encode_target(v)) for k, v in judged.items()},
        metrics=options.metrics, class_weight=_class_weight(options, encoder),
        schedule=_schedule(options), early_stopping=options.patience or options.early_stopping,
        clip_norm=options.clip_norm,
        accumulate=options.accumulate, input_noise=options.input_noise, ema=options.ema,
        precision=options.precision, autotune=options.autotune,
        callbacks=logs, checkpoint=options.checkpoint, resume=options.resume,
        progress=False if options.quiet else "lines", seed=options.seed,
    )  # fmt: skip
    model.save(output)
    history.save(history_file)
    if plot_file is not None and history.epochs:
        history.plot(plot_file, title=f"{encoder.target.name}: {loss.name}")
    for name, part in (judged or {"training": train}).items():
        shown = "validation" if name == "val" else name
        say(f"{shown}, {len(part):,} rows: {_listed(scores(model, part))}")
    written = [str(file) for file in (output, history_file, plot_file) if file is not None]
    say(f"wrote {', '.join(written)}")
    if history.interrupted:
        raise KeyboardInterrupt


def predict(options: Namespace) -> None:
    """Write one CSV row for each row of a table, led by its line in that file."""
    model = load_with_encoder(options.model, options.device)
    columns = [column.name for column in model.encoder.columns]
    table = read_table(
        options.data, columns=columns, kinds=model.encoder.kinds, max_refused=options.max_refused
    )
    _report_refused(table)
    header, rows = _predictions(model, table)
    # The line numbers keep rows and predictions together where rows were refused.
    lines = table.line_numbers.tolist()
    with ExitStack() as stack:
        stream = sys.stdout
        if options.output is not None:
            stream = stack.enter_context(open(options.output, "w", newline="", encoding="utf-8"))
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([table.unit, *header])
        writer.writerows([line, *row] for line, row in zip(lines, rows, strict=True))


def evaluate(options: Namespace) -> None:
    """Print how far predictions for a table are from its target column."""
    model = load_with_encoder(options.model, options.device)
    table = _read_like(model.encoder, options.data, options.max_refused, options.target)
    _report_refused(table)
    print(f"{options.data}, {len(table):,} rows: {_listed(scores(model, table))}")


def load_with_encoder(path: str, device: str) -> Sequential:
    """The model in `path`, which must know how to encode raw rows."""
    model = load(path, device)
    if model.encoder is None:
        raise DataError(
            f"{path}: expected a model of `backprop fit`, which holds the encoding of raw rows, "
            "got one without; use it from Python: backprop.load(path).predict(X)"
        )
    return model


def scores(model: Sequential, table: Table) -> dict[str, float]:
    """The usual metrics of the model's task on rows with a target; those undefined are left out."""
    encoder = model.encoder
    y = encoder.encode_target(table)
    if encoder.task == "regression":
        true = table.columns[encoder.target.name]
        predicted = encoder.decode_target(model.predict(table)[:, 0])
        found = {"MAE": mae(true, predicted), "RMSE": rmse(true, predicted)}
        return {**found, "R²": r2(true, predicted)} if len(y) > 1 else found
    P = model.predict_proba(table)
    if encoder.task == "multiclass":
        return {"accuracy": accuracy(y, P.argmax(axis=1)), "log loss": log_loss(y, P)}
    p = P[:, 0]
    found = {"log loss": log_loss(y, p), "accuracy": accuracy(y, p >= 0.5)}
    return {"AUC": auc(y, p), **found} if 0 < y.sum() < len(y) else found


def _predictions(model: Sequential, table: Table) -> tuple[list[str], Iterable[list[Any]]]:
    """The header and the rows of a prediction, without the line numbers."""
    encoder = model.encoder
    if encoder.task == "regression":
        values = encoder.decode_target(model.predict(table)[:, 0])
        return [encoder.target.name], ([f"{value:.7g}"] for value in values)
    P = model.predict_proba(table)
    if encoder.task == "binary":
        labels = encoder.decode_target(P[:, 0] >= 0.5)
        named = encoder.classes[1:]
    else:
        labels = encoder.decode_target(P.argmax(axis=1))
        named = encoder.classes
    header = [encoder.target.name, *(f"probability_{name}" for name in named)]
    return header, (
        [label, *(f"{p:.7g}" for p in row)] for label, row in zip(labels, P, strict=True)
    )


def _read_training(options: Namespace) -> tuple[Table, Table | None, Encoder]:
    """Training rows, validation rows, and the encoding learned from the training rows alone."""
    if not 0 <= options.valid_fraction < 1:
        raise OptionError(
            f"fit: --valid-fraction: expected 0 or more, below 1, got {options.valid_fraction}"
        )
    # Columns to drop are read as text, which no value can spoil.
    table = read_table(
        options.data, kinds=dict.fromkeys(options.drop, "text"), max_refused=options.max_refused
    ).require(options.target, options.max_refused)
    _report_refused(table)
    valid_rows = 0 if options.valid else round(options.valid_fraction * len(table))
    valid = None
    if valid_rows:
        order = np.random.default_rng(options.seed).permutation(len(table))
        valid = table.take(np.sort(order[:valid_rows]))
        table = table.take(np.sort(order[valid_rows:]))
    encoder = Encoder.fit(table, target=options.target, drop=options.drop, task=options.task)
    if options.valid:
        valid = _read_like(encoder, options.valid, options.max_refused)
        _report_refused(valid)
    return table, valid, encoder


def _read_like(encoder: Encoder, path: str, max_refused: float, target: str | None = None) -> Table:
    """A file's rows read as the training rows were; `target` is the target's name in this file."""
    name = encoder.target.name
    there = target or name
    kinds = {**encoder.kinds, there: encoder.kinds[name]}
    columns = [*(column.name for column in encoder.columns), there]
    table = read_table(path, columns=columns, kinds=kinds, max_refused=max_refused)
    table = table.require(there, max_refused)
    return replace(table, columns={**table.columns, name: table.columns[there]})


def _optimizer(options: Namespace) -> Optimizer:
    said = options.optimizer if isinstance(options.optimizer, dict) else {"name": options.optimizer}
    flags = {"lr": options.lr, "weight_decay": options.weight_decay}
    return optimizer(**said | {name: value for name, value in flags.items() if value is not None})


def _class_weight(options: Namespace, encoder: Encoder) -> Any:
    """As `fit` takes it: by number, where the file has names of classes."""
    if not isinstance(options.class_weight, dict):
        return options.class_weight
    numbers = {str(name): number for number, name in enumerate(encoder.classes)}
    unknown = [name for name in options.class_weight if name not in numbers]
    if unknown:
        raise OptionError(
            f"fit: class-weight: expected classes of {encoder.target.name} "
            f"({', '.join(numbers) or 'none'}), got {', '.join(unknown)}"
        )
    return {numbers[name]: weight for name, weight in options.class_weight.items()}


def _files(options: Namespace) -> tuple[Path, Path, Path | None]:
    """Where model, history and picture go. What would fail after the training fails here."""
    output = Path(options.output)
    plots = find_spec("matplotlib") is not None
    if options.plot and not plots:
        raise OptionError(
            'fit: --plot: expected matplotlib, got none; pip install "fused-backprop[plot]"'
        )
    history = Path(options.history or output.with_suffix(".history.json"))
    plot = Path(options.plot or output.with_suffix(".png")) if plots else None
    for file in filter(None, (output, history, plot)):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise OptionError(f"fit: {file}: expected a file to write, got a folder")
    return output, history, plot


def _schedule(options: Namespace) -> Schedule | Plateau | None:
    if isinstance(options.schedule, Schedule | Plateau):
        if options.warmup:
            raise OptionError("fit: --warmup: expected it in the table of schedule, got both")
        return options.schedule
    if options.schedule == "plateau":
        return Plateau(warmup=options.warmup)
    if options.schedule is None and not options.warmup:
        return None
    return Schedule(options.schedule or "constant", warmup=options.warmup)


def _logs(options: Namespace) -> list[Log]:
    logs: list[Log] = []
    if options.log is not None:
        kinds = {".csv": CSVLog, ".jsonl": JSONLog}
        suffix = Path(options.log).suffix
        if suffix not in kinds:
            raise OptionError(f"fit: --log: expected a name ending in .csv or .jsonl, got {suffix}")
        logs.append(kinds[suffix](options.log))
    if options.tensorboard is not None:
        logs.append(TensorBoard(options.tensorboard))
    return logs


def _inferred(table: Table, encoder: Encoder) -> str:
    """What was made of the training rows, in two lines or more."""
    target = encoder.target
    if encoder.task == "regression":
        about = f"mean {target.mean:g}, deviation {target.scale:g}"
    else:
        counts = np.bincount(encoder.encode_target(table).astype(np.int64))
        shares = (
            f"{name} {count / len(table):.1%}"
            for name, count in zip(encoder.classes, counts[:10], strict=False)
        )
        more = ", …" if len(encoder.classes) > 10 else ""
        about = f"{len(encoder.classes)} classes: {', '.join(shares)}{more}"
    texts = sum(hasattr(column, "categories") for column in encoder.columns)
    lines = [
        f"{table.path}: {len(table):,} rows to train on, target {target.name}: "
        f"{encoder.task}, {about}",
        f"{len(encoder.columns)} columns ({len(encoder.columns) - texts} numbers, standardised; "
        f"{texts} texts, one-hot) make {len(encoder.feature_names)} features",
        *(f"note: {note}" for note in encoder.notes),
    ]
    return "\n".join(lines)


def _report_refused(table: Table) -> None:
    """Say on stderr which rows were left out: the first few with their lines, and how many."""
    if not table.refused:
        return
    rows = len(table) + len(table.refused)
    print(f"{table.path}: {len(table.refused)} of {rows} rows refused:", file=sys.stderr)
    for reason in table.refused[:SHOWN_REFUSALS]:
        print(f"  {reason}", file=sys.stderr)
    if len(table.refused) > SHOWN_REFUSALS:
        print("  …", file=sys.stderr)


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def _silent(words: str) -> None:
    """In place of `print` where nobody wants to read."""
