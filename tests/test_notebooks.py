"""The notebooks: every cell runs and prints what is stored below it."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.name for path in NOTEBOOKS])
def test_cells_print_what_is_stored(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    for number, cell in enumerate(cells, start=1):
        assert cell["execution_count"] == number, "run the notebook from top to bottom"
        with redirect_stdout(StringIO()) as printed:
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
        stored = "".join("".join(output["text"]) for output in cell["outputs"])
        assert printed.getvalue() == stored
