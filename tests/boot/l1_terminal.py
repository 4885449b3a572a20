"""Runs in the testbed: plays a person at a terminal, once for each scenario on stdin, and says on
stdout what happened.

A scenario is {"argv": [...], "steps": [[what, value], ...]} with the steps
  expect REGEX    wait until the output from here on matches
  type TEXT       press keys
  sleep SECONDS
  signal NUMBER   to the command
  resize [COLUMNS, ROWS]
  hangup 0        close the terminal's other end
and a result is {"status", "seconds" from the last step to the end, "raw" whether the terminal's
modes differed at the last step, "restored" whether they are as before, "output", "late" what was
missed}.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import termios
import time

PATIENCE = 180.0
#: Written behind the command's output. A terminal passes these bytes on as they are.
END = b"\0end of output\0"


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, argv: list[str]) -> None:
        self.master, self.slave = os.openpty()
        self.output = bytearray()
        self.before = termios.tcgetattr(self.slave)
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            for fd in (0, 1, 2):
                os.dup2(self.slave, fd)
            import fcntl

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            os.closerange(3, 100)
            os.execvp(argv[0], argv)

    def pump(self, seconds: float) -> None:
        """Read what comes within that time, or the first piece."""
        if self.master >= 0 and select.select([self.master], [], [], seconds)[0]:
            try:
                self.output += os.read(self.master, 65536)
            except OSError:
                pass

    def expect(self, pattern: str, start: int) -> bool:
        """Whether the output from ``start`` matches in time."""
        until = time.monotonic() + PATIENCE
        while not re.search(pattern.encode(), bytes(self.output[start:]), re.MULTILINE):
            if time.monotonic() > until:
                return False
            self.pump(1.0)
        return True

    def drain(self) -> None:
        """Read all that the command has written: what is on its way may come after its end."""
        while select.select([self.master], [], [], 0)[0]:
            self.pump(0)
        os.write(self.slave, END)
        until = time.monotonic() + PATIENCE
        while not self.output.endswith(END) and time.monotonic() < until:
            self.pump(1.0)
        self.output = self.output.removesuffix(END)

    def wait(self) -> int | None:
        """The exit status as a shell has it; None, and killed, where it does not end."""
        until = time.monotonic() + PATIENCE
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return None
            if self.master >= 0:
                self.pump(0.02)
            else:
                time.sleep(0.02)


def play(scenario: dict[str, object]) -> dict[str, object]:
    """One scenario."""
    terminal = Terminal(scenario["argv"])  # type: ignore[arg-type]
    late = ""
    at = 0
    for what, value in scenario["steps"]:  # type: ignore[attr-defined]
        if what == "expect":
            if not terminal.expect(value, at):
                late = value
                os.kill(terminal.pid, signal.SIGKILL)
                break
        elif what == "type":
            at = len(terminal.output)
            os.write(terminal.master, value.encode())
        elif what == "sleep":
            until = time.monotonic() + value
            while (left := until - time.monotonic()) > 0:
                terminal.pump(left)
        elif what == "signal":
            raw = termios.tcgetattr(terminal.slave) != terminal.before
            os.kill(terminal.pid, value)
        elif what == "resize":
            termios.tcsetwinsize(terminal.slave, tuple(reversed(value)))
        elif what == "hangup":
            os.close(terminal.master)
            os.close(terminal.slave)
            terminal.master = terminal.slave = -1
        if what != "signal" and terminal.slave >= 0:
            raw = termios.tcgetattr(terminal.slave) != terminal.before
    start = time.monotonic()
    status = terminal.wait()
    seconds = time.monotonic() - start
    if terminal.slave >= 0:
        terminal.drain()
    restored = terminal.slave < 0 or termios.tcgetattr(terminal.slave) == terminal.before
    for fd in (terminal.master, terminal.slave):
        if fd >= 0:
            os.close(fd)
    return {
        "status": status,
        "seconds": round(seconds, 2),
        "raw": raw,
        "restored": restored,
        "output": terminal.output.decode(errors="replace"),
        "late": late,
    }


if __name__ == "__main__":
    json.dump([play(scenario) for scenario in json.load(sys.stdin)], sys.stdout)
