"""Imports point down the order that CONTRIBUTING.md states, in no circle, and private names stay at home.

What counts as an import: import statements at any level of a file, under `TYPE_CHECKING` too, and strings that name a
module of this package (class paths, `import_module`). A package's `__init__` belongs to whoever is named there.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nspo_lightning

ROOT = Path(__file__).parents[1]
PACKAGE = "nspo_lightning"
DOTTED = re.compile(rf"{PACKAGE}(\.[A-Za-z_]\w*)+(:\w+)?")
EXEMPT = {PACKAGE, f"{PACKAGE}.__main__"}
"""The lazy exports and the entry point: they name what is above them."""
OWN_FRIENDS = {"_replace", "_asdict", "_fields"}  # named tuples' public methods
MOST_ROOT_MODULES = 6
PROBES = {"getattr", "hasattr", "setattr", "delattr"}
PUBLIC_IN_FACT = {"os._exit", "lightning.fabric.utilities.types._PATH"}
"""Documented by Python, and in the signatures of Lightning's plugins."""


@cache
def files() -> dict[str, Path]:
    """Module name to file, the linked folders among them."""
    found: dict[str, Path] = {}
    for folder in (ROOT / PACKAGE, ROOT / "callbacks", ROOT / "datamodules"):
        base = folder if folder.name == PACKAGE else folder.parent
        for file in folder.rglob("*.py"):
            inner = file.relative_to(base).with_suffix("").parts
            if folder.name == PACKAGE and inner[0] in {"callbacks", "datamodules"}:
                continue
            parts = [PACKAGE, *inner]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def docstrings(module: ast.AST) -> set[int]:
    """Identities of strings that stand alone as statements."""
    return {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}


def named_in(module: ast.Module) -> Iterator[str]:
    """Dotted names of this package that a file imports or spells out."""
    alone = docstrings(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            if DOTTED.fullmatch(node.value):
                yield node.value.replace(":", ".")
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            start = str(node.values[0].value)
            if start.startswith(f"{PACKAGE}.") and len(node.values) > 1:
                yield start.rstrip(".")


@cache
def graph() -> dict[str, set[str]]:
    """Module to the modules that it names."""
    modules = files()
    found: dict[str, set[str]] = {}
    for name, file in modules.items():
        found[name] = set()
        found[name] |= {module_of(dotted) for dotted in named_in(tree(file))} - {name, PACKAGE}
    return found


def module_of(dotted: str) -> str:
    """The module that a dotted name belongs to; a lazy export of the package is where it comes from."""
    root, _, export = dotted.partition(".")
    if root == PACKAGE and export in nspo_lightning._EXPORTS:
        return nspo_lightning._EXPORTS[export]
    while dotted not in files() and "." in dotted:
        dotted = dotted.rpartition(".")[0]
    return dotted


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def order() -> dict[str, int]:
    """Room to its height, read off CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    line = re.search(r"^ *`(\{[^`]*<[^`]*)`", text, re.MULTILINE)
    assert line is not None, "CONTRIBUTING.md states the order as `{a, b} < c < d`"
    layers = [re.findall(r"\w+", layer) for layer in line[1].split("<")]
    return {name: height for height, layer in enumerate(layers) for name in layer}


def test_every_room_has_a_place_in_the_order() -> None:
    rooms = {room(module) for module in files()} - {PACKAGE, "configs"}
    assert rooms == set(order())


def test_arrows_point_down() -> None:
    heights = order()
    wrong = sorted(
        f"{source} -> {target}"
        for source, targets in graph().items()
        for target in targets
        if source not in EXEMPT and room(source) != room(target) and room(target) != "configs"
        if heights[room(target)] >= heights[room(source)]
    )
    assert wrong == [], f"{len(wrong)} arrows point up or sideways:\n" + "\n".join(wrong)


def test_a_planted_import_is_found_whatever_its_form() -> None:
    code = """
from nspo_lightning import GRPOModule, ranks
from nspo_lightning.cli import jobs
x = "nspo_lightning.callbacks:NullSpaceProjection"
"""
    assert {module_of(dotted) for dotted in named_in(ast.parse(code))} == {
        "nspo_lightning.module",
        "nspo_lightning.ranks",
        "nspo_lightning.cli.jobs",
        "nspo_lightning.callbacks",
    }


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in arrows.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            start = stack.index(node)
            group, stack[start:] = stack[start:], []
            if len(group) > 1:
                found.append(sorted(group))

    for node in arrows:
        if node not in index:
            visit(node)
    return found


def test_there_is_no_circle_between_modules() -> None:
    arrows = {source: targets for source, targets in graph().items() if source not in EXEMPT}
    assert circles(arrows) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def own_names(module: ast.Module) -> set[str]:
    """Attributes with an underscore that the file's own classes have: methods, fields, and what is set on self."""
    names: set[str] = set()
    for node in ast.walk(module):
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names.add(inner.name)
            targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def private_uses(module: ast.Module) -> Iterator[str]:
    """Private attributes of somebody else: not of self or cls, and not of a class of this file."""
    own = own_names(module)
    alone = docstrings(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
            of = ast.unparse(node.value)
            if of not in {"self", "cls", "super()"} and node.attr not in own | OWN_FRIENDS:
                yield f"line {node.lineno}: {of}.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PROBES:
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and id(name) not in alone and re.match(r"_[^_]", str(name.value)):
                yield f"line {node.lineno}: {node.func.id}(..., {name.value!r})"
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(PACKAGE):
            for alias in node.names:
                if re.match(r"_[^_]", alias.name):
                    yield f"line {node.lineno}: {node.module}.{alias.name}"


def test_private_names_of_others_are_used_in_compat_alone() -> None:
    found = sorted(
        f"{module}, {use}"
        for module, file in files().items()
        if room(module) != "compat"
        for use in private_uses(tree(file))
        if use.partition(": ")[2] not in PUBLIC_IN_FACT
    )
    assert found == [], f"{len(found)} uses:\n" + "\n".join(found)


def test_a_private_use_is_found() -> None:
    code = "class A:\n    _mine = 1\n\ndef f(x, a):\n    self._a; a._mine; x._theirs; getattr(x, '_other', 0)\n"
    assert sorted(private_uses(ast.parse("from m import _hidden\n" + code))) == [
        "line 1: m._hidden",
        "line 6: getattr(..., '_other')",
        "line 6: x._theirs",
    ]


def test_the_packages_root_holds_few_modules() -> None:
    modules = {path.stem for path in (ROOT / PACKAGE).glob("*.py")}
    assert len(modules) <= MOST_ROOT_MODULES, sorted(modules)


CORE = {"grpo": {"torch"}, "nullspace": {"torch", "safetensors"}}
"""Rooms of the numerical core, and the libraries that they may know."""


def libraries(module: ast.Module) -> set[str]:
    """Names of the libraries that a file imports anywhere in it, the standard one left out."""
    found = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {PACKAGE}


def test_the_numerical_core_knows_torch_and_no_picture() -> None:
    for room, allowed in CORE.items():
        used = {name: libraries(tree(file)) for name, file in files().items() if name.startswith(f"{PACKAGE}.{room}")}
        assert used
        assert not {name: more - allowed for name, more in used.items() if more - allowed}
    planted = ast.parse("import json\ndef f():\n    from matplotlib import pyplot\n")
    assert libraries(planted) == {"matplotlib"}
