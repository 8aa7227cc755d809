"""Imports point down only, and no private name crosses the border of a package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import paper_layers

ROOT = Path(paper_layers.__file__).parent
# The papers stand side by side on the ops, and these on the basement.
BELOW = {"_core": {"_core"}, "ops": {"_core", "ops"}}
PAPERS = {"adv_prop", "big_bigan", "deep_gcn", "lip", "point_rend", "soft_triple"}


def imports() -> Iterator[tuple[str, list[str]]]:
    """Yield the file, and the parts of each name of ours that it imports."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "paper_layers":
                for name in node.names:
                    yield str(file.relative_to(ROOT)), f"{node.module}.{name.name}".split(".")[1:]


def test_imports_point_down() -> None:
    wrong = []
    for file, (target, *_) in imports():
        package = file.split("/")[0]
        allowed = BELOW.get(package, {"_core", "ops", package} if package in PAPERS else None)
        if allowed is not None and target not in allowed:
            wrong.append(f"{file} imports {target}")
    assert not wrong


def test_private_names_stay_in_their_package() -> None:
    wrong = []
    for file, parts in imports():
        private = [part for part in parts if part.startswith("_") and not part.startswith("__") and part != "_core"]
        if private and parts[0] != file.split("/")[0]:
            wrong.append(f"{file} imports {'.'.join(parts)}")
    assert not wrong


def test_the_walk_finds_imports() -> None:
    assert ("ops/knn.py", ["_core", "library", "define"]) in list(imports())
