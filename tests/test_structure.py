"""Imports point down only, and no private name crosses the border of a package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import paper_layers

ROOT = Path(paper_layers.__file__).parent
# The papers stand side by side on the ops, and these on the basement.
BELOW = {"_core": {"_core"}, "ops": {"_core", "ops"}}
# Underscored as they are nobody else's; within the package all may use them.
PUBLIC = {"_core", "_torch_private"}
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
        private = [part for part in parts if part.startswith("_") and not part.startswith("__") and part not in PUBLIC]
        if private and parts[0] != file.split("/")[0]:
            wrong.append(f"{file} imports {'.'.join(parts)}")
    assert not wrong


def private_names_of_torch(source: str) -> Iterator[str]:
    """Yield imports of torch's private names and attributes that are found through them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            yield from (f"{node.module}.{a.name}" for a in node.names if "._" in f".{node.module}.{a.name}")
        elif (
            isinstance(node, ast.Attribute)
            and (name := ast.unparse(node)).startswith("torch.")
            and "._" in name.replace(".__", ".")
        ):
            yield name


def test_private_names_of_torch_stand_in_one_file() -> None:
    found = {
        str(file.relative_to(ROOT)): names
        for file in sorted(ROOT.rglob("*.py"))
        if (names := [*private_names_of_torch(file.read_text())])
    }
    assert list(found) == ["_core/_torch_private.py"], found


def test_the_walk_finds_imports() -> None:
    assert ("ops/knn.py", ["_core", "library", "define"]) in list(imports())
