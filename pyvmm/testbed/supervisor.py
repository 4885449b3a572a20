"""The supervisor: the process on the host that owns one L1 and connects clients to the agent in L1.

The process takes its options as a JSON object on stdin (see
``Supervisor``). The supervisor starts the emulator (``machine``), listens on a socket, renumbers
channels and asks the agent for a sign of life every second. If L1 hangs or dies, the supervisor
tells every client why, and ends. Its child processes die with it.
"""

from __future__ import annotations

import fcntl
import json
import marshal
import os
import re
import selectors
import signal
import socket
import sys
import time

from pyvmm.errors import PyvmmError, TestbedError
from pyvmm.host.paths import cache_root
from pyvmm.testbed import protocol as p
from pyvmm.testbed.machines import machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.testbed.machine import Machine

PING_EVERY = 1.0  # seconds
REST_AFTER = 2.0  # seconds without a command until a machine that never rests is stopped
CHATTER_KEPT = 4096  # bytes of what the emulator prints on its terminal
CONSOLE_KEPT = 64 << 10  # bytes of L1's console that are kept for the log
#: Bytes that may wait for a client. Credit allows L1 much less, and L1 is not trusted.
OUT_MAX = 4 << 20
#: Bytes that may wait for L1, which stops reading when it hangs. An OPEN has 6 MiB at most.
PORT_MAX = 128 << 20
NOTES_MAX, NOTE_MAX = 100, 400  # notes of L1's, and characters of one


class Client:
    """One connection. It runs at most one command."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.framer = p.Framer()
        self.out = bytearray()
        self.channel = 0
        #: OPEN and the frames after it, which wait until L1 is ready and ``due`` has passed; each
        #: is (type, stream, payload).
        self.early: list[tuple[int, int, bytes]] = []
        self.due = 0.0
        self.closing = False


class Supervisor:
    """Runs one L1 until somebody stops it, or until it fails.

    ``options`` has these keys:

    - socket, lock: paths of the socket to listen on and of the lock file;
    - log_later: the path at which the log is found after the end, for messages;
    - cpu: the processor, as in ``machines.CPUS``;
    - host: the machine as ssh://[USER@]NAME[:PORT], or an empty string for an emulated one;
    - cpus: the number of vCPUs for commands, or 0 for as many as there can be, at most two;
    - memory: bytes, or 0 for the machine's own default;
    - kernel: a prefix of the kernel's version, or None;
    - kvm: options of L1's KVM module, each as NAME=VALUE;
    - writable: the directories that commands may write;
    - add: what travels into a machine that does not share files, each as FILE|DIR[:PATH];
    - directories: directories that exist in such a machine;
    - vdpa_card: whether L1 has a card for vp_vdpa;
    - watchdog: seconds without a sign of life after which L1 counts as hung, or None for the
      machine's own default;
    - tether: a descriptor, or None; the supervisor stops when its other end is closed.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.started = time.monotonic()
        self.selector = selectors.DefaultSelector()
        self.clients: dict[int, Client] = {}
        #: None stands for a client that has gone while its command's EXIT is still to come.
        self.channels: dict[int, Client | None] = {}
        self.next_channel = 1
        #: As ``Machine.fresh``. A command starts so long after its client asked for it: by then
        #: every older entry has expired, and the command sees every change that was made before the
        #: client asked.
        self.fresh = 0.0
        self.waiting: list[Client] = []
        self.console = bytearray()
        self.port_out = bytearray()
        self.framer = p.Framer()
        self.greeted = self.ready = False
        self.notes: list[str] = []
        self.stopping = 0.0
        self.last_life = 0.0
        self.last_ping = 0.0
        self.answered = True
        self.busy_until = 0.0
        self.resting = False
        self.chatter = bytearray()
        self.commands = 0
        self.machine: Machine
        self.watchdog = 0.0
        self.ready_after = 0.0

    # --- start ------------------------------------------------------------------------------------

    def listen(self) -> None:
        path = self.options["socket"]
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(64)
        listener.setblocking(False)
        self.listener = listener
        self.selector.register(listener, selectors.EVENT_READ, self.accept)
        r, w = os.pipe()
        os.set_blocking(r, False)
        os.set_blocking(w, False)
        signal.set_wakeup_fd(w)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda number, at: None)
        self.selector.register(r, selectors.EVENT_READ, lambda: self.signalled(r))
        tether = self.options.get("tether")
        if tether is not None:
            self.selector.register(tether, selectors.EVENT_READ, self.untethered)

    def boot(self) -> None:
        """Start the machine.

        :raises PyvmmError: something that it needs is missing.
        """
        self.machine = made = machine(self.options["cpu"], self.options["host"])(
            self.options, self.say
        )
        self.watchdog = self.options["watchdog"] or made.WATCHDOG
        made.start()
        self.notes += made.notes
        self.fresh = made.fresh
        self.started = time.monotonic()
        self.last_life = made.clock()
        self.say(made.intent())
        for fd, handler in (
            (made.port.source, self.from_port),
            (made.console, self.from_console),
            (made.screen, self.from_screen),
        ):
            if fd >= 0:
                self.selector.register(fd, selectors.EVENT_READ, handler)
        self.push_port()

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until the end; returns the exit status for this process."""
        self.listen()
        try:
            self.boot()
            return self.loop()
        except PyvmmError as e:
            self.fail(str(e))
            return 1
        except Exception as e:
            self.fail(f"the testbed's supervisor failed: {e!r}; {self.hint()}")
            raise
        finally:
            if hasattr(self, "machine"):
                for child in self.machine.processes:
                    if child.poll() is None:
                        child.kill()
                    child.wait()
                self.machine.close()
            for client in list(self.clients.values()):
                client.sock.setblocking(True)
                client.sock.settimeout(1)
                try:
                    client.sock.sendall(client.out)
                except OSError:
                    pass

    def loop(self) -> int:
        l1 = self.machine
        last = time.monotonic()
        while True:
            for key, _mask in self.selector.select(self.fresh / 4 if self.waiting else 0.25):
                key.data()
            now = time.monotonic()
            if self.ready and self.waiting:
                self.open_due(now)
            if now - last > 5:  # this process was suspended: L1's silence means nothing
                self.last_life = l1.clock()
            last = now
            if not self.stopping and any(child.poll() is not None for child in l1.processes):
                raise self.obituary()
            trouble = l1.trouble(self.console)
            if trouble and not self.stopping:
                raise TestbedError(f"L1 died: {trouble}", self.hint())
            if self.stopping:
                if l1.vm.poll() is not None or now - self.stopping > 5:
                    self.tell("the testbed was stopped")
                    return 0
            elif self.ready:
                self.watch(now)
            elif l1.clock() - self.last_life > l1.BOOT_TIMEOUT:
                raise TestbedError(
                    f"L1 did not start within {l1.BOOT_TIMEOUT:g} s{self.last_words(failed=False)}",
                    self.hint(),
                )

    def watch(self, now: float) -> None:
        """Ask L1 for a sign of life, or let it rest.

        :raises TestbedError: L1 hangs.
        """
        if self.channels or self.waiting:
            self.busy_until = now + REST_AFTER
        if self.machine.RESTLESS and now > self.busy_until and not self.port_out:
            self.rest(True)
            return
        self.rest(False)
        if self.answered and now - self.last_ping >= PING_EVERY:
            self.last_ping = now
            self.answered = False
            self.to_port(p.frame(p.PING))
        if self.machine.clock() - self.last_life > self.watchdog:
            raise TestbedError(
                f"L1 hung: no sign of life for {self.watchdog:g} s{self.registers()}",
                self.hint(),
            )

    def registers(self) -> str:
        """Write the registers of L1's vCPUs to the log; returns their instruction pointers as text
        for a message.
        """
        text = self.machine.registers()
        print(text, file=sys.stderr)
        rips = re.findall(r"RIP=([0-9a-f]+)", text)
        return f" (RIP {', '.join(rips)})" if rips else ""

    def rest(self, on: bool) -> None:
        """Stop a machine that has nothing to do, or let it go on."""
        if self.resting != on:
            self.resting = on
            self.machine.rest(on)
            self.last_life = self.machine.clock()

    def hint(self) -> str:
        return f"see {self.options['log_later']}"

    def fail(self, why: str) -> None:
        print(why, file=sys.stderr)
        if self.console:
            print(
                "--- L1's console:",
                self.console.decode(errors="replace"),
                "---",
                sep="\n",
                file=sys.stderr,
            )
        self.tell(why)

    def tell(self, why: str) -> None:
        """Let nobody connect any more, and tell all clients why the testbed ends."""
        while self.accept():
            pass
        self.selector.unregister(self.listener)
        self.listener.close()
        os.unlink(self.options["socket"])
        for client in list(self.clients.values()):
            self.to(client, p.frame(p.ERROR, 0, why.encode()))

    def obituary(self) -> TestbedError:
        """Why L1 died: which program was the first to end, how, and its last words."""
        time.sleep(0.3)  # each child ends when another one has; those that fail do so by themselves
        self.take_console()
        names = self.machine.processes
        ended = [child for child in names if child.poll() is not None]
        # The emulator comes first: it is the cause unless another one has failed.
        child = next((c for c in ended if c is not self.machine.vm and c.returncode), ended[0])
        status = child.returncode
        if child is self.machine.vm:
            reason = self.machine.reason(status, printable(self.chatter))
            if reason is not None:
                return TestbedError(*reason)
        how = signal.Signals(-status).name if status < 0 else str(status)
        words = self.last_words(failed=bool(status))
        return TestbedError(f"L1 died: {names[child]} ended with {how}{words}", self.hint())

    def take_console(self) -> None:
        """Read what the emulator still wrote before it ended."""
        for fd, kept in ((self.machine.console, self.console), (self.machine.screen, self.chatter)):
            try:
                while fd >= 0 and (data := os.read(fd, 65536)):
                    kept += data
            except OSError:
                pass  # all is read

    def last_words(self, *, failed: bool) -> str:
        """The line that best explains why L1 died, in brackets.

        :param failed: one of our programs did: then that is the last line of the log. Else the
            first line of L1's console that names a panic or the like, or its last line.
        """
        said = "" if failed else self.console.decode(errors="replace")
        if not said:
            said = printable(self.chatter)
        if not said:
            with open("/proc/self/fd/2", encoding="utf-8", errors="replace") as log:
                said = log.read()
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        telling = [
            line
            for line in lines
            if any(word in line for word in ("panic", "BUG:", "L1:", "switch_root:"))
        ]
        return f" ({(telling or lines)[-1 if not telling else 0]})" if lines else ""

    def say(self, text: str) -> None:
        """Write a line of progress to the log and to all clients."""
        print(text, file=sys.stderr, flush=True)
        for client in list(self.clients.values()):
            self.to(client, p.frame(p.NOTE, 0, text.encode()))

    def stop(self) -> None:
        if not self.stopping:
            self.stopping = time.monotonic()
            if self.ready and self.machine.ORDERLY:
                self.to_port(p.frame(p.STOP))
            else:
                self.machine.vm.kill()

    def signalled(self, fd: int) -> None:
        numbers = os.read(fd, 4096)
        if any(n != signal.SIGCHLD for n in numbers):
            self.stop()

    def untethered(self) -> None:
        self.selector.unregister(self.options["tether"])
        self.stop()

    # --- clients ----------------------------------------------------------------------------------

    def accept(self) -> bool:
        """Accept one connection; returns whether there was one."""
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return False
        sock.setblocking(False)
        client = Client(sock)
        self.clients[sock.fileno()] = client
        self.selector.register(sock, selectors.EVENT_READ, lambda: self.from_client(client))
        if self.ready:
            self.to(client, p.frame(p.READY))
        return True

    def drop(self, client: Client) -> None:
        """Forget a client whose connection has ended, and kill its command."""
        if self.clients.pop(client.sock.fileno(), None) is None:
            return
        self.selector.unregister(client.sock)
        client.sock.close()
        if client.channel and self.channels.get(client.channel) is client:
            self.channels[client.channel] = None
            self.to_port(p.frame(p.CLOSE, client.channel))

    def to(self, client: Client, data: bytes) -> None:
        client.out += data
        self.push(client)
        if len(client.out) > OUT_MAX:
            self.drop(client)

    def push(self, client: Client) -> None:
        try:
            while client.out:
                n = client.sock.send(client.out)
                del client.out[:n]
        except BlockingIOError:
            pass
        except OSError:
            self.drop(client)
            return
        if client.closing and not client.out:
            self.drop(client)
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.out else 0)
        self.selector.modify(client.sock, events, lambda: self.turn(client))

    def turn(self, client: Client) -> None:
        if client.out:
            self.push(client)
        if client.sock.fileno() >= 0:
            self.from_client(client)

    def from_client(self, client: Client) -> None:
        try:
            data = client.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(client)
            return
        try:
            frames = client.framer.feed(data)
        except ValueError:
            self.drop(client)
            return
        for kind, _channel, stream, payload in frames:
            if kind == p.OPEN:
                if client.channel or client.early:
                    self.drop(client)
                    return
                client.early.append((kind, stream, payload))
                client.due = time.monotonic() + self.fresh
                self.waiting.append(client)
            elif kind == p.STOP:
                self.stop()
            elif kind == p.STATUS:
                self.to(client, p.frame(p.NOTE, 0, json.dumps(self.status()).encode()))
            elif client.early:
                client.early.append((kind, stream, payload))
            elif client.channel:
                self.to_port(p.frame(kind, client.channel, payload, stream))

    def open_due(self, now: float) -> None:
        for client in self.waiting[:]:
            if client.sock.fileno() < 0:
                self.waiting.remove(client)
            elif now >= client.due:
                self.waiting.remove(client)
                self.open(client)

    def open(self, client: Client) -> None:
        while self.next_channel in self.channels:
            self.next_channel = self.next_channel % 65535 + 1
        client.channel = self.next_channel
        self.next_channel = self.next_channel % 65535 + 1
        self.channels[client.channel] = client
        self.commands += 1
        early, client.early = client.early, []
        for kind, stream, payload in early:
            self.to_port(p.frame(kind, client.channel, payload, stream))

    def status(self) -> dict[str, Any]:
        """The facts that ``pyvmm testbed status`` shows."""
        l1 = self.machine
        return {
            "protocol": p.VERSION,
            "pid": os.getpid(),
            "ready": self.ready,
            "ready_after_s": round(self.ready_after, 2),
            "up_s": round(time.monotonic() - self.started, 1),
            "cpu": self.options["cpu"],
            "emulator": l1.emulator(),
            "kernel": l1.release,
            "cpus": l1.cpus,
            "memory": l1.memory,
            "shares": l1.SHARES,
            "resting": self.resting,
            "add": self.options["add"],
            "kvm": self.options["kvm"],
            "writable": self.options["writable"],
            "vdpa_card": self.options["vdpa_card"],
            "running": len(self.channels),
            "commands": self.commands,
            "notes": self.notes,
            **l1.facts(),
        }

    # --- L1 ---------------------------------------------------------------------------------------

    def to_port(self, data: bytes) -> None:
        self.port_out += data
        self.push_port()
        if len(self.port_out) > PORT_MAX:
            raise TestbedError(f"L1 takes no more: {PORT_MAX >> 20} MiB wait for it", self.hint())

    def push_port(self) -> None:
        port = self.machine.port
        try:
            if port.busy and port.prelude():
                self.last_life = self.machine.clock()
            while self.port_out and not port.busy:
                n = port.send(memoryview(self.port_out)[: 1 << 16])
                del self.port_out[:n]
        except BlockingIOError:
            pass
        except OSError:
            return  # the emulator has gone; the loop finds out and reports it
        write = selectors.EVENT_WRITE if self.port_out or port.busy else 0
        if port.sink == port.source:
            self.selector.modify(port.source, selectors.EVENT_READ | write, self.from_port)
        elif write and port.sink not in self.selector.get_map():
            self.selector.register(port.sink, write, self.push_port)
        elif not write and port.sink in self.selector.get_map():
            self.selector.unregister(port.sink)

    def from_console(self) -> None:
        self.take(self.machine.console, self.console, CONSOLE_KEPT)

    def from_screen(self) -> None:
        self.take(self.machine.screen, self.chatter, CHATTER_KEPT)

    def take(self, fd: int, kept: bytearray, most: int) -> None:
        """Read from ``fd``, and keep the last ``most`` bytes of all."""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(fd)
            return
        kept += data
        del kept[:-most]

    def from_port(self) -> None:
        port = self.machine.port
        if self.port_out:
            self.push_port()
        try:
            data = port.recv()
        except BlockingIOError:
            return
        if not data:
            self.selector.unregister(port.source)
            return
        self.last_life = self.machine.clock()
        try:
            frames = self.framer.feed(data)
        except ValueError as e:
            raise TestbedError(f"L1 broke the protocol: {e}", self.hint()) from e
        for kind, channel, stream, payload in frames:
            if kind == p.PONG:
                self.answered = True
            elif (kind == p.HELLO and self.greeted) or (kind == p.READY and self.ready):
                # Each is a line of the log, which L1 must not be able to fill a disk with.
                raise TestbedError("L1 broke the protocol: it started twice", self.hint())
            elif kind == p.HELLO:
                self.greeted = True
                self.machine.started(payload.decode(errors="replace"))
                self.say(f"the agent runs ({time.monotonic() - self.started:.1f} s)")
                self.to_port(p.frame(p.CONFIG, 0, marshal.dumps(self.machine.config(), 2)))
            elif kind == p.READY:
                self.became_ready(payload.decode(errors="replace"))
            elif channel in self.channels:
                client = self.channels[channel]
                if kind == p.EXIT:
                    del self.channels[channel]
                if client is not None:
                    client.closing = kind == p.EXIT
                    self.to(client, p.frame(kind, 0, payload, stream))

    def became_ready(self, notes: str) -> None:
        self.ready = True
        now = time.monotonic()
        self.busy_until = now + REST_AFTER
        self.ready_after = now - self.started
        self.notes += [note[:NOTE_MAX] for note in notes.splitlines()[:NOTES_MAX]]
        for note in self.notes:
            self.say(f"L1: {note}")
        self.say(f"ready ({self.ready_after:.1f} s)")
        for client in list(self.clients.values()):
            if not client.early:
                self.to(client, p.frame(p.READY))


def printable(screen: bytes | bytearray) -> str:
    """What a program has printed on its terminal, without the terminal's commands."""
    text = re.sub(rb"\x1b(\[[0-9;?]*[a-zA-Z]|[()].|[=>78])", b"\n", bytes(screen))
    return "".join(c for c in text.decode(errors="replace") if c.isprintable() or c == "\n")


def main() -> int:
    """Read the options, take the lock and serve."""
    options = json.load(sys.stdin)
    lock = os.open(options["lock"], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 3  # another process was faster; the caller uses its testbed
    os.ftruncate(lock, 0)
    os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    os.makedirs(cache_root(), exist_ok=True)
    return Supervisor(options).run()


if __name__ == "__main__":
    sys.exit(main())
