"""The pytest plugin of pyvmm: machines as fixtures (docs/pytest.md).

pytest loads it in every session of an environment that has pyvmm, so it imports nothing of pyvmm
until a fixture is used.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import Any, NoReturn

    from pyvmm.testing.console import Trouble, Watch
    from pyvmm.testing.vm import TestMachine

HOSTS = ("local", "testbed", "auto")
SCOPES = ("function", "class", "module", "package", "session")
#: The marker's keywords: parameters of ``TestMachine``, and how the test gets the machine.
MARKER = (
    "add", "append", "command", "cpu", "cpus", "disk", "fail_on", "hang_timeout", "huge", "initrd",
    "kernel", "load_address", "load_mode", "memory", "modules",
    "net", "on_reboot", "sandbox", "scenario", "start", "test_devices", "timeout",
)  # fmt: skip
CONSOLE_LINES = 200


class Record:
    """A machine that a test has used, for the test's report.

    :ivar node: the test, class, module, package or session for which the machine was made.
    """

    def __init__(self, node: pytest.Item | pytest.Collector, name: str) -> None:
        self.node, self.name = node, name
        self.machine: TestMachine | None = None
        self.watch: Watch | None = None

    def sections(self) -> list[tuple[str, str]]:
        """Title and text of everything that helps to find out why a test failed."""
        from pyvmm.testing.verdict import last_lines

        machine = self.machine
        if machine is None:
            return []
        outcome = machine.outcome
        state = "running" if outcome is None else f"{outcome.kind} {outcome.detail}".strip()
        out = [
            (
                f"pyvmm console of {self.name} ({state})",
                "\n".join(last_lines(machine.console.text, CONSOLE_LINES)),
            ),
            (f"pyvmm notes on {self.name}", "\n".join(machine.notes)),
            (f"pyvmm exits of {self.name}", machine.summary()),
        ]
        return [(title, text) for title, text in out if text]


RECORDS = pytest.StashKey[list[Record]]()


# --- options --------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("pyvmm", "machines to test kernels in (docs/pytest.md)")
    group.addoption(
        "--pyvmm-kernel",
        dest="pyvmm_kernels",
        metavar="K",
        action="append",
        default=[],
        help="run each test of `vm` with this kernel, a file or the name of an image; repeatable",
    )
    group.addoption("--pyvmm-initrd", metavar="I", help="initial RAM disk (default: pyvmm's image)")
    group.addoption(
        "--pyvmm-add",
        metavar="F[:PATH]",
        action="append",
        default=[],
        help="a file or directory for all guests, as for `pyvmm run --add`; repeatable",
    )
    group.addoption("--pyvmm-modules", metavar="DIR", help="kernel modules for all guests")
    group.addoption(
        "--pyvmm-append", metavar="S", default="", help="more kernel command line, for all"
    )
    group.addoption(
        "--pyvmm-scope",
        choices=SCOPES,
        help="how long a `vm` lives (function, or pyvmm_scope in the configuration)",
    )
    group.addoption(
        "--pyvmm-host",
        choices=HOSTS,
        help="where: local, testbed, or auto: the testbed if this KVM runs no Linux (pyvmm_host)",
    )
    parser.addini(
        "pyvmm_scope",
        "how long a `vm` lives: function, class, module, package, session",
        default="function",
    )
    parser.addini("pyvmm_host", "where the tests run: local, testbed or auto", default="local")
    parser.addini("pyvmm_boot_timeout", "seconds until a guest takes commands", default="180")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and check the configuration."""
    config.addinivalue_line(
        "markers",
        "pyvmm(kernel=..., cpus=1, memory='256M', net='none', append='', fail_on=..., ...): "
        "the machine that `vm` gives this test, see docs/pytest.md",
    )
    for name, choices in (("pyvmm_scope", SCOPES), ("pyvmm_host", HOSTS)):
        if config.getini(name) not in choices:
            raise pytest.UsageError(
                f"{name} = {config.getini(name)}: use one of {', '.join(choices)}"
            )
    try:
        float(config.getini("pyvmm_boot_timeout"))
    except ValueError:
        raise pytest.UsageError("pyvmm_boot_timeout: write seconds") from None


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Run the whole session in the testbed, if the user asks for it."""
    host = config.getoption("pyvmm_host") or config.getini("pyvmm_host")
    if host == "local" or hasattr(config, "workerinput") or config.getoption("help"):
        return None
    from pyvmm.doctor import can_run_linux_locally
    from pyvmm.errors import PyvmmError
    from pyvmm.programs import module
    from pyvmm.testbed.testbed import Testbed, inside

    if inside() or (host == "auto" and can_run_linux_locally()[0]):
        return None
    # pytest's own terminal does not exist yet.
    sys.stderr.write("pyvmm: the tests run in the testbed\n")
    try:
        return Testbed().run_attached(module("pytest", *config.invocation_params.args))
    except PyvmmError as e:
        raise pytest.UsageError(f"--pyvmm-host {host}: {e}") from e


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once per ``--pyvmm-kernel``, unless its marker names a kernel."""
    kernels: list[str] = metafunc.config.getoption("pyvmm_kernels")
    if "pyvmm_kernel" not in metafunc.fixturenames or not kernels:
        return
    marker = metafunc.definition.get_closest_marker("pyvmm")
    if marker is None or "kernel" not in marker.kwargs:
        scope: Any = _scope("vm", metafunc.config)
        metafunc.parametrize(
            "pyvmm_kernel", kernels, ids=kernel_ids(kernels), indirect=True, scope=scope
        )


def kernel_ids(kernels: list[str]) -> list[str]:
    """Short names: the file's name, or as much of its path as distinguishes it from the other
    files.
    """
    parts = [Path(k).parts for k in kernels]
    for n in range(1, max(map(len, parts), default=1) + 1):
        names = ["-".join(p[-n:]).replace("/", "") for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{i}" for i, name in enumerate(kernels)]


# --- fixtures -------------------------------------------------------------------------------------


def _scope(fixture_name: str, config: pytest.Config) -> Any:
    return config.getoption("pyvmm_scope") or config.getini("pyvmm_scope")


@pytest.fixture(scope=_scope)
def pyvmm_kernel(request: pytest.FixtureRequest) -> str | None:
    """The kernel of ``--pyvmm-kernel`` that this test is run with; None if there is none."""
    kernel: str | None = getattr(request, "param", None)
    if kernel is None or not (kernel.startswith((".", "/")) or os.sep in kernel):
        return kernel
    return str(request.config.invocation_params.dir / kernel)


@pytest.fixture(scope=_scope)
def machine_factory(
    request: pytest.FixtureRequest, pyvmm_kernel: str | None
) -> Iterator[Callable[..., TestMachine]]:
    """A function that makes machines: ``machine_factory(cpus=2, net="vhost-net")``. It takes the
    keywords of the marker; all machines end with the test.
    """
    records: list[Record] = []

    def make(**wishes: Any) -> TestMachine:
        return _make(
            request,
            {"kernel": pyvmm_kernel} | _marked(request) | wishes,
            f"machine {len(records)}",
            records,
        )

    yield make
    _close(request, records)


@pytest.fixture(scope=_scope)
def vm(request: pytest.FixtureRequest, pyvmm_kernel: str | None) -> Iterator[TestMachine]:
    """A running machine, made as the marker ``pyvmm`` describes it. A Linux guest takes commands
    by ``vm.run``.
    """
    records: list[Record] = []
    yield _make(request, {"kernel": pyvmm_kernel} | _marked(request), "vm", records)
    _close(request, records)


def _marked(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The keywords of all markers; for each keyword the nearest marker wins."""
    wishes: dict[str, Any] = {}
    for marker in request.node.iter_markers("pyvmm"):
        if marker.args:
            _refuse(f"pyvmm{marker.args!r}: the marker takes keywords only")
        wishes = marker.kwargs | wishes
    return wishes


def _refuse(text: str) -> NoReturn:
    pytest.fail(text, pytrace=False)


def _make(
    request: pytest.FixtureRequest, wishes: dict[str, Any], name: str, records: list[Record]
) -> TestMachine:
    from pyvmm.diskopt import Disk
    from pyvmm.errors import PyvmmError
    from pyvmm.netopt import Net
    from pyvmm.testing.console import Watch, parse_kinds
    from pyvmm.testing.vm import TestMachine, resolve

    config = request.config
    unknown = sorted(set(wishes) - set(MARKER))
    if unknown:
        _refuse(f"pyvmm({unknown[0]}=...): it takes {', '.join(MARKER)}")
    wishes = dict(wishes)
    kernel = wishes.pop("kernel", None)
    if kernel is not None:
        kernel = os.fspath(kernel)
        kernel = str(config.rootpath / kernel) if os.sep in kernel else kernel
    start, limit = wishes.pop("start", True), wishes.pop("timeout", None)
    limit = float(config.getini("pyvmm_boot_timeout")) if limit is None else limit
    nets = wishes.pop("net", "none")
    scenario = wishes.pop("scenario", None)
    record = Record(request.node, name)
    try:
        kinds = wishes.pop("fail_on", None)
        if kinds:
            record.watch = Watch(parse_kinds(kinds if isinstance(kinds, str) else ",".join(kinds)))
            wishes["watched"] = True
        wishes["nets"] = [
            n if isinstance(n, Net) else Net.parse(n)
            for n in ([nets] if isinstance(nets, str | Net) else nets)
        ]
        disks = wishes.pop("disk", ())
        wishes["disks"] = [
            d if isinstance(d, Disk) else Disk.parse(str(config.rootpath / d))
            for d in ([disks] if isinstance(disks, str | Disk) else disks)
        ]
        wishes.setdefault("initrd", config.getoption("pyvmm_initrd"))
        wishes["append"] = f"{config.getoption('pyvmm_append')} {wishes.get('append', '')}".strip()
        if wishes["initrd"] is None:
            del wishes["initrd"]
        added = wishes.pop("add", ())
        added = [added] if isinstance(added, str | os.PathLike) else added
        # Paths of a marker are below the root, as the kernel's; those of options are the shell's.
        wishes["add"] = [
            *(str(config.rootpath / add) for add in added),
            *config.getoption("pyvmm_add"),
        ]
        modules = wishes.pop("modules", None)
        wishes["modules"] = (
            config.getoption("pyvmm_modules") if modules is None else str(config.rootpath / modules)
        )
        _check_host(resolve(kernel)[0])
        made = TestMachine(kernel, **wishes)
        record.machine = made  # which is closed if the scenario is none
        if scenario is not None:
            named = os.sep in scenario or "." in scenario
            made.play(str(config.rootpath / scenario) if named else scenario)
    except (PyvmmError, ValueError) as e:
        if record.machine is not None:
            record.machine.close()
        _refuse(f"pyvmm: {e}")
    records.append(record)
    config.stash.setdefault(RECORDS, []).append(record)
    if isinstance(request.node, pytest.Item):
        request.node.user_properties.append((f"pyvmm {name}", kernel or "default"))
    if record.watch is not None:
        made.console.add_sink(record.watch)
    if start:
        try:
            made.ready(limit)
        except PyvmmError as e:
            text = str(e)
            _close(request, records)
            _refuse(f"pyvmm: the guest did not come up: {text}")
    return made


def _check_host(kernel: str) -> None:
    from pyvmm.boot import is_linux
    from pyvmm.doctor import can_run_linux_locally
    from pyvmm.errors import KvmUnsuitable

    good, reason = can_run_linux_locally()
    if not good and is_linux(kernel):
        raise KvmUnsuitable(
            f"no Linux guest can run here: {reason}",
            "run the tests in the testbed: pytest --pyvmm-host testbed, "
            "or pyvmm_host = auto in the configuration",
        )


def _close(request: pytest.FixtureRequest, records: list[Record]) -> None:
    """End the machines, the last one first. The test fails if a kernel has made a report of a
    kind in ``fail_on``.
    """
    troubles: list[Trouble] = []
    count = 0
    for record in reversed(records):
        if record.machine is None:
            continue
        record.machine.close()
        if record.watch is not None:
            record.watch.finish()
            troubles += record.watch.troubles
            count += record.watch.count
    records.clear()
    if troubles:
        from pyvmm.testing.console import headline

        first = troubles[0]
        _refuse("\n".join([f"pyvmm: {headline(first, count)}:", *first.lines]))


# --- reports --------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add console and exits of the test's machines to the report of a failure."""
    report = yield
    records = item.config.stash.get(RECORDS, None)
    if records and report.failed:
        chain = item.listchain()
        for record in records:
            if record.node in chain:
                report.sections += record.sections()
    if records and report.when == "teardown":  # machines of wider scopes live on
        records[:] = [r for r in records if r.node is not item]
    return report
