"""Reject sentences that a reader has to read twice: `python -m testing.sentences` lists them and exits with 1."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START = re.compile(r"(What|Whether .* and|Of) ")
ANYWHERE = re.compile(r"\b(has|have) not (a|an|any|the|such)\b|\bin the eyes of\b")
COMMENT = re.compile(r"(?:^|\s)//[/ ]*(.*)")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each docstring, and of each of its entries, as in `name: text`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                first = node.body[0].lineno
                yield first, text
                for number, line in enumerate(text.splitlines()):
                    if entry := re.match(r"\s+\w+: (.+)", line):
                        yield first + number, entry[1]


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield each comment; a line that goes on with the sentence of the line before starts with a space."""
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            yield line, " " * (last == line - 1) + token.string.lstrip("# ")
            last = line


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of everything that a person reads in a file."""
    source = path.read_text()
    if path.suffix == ".py":
        yield from docstrings(source)
        yield from comments(source)
    elif path.suffix == ".md":
        yield from ((i, f" {line}") for i, line in enumerate(source.splitlines(), 1))
    else:
        last = -1
        for number, line in enumerate(source.splitlines(), 1):
            if found := COMMENT.search(line):
                yield number, " " * (last == number - 1) + found[1]
                last = number


def faults(root: Path) -> Iterator[str]:
    """Yield each sentence of a tracked file that breaks a rule."""
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    for name in listed.split():
        if Path(name).suffix in (".py", ".md", ".h", ".cuh", ".cu", ".cpp"):
            for line, text in sentences(root / name):
                if START.match(text) or ANYWHERE.search(text):
                    yield f"{name}:{line}: {text.strip().splitlines()[0]}"


if __name__ == "__main__":
    found = sorted(set(faults(ROOT)))
    print("\n".join(found))
    sys.exit(bool(found))
