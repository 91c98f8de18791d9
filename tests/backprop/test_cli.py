"""The command line: what it prints, writes and refuses, against the library called directly."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backprop_kernels import errors

import backprop as bp
from backprop import cli
from backprop.cli import doctor, exit_status, main, tables
from backprop.metrics import accuracy, auc, log_loss, mae, r2, rmse
from backprop.table import read_table

ROWS = 300
SMALL = ("--hidden", "8", "--epochs", "3", "--device", "reference", "--lr", "0.01")


def write_rows(path: Path, extra: str = "") -> Path:
    """People: two numbers and a text, and three targets that follow from them."""
    rng = np.random.default_rng(3)
    lines = ["age,income,city,late,kind,delay"]
    for row in range(ROWS):
        age, income = rng.normal(40, 10), rng.normal(0, 1)
        city = ("Lima", "Oslo", "Rome")[rng.integers(3)]
        score = 0.1 * (age - 40) + income + 1.5 * (city == "Rome")
        kind = "low" if score < -0.5 else "high" if score > 1 else "mid"
        shown_income = "" if row % 40 == 0 else f"{income:.3f}"
        late, delay = int(score > 0.3), 100 + 20 * score
        lines.append(f"{age:.2f},{shown_income},{city},{late},{kind},{delay:.3f}")
    path.write_text("\n".join(lines) + "\n" + extra, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "people.csv")


DROP = {"late": "kind,delay", "kind": "late,delay", "delay": "late,kind"}


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each task, by target."""
    folder = tmp_path_factory.mktemp("models")
    files = {target: folder / f"{target}.safetensors" for target in DROP}
    for target, file in files.items():
        options = ["--target", target, "--drop", DROP[target], "-o", str(file), *SMALL, "-q"]
        assert main(["fit", str(data), *options]) == 0
    return files


def predictions(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_fit_tells_what_it_inferred_and_how_well_it_did(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "late.safetensors"
    options = ["--target", "late", "--drop", "kind", "--drop", "delay", "-o", str(output)]
    assert main(["fit", str(data), *options, *SMALL]) == 0
    printed = capsys.readouterr()
    model = bp.load(output, device="reference")
    order = np.random.default_rng(0).permutation(ROWS)
    table = read_table(data)
    train, valid = table.take(np.sort(order[30:])), table.take(np.sort(order[:30]))
    late = train.columns["late"].mean()
    p = model.predict_proba(valid)[:, 0]
    y = valid.columns["late"]
    assert printed.out.splitlines() == [
        f"{data}: 270 rows to train on, target late: binary, "
        f"2 classes: 0 {1 - late:.1%}, 1 {late:.1%}",
        "3 columns (2 numbers, standardised; 1 texts, one-hot) make 5 features",
        "network 5-8-1, relu: 57 parameters; bce_with_logits, Adam lr 0.01, batches of 16",
        f"validation, 30 rows: AUC {auc(y, p):.4f}, log loss {log_loss(y, p):.4f}, "
        f"accuracy {accuracy(y, p >= 0.5):.4f}",
        f"wrote {output}, {tmp_path}/new/late.history.json, {tmp_path}/new/late.png",
    ]
    assert model.encoder.columns[0].mean == train.columns["age"].mean()  # of training rows alone
    history = json.loads((tmp_path / "new" / "late.history.json").read_text())
    assert len(history["val_loss"]) == 3 and history["lr"] == [0.01] * 3
    assert history["val_loss"][-1] == pytest.approx(log_loss(y, p), rel=1e-5)
    assert (tmp_path / "new" / "late.png").read_bytes()[:4] == b"\x89PNG"
    assert printed.err.count("epoch ") == 3


def test_fit_trains_as_the_library_does(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    options = ["--target", "delay", "--drop", "late,kind", "-o", str(output), "--valid-fraction"]
    network = ["--hidden", "6,4", "--activation", "tanh", "--dropout", "0.2", "--norm", "layer"]
    training = ["--optimizer", "adamw", "--lr", "0.02", "--weight-decay", "0.5", "--loss", "huber"]
    rest = ["--epochs", "2", "--batch-size", "50", "--seed", "7", "--dtype", "float64", "-q"]
    rest += ["--device", "reference"]
    assert main(["fit", str(data), *options, "0", *network, *training, *rest]) == 0
    table = read_table(data)
    model = bp.MLP([5, 6, 4, 1], "tanh", 0.2, "layer", dtype="float64", seed=7, device="reference")
    encoder = bp.load(output, device="reference").encoder
    bp.fit(
        model, encoder.transform(table), encoder.encode_target(table), "huber",
        bp.AdamW(lr=0.02, weight_decay=0.5), 2, 50, seed=7, progress=False,
    )  # fmt: skip
    saved = bp.load(output, device="reference").state_dict()
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


def test_the_same_seed_writes_the_same_bytes(data: Path, models: dict[str, Path]) -> None:
    again = models["late"].with_name("again.safetensors")
    options = ["--target", "late", "--drop", DROP["late"], "-o", str(again), *SMALL, "-q"]
    assert main(["fit", str(data), *options]) == 0
    assert again.read_bytes() == models["late"].read_bytes()
    assert main(["fit", str(data), *options, "--seed", "1"]) == 0
    assert again.read_bytes() != models["late"].read_bytes()


def test_quiet_prints_nothing(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--target", "late", "-q", "-o", str(tmp_path / "m"), *SMALL]
    assert main(["fit", str(data), *options]) == 0
    assert capfd.readouterr() == ("", "")


def test_binary_predictions_are_the_library_s(
    data: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(models["late"]), str(data), "--device", "reference"]) == 0
    rows = predictions(capsys.readouterr().out)
    p = bp.load(models["late"], device="reference").predict_proba(read_table(data))[:, 0]
    assert [int(row["line"]) for row in rows] == list(range(2, ROWS + 2))
    np.testing.assert_allclose([float(row["probability_1"]) for row in rows], p, rtol=1e-6)
    assert [row["late"] for row in rows] == ["1" if value >= 0.5 else "0" for value in p]
    assert list(rows[0]) == ["line", "late", "probability_1"]


def test_multiclass_predictions_name_their_classes(
    data: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    command = ["predict", str(models["kind"]), str(data), "--device", "reference", "-o", str(out)]
    assert main(command) == 0
    rows = predictions(out.read_text())
    assert list(rows[0]) == [
        "line", "kind", "probability_high", "probability_low", "probability_mid",
    ]  # fmt: skip
    P = np.array([[float(row[f"probability_{c}"]) for c in ("high", "low", "mid")] for row in rows])
    expected = bp.load(models["kind"], device="reference").predict_proba(read_table(data))
    np.testing.assert_allclose(P, expected, rtol=1e-6)
    assert [row["kind"] for row in rows] == [("high", "low", "mid")[i] for i in P.argmax(axis=1)]
    kinds = read_table(data).columns["kind"]
    assert np.mean([row["kind"] == kind for row, kind in zip(rows, kinds, strict=True)]) > 0.7


def test_regression_predicts_in_the_units_of_the_target(
    data: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(models["delay"]), str(data), "--device", "reference"]) == 0
    rows = predictions(capsys.readouterr().out)
    predicted = np.array([float(row["delay"]) for row in rows])
    true = read_table(data).columns["delay"]
    assert abs(predicted.mean() - true.mean()) < 5 and r2(true, predicted) > 0.8
    assert main(["evaluate", str(models["delay"]), str(data), "--device", "reference"]) == 0
    assert capsys.readouterr().out == (
        f"{data}, 300 rows: MAE {mae(true, predicted):.4f}, RMSE {rmse(true, predicted):.4f}, "
        f"R² {r2(true, predicted):.4f}\n"
    )


@pytest.mark.parametrize("target", DROP)
def test_evaluate_agrees_with_fit_on_a_validation_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    other = tmp_path / "renamed.csv"
    text = data.read_text()
    other.write_text(text.replace(target, "truth", 1))
    model = str(tmp_path / "m.safetensors")
    options = ["--target", target, "--drop", DROP[target], "-o", model, *SMALL]
    assert main(["fit", str(data), "--valid", str(data), *options]) == 0
    fitted = next(line for line in capsys.readouterr().out.splitlines() if "validation" in line)
    command = ["evaluate", model, str(other), "--target", "truth", "--device", "reference"]
    assert main(command) == 0
    assert capsys.readouterr().out == fitted.replace("validation", str(other)) + "\n"


def test_refused_rows_are_reported_and_keep_the_line_numbers_right(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dirty = tmp_path / "dirty.csv"
    lines = write_rows(tmp_path / "clean.csv").read_text().splitlines()
    lines[3:3] = ["old,1,Rome,1,low,2", "1,2,3"]
    dirty.write_text("\n".join(lines) + "\n")
    model = ["--device", "reference", str(models["late"])]
    assert main(["predict", *model, str(tmp_path / "clean.csv")]) == 0
    clean = predictions(capsys.readouterr().out)
    assert main(["predict", *model, str(dirty)]) == 0
    out, err = capsys.readouterr()
    rows = predictions(out)
    assert [row["line"] for row in rows[:4]] == ["2", "3", "6", "7"]
    assert [row["probability_1"] for row in rows] == [row["probability_1"] for row in clean]
    assert err.splitlines()[0] == f"{dirty}: 2 of 302 rows refused:"
    assert set(err.splitlines()[1:]) == {
        "  line 4: column age: expected a number, found 'old'",
        "  line 5: expected 6 fields, found 3",
    }
    assert main(["predict", *model, str(dirty), "--max-refused", "0.001"]) == 2
    assert "got 2 of 302 refused" in capsys.readouterr().err
    options = ["--target", "late", "-o", str(tmp_path / "m"), *SMALL, "-q"]
    assert main(["fit", str(dirty), *options]) == 0
    assert capsys.readouterr().err.startswith(f"{dirty}: 2 of 302 rows refused:\n")


def test_a_dropped_column_refuses_no_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.csv", extra="30,0,Rome,1,low,soon\n")
    options = ["--target", "late", "-o", str(tmp_path / "m"), *SMALL, "-q"]
    assert main(["fit", str(path), "--drop", "kind,delay", *options]) == 0
    assert capsys.readouterr().err == ""
    assert main(["fit", str(path), "--drop", "kind", *options]) == 0
    assert "line 302: column delay: expected a number" in capsys.readouterr().err


def test_every_format_predicts_the_same(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = read_table(data)
    numbers = {name: table.columns[name] for name in ("age", "income", "delay")}
    X = np.stack(list(numbers.values()), axis=1)
    np.savez(tmp_path / "d.npz", **numbers)
    np.savez(tmp_path / "matrix.npz", X=X, columns=np.array(list(numbers)))
    parquet.write_table(arrow.table(numbers), tmp_path / "d.parquet")
    np.save(tmp_path / "d.npy", X)
    header = ",".join(numbers)
    np.savetxt(tmp_path / "d.csv", X, delimiter=",", header=header, comments="", fmt="%.17g")
    model = str(tmp_path / "m.safetensors")
    options = ["--target", "delay", "-o", model, *SMALL, "-q"]
    assert main(["fit", str(tmp_path / "d.parquet"), *options]) == 0
    columns = []
    for name in ("d.csv", "d.npz", "matrix.npz", "d.parquet"):
        assert main(["predict", model, str(tmp_path / name), "--device", "reference"]) == 0
        columns.append([row["delay"] for row in predictions(capsys.readouterr().out)])
    assert columns[0] == columns[1] == columns[2] == columns[3]
    assert main(["fit", str(tmp_path / "d.npy"), *options[2:], "--target", "x2"]) == 0
    assert main(["evaluate", model, str(tmp_path / "d.npy"), "--device", "reference"]) == 0
    assert ", 300 rows: MAE " in capsys.readouterr().out


def test_one_class_in_the_validation_rows_has_no_auc(
    data: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = data.read_text().splitlines()
    late = [line for line in lines[1:] if line.split(",")[3] == "1"]
    (tmp_path / "late.csv").write_text("\n".join([lines[0], *late]) + "\n")
    command = ["evaluate", str(models["late"]), str(tmp_path / "late.csv")]
    assert main([*command, "--device", "reference"]) == 0
    assert f", {len(late)} rows: log loss " in capsys.readouterr().out


REFUSED: list[tuple[list[str], str]] = [
    (["--target", "late", "--loss", "mse"],
     "fit: --loss: expected bce_with_logits or focal for binary, got mse; --task says how to take "
     "the target"),
    (["--target", "late", "--valid-fraction", "1"],
     "fit: --valid-fraction: expected 0 or more, below 1, got 1.0"),
    (["--target", "lat"],
     "{data}: expected a column 'lat', got columns age, income, city, late, kind, delay"),
    (["--target", "late", "--optimizer", "adm"], "optimizer: rule: expected"),
    (["--target", "late", "--lr", "-1"], "Adam: lr: expected a number in [0, inf), got -1.0"),
    (["--target", "late", "--hidden", "8,0"],
     "Linear: out_features: expected an integer ≥ 1, got 0"),
    (["--target", "late", "-o", "{folder}"],
     "fit: {folder}: expected a file to write, got a folder"),
    (["--target", "late", "--device", "gpu"], "device: expected"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_fit_refuses(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    places = {"data": data, "folder": tmp_path}
    options = [option.format(**places) for option in options]
    output = ["-o", str(tmp_path / "m")]
    assert main(["fit", str(data), "--device", "reference", *output, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"backprop: {message.format(**places)}")
    assert error.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_files_that_cannot_be_used(
    data: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.csv"
    assert main(["predict", str(models["late"]), str(missing)]) == 2
    assert capsys.readouterr().err == (
        f"backprop: [Errno 2] No such file or directory: '{missing}'\n"
    )
    plain = tmp_path / "plain.safetensors"
    bp.MLP([3, 1], device="reference").save(plain)
    assert main(["evaluate", str(plain), str(data)]) == 2
    assert capsys.readouterr().err == (
        f"backprop: {plain}: expected a model of `backprop fit`, which holds the encoding of raw "
        "rows, got one without; use it from Python: backprop.load(path).predict(X)\n"
    )
    (tmp_path / "narrow.csv").write_text("age,city\n1,Rome\n")
    assert main(["predict", str(models["late"]), str(tmp_path / "narrow.csv")]) == 2
    assert "income" in capsys.readouterr().err


def test_an_encoder_that_does_not_fit_its_network_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    wrong = bp.MLP([4, 1], device="reference")
    wrong.encoder = bp.load(models["late"], device="reference").encoder
    wrong.save(tmp_path / "wrong.safetensors")
    with pytest.raises(bp.CheckpointFormatError, match="the encoder wants 5 inputs and 1 outputs"):
        bp.load(tmp_path / "wrong.safetensors")


def test_without_matplotlib_there_is_no_picture(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    options = ["fit", str(data), "--target", "late", "-o", str(tmp_path / "m"), *SMALL, "-q"]
    assert main(options) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"m", "m.history.json"}
    assert main([*options, "--plot", "x.png"]) == 2
    assert capsys.readouterr().err == (
        'backprop: fit: --plot: expected matplotlib, got none; pip install "fused-backprop[plot]"\n'
    )


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "gaussian_nll", "hinge", "poisson"])
def test_gradcheck_of_a_random_network(capsys: pytest.CaptureFixture[str], loss: str) -> None:
    options = ["--loss", loss, "--activation", "gelu", "--norm", "batch", "--dtype", "float64"]
    assert main(["gradcheck", *options, "--device", "reference", "--hidden", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    outputs = 3 if loss == "cross_entropy" else 2
    assert lines[0].startswith("MLP([Linear(in_features=5, out_features=4")
    assert [line.split()[0] for line in lines[2:-1]] == [
        "layers.0.weight", "norms.0.weight", "norms.0.bias", "layers.1.weight", "layers.1.bias",
    ]  # fmt: skip
    assert lines[-1] == f"{20 + 8 + 5 * outputs} derivatives checked, bound 1e-10"


def test_gradcheck_of_a_model_finds_a_wrong_gradient(
    data: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["gradcheck", str(models["kind"]), str(data), "--device", "reference"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "75 derivatives checked, bound 0.0001"
    from backprop_kernels import reference

    right = reference.linear_wgrad

    def wrong(dZ: Any, X: Any, **options: Any) -> Any:
        dW = right(dZ, X, **options)
        dW *= 1.01
        return dW

    monkeypatch.setattr(reference, "linear_wgrad", wrong)
    assert main(command) == 2
    assert "layers.0.weight  1.0e-02  WRONG" in capsys.readouterr().err
    assert main(["gradcheck", str(models["kind"])]) == 2
    assert "expected rows to check MODEL on" in capsys.readouterr().err


def test_doctor_says_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = {line[:13].strip(): line[14:] for line in lines}
    assert report["versions"].startswith(f"fused-backprop {bp.__version__}, Python 3.")
    assert report["kernels"].startswith("work, compiled for ")
    assert int(report["threads"]) >= 1
    assert report["cuda"]


def test_doctor_says_what_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise OSError("no LLVM")

    monkeypatch.setattr(doctor, "_train_a_little", broken)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert (
        "kernels       do not work; plain NumPy serves, slower: OSError('no LLVM'); "
        "pip install --force-reinstall numba llvmlite\n"
    ) in out
    assert (
        "pyarrow       not installed; Parquet files need it: "
        'pip install "fused-backprop[parquet]"\n'
    ) in out


def test_interrupt_and_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert exit_status(interrupted) == 130
    assert capsys.readouterr().err == "backprop: interrupted\n"
    for arguments in ([], ["fit"], ["fit", "x.csv", "--target", "y", "--hidden", "two"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "expected widths such as 256,128, or none; got 'two'" in capsys.readouterr().err


def test_help_fits_one_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli.parser().format_help().splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80


def test_hidden_none_is_a_linear_model(data: Path, tmp_path: Path) -> None:
    options = ["--target", "late", "-o", str(tmp_path / "m"), *SMALL, "-q", "--hidden", "none"]
    assert main(["fit", str(data), *options]) == 0
    linear = bp.load(tmp_path / "m", device="reference").layers
    assert linear == [bp.Linear(9, 1)]


def test_as_a_program_whose_reader_stops_early(
    data: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    header, *lines = data.read_text().splitlines()
    many = tmp_path / "many.csv"  # more output than a pipe holds
    many.write_text("\n".join([header, *lines * 20]) + "\n")
    command = f"{sys.executable} -m backprop predict {models['late']} {many} --device reference"
    done = subprocess.run(
        f"set -o pipefail; {command} | head -n 1", shell=True, executable="/bin/bash",
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "line,late,probability_1\n", "")


def test_version_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "backprop", "--version"],
        capture_output=True, text=True, env=environment(), check=True,
    )  # fmt: skip
    assert done.stdout == f"fused-backprop {bp.__version__}\n"


def environment() -> dict[str, str]:
    """This process's, with both packages importable where nothing is installed."""
    roots = [str(Path(file).parents[1]) for file in (bp.__file__, errors.__file__)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
