"""`backprop fit --config`: the same as the flags, and errors that name the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import backprop as bp
from backprop.cli import main, parser, tables
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


TABLES = """\
[optimizer]
name = "AdamW"
lr = 5.0
l1 = 1e-4
clip_value = 0.5
max_norm = 2.0
groups."*.bias".lr_scale = 0.5

[schedule]
name = "cosine"
warmup = 0.5

[ema]
decay = 0.9

[early_stopping]
monitor = "test_auc"
patience = 2

[checkpoint]
folder = "{folder}/run"
steps = 5

[class_weight]
0 = 2
1 = 1.5

[eval_set]
test = "{folder}/people.csv"
"""


def test_tables_build_what_python_takes(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = config.parent, {}

    def spy(*given: Any, **options: Any) -> bp.History:
        seen.update(options, loss=given[3], optimizer=given[4])
        return bp.fit(*given, **options)

    monkeypatch.setattr(tables, "train_model", spy)
    plain = config.read_text().replace("lr = 1e-2\n", 'metrics = "auc"\ninput_dropout = 0.1\n')
    config.write_text(plain.replace("quiet = true\n", "") + TABLES.format(folder=folder))
    assert main(["fit", "--config", str(config), "--lr", "0.01"]) == 0
    assert repr(seen["optimizer"]) == repr(
        bp.AdamW(
            lr=0.01, l1=1e-4, clip_value=0.5, max_norm=2.0, groups={"*.bias": {"lr_scale": 0.5}}
        )
    )  # fmt: skip
    assert (seen["schedule"].warmup, seen["ema"].decay) == (0.5, 0.9)
    assert (seen["early_stopping"].patience, seen["early_stopping"].monitor.key) == (2, "test_auc")
    assert (seen["checkpoint"].steps, seen["checkpoint"].epochs) == (5, None)
    assert seen["class_weight"] == {0: 2, 1: 1.5}
    history = bp.History.read(folder / "m.history.json")
    assert {"val_loss", "val_auc", "test_loss", "test_auc"} <= set(history)
    model = bp.load(folder / "m.safetensors", "reference")
    assert isinstance(model.layers[0], bp.Dropout) and model.layers[0].rate == 0.1
    printed = capsys.readouterr().out
    assert "AdamW lr 0.01" in printed and "test, 300 rows: AUC" in printed
    assert len(list((folder / "run").iterdir())) == 2

    config.write_text(plain + "[class-weight]\nmaybe = 3\n")
    assert main(["fit", "--config", str(config)]) == 2
    assert "expected classes of late (0, 1), got maybe" in capsys.readouterr().err
    config.write_text(plain + "[schedule]\nname = 'step'\n")
    assert main(["fit", "--config", str(config), "--warmup", "1"]) == 2
    assert "--warmup: expected it in the table of schedule" in capsys.readouterr().err


def test_muon_from_a_flag_and_from_a_table(config: Path) -> None:
    config.write_text(config.read_text().replace("lr = 1e-2\n", ""))
    assert main(["fit", "--config", str(config), "--optimizer", "Muon", "--lr", "0.02"]) == 0
    flag = (config.parent / "m.safetensors").read_bytes()
    text = '[optimizer]\nname = "Muon"\nothers = { name = "AdamW", lr = 3e-4 }\n'
    config.write_text(config.read_text() + text)
    assert main(["fit", "--config", str(config)]) == 0
    assert (config.parent / "m.safetensors").read_bytes() == flag


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
    """As a string, which any option is; the flags as what they are."""
    arguments = ["fit", "--config", str(config)]
    config.write_text('data = "d"\ntarget = "t"\n')
    plain = vars(parser(arguments).parse_args(arguments))
    lines = [
        f'{name.replace("_", "-")} = "{"none" if name == "hidden" else value}"'
        for name, value in plain.items()
        if name
        not in ("config", "run", "quiet", "autotune", "resume", "drop", "metrics", "eval_set")
        and value is not None
    ]
    config.write_text("\n".join([*lines, "quiet = false", "autotune = false"]))
    assert {**vars(parser(arguments).parse_args(arguments)), "hidden": [128, 64]} == plain


WRONG = {
    "epoch = 3": "line 2: epoch: expected an option of `backprop fit`; try epochs",
    "batch_size = 3\nbatch-size = 3": "line 3: batch-size: expected each option once, got",
    "[optimizer]\nlr = 1": "line 2: optimizer: expected name = …, got lr",
    "[optimizer]\nname = 'adamw'\n# lr = 'x'\nlr = 'x'": "line 5: optimizer.lr: AdamW: lr:",
    "[optimizer]\nlrr = 1\nname = 'SGD'": "line 3: optimizer.lrr: SGD: expected options lr, mom",
    "[optimizer]\nname = 'Best'": "line 3: optimizer.name: optimizer: rule: expected",
    "optimizer = {name = 'SGD', l1 = -1}": "line 2: optimizer.l1: SGD: l1: expected a number ≥ 0",
    "[optimizer]\nname = 'SGD'\n[optimizer.groups.'*.bias']\nlr = 2": (
        "line 4: optimizer.groups: SGD: groups['*.bias']: expected options lr_scale"
    ),
    "[optimizer]\nname = 'muon'\nbeta = 1": "line 4: optimizer.beta: Muon.__init__() got an unexp",
    "[optimizer]\nname = 3": "line 3: optimizer.name: ",
    "[checkpoint]\nseconds = 6": "line 2: checkpoint: expected folder = …, got seconds",
    "checkpoint.folder = 'r'\ncheckpoint.step = 6": "line 3: checkpoint.step: expected one of",
    "[checkpoint]\nfolder = 'r'\nkeep = 1": "line 4: checkpoint.keep: Checkpoint: keep: expected",
    "[early_stopping]\npatience = 0": "line 3: early_stopping.patience: EarlyStopping: patience",
    "[schedule]\nname = 'step'\nend = 1": "line 4: schedule.end: Schedule: expected options warmup",
    "[schedule]\nname = 'plateau'\nfactor = 2": "line 4: schedule.factor: Plateau: factor",
    "[ema]\ndecay = 2": "line 3: ema.decay: EMA: decay: expected a number in [0, 1), got 2",
    "[loss]\nname = 'focal'\nalpha = 'x'": "line 4: loss.alpha: Loss focal: alpha: expected",
    "[eval-set]\nval = 'v.csv'": "line 3: eval-set.val: expected a name other than",
    "[class-weight]\nyes = -1": "line 3: class-weight.yes: expected a number ≥ 0, got -1",
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
