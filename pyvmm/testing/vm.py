"""The machine of a test: it knows what to boot, runs commands, and counts the exits that something
took.
"""

from __future__ import annotations

from pyvmm.boot import is_linux
from pyvmm.errors import ImageError
from pyvmm.exits.budget import Budget
from pyvmm.exits.phases import Phase
from pyvmm.images import CMDLINE, find, is_name
from pyvmm.machine import Machine
from pyvmm.testing.console import audible

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from pyvmm.exits.phases import Phase
    from pyvmm.exits.snapshot import Snapshot

#: Seconds until the guest takes commands. Under emulation, on a busy host, this takes long.
BOOT_TIMEOUT = 180.0
SUMMARY_LINES = 20


class ExitsExceeded(AssertionError):
    """There were more exits than allowed. pytest shows this as a failed assertion."""


class Exits:
    """The exits of a machine since it was ready, or since the last ``reset``; ``with vm.exits:``
    counts a block alone.

    They can be read until the machine is closed. Their names are those of budgets
    (docs/budgets.md).
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._begin: Snapshot | None = None
        self._outer: list[Snapshot | None] = []

    def reset(self) -> None:
        """Count from now on."""
        self._begin = self._machine.accounts.snapshot("test")

    def phase(self) -> Phase:
        """Everything that has been counted: ``ledger``, ``kvm``, ``counters``, ``metrics()``."""
        accounts = self._machine.accounts
        return Phase("test", accounts, self._begin, accounts.snapshot("now"))

    def counts(self) -> dict[str, int | None]:
        """The figures up to now, by name; None if nothing counts a figure."""
        return self.phase().metrics()

    def assert_within(self, *budgets: str, **limits: float) -> dict[str, float | None]:
        """Fail unless all budgets hold: ``assert_within(user_exits=5000, notify_per_kpacket=20)``.

        :param limits: the largest allowed value of each figure.
        :param budgets: other conditions, such as ``"packets>=100"``, ``"exits[serial0]==0"``.
        :returns: the value of each budget.
        :raises ExitsExceeded: a budget is broken; names each of them, and the most frequent exits.
        :raises UsageError: there is no such figure, or this machine does not count it.
        """
        phase = self.phase()
        found: dict[str, float | None] = {}
        wrong = []
        for text in (*budgets, *(f"{name}<={limit}" for name, limit in limits.items())):
            budget = Budget(text)
            budget.check_names(self._machine.accounts)
            value = found[text] = budget.value(phase)
            if value is None:
                wrong.append(f"{text}: there were no packets")
            elif not budget.holds(value):
                wrong.append(f"{text}: it is {value:g}")
        if wrong:
            lines = [
                f"  {line.count:8}  {line.what}" for line in phase.ledger.lines[:8] if line.count
            ]
            raise ExitsExceeded("\n".join([*wrong, "most frequent:", *lines]))
        return found

    def __enter__(self) -> Self:
        self._outer.append(self._begin)
        self.reset()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._begin = self._outer.pop()

    def __repr__(self) -> str:
        return f"Exits({self.counts()!r})"


class TestMachine(Machine):
    """A ``Machine`` for tests.

    :param kernel: a file, or the name of an image of pyvmm; None for the image ``default``. A Linux
        kernel without ``initrd`` gets the initrd of the default image, with pyvmm's init, which
        takes commands. :param watched: whether a ``Watch`` will search the console, so that the
        kernel has to print its warnings there. The other parameters are those of ``Machine``.
    :ivar exits: see ``Exits``.
    """

    __test__ = False  # not a pytest class

    def __init__(
        self,
        kernel: str | None = None,
        *,
        initrd: str | None = None,
        append: str = "",
        command: Any = None,
        agent: bool | None = None,
        watched: bool = False,
        **more: Any,
    ) -> None:
        path, own_initrd, base = resolve(kernel)
        full = f"{base} {append}".strip()
        ours = initrd is None and own_initrd is not None
        if agent is None:
            agent = ours and command is None
        super().__init__(
            path,
            initrd=initrd or own_initrd,
            append=audible(full) if watched else full,
            command=command,
            agent=agent,
            **more,
        )
        self.exits = Exits(self)
        self._summary = ""

    def summary(self) -> str:
        """The exits up to now, the most frequent first, for people. It may be called after
        ``close``, too.
        """
        if self._summary:
            return self._summary
        ledger = self.ledger()
        lines = [f"{ledger.total} exits to the VMM"]
        return "\n".join(
            [*lines, *(f"{x.count:8}  {x.what}" for x in ledger.lines[:SUMMARY_LINES])]
        )

    def close(self) -> None:
        """Stop, and release everything. A second call does nothing."""
        if not self._summary:
            self.stop()
            self._summary = self.summary()
        super().close()

    def ready(self, timeout: float = BOOT_TIMEOUT) -> Self:
        """Start, and wait until the guest takes commands; if it never does, wait until init runs.

        :param timeout: seconds.
        :raises PyvmmError: the guest does not come up.
        """
        self.start()
        if self.waits_for_commands:
            self.run(["true"], ready_timeout=timeout)
        self.exits.reset()
        return self


def resolve(kernel: str | None) -> tuple[str, str | None, str]:
    """What to boot: path of the kernel; path of its initrd, or None if it needs none; and its
    parameters.

    :raises ImageError: there is no such image or file.
    """
    if kernel is None or is_name(kernel):
        image = find(kernel or "default")
        return image.kernel, image.initrd, CMDLINE
    if not is_linux(kernel):
        return kernel, None, ""
    try:
        return kernel, find("default").initrd, CMDLINE
    except ImageError:
        return kernel, None, ""
