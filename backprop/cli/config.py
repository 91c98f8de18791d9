"""The TOML file of `backprop fit --config`: the options' names, and tables for what Python builds.

Wherever Python takes an object (`Optimizer`, `Checkpoint`, …), the file takes a table with that
class's names. All is checked here, so that an error names file and line.
"""

from __future__ import annotations

import argparse
import inspect
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from backprop_kernels.errors import BackpropError, OptionError

from backprop.averaging import EMA
from backprop.cli.options import names, widths
from backprop.losses import Loss
from backprop.monitor import EarlyStopping
from backprop.optimizers import Optimizer, resolve_optimizer
from backprop.resume import Checkpoint
from backprop.schedules import Plateau, Schedule

NOT_IN_A_FILE = ("help", "config")


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
    for written, value in settings.items():
        name = written.replace("_", "-")  # as in Python, or as the flag
        where = f"{path}: line {_line(text, written)}: {written}"
        if name in lines:
            raise OptionError(f"{where}: expected each option once, got it on {lines[name]} too")
        lines[name] = f"line {_line(text, written)}"
        if isinstance(value, dict) and name in TABLES:
            built = _built(name, value, text, f"{path}: line", written)
            fit.set_defaults(**{name.replace("-", "_"): built})
            continue
        if name not in actions:
            known = [*actions, *TABLES]
            close = get_close_matches(name, known, 1) or [", ".join(known)]
            raise OptionError(f"{where}: expected an option of `backprop fit`; try {close[0]}")
        actions[name].default = _value(actions[name], value, where)
        actions[name].required = False
        if not actions[name].option_strings:
            actions[name].nargs = "?"
    given = {argument.partition("=")[0] for argument in arguments}
    for group in fit._mutually_exclusive_groups:
        together = [_name(action) for action in group._group_actions if _name(action) in lines]
        if len(together) > 1:
            line = lines[together[1]]
            where = f"{path}: {line}: {together[1]}"
            raise OptionError(f"{where}: expected not both this and {together[0]}")
        if together and given & {flag for a in group._group_actions for flag in a.option_strings}:
            actions[together[0]].default = None  # the flag speaks of the same thing


def _name(action: argparse.Action) -> str:
    """What an option is called in the file: its longest flag without dashes."""
    return max(action.option_strings, key=len, default=action.dest).lstrip("-")


def _line(text: str, name: str, key: str = "") -> int:
    """The line where `name` is set or its table begins; of a `key` in the table, where that is."""
    beginning = 0
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[+([^\]]*)\]", line)
        if not header and not re.match(r"[^#=]+=", line):
            continue
        words = re.findall(
            r"""[\w-]+|"[^"]*"|'[^']*'""", header[1] if header else line.split("=")[0]
        )
        path = [*([] if header else table), *(word.strip("\"'") for word in words)]
        table = path if header else table
        if path[:1] == [name]:
            if key in ("", *path[1:2]):
                return number
            beginning = beginning or number
    return beginning


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


def _built(name: str, table: Mapping[str, Any], text: str, path: str, written: str) -> Any:
    """What a table stands for. Its keys are tried one by one: the one that fails is at fault."""
    first, make = TABLES[name]
    if first and first not in table:
        where = f"{path} {_line(text, written)}: {written}"
        raise OptionError(f"{where}: expected {first} = …, got {', '.join(table) or 'nothing'}")
    options: dict[str, Any] = {}
    for key in sorted(table, key=lambda key: key != first):
        options[key] = table[key]
        try:
            make(**options)
        except (BackpropError, TypeError) as problem:
            where = f"{path} {_line(text, written, key)}: {written}.{key}"
            raise OptionError(f"{where}: {problem}") from None
    return make(**options)


def _known(make: Callable[..., Any], /, **options: Any) -> Any:
    """`make(**options)`, after a look at their names."""
    known = list(inspect.signature(make).parameters)
    for name in options:
        if name not in known:
            raise OptionError(f"expected one of {', '.join(known)}")
    return make(**options)


def optimizer(name: str, **options: Any) -> Optimizer:
    """Of this name; an optimizer within it (Muon's `others`) is a table too."""
    if isinstance(options.get("others"), dict):
        options["others"] = optimizer(**options["others"])
    return resolve_optimizer(name, **options)


def _optimizer(**options: Any) -> dict[str, Any]:
    """The options as they are, to which flags may add: but they must make an optimizer."""
    optimizer(**options)
    return options


def _schedule(name: str, **options: Any) -> Schedule | Plateau:
    if name == "plateau":
        plateau: Plateau = _known(Plateau, **options)
        return plateau
    return Schedule(name, **options)


def _eval_set(**files: Any) -> dict[str, str]:
    for name, file in files.items():
        if name == "val" or not isinstance(file, str):
            raise OptionError('expected a name other than "val" (that is `valid`) and a file')
    return files


def _class_weight(**weights: Any) -> dict[str, float]:
    for weight in weights.values():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            raise OptionError(f"expected a number ≥ 0, got {weight!r}")
    return weights


# By name: the key that must be there, and what is called with all of them.
TABLES: dict[str, tuple[str, Callable[..., Any]]] = {
    "loss": ("name", Loss),
    "optimizer": ("name", _optimizer),
    "schedule": ("name", _schedule),
    "ema": ("", partial(_known, EMA)),
    "early-stopping": ("", partial(_known, EarlyStopping)),
    "checkpoint": ("folder", partial(_known, Checkpoint)),
    "eval-set": ("", _eval_set),
    "class-weight": ("", _class_weight),
}
