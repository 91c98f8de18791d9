"""The options of `backprop fit`, in groups, and the TOML file that may hold them."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from backprop_kernels.errors import OptionError
from backprop_kernels.optimizers import OPTIMIZERS

from backprop.cli import tables
from backprop.cli.options import ROWS, add_network, add_refused, names, option, widths
from backprop.evaluation import METRICS
from backprop.schedules import NAMES as SCHEDULE_NAMES
from backprop.table.encoding import TASKS

NOT_IN_A_FILE = ("help", "config")


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
    fit.add_argument("--config", metavar="FILE", help="TOML with these options; flags win over it")
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
    training.add_argument("--schedule", choices=SCHEDULE_NAMES, metavar="NAME",
                          help=f"of lr: {', '.join(SCHEDULE_NAMES)}")  # fmt: skip
    option(training, "--warmup", 0.0, "epochs over which lr rises from 0", type=float,
           metavar="F")  # fmt: skip
    training.add_argument("--patience", type=int, metavar="N",
                          help="stop after so many epochs without a better val_loss")  # fmt: skip
    training.add_argument("--metrics", type=names, default=[], metavar="NAME,…",
                          help=f"beside the losses: {', '.join(METRICS)}")  # fmt: skip
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
    fit.set_defaults(run=tables.fit)
    return fit


def apply_config(fit: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Make what the `--config` file of these arguments says the defaults of the parser.

    Raises OptionError, with file and line, for what no option would accept.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(arguments)[0].config
    if path is None:
        return
    text = Path(path).read_text(encoding="utf-8")
    try:
        settings = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise OptionError(f"{path}: expected TOML, got {problem}") from None
    actions = {_name(a): a for a in fit._actions if _name(a) not in NOT_IN_A_FILE}
    lines: dict[str, str] = {}
    for name, value in settings.items():
        where = lines[name] = f"{path}: line {_line(text, name)}: {name}"
        if name not in actions:
            close = get_close_matches(name.replace("_", "-"), actions, 1) or [", ".join(actions)]
            raise OptionError(f"{where}: expected an option of `backprop fit`; try {close[0]}")
        actions[name].default = _value(actions[name], value, where)
        actions[name].required = False
        if not actions[name].option_strings:
            actions[name].nargs = "?"
    given = {argument.partition("=")[0] for argument in arguments}
    for group in fit._mutually_exclusive_groups:
        together = [_name(action) for action in group._group_actions if _name(action) in settings]
        if len(together) > 1:
            raise OptionError(f"{lines[together[1]]}: expected not both this and {together[0]}")
        if together and given & {flag for a in group._group_actions for flag in a.option_strings}:
            actions[together[0]].default = None  # the flag speaks of the same thing


def _name(action: argparse.Action) -> str:
    """What an option is called in the file: its longest flag without dashes."""
    return max(action.option_strings, key=len, default=action.dest).lstrip("-")


def _line(text: str, name: str) -> int:
    """The line where a key of the top level is set."""
    key = re.compile(rf"""\s*["'\[]*{re.escape(name)}["'\]]*\s*(=|\.|$)""")
    lines = text.splitlines()
    return next((i for i, line in enumerate(lines, 1) if key.match(line)), 1)


def _value(action: argparse.Action, value: Any, where: str) -> Any:
    """The value as the flag would have given it."""
    if isinstance(action.default, bool) or isinstance(value, bool):
        if not (isinstance(action.default, bool) and isinstance(value, bool)):
            expected = "true or false" if isinstance(action.default, bool) else "a value"
            raise OptionError(f"{where}: expected {expected}, got {value!r}")
        return value
    if isinstance(value, list) and action.type in (names, widths):
        value = ",".join(map(str, value)) or "none"
    if not isinstance(value, str | int | float):
        raise OptionError(f"{where}: expected a number or text, got {value!r}")
    try:
        parsed = action.type(str(value)) if callable(action.type) else str(value)
    except (ValueError, argparse.ArgumentTypeError) as problem:
        kind = {int: "an integer", float: "a number"}.get(action.type, "")  # type: ignore[call-overload]
        expected = f"expected {kind}, got {value!r}" if kind else str(problem)
        raise OptionError(f"{where}: {expected}") from None
    if action.choices is not None and parsed not in action.choices:
        raise OptionError(f"{where}: expected {', '.join(action.choices)}, got {value!r}")
    return parsed
