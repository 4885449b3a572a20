"""Verdicts: the meaning of a run, as one word, one exit status and one line.

A verdict is made of how the machine ended and, for Linux, of the reports on the console
(``testing.console``).
"""

from __future__ import annotations

from pyvmm.errors import BuildError, DiskError, ImageError, PyvmmError, ShareError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from pyvmm.outcome import Abnormal, Outcome

    Kind = Literal[
        Abnormal,
        "passed",
        "skipped",
        "failed",
        "error",
        "budget",
        "host-problem",
        "trouble",
        "ended",
        "disk",
        "interrupted",
    ]

#: Verdict -> exit status; None: the status of the test itself. docs/exit-codes.md has the same
#: table, and a test compares the two.
CODES: dict[Kind, int | None] = {
    "passed": 0,
    "skipped": 77,
    "failed": None,
    "error": 105,
    "budget": 117,
    "host-problem": 101,
    "hang": 116,
    "trouble": 118,
    "ended": 119,
    "panic": 120,
    "reboot": 121,
    "triple-fault": 122,
    "kvm-error": 123,
    "timeout": 124,
    "thread-stopped": 128,
    "share": 131,
    "disk": 133,
    "interrupted": 130,
}
#: What has broken off during the run -> verdict.
LOSSES: dict[type[PyvmmError], Kind] = {ShareError: "share", DiskError: "disk"}
SKIP_STATUS = 77  # as in autotools; a test kernel ends with it by a debug-exit with 77 >> 1


class Verdict:
    """The meaning of a run.

    :ivar kind: one of CODES.
    :ivar message: one line; empty if the run passed and there is nothing to say.
    :ivar status: the test's own exit status if it has one; pyvmm's, if an error, a host problem or
        a signal ended the run.
    :ivar details: more lines: registers, call trace.
    """

    __slots__ = ("details", "kind", "message", "status")

    def __init__(
        self,
        kind: Kind,
        message: str = "",
        *,
        status: int | None = None,
        details: list[str] | None = None,
    ) -> None:
        assert kind in CODES
        self.kind, self.message, self.status = kind, message, status
        self.details = details or []

    @property
    def code(self) -> int:
        """The exit status of pyvmm for this verdict."""
        code = CODES[self.kind]
        if code is None or self.kind in ("error", "host-problem", "interrupted"):
            return self.status or code or 1
        return code

    @property
    def good(self) -> bool:
        """Whether the run passed or was skipped."""
        return self.kind in ("passed", "skipped")

    def __repr__(self) -> str:
        return f"Verdict({self.kind!r}, {self.message!r}, status={self.status})"


def of_error(error: PyvmmError) -> Verdict:
    """The verdict if no machine could be made or go on: the user asks for something wrong, or the
    host lacks something.
    """
    ours = isinstance(error, UsageError | ImageError | BuildError)
    return Verdict("error" if ours else "host-problem", str(error), status=error.exit_code)


def judge_test(outcome: Outcome) -> Verdict:
    """The verdict of a test kernel.

    Debug-exit with value 0, or status 0 by the guest port, means passed; status 77 (value 38)
    skipped; any other value failed.
    """
    kind, status = outcome.kind, outcome.status
    if kind in ("debug-exit", "poweroff") and status is not None:
        by_port = kind == "debug-exit"
        if status == (1 if by_port else 0):
            return Verdict("passed", status=status)
        if status == SKIP_STATUS:
            return Verdict(
                "skipped", "the kernel says that it cannot test this here", status=status
            )
        how = f"debug-exit with {status >> 1}, status {status}" if by_port else f"status {status}"
        return Verdict("failed", f"the kernel ended by {how}", status=status)
    if kind == "poweroff":
        return Verdict("ended", "the kernel powered off without a status")
    if kind == "stopped":
        return Verdict("interrupted", "stopped before it ended")
    error, abnormal = outcome.error(), outcome.abnormal
    assert error is not None and abnormal is not None, "debug-exit comes with a status"
    return Verdict(abnormal, error.cause)


def register_lines(registers: dict[str, int]) -> list[str]:
    """Registers, four per line."""
    items = [f"{name:>6} {value:016x}" for name, value in registers.items()]
    return ["  ".join(items[i : i + 4]) for i in range(0, len(items), 4)]


def last_lines(text: bytes | bytearray, count: int = 20) -> list[str]:
    """The last ``count`` lines of a console, without control characters."""
    return [
        clean(line)
        for line in bytes(text[-200 * count :]).decode(errors="replace").splitlines()[-count:]
    ]


def clean(line: str) -> str:
    """A line with U+FFFD in place of each character that would move a terminal's cursor or that
    XML cannot hold.
    """
    return "".join(
        c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in line.rstrip()
    )
