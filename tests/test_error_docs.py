"""The messages that docs/operations.md explains are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def quoted() -> list[str]:
    """First column of the table of errors."""
    section = (ROOT / "docs/operations.md").read_text().partition("## What errors mean")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def messages() -> list[str]:
    """Texts of the package without docstrings, and for every UserError its three together."""
    found = []
    for file in (ROOT / "megatron_moe2dense").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        said_of_code = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in said_of_code:
                found.append(node.value)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                found.append(" ".join(text for argument in node.args for text in _texts(argument)))
    return found


def _texts(node: ast.AST) -> list[str]:
    return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def test_an_explained_message_is_one_of_the_code():
    assert len(quoted()) > 15
    texts = messages()
    patterns = {phrase: ".*".join(re.escape(piece.strip()) for piece in phrase.split("…")) for phrase in quoted()}
    unknown = [phrase for phrase, pattern in patterns.items() if not any(re.search(pattern, text, re.DOTALL) for text in texts)]
    assert not unknown, "\n".join(unknown)
