"""What the options of several commands share: how they are declared, read and explained."""

from __future__ import annotations

import argparse

from backprop_kernels.activations import ACTIVATIONS

from backprop.layers import NORMS
from backprop.model import DTYPES
from backprop.table import MAX_REFUSED

ROWS = ".csv, .tsv or .txt (also .gz, .zip), .npz, .npy or .parquet file"


def option(
    group: argparse._ActionsContainer, flags: str, default: object, text: str, **details: object
) -> None:
    """An option whose help ends with its default."""
    shown = text if "default" in text else f"{text}; default: {default}"
    group.add_argument(*flags.split("/"), default=default, help=shown, **details)  # type: ignore[arg-type]


def add_network(command: argparse.ArgumentParser, hidden: str) -> None:
    """The options that make a network."""
    network = command.add_argument_group("network")
    option(network, "--hidden", widths(hidden), f"widths, or none; default: {hidden}",
           type=widths, metavar="N,…")  # fmt: skip
    option(network, "--activation", "relu", f"one of {', '.join(ACTIVATIONS)}", metavar="NAME")
    option(network, "--dropout", 0.0, "rate after every hidden layer", type=float, metavar="P")
    option(network, "--input-dropout", 0.0, "and of the input", type=float, metavar="P")
    network.add_argument(
        "--norm", choices=NORMS, metavar="KIND",
        help=f"{', '.join(NORMS)}: normalise before every activation",
    )  # fmt: skip
    option(network, "--dtype", DTYPES[0], " or ".join(DTYPES), choices=DTYPES, metavar="NAME")
    add_device(network)
    option(network, "--seed", 0, "of weights, order, dropout and split", type=int, metavar="N")


def add_device(group: argparse._ActionsContainer) -> None:
    """The option that says where to compute."""
    option(group, "--device", "auto", "auto, cpu, cuda, cuda:N or reference", metavar="NAME")


def add_model_and_data(command: argparse.ArgumentParser) -> None:
    """The arguments of commands that apply a model to rows."""
    command.add_argument("model", help="a model of `backprop fit`")
    command.add_argument("data", help=ROWS)
    add_device(command)
    add_refused(command)


def add_refused(command: argparse._ActionsContainer) -> None:
    """The option that says how many unusable rows are too many."""
    option(command, "--max-refused", MAX_REFUSED, "share of unusable rows to put up with",
           type=float, metavar="F")  # fmt: skip


def names(text: str) -> list[str]:
    """Names with commas between."""
    return [name.strip() for name in text.split(",") if name.strip()]


def widths(text: str) -> list[int]:
    """Numbers with commas between, or none."""
    if text.strip() in ("", "none"):
        return []
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected widths such as 256,128, or none; got {text!r}"
        ) from None
