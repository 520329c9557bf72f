"""How large the core is: `python tests/size.py` counts the lines of code of engine/ and kernels/.

A line counts if it holds code: blank lines, comments and docstrings are what makes it readable, and are free.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 8200
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def lines_of_code(source: str) -> int:
    """Lines of Python that hold something beside comments and docstrings."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                code.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(code)


def core_size() -> int:
    files = [path for floor in ("engine", "kernels") for path in (ROOT / floor).rglob("*.py")]
    return sum(lines_of_code(path.read_text(encoding="utf-8")) for path in files)


if __name__ == "__main__":
    size = core_size()
    print(f"engine/ + kernels/: {size} lines of code of {LIMIT}; blank lines, comments and docstrings not counted")
    sys.exit(size > LIMIT)
