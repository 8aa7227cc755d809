"""The lint of sentences finds what it should, and leaves plain sentences alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from testing.sentences import ANYWHERE, START, sentences


def found(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return [line for _, line in sentences(path) if START.match(line) or ANYWHERE.search(line)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", 'def f():\n    """What it returns."""\n'),
        ("a.py", 'def f(x):\n    """Return x.\n\n    Args:\n        x: Of any shape.\n    """\n'),
        ("a.py", "x = 1  # What is left.\n"),
        ("a.py", "# A module that has not a weight.\n"),
        ("a.h", "int x;  // Of a row.\n"),
        ("a.md", "A model which has not any norm.\n"),
    ],
)
def test_faults_are_found(tmp_path: Path, name: str, text: str) -> None:
    assert len(found(tmp_path / name, text)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", 'def f():\n    """Return the rest."""\n'),
        ("a.py", "# The share of a row.\n# Of the same sentence this is the second line.\n".replace("row.", "row")),
        ("a.h", "int x;  // The row's number.\n"),
    ],
)
def test_plain_sentences_pass(tmp_path: Path, name: str, text: str) -> None:
    assert found(tmp_path / name, text) == []
