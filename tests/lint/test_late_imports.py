"""Where imports stand: at the top, unless waiting with one saves time.

Under emulation Python starts 20 times slower than natively, so what ``pyvmm run`` may need later
is imported by the function that needs it. The rule has two halves:

1. A function imports nothing that the imports at the top of its module have loaded already.
2. Outside of ``cli``, and of the modules that ``pyvmm run`` or the pytest plugin can come to need,
   a function imports only what is heavy (``HEAVY``) or not ours and not Python's.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache

from tests.lint.test_imports import modules
from tests.unit.test_cli import HEAVY

Import = ast.Import | ast.ImportFrom
TREES = {f"pyvmm.{name}".removesuffix("."): ast.parse(path.read_text()) for name, path in modules()}
#: What waits for the guest's first instruction, or for pytest's first test.
STARTS = ("pyvmm.cli.run", "pyvmm.testing.plugin")


def imports(body: list[ast.stmt], *, late: bool) -> Iterator[Import]:
    """The imports in ``body`` but for those that only type checkers see.

    :param late: those in functions, or else those that run with the module.
    """
    todo: list[tuple[ast.AST, bool]] = [(node, False) for node in body]
    while todo:
        node, inside = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += [(child, inside) for child in node.orelse]
        elif isinstance(node, Import):
            if inside == late:
                yield node
        else:
            inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            todo += [(child, inside) for child in ast.iter_child_nodes(node)]


def targets(node: Import) -> set[str]:
    """The modules that an import loads."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    inner = {f"{node.module}.{alias.name}" for alias in node.names}
    return {node.module or "", *(inner & set(TREES))}


@cache
def direct(name: str, *, late: bool) -> frozenset[str]:
    """What module ``name`` imports, and its package; nothing if it is not ours."""
    if name not in TREES:
        return frozenset()
    found = {name.rpartition(".")[0] or name}
    for way in (False, True) if late else (False,):
        for node in imports(TREES[name].body, late=way):
            found |= targets(node)
    return frozenset(found)


def reach(starts: set[str], *, late: bool) -> frozenset[str]:
    """The modules of ``starts``, their packages, and what all these import.

    :param late: whether the imports in functions count.
    """
    found: set[str] = set()
    todo = set(starts)
    while todo:
        found |= todo
        todo = {target for name in todo for target in direct(name, late=late)} - found
    return frozenset(found)


@cache
def loaded(name: str) -> frozenset[str]:
    """What is loaded once module ``name`` is."""
    return reach({name}, late=False)


@cache
def startup() -> frozenset[str]:
    """What ``pyvmm run`` or the plugin can come to need."""
    return reach(set(STARTS), late=True)


def check(name: str, tree: ast.Module, have: frozenset[str], *, may_wait: bool) -> list[str]:
    """What is wrong with the imports in functions of a module.

    :param have: the modules that are loaded once it is. :param may_wait: whether it is in ``cli``
        or ``startup``.
    """
    wrong = []
    for node in imports(tree.body, late=True):
        light = {
            target
            for target in targets(node)
            if target.partition(".")[0] in sys.stdlib_module_names | {"pyvmm"}
            and target.partition(".")[0] not in HEAVY
        }
        where = f"{name}, line {node.lineno}: {ast.unparse(node)}"
        if targets(node) <= have:
            wrong.append(f"{where}: it is loaded already")
        elif light and not may_wait:
            wrong.append(f"{where}: no start waits for this module")
    return wrong


def test_functions_import_only_what_is_worth_the_wait() -> None:
    wrong = []
    for name, tree in TREES.items():
        if name == "pyvmm.launch":  # it is run as a file, and belongs to no package at first
            continue
        may_wait = name.startswith("pyvmm.cli") or name in startup()
        wrong += check(name, tree, loaded(name), may_wait=may_wait)
    assert not wrong, "\n".join(wrong)


def test_the_start_is_seen_whole() -> None:
    assert {"pyvmm.machine", "pyvmm.card.nic", "pyvmm.testbed.assets"} <= startup()
    assert not startup() & {"pyvmm.compare.run", "pyvmm.conformance.check"}
    assert {"pyvmm.kvm.vcpu", "pyvmm.spec.platform", "pyvmm", "os"} <= loaded("pyvmm.machine")
    assert "subprocess" not in loaded("pyvmm.machine")


def test_the_check_notices() -> None:
    def found(source: str, *, may_wait: bool = False) -> str:
        have = frozenset({"os", "pyvmm.fd", "pyvmm"})
        return "".join(check("x", ast.parse(f"def f():\n {source}"), have, may_wait=may_wait))

    assert "loaded already" in found("import os", may_wait=True)
    assert "loaded already" in found("from pyvmm.fd import Fd", may_wait=True)
    assert "loaded already" in found("if x:\n  from pyvmm import __version__", may_wait=True)
    assert "no start waits" in found("import struct")
    assert "no start waits" in found("from pyvmm.bus import Bus")
    assert not found("from pyvmm.bus import Bus", may_wait=True)
    assert not found("from subprocess import run") and not found("import rich.table")
    assert not check(
        "x", ast.parse("import os\nif TYPE_CHECKING:\n import os"), loaded("os"), may_wait=False
    )
