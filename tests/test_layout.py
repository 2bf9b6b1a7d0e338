"""The folders are what the docstring of jdam says: arrows point downwards, nothing is hidden."""

import ast
import importlib
import pkgutil
import types
from pathlib import Path

import pytest

import jdam

ROOT = Path(jdam.__file__).parent
LAYERS = [
    "_core",
    "_measures",
    "_entropic",
    "geometry",
    "_memory",
    "_energy",
    "_recall",
    "_learning",
]
FILES = sorted(path for path in ROOT.rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jdam"):
            yield node.module
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("jdam"))


@pytest.mark.parametrize("layer", LAYERS)
def test_arrows_point_downwards(layer):
    allowed = {f"jdam.{name}" for name in LAYERS[: LAYERS.index(layer) + 1]}
    for path in (ROOT / layer).glob("*.py"):
        used = {".".join(module.split(".")[:2]) for module in imported(path)}
        assert used <= allowed, path


def test_the_docstring_is_the_map():
    places = [jdam.__doc__.index(f"    {layer} ") for layer in LAYERS]
    assert places == sorted(places)
    assert len([path for path in ROOT.iterdir() if path.is_file()]) <= 12


def test_no_module_is_hidden():
    for module in pkgutil.walk_packages(jdam.__path__, "jdam."):
        parent, _, name = module.name.rpartition(".")
        if name != "__main__":
            importlib.import_module(module.name)
            found = getattr(importlib.import_module(parent), name)
            assert isinstance(found, types.ModuleType), module.name


def test_files_are_short():
    assert max(len(path.read_text().splitlines()) for path in FILES) <= 400


def test_functions_take_few_arguments_by_position():
    """Five at most, `self` aside."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in node.args.args if argument.arg != "self"]
                assert len(names) <= 5, (path.name, node.name, names)
