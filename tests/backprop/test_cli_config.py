"""`backprop fit --config`: the same as the flags, and errors that name the line."""

from __future__ import annotations

from pathlib import Path

import pytest

import backprop as bp
from backprop.cli import main, parser
from tests.backprop.test_cli import write_rows

CONFIG = """\
# what to train on
data = "{data}"
target = "late"
drop = ["kind", "delay"]

hidden = [8, 4]      # two layers
activation = "silu"
lr = 1e-2
epochs = 2
batch-size = 32
device = "reference"
quiet = true
log = "{folder}/log.csv"
tensorboard = "{folder}/events"
output = "{folder}/m.safetensors"
"""
FLAGS = (
    "--target late --drop kind,delay --hidden 8,4 --activation silu --lr 0.01 --epochs 2 "
    "--batch-size 32 --device reference --quiet"
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = write_rows(tmp_path / "people.csv")
    (tmp_path / "run.toml").write_text(CONFIG.format(data=data, folder=tmp_path))
    return tmp_path / "run.toml"


def test_a_file_does_what_its_flags_do(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.parent
    assert main(["fit", "--config", str(config)]) == 0
    flags = [str(folder / "people.csv"), *FLAGS.split(), "-o", str(folder / "flags.safetensors")]
    assert main(["fit", *flags]) == 0
    assert capsys.readouterr() == ("", "")
    files = [(folder / name).read_bytes() for name in ("m.safetensors", "flags.safetensors")]
    assert files[0] == files[1]
    assert bp.History.read(folder / "log.csv") == bp.History.read(folder / "m.history.json")
    assert len(list((folder / "events").iterdir())) == 1


def test_flags_win_over_the_file(config: Path) -> None:
    arguments = ["fit", "other.csv", f"--config={config}", "--lr", "0.5", "--drop", "age"]
    options = parser(arguments).parse_args(arguments)
    assert (options.data, options.lr, options.epochs) == ("other.csv", 0.5, 2)
    assert options.drop == ["kind", "delay", "age"]  # a list grows
    config.write_text('data = "d.csv"\ntarget = "late"\nvalid = "v.csv"\n')
    arguments = ["fit", "--config", str(config), "--valid-fraction", "0.2"]
    options = parser(arguments).parse_args(arguments)
    assert (options.valid, options.valid_fraction) == (None, 0.2)


def test_every_option_may_stand_in_a_file(config: Path) -> None:
    """As a string, which any flag is; `quiet` as what it is."""
    arguments = ["fit", "--config", str(config)]
    config.write_text('data = "d"\ntarget = "t"\n')
    plain = vars(parser(arguments).parse_args(arguments))
    lines = [
        f'{name.replace("_", "-")} = "{"none" if name == "hidden" else value}"'
        for name, value in plain.items()
        if name not in ("config", "run", "quiet", "resume", "drop", "metrics") and value is not None
    ]
    config.write_text("\n".join([*lines, "quiet = false"]))
    assert {**vars(parser(arguments).parse_args(arguments)), "hidden": [128, 64]} == plain


WRONG = {
    "epoch = 3": "line 2: epoch: expected an option of `backprop fit`; try epochs",
    "batch_size = 3": "line 2: batch_size: expected an option of `backprop fit`; try batch-size",
    "[training]\nlr = 1": "line 2: training: expected an option of `backprop fit`; try ",
    "lr = 'fast'": "line 2: lr: expected a number, got 'fast'",
    "epochs = 2.5": "line 2: epochs: expected an integer, got 2.5",
    "epochs = true": "line 2: epochs: expected a value, got True",
    "quiet = 1": "line 2: quiet: expected true or false, got 1",
    "hidden = ['a']": "line 2: hidden: expected widths such as 256,128, or none; got 'a'",
    "lr = [1]": "line 2: lr: expected a number or text, got [1]",
    "\n\nnorm = 'group'": "line 4: norm: expected batch, layer, rms, got 'group'",
    "config = 'x'": "line 2: config: expected an option",
    "help = true": "line 2: help: expected an option",
    "lr = ": "expected TOML, got Invalid value (at line 2",
    "lr = 1\nlr = 2": "expected TOML, got Cannot overwrite a value (at line 3",
    "valid = 'v'\nvalid-fraction = 0.2": "line 3: valid-fraction: expected not both this and valid",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_lines_are_named(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'target = "late"\n{text}\n')
    assert main(["fit", "data.csv", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"backprop: {path}: {WRONG[text]}") and error.count("\n") == 1


def test_a_missing_file_and_what_only_flags_refuse(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "absent.toml"]) == 2
    assert "No such file or directory: 'absent.toml'" in capsys.readouterr().err
    config.write_text('data = "d.csv"')
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config)])
    assert "the following arguments are required: --target" in capsys.readouterr().err


def test_help_fits_a_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100
    groups = [
        "columns and rows:", "network:", "training:", "stopping and going on:", "files to write:",
    ]  # fmt: skip
    assert [line for line in lines if line in groups] == groups


def test_other_logs_are_refused_before_anything_is_read(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", "absent.csv", "--target", "t", "--log", "log.txt"]) == 2
    assert "--log: expected a name ending in .csv or .jsonl, got .txt" in capsys.readouterr().err
