"""Public names: listed, sorted, documented with an example, and alike in their order of arguments."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import paper_layers

PAPERS = sorted(
    {file.parent.name for file in Path(paper_layers.__file__).parent.glob("*/__init__.py")} - {"_core", "ops"}
)
MODULES = ("paper_layers", *(f"paper_layers.{name}" for name in (*PAPERS, "ops", "swap")))


def public(name: str) -> dict[str, Any]:
    module = importlib.import_module(name)
    found = {key: getattr(module, key) for key in module.__all__ if not key.startswith("__")}
    return {key: value for key, value in found.items() if not inspect.ismodule(value)}


def natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


EVERYTHING = {f"{module}.{key}": value for module in MODULES for key, value in public(module).items()}


@pytest.mark.parametrize("name", MODULES)
def test_all_names_what_is_imported(name: str) -> None:
    module = importlib.import_module(name)
    tree = ast.parse(Path(module.__file__ or "").read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paper_layers")
        for alias in node.names
    }
    assert set(module.__all__) == imported
    assert module.__all__ == sorted(module.__all__, key=natural)
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("paper", PAPERS)
def test_classes_of_all_papers_stand_at_the_top(paper: str) -> None:
    layers = {
        key
        for key, value in public(f"paper_layers.{paper}").items()
        if isinstance(value, type) and issubclass(value, nn.Module)
    }
    assert layers & set(paper_layers.__all__)


@pytest.mark.parametrize("name", EVERYTHING)
def test_documented_with_an_example(name: str) -> None:
    value = EVERYTHING[name]
    text = inspect.getdoc(value)
    assert text
    if isinstance(value, type) and issubclass(value, tuple | dict):
        assert "Attributes:" in text
        return
    assert "\n" not in text.split("\n\n")[0], "the first line stands alone"
    assert ">>>" in text


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


OPS = public("paper_layers.ops")
PAIRS = {
    key: (value, OPS[snake_case(key)])
    for key, value in vars(paper_layers).items()
    if snake_case(key) in OPS.keys() - {key}
}


def test_pairs_are_found() -> None:
    assert {"LIPPool2d", "SoftTripleLoss"} <= set(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_module_and_function_have_one_order_of_arguments(name: str) -> None:
    module, function = (
        [name for name, p in inspect.signature(value).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for value in PAIRS[name]
    )
    shared = [argument for argument in module if argument in function and argument != "logit"]  # a module or a tensor
    assert shared == [argument for argument in function if argument in shared]
