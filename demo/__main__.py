"""What the package does, on real input: every section runs and goes into one report.

python -m demo
"""

from __future__ import annotations

import time
from pathlib import Path

import paper_layers
from demo import adv_prop, big_bigan, deep_gcn, lip, point_rend, report, soft_triple

SECTIONS = (
    *(lip.section, soft_triple.section, deep_gcn.section),
    *(adv_prop.section, point_rend.section, big_bigan.section),
)
OUTPUT = Path("out/report.html")


def main() -> None:
    start = time.perf_counter()
    print(paper_layers.show_config())
    report.write(OUTPUT, [section() for section in SECTIONS])
    print(f"\nwritten in {time.perf_counter() - start:.0f} s: {OUTPUT.resolve()}")


if __name__ == "__main__":
    main()
