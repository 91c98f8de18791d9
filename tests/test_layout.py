"""The shape of the project: every operator complete, imports one way, files short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from backprop_kernels.operators import OPERATORS

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "backprop_kernels"
BACKENDS = ("reference", "cpu", "cuda")
LONGEST = 500
LONGER_FOR_A_REASON: dict[str, str] = {}  # file: why it is one idea


def sources() -> list[Path]:
    folders = (ROOT / name for name in ("backprop", "kernels", "tests", "benchmarks"))
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_kernels_is_a_folder_and_no_package() -> None:
    """With an __init__.py it would hide the `kernels` package of others: references in docs."""
    assert KERNELS.is_dir() and not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("operator", [row.name for row in OPERATORS])
def test_every_operator_is_complete(operator: str) -> None:
    files = [KERNELS / backend / f"{operator}.py" for backend in BACKENDS]
    files.append(ROOT / "tests" / "kernels" / f"test_{operator}.py")
    files.append(ROOT / "benchmarks" / f"bench_{operator}.py")
    assert [str(f.relative_to(ROOT)) for f in files if not f.is_file()] == []
    for file in files[: len(BACKENDS)]:
        assert f"docs/derivations.md#{operator}\n" in file.read_text(encoding="utf-8") or (
            f'docs/derivations.md#{operator}"""' in file.read_text(encoding="utf-8")
        ), f"{file.name} does not say where its formulas are derived"
    headings = (ROOT / "docs" / "derivations.md").read_text(encoding="utf-8").splitlines()
    assert headings.count(f"## {operator}") == 1


def test_kernels_never_import_backprop() -> None:
    for path in KERNELS.rglob("*.py"):
        assert [m for m in imports(path) if m.split(".")[0] == "backprop"] == [], path


def test_backends_do_not_import_one_another() -> None:
    for backend in BACKENDS:
        others = tuple(f"{KERNELS.name}.{name}" for name in BACKENDS if name != backend)
        for path in (KERNELS / backend).rglob("*.py"):
            assert [m for m in imports(path) if m.startswith(others)] == [], path


def test_tables_and_checks_import_no_backend() -> None:
    backends = tuple(f"{KERNELS.name}.{name}" for name in BACKENDS)
    for path in KERNELS.glob("*.py"):
        assert [m for m in imports(path) if m.startswith(backends)] == [], path


def test_library_imports_no_tests_and_no_yardsticks() -> None:
    never = {"tests", "benchmarks", "torch", "pytest", "hypothesis", "sklearn", "scipy"}
    for path in [*KERNELS.rglob("*.py"), *(ROOT / "backprop").rglob("*.py")]:
        estimators = path.parent == ROOT / "backprop" / "sklearn"
        allowed = {"sklearn"} if estimators else set()
        assert {m.split(".")[0] for m in imports(path)} & never <= allowed, path


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources()
    }
    longer = {name for name, length in lengths.items() if length > LONGEST}
    assert longer == set(LONGER_FOR_A_REASON)


def test_users_input_is_never_checked_by_assert() -> None:
    """`python -O` removes asserts; those left tell the type checker what holds by construction."""
    for path in [*KERNELS.rglob("*.py"), *(ROOT / "backprop").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                assert "is not None" in ast.unparse(node.test), f"{path}:{node.lineno}"
