"""The import rules of ARCHITECTURE.md: imports go downward, modules form no circle, and few touch
the C extension.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (
    {"errors", "fd", "programs", "spec", "threads", "__version__"},
    {"apart", "memory", "kvm", "hostnet", "outcome", "vhostuser", "helper"},
    {"bus", "pci"},
    {"boot", "datapath", "devices", "virtio"},
    {
        "backend",
        "capture",
        "conformance",
        "control",
        "exits",
        "explain",
        "host",
        "images",
        "devopt",
        "jailopt",
        "diskopt",
        "faultopt",
        "faulttc",
        "scenario",
        "shareopt",
        "macs",
        "netopt",
        "testbed",
        "testing",
        "watch",
        "workloads",
    },
    {"card", "doctor"},
    {"hang", "panics", "plugs", "vcpus", "sandbox"},
    {"assembly", "jail"},
    {"machine"},
    {"testing.suite"},
    {"testing.vm"},
    {"compare", "matrix"},
    {"", "cli", "__main__", "launch", "testing.plugin"},  # "": pyvmm/__init__.py, the public API
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
EXTENSION = (
    "apart",
    "bus",
    "capture.bpf",
    "capture.session",
    "datapath",
    "devices",
    "fd",
    "helper",
    "hostnet",
    "jail",
    "kvm",
    "memory",
    "pci",
    "backend.memory",
    "backend.ports",
    "backend.process",
    "sandbox",
    "threads",
    "backend.vduse",
    "virtio.isr",
    "virtio.kicks",
    "virtio.mmio",
    "virtio.pci",
    "virtio.queue",
)


def runtime_imports(node: ast.AST) -> Iterator[str]:
    """Modules of pyvmm imported below ``node``, without those that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from runtime_imports(other)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide the layer"
            if child.module == "pyvmm":
                yield from (f"pyvmm.{alias.name}" for alias in child.names)
            elif child.module and child.module.startswith("pyvmm."):
                yield child.module
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.startswith("pyvmm."))
        else:
            yield from runtime_imports(child)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "pyvmm").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "pyvmm").with_suffix("").parts)
        yield name.removesuffix("__init__").removesuffix("."), path


def rank(name: str) -> int:
    """The layer of a module: its own if it has one, else its package's."""
    return RANK[name] if name in RANK else RANK[name.split(".")[0]]


def check(name: str, source: str) -> list[str]:
    """What is wrong with the imports of module ``name`` (without "pyvmm.")."""
    own = name.split(".")[0]
    wrong = []
    for target in runtime_imports(ast.parse(source)):
        inner = target.removeprefix("pyvmm.")
        other = inner.split(".")[0]
        if other == "_ext":
            if not any(name == e or name.startswith(f"{e}.") for e in EXTENSION):
                wrong.append(f"pyvmm.{name} touches the C extension")
        elif (
            own == "virtio"
            and other in ("backend", "datapath", "hostnet", "vhostuser")
            and inner not in ("datapath.base", "datapath.ringformat")
        ):
            wrong.append(f"pyvmm.{name} picks a backend: {target}")
        elif other not in RANK:
            wrong.append(f"pyvmm.{other} has no layer: add it to LAYERS and to ARCHITECTURE.md")
        elif rank(inner) > rank(name):
            wrong.append(f"pyvmm.{name} imports {target}, which is above it")
    return wrong


def test_imports_go_downward() -> None:
    wrong = [problem for name, path in modules() for problem in check(name, path.read_text())]
    assert not wrong, "\n".join(wrong)


def test_the_check_notices() -> None:
    assert check("kvm.vm", "from pyvmm.machine import Machine")
    assert check("kvm.vm", "def f():\n    import pyvmm.cli.run")
    assert check("virtio.net", "from pyvmm.hostnet.tap import Tap")
    assert check("boot.elf", "from pyvmm._ext import lib")
    assert check("machine", "from pyvmm._ext import lib")
    assert check("virtio.net", "from pyvmm._ext import lib")
    assert check("testing.verdict", "from pyvmm.machine import Machine")
    assert check("testing.suite", "from pyvmm.testing.vm import TestMachine")
    assert not check("kvm.vm", "if TYPE_CHECKING:\n    from pyvmm.machine import Machine")
    assert not check("virtio.net", "from pyvmm.datapath.base import Vring")


def test_no_ctypes() -> None:
    """Functions without declared arguments: there is the extension, and there are programs."""
    wrong = [
        name
        for name, path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(a.name.startswith("ctypes") for a in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ctypes"))
    ]
    assert not wrong


def all_imports(name: str, source: str, known: set[str]) -> set[str]:
    """The modules of ``known`` that module ``name`` imports anywhere, for type checkers included.

    ``known`` and the names have no "pyvmm."; the package pyvmm itself, whose name is empty, only
    hands names on when they are asked for, so it counts neither as importer nor as imported.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full.removeprefix("pyvmm.") in known else node.module)
    inner = {target.removeprefix("pyvmm.") for target in found if target.startswith("pyvmm.")}
    return inner & known - {name} if name else set()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each is imported by the next; empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return list(e.args[1])
    return []


def test_modules_form_no_circle() -> None:
    sources = {name: path.read_text() for name, path in modules()}
    known = set(sources)
    graph = {name: all_imports(name, source, known) for name, source in sources.items()}
    assert graph["machine"] >= {"assembly", "outcome", "netopt"}, "type checkers' imports count"
    found = circle(graph)
    assert not found, " <- ".join(found)


def test_the_circle_is_noticed() -> None:
    known = {"a", "b.c", "b", ""}
    assert all_imports("a", "from pyvmm.b import c", known) == {"b.c"}
    assert all_imports("a", "from pyvmm.b import X\nimport os", known) == {"b"}
    assert all_imports("b.c", "def f():\n    import pyvmm.a", known) == {"a"}
    assert all_imports("a", "if TYPE_CHECKING:\n    from pyvmm.b import X", known) == {"b"}
    assert all_imports("", "from pyvmm.a import X", known) == set()
    assert circle({"a": {"b.c"}, "b.c": {"b"}, "b": set()}) == []
    assert set(circle({"a": {"b.c"}, "b.c": {"a"}, "b": {"a"}})) == {"a", "b.c"}


def test_only_cli_prints_or_exits() -> None:
    """Libraries raise; processes of their own (the supervisor, the agent in L1) may talk to their
    log.
    """
    own_process = {"testbed.agent", "testbed.supervisor", "launch"}
    wrong = []
    for name, path in modules():
        if name.split(".")[0] in ("cli", "__main__") or name in own_process:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "exit",
                "quit",
                "sys.exit",
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}")
    assert not wrong, "\n".join(wrong)
