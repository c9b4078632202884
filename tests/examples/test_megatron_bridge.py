"""The example for Megatron-Bridge, which is not installed here: what it imports from us exists, and its README is true.

What it calls is run by tests/training/test_any_loop.py.
"""

import ast
import importlib
import inspect
from pathlib import Path

from megatron_sfr.training.bridge import forward_step

EXAMPLE = Path(__file__).parents[2] / "examples" / "megatron_bridge" / "finetune.py"


def test_every_name_that_the_example_imports_from_the_package_exists() -> None:
    nodes = list(ast.walk(ast.parse(EXAMPLE.read_text(encoding="utf-8"))))
    imported = [
        (node.module, alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module.startswith("megatron_sfr.")
        for alias in node.names
    ]
    imported += [
        ("megatron_sfr", node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sfr"
    ]
    assert len(imported) > 8
    assert [name for module, name in imported if not hasattr(importlib.import_module(module), name)] == []


def test_megatron_bridge_would_inject_its_state() -> None:
    """Megatron-Bridge passes its GlobalState to a forward step whose first parameter is called `state`."""
    assert list(inspect.signature(forward_step(61)).parameters) == ["state", "data_iterator", "model"]
