"""The machine that a test gets: it knows what to boot, runs commands, and says how many exits something took."""

from __future__ import annotations

from pyvmm.errors import ImageError, UsageError
from pyvmm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from pyvmm.exits.ledger import Ledger

BOOT_TIMEOUT = 180.0  # seconds until the guest takes commands: emulated ones on a busy machine need many
MEGA = 1_000_000
SUMMARY_LINES = 20


class ExitsExceeded(AssertionError):
    """More exits than allowed; pytest shows it as a failed assertion."""


class Counts:
    """Counters at a moment, and with ``since`` what was added from then on."""

    def __init__(self, vm: Machine) -> None:
        ledger: Ledger = vm.ledger()
        self.total = ledger.total
        self.lines = {(x.reason, x.addr, x.size, x.write, x.device): x.count for x in ledger.lines}
        self.nets = [nic.device.datapath.counters() for nic in vm.nets]

    def since(self, before: Counts) -> dict[str, int]:
        """Figures by name: ``user_exits``, ``pio``, ``mmio``, ``notify``, the devices by their names, the cards' counters summed."""
        more = {k: n - before.lines.get(k, 0) for k, n in self.lines.items()}
        out = {"user_exits": self.total - before.total, "pio": 0, "mmio": 0, "notify": 0}
        for (reason, _, _, _, device), count in more.items():
            if reason in ("io", "mmio"):
                out["pio" if reason == "io" else "mmio"] += count
                out["notify"] += count if device.endswith(" notify") else 0
                out[device or "nobody"] = out.get(device or "nobody", 0) + count
            else:
                out[reason] = out.get(reason, 0) + count
        for new, old in zip(self.nets, before.nets, strict=True):
            for name, value in new.items():
                if isinstance(value, int):
                    out[name] = out.get(name, 0) + value - old.get(name, 0)
        for name, parts in (
            ("packets", "packets"),
            ("bytes", "bytes"),
            ("kicks", "kicks"),
            ("interrupts", "calls"),
        ):
            out[name] = sum(out.get(f"{way}_{parts}", 0) for way in ("rx", "tx"))
        return out


class Exits:
    """Exits of a machine since it was ready, or since the last ``reset``; ``with vm.exits:`` counts a block alone."""

    def __init__(self, vm: Machine) -> None:
        self._vm = vm
        self._before = Counts(vm)
        self._outer: list[Counts] = []

    def reset(self) -> None:
        """Count from now on."""
        self._before = Counts(self._vm)

    def counts(self) -> dict[str, int]:
        """The figures so far, by name; docs/pytest.md lists them."""
        return Counts(self._vm).since(self._before)

    def assert_within(self, **limits: float) -> dict[str, float]:
        """Fail unless each figure is at most what is given: ``assert_within(user_exits=5000, notify_per_kpacket=20)``.

        :param limits: names of ``counts()``, each also with ``_per_kpacket`` or ``_per_mb``. A device's register has spaces in its
            name: ``**{"net0 notify": 0}``. What never happened counts 0.
        :returns: the figures. :raises ExitsExceeded: naming each that is too high, with the most frequent exits.
        """
        counts = self.counts()
        found: dict[str, float] = {}
        wrong = []
        for name, limit in limits.items():
            value = found[name] = self._value(name, counts)
            if value > limit:
                wrong.append(f"{name} is {value:g}, {value - limit:g} over {limit:g}")
        if wrong:
            most = sorted(self._since().items(), key=lambda item: -item[1])[:8]
            lines = [f"  {count:8}  {what}" for what, count in most if count]
            raise ExitsExceeded("\n".join([*wrong, "most frequent:", *lines]))
        return found

    def _since(self) -> dict[str, int]:
        """Exits since the beginning by cause, in words."""
        out: dict[str, int] = {}
        for x in self._vm.ledger().lines:
            before = self._before.lines.get((x.reason, x.addr, x.size, x.write, x.device), 0)
            out[x.what] = out.get(x.what, 0) + x.count - before
        return out

    @staticmethod
    def _value(name: str, counts: dict[str, int]) -> float:
        for suffix, per, unit in (("_per_kpacket", "packets", 1000), ("_per_mb", "bytes", MEGA)):
            if name.endswith(suffix):
                amount = counts[per]
                if not amount:
                    raise UsageError(f"{name}: no {per} were counted", "send some, or leave the limit out")
                return counts.get(name.removesuffix(suffix), 0) * unit / amount
        return float(counts.get(name, 0))

    def __enter__(self) -> Self:
        self._outer.append(self._before)
        self.reset()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._before = self._outer.pop()

    def __repr__(self) -> str:
        return f"Exits({self.counts()!r})"


class Vm(Machine):
    """A ``Machine`` for tests.

    :param kernel: a file, or the name of an image of pyvmm's; None for the image ``default``. A Linux kernel without ``initrd`` gets
        the default image's, and with it pyvmm's init, which takes commands.
    Other parameters: as of ``Machine``. :ivar exits: see ``Exits``.
    """

    def __init__(
        self,
        kernel: str | None = None,
        *,
        initrd: str | None = None,
        append: str = "",
        command: Any = None,
        agent: bool | None = None,
        **more: Any,
    ) -> None:
        path, own_initrd, base = resolve(kernel)
        ours = initrd is None and own_initrd is not None
        if agent is None:
            agent = ours and command is None
        super().__init__(
            path,
            initrd=initrd or own_initrd,
            append=f"{base} {append}".strip(),
            command=command,
            agent=agent,
            **more,
        )
        self.exits = Exits(self)
        self._summary = ""

    def summary(self) -> str:
        """The exits so far, the most frequent first, for people; also once it is closed."""
        if self._summary:
            return self._summary
        ledger = self.ledger()
        lines = [f"{ledger.total} exits to the VMM"]
        return "\n".join([*lines, *(f"{x.count:8}  {x.what}" for x in ledger.lines[:SUMMARY_LINES])])

    def close(self) -> None:
        """Stop, and release everything. A second call does nothing."""
        if not self._summary:
            self.stop()
            self._summary = self.summary()
        super().close()

    def ready(self, timeout: float = BOOT_TIMEOUT) -> Self:
        """Start, and wait until the guest takes commands, or init runs where it takes none.

        :raises PyvmmError: it does not come up.
        """
        self.start()
        if self.agent is not None:
            self.run(["true"], ready_timeout=timeout)
        self.exits.reset()
        return self


def resolve(kernel: str | None) -> tuple[str, str | None, str]:
    """What to boot: path of the kernel, of an initrd that goes with it (None: it needs none), and its parameters.

    :raises ImageError: there is no such image or file.
    """
    from pyvmm.boot import is_linux
    from pyvmm.images import CMDLINE, NAMES, find

    if kernel is None or kernel in NAMES:
        image = find(kernel or "default")
        return image.kernel, image.initrd, CMDLINE
    if not is_linux(kernel):
        return kernel, None, ""
    try:
        return kernel, find("default").initrd, CMDLINE
    except ImageError:
        return kernel, None, ""
