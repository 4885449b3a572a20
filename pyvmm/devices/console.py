"""Streams between guest and user: the serial console, and the byte streams of the guest port.

The guest's output goes into a pipe. A reader thread takes it from there, keeps the latest part and
hands all of it to sinks. A sink that fails (a closed terminal, a full disk) is dropped, and the
guest goes on. A slow sink loses nothing: when the pipe is full, the vCPU that writes waits, as any
process waits that writes to a full pipe. Only a sink that takes nothing at all for minutes is given
up. The end of the machine never waits for a sink without limit.
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
PATIENCE = 300.0  # seconds that a sink waits while its reader reads nothing at all
#: Bytes of each stream of the guest's in the file of a machine in the background.
BACKGROUND_MAX = 1 << 30
KEEP = 1 << 20  # bytes of output that are kept for expect() and for messages


class Stream:
    """Bytes that the guest writes. The object owns the pipe and its reader thread.

    :param name: names the thread and the stream in messages.
    :ivar text: the latest output, about ``KEEP`` bytes; ``dropped_text`` counts the bytes before it
        that were dropped.
    :ivar lost_sinks: the exceptions for which sinks were dropped.
    :ivar reader_gone: whether a sink was dropped because nobody will ever read it (EPIPE).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipe = lib.pv_pipe_new(PIPE_SIZE)
        if self.pipe == ffi.NULL:
            raise MemoryError
        self.text = bytearray()
        self.dropped_text = 0
        self.lost_sinks: list[Exception] = []
        self.reader_gone = False
        self._dropped = 0  # the pipe's count, kept when the pipe is freed
        #: Held while another thread than the reader or a vCPU uses the pipe: such a thread may come
        #: late, and ``close`` frees the pipe.
        self._using = threading.Lock()
        self._sinks: list[Callable[[bytes], None]] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread = Thread(target=self._read, name=name, daemon=True)

    def plug(self, bus: Bus, port: int, name: str) -> None:
        """Let the guest write to ``port``, single bytes or strings (``rep outsb``)."""
        bus.add(PIO, port, 1, name, kind=lib.PV_REGION_STREAM, opaque=self.pipe)

    def start(self) -> None:
        """Start the reader thread."""
        self._thread.start()

    def add_sink(self, sink: Callable[[bytes], None]) -> None:
        """Call ``sink`` with every piece of output from now on, in the reader thread. A sink that
        raises an exception is dropped.
        """
        self._sinks.append(sink)

    def _read(self) -> None:
        pipe = self.pipe  # close() clears the attribute, but frees the pipe only after this thread
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
                    self.reader_gone = self.reader_gone or isinstance(e, BrokenPipeError)
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
        """Add bytes that the guest wrote by another way than the stream's own port.

        This waits until the pipe has room, so the caller must hold no lock that others need.
        """
        lib.pv_pipe_write(self.pipe, data, len(data), -1)

    def expect(
        self, pattern: str | bytes | re.Pattern[bytes], timeout: float = 30.0
    ) -> re.Match[bytes]:
        """Wait until the output in ``text`` matches ``pattern``, a regular expression.

        :param timeout: seconds.
        :returns: the match.
        :raises TimeoutError: no match came in time, or the output has ended. The error has the end
            of the output.
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
        """Let no vCPU wait for room in the pipe any longer, because the machine ends or is reset.
        Output that does not fit is dropped and counted. ``hurry=False`` undoes this.
        """
        with self._using:
            if self.pipe != ffi.NULL:
                lib.pv_pipe_hurry(self.pipe, hurry)

    def hurry(self) -> None:
        """End soon: neither the vCPUs nor the reader thread wait any longer for somebody who does
        not take the output.
        """
        self.release()
        for sink in list(self._sinks):
            if isinstance(sink, FdSink):
                sink.patience = min(sink.patience, 0.2)

    def finish(self, timeout: float = 1.0) -> None:
        """Say that the guest writes no more, and wait at most ``timeout`` seconds for the reader
        thread to take the rest.
        """
        with self._using:
            if self.pipe == ffi.NULL:
                return
            lib.pv_pipe_close(self.pipe)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def drain(self, timeout: float | None = None) -> None:
        """After ``finish``, wait until the sinks have taken all output or have lost patience, at
        most ``timeout`` seconds; then ``hurry``.
        """
        if self._thread.is_alive():
            self._thread.join(timeout)
            self.hurry()

    @property
    def position(self) -> int:
        """How many bytes the reader thread has taken so far. ``text`` ends at this position."""
        with self._changed:
            return self.dropped_text + len(self.text)

    @property
    def written(self) -> int:
        """The ``position`` at which the reader thread will have taken all that has been written by
        now. No vCPU may run.
        """
        with self._using:
            if self.pipe == ffi.NULL:
                return self.position
            return int(lib.pv_pipe_total(self.pipe) - lib.pv_pipe_dropped(self.pipe))

    @property
    def dropped(self) -> int:
        """How many bytes the guest wrote that no reader took in time."""
        with self._using:
            if self.pipe != ffi.NULL:
                self._dropped = int(lib.pv_pipe_dropped(self.pipe))
            return self._dropped

    def close(self) -> None:
        """Release the stream once no vCPU runs any more. A second call does nothing."""
        if self.pipe == ffi.NULL:
            return
        self.finish(0.1)
        with self._using:
            self._dropped = int(lib.pv_pipe_dropped(self.pipe))
            pipe, self.pipe = self.pipe, ffi.NULL
        if not self._thread.is_alive():
            self._free(pipe)  # a thread that hangs in a sink keeps the pipe: a leak beats a crash

    def _free(self, pipe: Any) -> None:
        lib.pv_pipe_free(pipe)


#: The names of the UART's registers in the PC16550D data sheet, table II.
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
    """A serial console (a 16550A): a stream from the guest and a keyboard to the guest.

    :param vm: lent.
    :param gsi: the port's interrupt line.
    """

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
        """Type as much of ``data`` as fits into the port's receive queue now.

        :returns: the number of bytes taken; 0 once the port is closed.
        """
        with self._changed:  # close() may free the port in another thread
            return (
                0
                if self.serial == ffi.NULL
                else int(lib.pv_serial_input(self.serial, data, len(data)))
            )

    def send(self, data: str | bytes, timeout: float = 10.0) -> None:
        """Type ``data``, piece by piece, as the guest reads it.

        :param timeout: seconds to wait without any progress.
        :raises TimeoutError: the guest does not read, or has ended.
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
        """Set the port's registers to their values after a machine reset."""
        lib.pv_serial_reset(self.serial)

    def _free(self, pipe: Any) -> None:
        with self._changed:
            serial, self.serial = self.serial, ffi.NULL
        lib.pv_serial_free(serial)  # before the pipe, because the port removes its hook from it
        super()._free(pipe)


class Spotter:
    """A sink that looks for a phrase in the output, also if the phrase comes in two pieces.

    :param found: called for each piece of output that completes the phrase.
    """

    def __init__(self, phrase: bytes, found: Callable[[], None]) -> None:
        self._phrase, self._found = phrase, found
        self._last = b""

    def __call__(self, data: bytes) -> None:
        text = self._last + data
        if self._phrase in text:
            self._found()
            self._last = b""
        else:
            self._last = text[1 - len(self._phrase) :]


class FdSink:
    """A sink that writes to a descriptor, which may be slow.

    It waits up to ``patience`` seconds for room; meanwhile the pipe fills and the guest waits, too.
    After that, it drops and counts the output until the descriptor has room again. A call raises
    OSError if the descriptor's other end is gone for good.

    :param fd: lent.
    :param gone: called if nobody will ever read the descriptor (EPIPE).
    :param limit: the most bytes that are written, so that no guest can fill a disk; None: any
        number.
    :ivar patience: in seconds; any thread may lower it while a write waits.
    :ivar dropped: the number of bytes dropped; ``beyond`` of them because of ``limit``.
    :ivar error: why the descriptor takes no more.
    """

    SLICE = 0.05  # seconds after which a waiting write looks at ``patience`` again

    def __init__(
        self,
        fd: int,
        patience: float = PATIENCE,
        gone: Callable[[], object] = lambda: None,
        limit: int | None = None,
    ) -> None:
        self._fd, self._gone, self._left = fd, gone, limit
        self.patience = patience
        self._stuck = False
        self.dropped = self.beyond = 0
        self.error: OSError | None = None
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def _wait(self) -> bool:
        """Wait for room, at most as long as patience lasts; returns whether there is any."""
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
        if self._left is not None:
            beyond = max(0, len(view) - self._left)
            self.dropped += beyond
            self.beyond += beyond
            view = view[: len(view) - beyond]
            self._left -= len(view)
        while view:
            self._stuck = not self._wait()
            if self._stuck:
                self.dropped += len(view)
                return
            try:
                # A blocking pipe that is writable takes PIPE_BUF bytes without blocking.
                view = view[os.write(self._fd, view[:4096]) :]
            except BlockingIOError:
                continue
            except OSError as e:
                self.dropped += len(view)
                self.error = e
                if isinstance(e, BrokenPipeError):
                    self._gone()
                raise
