"""Every adapter has the contract's functions, with its signatures."""

import ast
import inspect
from pathlib import Path

import pytest

import toolkit
from toolkit.adapters import Adapter

ADAPTERS = Path(toolkit.__file__).parent / "adapters"
CONTRACT = {name: inspect.signature(f) for name, f in inspect.getmembers(Adapter, inspect.isfunction) if name[0] != "_"}


def parameters(arguments: ast.arguments) -> str:
    return ast.unparse(arguments).removeprefix("self, ").removeprefix("self")


@pytest.mark.parametrize("name", ["torch", "tensorflow", "keras"])
def test_adapter_keeps_the_contract(name):
    """Compared as source text: loading all three in one process would load torch beside TensorFlow."""
    contract = ast.parse((ADAPTERS / "__init__.py").read_text())
    protocol = next(n for n in contract.body if isinstance(n, ast.ClassDef) and n.name == "Adapter")
    wanted = {f.name: f for f in protocol.body if isinstance(f, ast.FunctionDef)}
    assert wanted.keys() == CONTRACT.keys() and len(wanted) >= 9
    module = ast.parse((ADAPTERS / f"{name}.py").read_text())
    found = {f.name: f for f in module.body if isinstance(f, ast.FunctionDef)}
    for function, promised in wanted.items():
        assert function in found, f"{name}.py has no {function}()"
        assert parameters(found[function].args) == parameters(promised.args), function
        assert ast.unparse(found[function].returns) == ast.unparse(promised.returns), function
        assert f"toolkit.adapters.Adapter.{function}" in ast.get_docstring(found[function]), function


def test_adapters_do_not_import_each_other():
    for name in ("torch", "tensorflow", "keras"):
        others = {"torch", "tensorflow", "keras"} - {name}
        for node in ast.walk(ast.parse((ADAPTERS / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "toolkit.adapters":
                assert not {alias.name for alias in node.names} & others
            if isinstance(node, ast.ImportFrom | ast.Import):
                module = getattr(node, "module", None) or ""
                assert module not in {f"toolkit.adapters.{other}" for other in others}
