"""Run the code of a notebook, as its kernel would: in order, in one namespace, what a cell ends with displayed."""

import ast
import json
from pathlib import Path
from typing import Any


def cells(path: Path) -> list[str]:
    """The sources of its code."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(path: Path) -> list[Any]:
    """What its code cells end with, None for a statement; an exception ends it as it ends a notebook."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, source in enumerate(cells(path)):
        *before, last = ast.parse(source).body
        value = None
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(before, []), f"cell {number}", "exec"), namespace)
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace)
        else:
            exec(compile(ast.parse(source), f"cell {number}", "exec"), namespace)
        shown.append(value)
    return shown
