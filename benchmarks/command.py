"""Options of all benchmarks, and their result files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser that describes a benchmark by its docstring and knows --quick and --json."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help=quick)
    found.add_argument("--json", metavar="PATH", help="write all numbers there, and the picture, if any, beside them")
    return found


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a table, with the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (head, *rows)]
    return "\n".join("   ".join(line).rstrip() for line in lines)


def save(path: str | Path, content: dict[str, Any], picture: Callable[[], Any] | None = None) -> None:
    """Write a result file and, under the same name, the matplotlib figure that `picture` draws; print their paths."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")
    if picture is not None:
        picture().savefig(path.with_suffix(".png"), dpi=120)
        print(f"written: {path.with_suffix('.png')}")
