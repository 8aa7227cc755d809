"""Imports point down only, and private names stay in their package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import paper_layers

ROOT = Path(paper_layers.__file__).parent
# The papers stand side by side on the ops, and these on the basement.
BELOW = {"_core": {"_core"}, "ops": {"_core", "ops"}}
# Underscored as they are nobody else's; within the package all may use them.
PUBLIC = {"_core", "_torch_private"}
# Tests and benchmarks share the folder testing. Tests may import benchmarks, whose claims they test.
ABOVE = {
    "paper_layers": {"testing", "tests", "benchmarks"},
    "testing": {"tests", "benchmarks"},
    "benchmarks": {"tests"},
}


def imported(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each file in a folder with each name that it imports, such as torch.nn.Module."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            for name in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                yield str(file.relative_to(folder)), f"{module}{name.name}"


def imports() -> Iterator[tuple[str, list[str]]]:
    """Yield the file, and the parts of each name of ours that it imports."""
    for file, name in imported(ROOT):
        package, *parts = name.split(".")
        if package == "paper_layers" and parts:
            yield file, parts


@pytest.mark.parametrize("folder", ABOVE)
def test_folders_import_downwards(folder: str) -> None:
    names = list(imported(ROOT.parent / folder))
    assert names
    assert not [f"{file} imports {name}" for file, name in names if name.split(".")[0] in ABOVE[folder]]


def test_imports_point_down() -> None:
    wrong = []
    for file, (target, *_) in imports():
        package = file.split("/")[0]
        allowed = BELOW.get(package, {"_core", "ops", package} if (ROOT / package).is_dir() else None)
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
    assert ("battery.py", "testing.raw_ops") in list(imported(ROOT.parent / "testing"))
