"""Demonstrate the package on real input: run the sections, one module per paper, and write one page.

python -m benchmarks.report
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from pathlib import Path

import paper_layers
from benchmarks.report import page, sections

OUTPUT = Path("out/report.html")


def main() -> None:
    start = time.perf_counter()
    print(paper_layers.show_config())
    names = (found.name for found in pkgutil.iter_modules(sections.__path__, f"{sections.__name__}."))
    page.write(OUTPUT, [importlib.import_module(name).section() for name in names])
    print(f"\nwritten in {time.perf_counter() - start:.0f} s: {OUTPUT.resolve()}")


if __name__ == "__main__":
    main()
