"""The docs: code runs, links resolve, tables and formulas are those of the code.

A ```python block runs, in order, one namespace a page, unless its fence says "fragment". A ```text
block right after it is its output; "```text output of examples/x.py" is that program's.
"""

from __future__ import annotations

import io
import math
import os
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backprop_kernels import errors
from backprop_kernels.activations import ACTIVATIONS
from backprop_kernels.cpu import vector_math
from backprop_kernels.losses import LOSSES, TARGETS
from backprop_kernels.operators import OPERATORS
from backprop_kernels.optimizers import OPTIMIZERS
from backprop_kernels.reference import array_math
from scipy import special

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.glob("*.md")),
    *sorted(ROOT.glob("*.md")),
    ROOT / "kernels" / "README.md",
]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.M)
SHOWN = ("", "text", "sh", "bash", "console", "python fragment")  # and not run
pages = pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])


@pytest.fixture(autouse=True)
def tables_as_they_were() -> Iterator[None]:
    """adding.md puts entries into the tables."""
    tables: list[dict[str, Any]] = [ACTIVATIONS, LOSSES, OPTIMIZERS]
    before = [dict(entries) for entries in tables]
    yield
    for entries, original in zip(tables, before, strict=True):
        entries.clear()
        entries.update(original)


@pages
def test_code_runs_and_prints_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    output: str | None = None  # of the block just above
    end = 0
    for fence in FENCE.finditer(text):
        info, body = fence.groups()
        directly_below = not text[end : fence.start()].strip()
        with redirect_stdout(io.StringIO()) as printed:
            if info == "python":
                line = text[: fence.start()].count("\n") + 1
                exec(compile("\n" * line + body, str(page), "exec"), namespace)
            elif info.startswith("text output of "):
                program = str(page.parent / info.removeprefix("text output of "))
                monkeypatch.setattr(sys, "argv", [program])
                runpy.run_path(program, run_name="__main__")
                assert printed.getvalue() == body
            elif info == "text" and output is not None and directly_below:
                assert output == body
            else:
                assert info in SHOWN, f"unknown kind of block: {info!r}"
        output = printed.getvalue() if info == "python" else None
        end = fence.end()


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_link(page: Path, link: str) -> None:
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    assert target.exists(), f"{page.relative_to(ROOT)}: {link}: no such file"
    if anchor:
        assert anchor in anchors(target), f"{page.relative_to(ROOT)}: {link}: no such heading"


@pages
def test_links_and_named_files_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|mailto:", link):
            check_link(page, link)
    for name in re.findall(r"`((?:backprop|kernels|tests|docs|benchmarks)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), f"{page.relative_to(ROOT)}: `{name}`: no such file"


@pages
def test_a_page_opens_with_the_question_it_answers(page: Path) -> None:
    if page.parent == DOCS:
        title, blank, question = page.read_text(encoding="utf-8").split("\n")[:3]
        assert title.startswith("# ") and not blank and re.fullmatch(r"\*[A-Z].+\?\*", question)


def test_sources_cite_headings_that_exist() -> None:
    cited = 0
    for source in (
        *ROOT.glob("kernels/**/*.py"),
        *ROOT.glob("backprop/**/*.py"),
        *DOCS.rglob("*.py"),
    ):
        for link in re.findall(r"docs/\w+\.md(?:#[\w-]+)?", source.read_text(encoding="utf-8")):
            check_link(ROOT / "README.md", link)
            cited += 1
    assert cited >= len(OPERATORS)


def test_architecture_names_every_module() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    for folder in (ROOT / "backprop", ROOT / "kernels" / "backprop_kernels"):
        for entry in folder.iterdir():
            if entry.name == "__init__.py" or entry.name == "__pycache__":
                continue
            if entry.suffix == ".py" or (entry / "__init__.py").exists():
                name = f"{entry.relative_to(ROOT)}{'/' if entry.is_dir() else ''}"
                assert f"| `{name}` |" in text, f"docs/architecture.md: no row for `{name}`"


def test_every_page_is_in_the_index() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    for page in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")):
        assert page.name == "index.md" or f"]({page.name})" in text, page.name


DERIVATIONS = (DOCS / "derivations.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """The text below a heading, up to the next of its level or above."""
    level = heading.index(" ")
    start = re.search(rf"^{re.escape(heading)}$", DERIVATIONS, re.M)
    assert start, f"docs/derivations.md: no heading {heading!r}"
    end = re.search(rf"^#{{2,{level}}} ", DERIVATIONS[start.end() :], re.M)
    return DERIVATIONS[start.end() :][: end.start() if end else None]


def table(heading: str) -> list[list[str]]:
    """The cells of the first table of a section, code marks and escapes taken off."""
    rows = re.findall(r"^\| (.+?) ?\|$", section(heading).replace(r"\|", "¦"), re.M)[1:]
    return [[cell.strip().replace("¦", "|") for cell in re.split(r" ?\|", row)] for row in rows]


def code(cell: str) -> str:
    assert re.fullmatch(r"`[^`]+`", cell), cell
    return cell[1:-1]


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_operators_are_those_of_the_table() -> None:
    headings = re.findall(r"^## (.+)$", DERIVATIONS, re.M)
    assert headings == [row.name for row in OPERATORS]
    for row in OPERATORS:
        text = one_line(section(f"## {row.name}"))
        assert f"`{one_line(row.formula)}`" in text, row.name
        assert f"`{row.shapes}`" in text, row.name


def test_activations_are_those_of_the_table() -> None:
    rows = {code(name): cells for name, *cells in table("### Activations")}
    assert list(rows) == list(ACTIVATIONS)
    for name, act in ACTIVATIONS.items():
        formula, _, saves, init = rows[name]
        assert (code(formula), saves, init) == (act.formula, act.saves, act.init), name


def test_losses_are_those_of_the_table() -> None:
    headings = re.findall(r"^### (.+)$", section("## loss"), re.M)
    assert sorted(headings) == sorted(["Elementwise losses", *LOSSES])
    rows = {code(name): cells for name, *cells in table("### Elementwise losses")}
    for name, loss in LOSSES.items():
        if loss.value is not None:
            assert code(rows[name][0]) == loss.formula
            assert rows[name][2] == TARGETS[loss.targets]
        else:
            text = one_line(section(f"### {name}"))
            assert f"`{loss.formula}`" in text, name
            assert f"Target: {TARGETS[loss.targets]}." in text, name
        for option in loss.options:
            assert f"`{option}`" in section("## loss"), f"{name}: {option}"
    assert set(rows) == {name for name, loss in LOSSES.items() if loss.value is not None}


def test_update_rules_are_those_of_the_table() -> None:
    rows = {code(name): cells for name, *cells in table("## optimizer_step")}
    assert list(rows) == list(OPTIMIZERS)
    assert re.findall(r"^### (.+)$", section("## optimizer_step"), re.M) == list(OPTIMIZERS)
    for name, rule in OPTIMIZERS.items():
        assert code(rows[name][0]) == rule.formula
        assert re.findall(r"`(\w+)`", rows[name][1]) == list(rule.state)


def test_errors_are_those_of_the_code() -> None:
    text = (DOCS / "conventions.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+Error)` \| `(\w+)` \|", text, re.M))
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.BackpropError)
    }
    del classes["BackpropError"]
    assert set(rows) == set(classes)
    for name, kind in classes.items():
        assert rows[name] in {base.__name__ for base in kind.__mro__[1:]}, name


def test_adding_lists_the_functions_of_the_math_namespaces() -> None:
    text = one_line((DOCS / "adding.md").read_text(encoding="utf-8"))
    listed = re.search(r"these functions of `m`: ([^.]+)\.", text)
    assert listed
    names = re.findall(r"`(\w+)`", listed[1])
    for module in (array_math, vector_math):
        assert [name for name in names if not callable(getattr(module, name, None))] == []


def evaluate(formula: str, **values: float) -> float:
    """A formula as the pages write it, evaluated: `z Φ(z)`, `|y − t|²/2 where …, else …`."""
    text = re.sub(r"; p = sigmoid\(z\)$", "", formula)
    text = re.sub(r"^(.*) for t = 1, (.*) for t = 0$", r"(\1) if t > 0 else (\2)", text)
    text = re.sub(r"^(.*) where (.*), else (.*)$", r"(\1) if (\2) else (\3)", text)
    for written, meant in {"−": "-", "·": "*", "≤": "<=", "≥": ">=", "^": "**", "²": "**2",
                           "³": "**3"}.items():  # fmt: skip
        text = text.replace(written, meant)
    text = re.sub(r"√(\d+)", r"sqrt(\1)", text).replace("√", "sqrt")
    text = re.sub(r"\|([^|]+)\|", r"abs(\1)", text)
    text = re.sub(r"log (\w+)(\([^()]*\))", r"log(\1\2)", text)
    text = re.sub(r"log (\w+)", r"log(\1)", text)
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", text)
    text = re.sub(r"\*?\b(if|else)\b\*?", r" \1 ", text)
    functions: dict[str, Any] = {
        **{name: getattr(math, name) for name in ("exp", "log", "sqrt", "tanh", "cosh", "erf")},
        **{name: getattr(math, name) for name in ("sin", "cos")},
        "sigmoid": special.expit, "softplus": lambda z: np.logaddexp(0, z), "sign": np.sign,
        "hardsigmoid": lambda z: min(max(z / 6 + 0.5, 0), 1),
        "Φ": special.ndtr, "φ": lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi),
        "π": math.pi,
    }  # fmt: skip
    return float(eval(text, {**functions, **values}))


POINTS = (-4.0, -3.0, -1.7, -1.0, -0.4, 0.0, 0.3, 1.0, 2.2, 3.0, 6.0, 7.5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_formulas_are_what_the_code_computes(name: str) -> None:
    act = ACTIVATIONS[name]
    derivative = code({code(row[0]): row for row in table("### Activations")}[name][2])
    relative = 5e-5 if name == "selu" else 1e-12  # selu's constants are written with 5 digits
    for z in POINTS:
        Z = np.array([z])
        Y = act.forward(array_math, Z)
        values = {"z": z, "y": float(Y[0]), "s": float(special.expit(z)),
                  "u": math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)}  # fmt: skip
        for formula in act.formula.split(" = "):
            assert Y[0] == pytest.approx(evaluate(formula, z=z), rel=relative, abs=1e-14), z
        if act.saves == "Y":
            del values["z"]  # must do without
        slope = act.derivative(array_math, {"Y": Y, "Z": Z, "": None}[act.saves])
        assert slope == pytest.approx(evaluate(derivative, **values), rel=relative, abs=1e-14), z


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.value is not None])
def test_loss_formulas_are_what_the_code_computes(name: str) -> None:
    loss = LOSSES[name]
    derivative = code({code(row[0]): row for row in table("### Elementwise losses")}[name][2])
    targets = {"binary": (0.0, 1.0), "sign": (-1.0, 1.0), "probability": (0.0, 0.3, 1.0)}
    options = {"delta": 1.5, "q": 0.3, "pos_weight": 2.5, "alpha": 0.4, "gamma": 1.5}
    chosen = {option: options[option] for option in loss.options}
    assert loss.value and loss.gradient
    for y, t in product(POINTS, targets.get(loss.targets, (0.0, 0.3, 1.0, 3.0))):
        values = {"y": y, "z": y, "t": t, "p": float(special.expit(y)), **chosen}
        arguments = (array_math, np.array([y]), np.array([t]), *chosen.values())
        value, slope = loss.value(*arguments), loss.gradient(*arguments)
        assert value == pytest.approx(evaluate(loss.formula, **values), rel=1e-11, abs=1e-13), (
            y,
            t,
        )
        assert slope == pytest.approx(evaluate(derivative, **values), rel=1e-11, abs=1e-13), (y, t)


def test_pictures_are_small() -> None:
    for picture in (DOCS / "images").iterdir():
        assert picture.suffix == ".png" and os.path.getsize(picture) < 60_000, picture.name
