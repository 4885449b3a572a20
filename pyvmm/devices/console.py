"""Streams between guest and user: the serial console, and the byte streams of the guest port.

A reader thread takes what the guest wrote from its pipe, keeps the last of it, and hands it to
sinks. A sink that fails (closed terminal, full disk) is dropped and the guest goes on. A sink that
is slow slows down the vCPU that writes, as a full pipe does any process, and loses nothing; only
one that takes nothing at all for minutes is given up. The end of the machine waits for none of it.
"""

from __future__ import annotations

import os
import select
import threading

from pyvmm._ext import ffi, lib
from pyvmm.bus import PIO, Registers
from pyvmm.threads import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Callable
    from typing import Any

    from pyvmm.bus import Bus
    from pyvmm.kvm.vm import Vm

PIPE_SIZE = 1 << 16
READ_SIZE = 1 << 14
PATIENCE = 300.0  # seconds that a sink waits for somebody who reads nothing at all
KEEP = 1 << 20  # bytes of output kept for expect() and for messages


class Stream:
    """Bytes that the guest writes; owns the pipe and its reader thread.

    :ivar text: the last ``KEEP`` bytes, with ``dropped_text`` bytes before them gone.
    :ivar lost_sinks: what the sinks raised that were dropped for it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipe = lib.pv_pipe_new(PIPE_SIZE)
        if self.pipe == ffi.NULL:
            raise MemoryError
        self.text = bytearray()
        self.dropped_text = 0
        self.lost_sinks: list[Exception] = []
        self._dropped = 0  # the pipe's count once it is gone
        self._sinks: list[Callable[[bytes], None]] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread = Thread(target=self._read, name=name, daemon=True)

    def plug(self, bus: Bus, port: int, name: str) -> None:
        """Let the guest write at ``port``, bytes or strings of them."""
        bus.add(PIO, port, 1, name, kind=lib.PV_REGION_STREAM, opaque=self.pipe)

    def start(self) -> None:
        """Start reading."""
        self._thread.start()

    def add_sink(self, sink: Callable[[bytes], None]) -> None:
        """Call ``sink`` with every piece from now on, in the reader's thread; one that raises is
        dropped.
        """
        self._sinks.append(sink)

    def _read(self) -> None:
        pipe = self.pipe  # lives as long as this thread, whatever close() does to the attribute
        buf = ffi.new("uint8_t[]", READ_SIZE)
        while True:
            n = lib.pv_pipe_read(pipe, buf, READ_SIZE, -1)
            if n < 0:
                break
            data = bytes(ffi.buffer(buf, n))
            for sink in list(self._sinks):
                try:
                    sink(data)
                except Exception as e:
                    self._sinks.remove(sink)
                    self.lost_sinks.append(e)
            with self._changed:
                self.text += data
                extra = len(self.text) - KEEP
                if extra > KEEP // 4:
                    del self.text[:extra]
                    self.dropped_text += extra
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def put(self, data: bytes) -> None:
        """Bytes that the guest wrote and that did not come through the pipe's own port.

        Waits for room as long as the reader takes; hold no lock that others need.
        """
        lib.pv_pipe_write(self.pipe, data, len(data), -1)

    def expect(
        self, pattern: str | bytes | re.Pattern[bytes], timeout: float = 30.0
    ) -> re.Match[bytes]:
        """Wait until the output kept so far matches ``pattern`` (a regular expression); returns the
        match.

        :param timeout: seconds. :raises TimeoutError: with the end of the output.
        """
        import re
        import time

        compiled = re.compile(
            pattern.encode() if isinstance(pattern, str) else pattern, re.MULTILINE
        )
        until = time.monotonic() + timeout
        with self._changed:
            while True:
                match = compiled.search(bytes(self.text))
                if match:
                    return match
                left = until - time.monotonic()
                if left <= 0 or self._ended:
                    tail = bytes(self.text[-400:]).decode(errors="replace")
                    raise TimeoutError(
                        f"{self.name}: {compiled.pattern!r} did not come; the end was: {tail!r}"
                    )
                self._changed.wait(left)

    def release(self, hurry: bool = True) -> None:
        """The machine is to end or to start over: no vCPU waits for room any longer, what does not
        fit is dropped and counted. ``False`` undoes it."""
        if self.pipe != ffi.NULL:
            lib.pv_pipe_hurry(self.pipe, hurry)

    def hurry(self) -> None:
        """All is to end now: neither guest nor reader waits any longer for who does not take the
        output.
        """
        self.release()
        for sink in list(self._sinks):
            if isinstance(sink, FdSink):
                sink.patience = min(sink.patience, 0.2)

    def finish(self, timeout: float = 1.0) -> None:
        """No more will come: let the reader take what is there, for at most ``timeout`` seconds."""
        if self.pipe == ffi.NULL:
            return
        lib.pv_pipe_close(self.pipe)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def drain(self, timeout: float | None = None) -> None:
        """After the end: wait until the sinks have taken all, as long as they have patience, at
        most ``timeout`` seconds; then hurry."""
        if self._thread.is_alive():
            self._thread.join(timeout)
            self.hurry()

    @property
    def dropped(self) -> int:
        """Bytes that the guest wrote and no reader took in time."""
        return self._dropped if self.pipe == ffi.NULL else int(lib.pv_pipe_dropped(self.pipe))

    def close(self) -> None:
        """Release; no vCPU runs any more. A second call does nothing."""
        if self.pipe == ffi.NULL:
            return
        self.finish(0.1)
        self._dropped = self.dropped
        pipe, self.pipe = self.pipe, ffi.NULL
        if not self._thread.is_alive():
            self._free(pipe)  # a reader stuck in a sink keeps it: better a leak than a crash

    def _free(self, pipe: Any) -> None:
        lib.pv_pipe_free(pipe)


#: PC16550D data sheet, table II.
UART_REGISTERS = Registers(
    {
        0: ("RBR", "THR"),
        1: "IER",
        2: ("IIR", "FCR"),
        3: "LCR",
        4: "MCR",
        5: "LSR",
        6: "MSR",
        7: "SCR",
        lib.PV_REG_DLAB: "DLL",
        lib.PV_REG_DLAB + 1: "DLM",
    }
)


class Console(Stream):
    """A serial console: a stream from the guest and a keyboard to it."""

    def __init__(self, name: str, vm: Vm, gsi: int) -> None:
        super().__init__(name)
        self._c_fd = vm.c_fd  # C reads it as long as the port exists
        self.serial = lib.pv_serial_new(self._c_fd, gsi, self.pipe)
        if self.serial == ffi.NULL:
            raise MemoryError

    def plug(self, bus: Bus, port: int, name: str) -> None:
        """Put the UART's eight registers at ``port``."""
        region = bus.add(PIO, port, 8, name, kind=lib.PV_REGION_SERIAL, opaque=self.serial)
        region.names = UART_REGISTERS

    def feed(self, data: bytes) -> int:
        """Type as much of ``data`` at the guest as its receive queue takes now; returns how many
        bytes.
        """
        with self._changed:  # against close()
            return (
                0
                if self.serial == ffi.NULL
                else int(lib.pv_serial_input(self.serial, data, len(data)))
            )

    def send(self, data: str | bytes, timeout: float = 10.0) -> None:
        """Type ``data`` at the guest, in pieces as it reads them.

        :param timeout: seconds without progress. :raises TimeoutError: the guest does not read, or
            has ended.
        """
        import time

        raw = data.encode() if isinstance(data, str) else data
        until = time.monotonic() + timeout
        while raw:
            n = self.feed(raw)
            raw = raw[n:]
            if n:
                until = time.monotonic() + timeout
            elif self._ended or time.monotonic() > until:
                raise TimeoutError(f"{self.name}: the guest does not read its input")
            else:
                time.sleep(0.01)

    def reset(self) -> None:
        """The registers after a machine reset."""
        lib.pv_serial_reset(self.serial)

    def _free(self, pipe: Any) -> None:
        with self._changed:
            serial, self.serial = self.serial, ffi.NULL
        lib.pv_serial_free(serial)  # first: it takes its hook off the pipe
        super()._free(pipe)


class FdSink:
    """Writes to a descriptor (lent) that may be slow: waits up to ``patience`` seconds for any room
    (the guest waits, too, once the pipe is full), then drops and counts until there is room again.

    :ivar patience: may be lowered by any thread while a write waits.
    :raises OSError: from the call, when the other end is gone for good.
    """

    SLICE = 0.05  # seconds between looks at ``patience``

    def __init__(self, fd: int, patience: float = PATIENCE) -> None:
        self._fd = fd
        self.patience = patience
        self._stuck = False
        self.dropped = 0
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def _wait(self) -> bool:
        """Whether there is room, at the latest after the time that patience lasts."""
        if self._poll.poll(0):
            return True
        waited = 0.0
        while not self._stuck and waited < self.patience:
            if self._poll.poll(self.SLICE * 1000):
                return True
            waited += self.SLICE
        return False

    def __call__(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._stuck = not self._wait()
            if self._stuck:
                self.dropped += len(view)
                return
            try:
                # PIPE_BUF at most: a blocking pipe that is writable takes that much without
                # blocking.
                view = view[os.write(self._fd, view[:4096]) :]
            except BlockingIOError:
                continue
            except OSError:
                self.dropped += len(view)
                raise
