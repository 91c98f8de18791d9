"""The `backprop` command: options here, one file for each group of commands beside.

backprop fit flights.csv --target late --hidden 256,128
backprop predict model.safetensors new.csv -o predictions.csv
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from backprop_kernels.errors import BackpropError
from backprop_kernels.losses import LOSSES

from backprop import __version__
from backprop.cli import doctor, export, gradcheck, plot, tables
from backprop.cli.config import apply_config
from backprop.cli.fit import add_fit
from backprop.cli.options import ROWS, add_model_and_data, add_network, option


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` unless given) and return its exit status.

    0 is success; 2 is an error, told in one message on stderr; 130 is Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)

    def command() -> None:
        options = parser(arguments).parse_args(arguments)
        options.run(options)

    return exit_status(command)


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


def parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Every command and option; defaults of `fit` are those of the --config in `arguments`."""
    top = argparse.ArgumentParser(
        prog="backprop",
        description="Train multi-layer perceptrons on tables, and predict with them.",
        epilog="backprop fit flights.csv --target late --hidden 256,128",
    )
    top.add_argument("--version", action="version", version=f"fused-backprop {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    fit = add_fit(commands)
    if arguments[:1] == ["fit"]:
        apply_config(fit, arguments)

    predict = commands.add_parser("predict", help="predict the rows of a table, as CSV")
    add_model_and_data(predict)
    predict.add_argument("-o", "--output", metavar="FILE", help="default: standard output")
    predict.set_defaults(run=tables.predict)

    evaluate = commands.add_parser("evaluate", help="compare predictions with known targets")
    add_model_and_data(evaluate)
    evaluate.add_argument("--target", metavar="COL", help="default: the name it was trained with")
    evaluate.set_defaults(run=tables.evaluate)

    picture = commands.add_parser("plot", help="draw the learning curves of one run or several")
    picture.add_argument(
        "runs", nargs="+", metavar="RUN",
        help="a model of `backprop fit`, its history (.json), a log (.csv, .jsonl), or a folder "
        "of checkpoints",
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
    option(out, "--activation", "relu", "of a PyTorch file's hidden layers", metavar="NAME")
    option(out, "--output-activation", "identity", "of its last layer", metavar="NAME")
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
    option(check, "--rows", 16, "how many rows", type=int, metavar="N")
    add_network(check, hidden="8,7")
    check.set_defaults(run=gradcheck.run)

    report = commands.add_parser("doctor", help="what works on this machine, and what to install")
    report.set_defaults(run=doctor.run)
    return top
