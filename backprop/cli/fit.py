"""The options of `backprop fit`, in groups."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from backprop_kernels.precisions import PRECISIONS

from backprop.cli import tables
from backprop.cli.options import ROWS, add_network, add_refused, names, option
from backprop.evaluation import METRICS
from backprop.optimizers import NAMES as OPTIMIZERS
from backprop.schedules import NAMES as SCHEDULE_NAMES
from backprop.table.encoding import TASKS


def add_fit(commands: Any) -> argparse.ArgumentParser:
    """Add the command; returns its parser."""
    fit: argparse.ArgumentParser = commands.add_parser(
        "fit",
        help="train a network on a table and save it",
        usage="backprop fit DATA --target COL [options]",
        allow_abbrev=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=27),
    )
    fit.add_argument("data", metavar="DATA", help=ROWS)
    fit.add_argument(
        "--config", metavar="FILE", help="TOML with these options and more; flags win over it"
    )
    fit.add_argument("-q", "--quiet", action="store_true", help="print problems only")

    columns = fit.add_argument_group("columns and rows")
    columns.add_argument("--target", required=True, metavar="COL", help="the column to predict")
    columns.add_argument("--drop", type=names, action="extend", default=[], metavar="COL,…",
                         help="columns to ignore")  # fmt: skip
    columns.add_argument("--task", choices=("auto", *TASKS), default="auto", metavar="NAME",
                         help=f"{', '.join(TASKS)}; default: by target")  # fmt: skip
    held_out = columns.add_mutually_exclusive_group()
    held_out.add_argument("--valid", metavar="FILE", help="rows to validate on")
    option(held_out, "--valid-fraction", 0.1, "or this share of the rows, drawn at random",
           type=float, metavar="F")  # fmt: skip
    add_refused(columns)

    add_network(fit, hidden="128,64")

    training = fit.add_argument_group("training")
    training.add_argument("--loss", choices=tables.LOSS_NAMES, metavar="NAME",
                          help=f"{', '.join(tables.LOSS_NAMES)}; default: by task")  # fmt: skip
    option(training, "--optimizer", "Adam", ", ".join(OPTIMIZERS), metavar="NAME")
    for name in ("--lr", "--weight-decay"):
        training.add_argument(name, type=float, metavar="F", help="default: the optimizer's")
    option(training, "--epochs", 20, "passes over the rows", type=int, metavar="N")
    training.add_argument(
        "--batch-size", type=int, metavar="N", help="default: 1 %% of the rows, from 16 to 1024"
    )
    training.add_argument("--clip-norm", type=float, metavar="F", help="longest gradient")
    option(training, "--accumulate", 1, "batches whose gradients make a step", type=int,
           metavar="N")  # fmt: skip
    training.add_argument("--autotune", action="store_true",
                          help="on a GPU: measure which kernels are the fastest")  # fmt: skip
    training.add_argument("--schedule", choices=SCHEDULE_NAMES, metavar="NAME",
                          help=f"of lr: {', '.join(SCHEDULE_NAMES)}")  # fmt: skip
    option(training, "--warmup", 0.0, "epochs over which lr rises from 0", type=float,
           metavar="F")  # fmt: skip
    training.add_argument("--patience", type=int, metavar="N",
                          help="stop after so many epochs without a better val_loss")  # fmt: skip
    training.add_argument("--metrics", type=names, default=[], metavar="NAME,…",
                          help=f"beside the losses: {', '.join(METRICS)}")  # fmt: skip
    training.add_argument(
        "--precision", choices=tuple(PRECISIONS), metavar="NAME",
        help="of products: on a GPU tf32, bf16, fp16, bf16x3, bf16x6",
    )  # fmt: skip
    training.add_argument("--class-weight", choices=("balanced",), metavar="balanced",
                          help="classes count alike, however rare")  # fmt: skip
    training.add_argument("--ema", type=float, metavar="F", help="decay of averaged parameters")
    option(training, "--input-noise", 0.0, "its standard deviation", type=float, metavar="F")

    survival = fit.add_argument_group("stopping and going on")
    survival.add_argument("--checkpoint", metavar="DIR", help="save the fit there, every epoch")
    survival.add_argument("--resume", action="store_true", help="go on from there, if it began")

    files = fit.add_argument_group("files to write")
    option(files, "-o/--output", "model.safetensors", "the model", metavar="FILE")
    files.add_argument("--history", metavar="FILE", help="default: OUTPUT with .history.json")
    files.add_argument("--plot", metavar="FILE", help="default: OUTPUT with .png, by matplotlib")
    files.add_argument("--log", metavar="FILE", help="every epoch as it ends: .csv or .jsonl")
    files.add_argument("--tensorboard", metavar="DIR", help="every epoch, for TensorBoard")
    # What only a file can say.
    fit.set_defaults(run=tables.fit, early_stopping=None, eval_set={})
    return fit
