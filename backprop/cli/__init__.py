"""The `backprop` command: options here, one file for each group of commands beside.

backprop fit flights.csv --target late --hidden 256,128
backprop predict model.safetensors new.csv -o predictions.csv
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.errors import BackpropError
from backprop_kernels.losses import LOSSES
from backprop_kernels.optimizers import OPTIMIZERS

from backprop import __version__
from backprop.cli import doctor, export, gradcheck, plot, tables
from backprop.layers import NORMS
from backprop.model import DTYPES
from backprop.table import MAX_REFUSED
from backprop.table.encoding import TASKS

ROWS = ".csv, .tsv or .txt (also .gz, .zip), .npz, .npy or .parquet file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` unless given) and return its exit status.

    0 is success; 2 is an error, told in one message on stderr; 130 is Ctrl-C.
    """
    options = parser().parse_args(arguments)
    return exit_status(lambda: options.run(options))


def exit_status(command: Callable[[], None]) -> int:
    """Run `command`; errors that are the user's business become a message and a status."""
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        # Python flushes stdout once more at exit: let that go nowhere instead of failing again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BackpropError, OSError) as problem:
        print(f"backprop: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("backprop: interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    top = argparse.ArgumentParser(
        prog="backprop",
        description="Train multi-layer perceptrons on tables, and predict with them.",
        epilog="backprop fit flights.csv --target late --hidden 256,128",
    )
    top.add_argument("--version", action="version", version=f"fused-backprop {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    fit = commands.add_parser("fit", help="train a network on a table and save it")
    fit.add_argument("data", help=ROWS)
    fit.add_argument("--target", required=True, metavar="COL", help="the column to predict")
    fit.add_argument("--drop", type=_names, action="extend", default=[], metavar="COL,…",
                     help="columns to ignore")  # fmt: skip
    fit.add_argument("--task", choices=("auto", *TASKS), default="auto", help="default: by target")
    fit.add_argument("--loss", choices=tables.LOSS_NAMES, help="default: by task")
    _add_network(fit, hidden="128,64")
    training = fit.add_argument_group("training")
    _option(training, "--optimizer", "Adam", f"one of {', '.join(OPTIMIZERS)}", metavar="NAME")
    for name in ("--lr", "--weight-decay"):
        training.add_argument(name, type=float, metavar="F", help="default: the optimizer's")
    _option(training, "--epochs", 20, "passes over the rows", type=int, metavar="N")
    training.add_argument(
        "--batch-size", type=int, metavar="N", help="default: 1 %% of the rows, from 16 to 1024"
    )
    held_out = training.add_mutually_exclusive_group()
    held_out.add_argument("--valid", metavar="FILE", help="rows to validate on")
    _option(held_out, "--valid-fraction", 0.1, "or this share of the rows, drawn at random",
            type=float, metavar="F")  # fmt: skip
    _add_refused(fit)
    files = fit.add_argument_group("files to write")
    _option(files, "-o/--output", "model.safetensors", "the model", metavar="FILE")
    files.add_argument("--history", metavar="FILE", help="default: OUTPUT with .history.json")
    files.add_argument("--plot", metavar="FILE", help="default: OUTPUT with .png, by matplotlib")
    fit.add_argument("-q", "--quiet", action="store_true", help="print problems only")
    fit.set_defaults(run=tables.fit)

    predict = commands.add_parser("predict", help="predict the rows of a table, as CSV")
    _add_model_and_data(predict)
    predict.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    predict.set_defaults(run=tables.predict)

    evaluate = commands.add_parser("evaluate", help="compare predictions with known targets")
    _add_model_and_data(evaluate)
    evaluate.add_argument("--target", metavar="COL", help="default: the name it was trained with")
    evaluate.set_defaults(run=tables.evaluate)

    picture = commands.add_parser("plot", help="draw the learning curves of one run or several")
    picture.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="a model of `backprop fit`, its history (.json), a log (.csv, .jsonl), or a folder "
        "with history.json",
    )  # fmt: skip
    picture.add_argument("-o", "--output", metavar="FILE", help="default: the first RUN with .png")
    picture.set_defaults(run=plot.run)

    out = commands.add_parser(
        "export",
        help="take a model to ONNX or PyTorch, or bring one from there",
        description="A model of this library becomes an .onnx file, or a .safetensors file with "
        "PyTorch's names. An .onnx file or a PyTorch .safetensors file becomes a model of this "
        "library.",
    )
    out.add_argument("model", help="a .safetensors or .onnx file")
    out.add_argument("output", help="the .onnx or .safetensors file to write")
    out.add_argument("--probabilities", action="store_true",
                     help="ONNX: end with sigmoid or softmax")  # fmt: skip
    _option(out, "--activation", "relu", "of a PyTorch file's hidden layers", metavar="NAME")
    _option(out, "--output-activation", "identity", "of its last layer", metavar="NAME")
    out.set_defaults(run=export.run)

    check = commands.add_parser(
        "gradcheck",
        help="check the gradients on this machine by complex step",
        description="Compare the kernels' gradients with the complex-step derivative: of a small "
        "random network with the given options, or of MODEL on the first rows of DATA.",
    )
    check.add_argument("model", nargs="?", help="a model of `backprop fit`")
    check.add_argument("data", nargs="?", help=ROWS)
    check.add_argument("--loss", choices=LOSSES, help="default: mse, or by the model's task")
    _option(check, "--rows", 16, "how many rows", type=int, metavar="N")
    _add_network(check, hidden="8,7")
    check.set_defaults(run=gradcheck.run)

    report = commands.add_parser("doctor", help="what works on this machine, and what to install")
    report.set_defaults(run=doctor.run)
    return top


def _add_network(command: argparse.ArgumentParser, hidden: str) -> None:
    network = command.add_argument_group("network")
    _option(network, "--hidden", _widths(hidden), f"widths, or none; default: {hidden}",
            type=_widths, metavar="N,…")  # fmt: skip
    _option(network, "--activation", "relu", f"one of {', '.join(ACTIVATIONS)}", metavar="NAME")
    _option(network, "--dropout", 0.0, "rate after every hidden layer", type=float, metavar="P")
    network.add_argument("--norm", choices=NORMS, help="before every activation")
    _option(network, "--dtype", DTYPES[0], "numbers to compute with", choices=DTYPES)
    _option(network, "--device", "auto", "auto, cpu, cuda, cuda:N or reference", metavar="NAME")
    _option(network, "--seed", 0, "of weights, order, dropout and split", type=int, metavar="N")


def _add_model_and_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a model of `backprop fit`")
    command.add_argument("data", help=ROWS)
    _option(command, "--device", "auto", "auto, cpu, cuda, cuda:N or reference", metavar="NAME")
    _add_refused(command)


def _add_refused(command: argparse.ArgumentParser) -> None:
    _option(command, "--max-refused", MAX_REFUSED, "share of unusable rows to put up with",
            type=float, metavar="F")  # fmt: skip


def _option(
    group: argparse._ActionsContainer, flags: str, default: object, text: str, **details: object
) -> None:
    """An option whose help ends with its default."""
    shown = text if "default" in text else f"{text}; default: {default}"
    group.add_argument(*flags.split("/"), default=default, help=shown, **details)  # type: ignore[arg-type]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _widths(text: str) -> list[int]:
    if text.strip() in ("", "none"):
        return []
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected widths such as 256,128, or none; got {text!r}"
        ) from None
