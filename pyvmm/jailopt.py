"""How users describe a jail: ``--jail UID[:GID][,key=value...]``."""

from __future__ import annotations

from pyvmm.errors import UsageError, did_you_mean
from pyvmm.memory import parse_size
from pyvmm.netopt import UID_MAX, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.devopt import Device

KEYS = ("memory", "cpus", "pids")
#: Bytes that pyvmm itself takes at most, besides the guest's memory: interpreter, helper, rings.
OVERHEAD = 96 << 20
#: Processes and threads that pyvmm has without any vCPU and card.
TASKS = 24
#: The same, per card: workers, the thread that speaks for the card, a back-end.
TASKS_PER_CARD = 16
#: Bytes, and processes and threads, of each machine's process (``apart``) beyond the first.
OVERHEAD_PER_MACHINE, TASKS_PER_MACHINE = 12 << 20, 10
PIDS_MAX = 4 << 20  # PID_MAX_LIMIT of the kernel
CPUS_MAX = 8192


class Jail:
    """What a jail is to be.

    :param text: ``UID[:GID]`` and limits: ``memory=SIZE``, ``cpus=N`` with at most three digits
        behind the point, ``pids=N``.
    :ivar uid, gid: the user and the group, neither of them 0; without GID the same as UID.
    :ivar memory: bytes; 0: no limit. :ivar millicpus: thousandths of a processor; 0: no limit.
    :ivar pids: processes and threads; 0: no limit.
    :raises UsageError: a value is not allowed.
    """

    __slots__ = ("gid", "memory", "millicpus", "pids", "text", "uid")

    def __init__(self, text: str) -> None:
        self.text = text
        user, *parts = text.split(",")
        uid, colon, gid = user.partition(":")
        for what, value in (("user", uid), ("group", gid if colon else uid)):
            good = value.isascii() and value.isdecimal() and len(value) <= 10
            if not good or not 0 < int(value) <= UID_MAX:
                raise UsageError(
                    f"--jail {text}: {value!r} is no {what} for a jail",
                    "write --jail UID[:GID] with numbers of a user that has nothing else, not 0",
                )
        self.uid, self.gid = int(uid), int(gid or uid)
        self.memory = self.millicpus = self.pids = 0
        seen = set()
        for part in parts:
            key, equals, value = part.partition("=")
            if key not in KEYS or not equals:
                raise UsageError(
                    f"--jail: unknown key {key!r}",
                    f"{did_you_mean(key, KEYS)}keys: {', '.join(KEYS)}",
                )
            if key in seen:
                raise UsageError(f"--jail: {key} is given twice", "give it once")
            seen.add(key)
            if key == "memory":
                self.memory = parse_size(value, "--jail: memory=")
            elif key == "cpus":
                self.millicpus = _millicpus(value)
            else:
                self.pids = number("pids", value, 1, PIDS_MAX, option="--jail")

    @property
    def limited(self) -> bool:
        """Whether there is a limit that needs a cgroup."""
        return bool(self.memory or self.millicpus or self.pids)

    def check(
        self,
        memory: int,
        *,
        cpus: int,
        cards: int,
        devices: Sequence[Device] = (),
        machines: int = 1,
    ) -> None:
        """Refuse limits within which no machine can run.

        :param memory: of the guest, in bytes. :param cpus: its vCPUs. :param cards: its cards.
        :param devices: its other devices. :param machines: such machines at a time.
        :raises UsageError: a limit is too low.
        """
        taken = OVERHEAD + (machines - 1) * OVERHEAD_PER_MACHINE
        taken += sum(device.memory for device in devices)
        least = machines * memory + taken
        if self.memory and self.memory < least:
            alone = not any(device.memory for device in devices)
            what = "pyvmm itself takes" if alone else "pyvmm and its back-ends take"
            raise UsageError(
                f"--jail: memory={self.memory >> 20}M for {machines * memory >> 20}M of guests",
                f"use at least {-(-least >> 20)}M: {what} up to {taken >> 20}M",
            )
        own = cpus + TASKS_PER_CARD * cards + sum(device.tasks for device in devices)
        tasks = TASKS + (machines - 1) * TASKS_PER_MACHINE + machines * own
        if self.pids and self.pids < tasks:
            raise UsageError(
                f"--jail: pids={self.pids}: this takes up to {tasks} processes and threads",
                f"use at least {tasks}",
            )


def _millicpus(text: str) -> int:
    whole, point, rest = text.partition(".")
    good = all(part.isascii() and part.isdecimal() for part in (whole, rest if point else "0"))
    value = int(whole) * 1000 + int(f"{rest:0<3}"[:3]) if good and len(text) < 12 else 0
    if len(rest) > 3 or not 10 <= value <= 1000 * CPUS_MAX:
        raise UsageError(
            f"--jail: cpus={text}", "write a number of processors from 0.01 on, as 2 or 0.5"
        )
    return value
