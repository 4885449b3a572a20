"""The supervisor: the process on the host that owns one L1 and connects clients to the agent in L1.

The process takes its options as a JSON object on stdin (see
``Supervisor``). The supervisor starts virtiofsd and QEMU, listens on a socket, renumbers channels
and asks the agent for a sign of life every second. If L1 hangs or dies, the supervisor tells every
client why, and ends. Its child processes die with it.
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
import subprocess
import sys
import time

from pyvmm.errors import PyvmmError, TestbedError
from pyvmm.host.paths import cache_root
from pyvmm.host.qemu import Qemu, newest
from pyvmm.host.shim import open_shim
from pyvmm.host.tether import tethered
from pyvmm.hostnet import isolate
from pyvmm.testbed import assets
from pyvmm.testbed import protocol as p

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# An EPYC without the features that TCG does not emulate or gets wrong under nested SVM.
CPU = (
    "EPYC,+svm,+npt,-x2apic,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,"
    "-nrip-save,-xsavec"
)
# Without tsc=reliable, L1's clock would fall back to the HPET. loglevel=4 keeps the console short
# because each character on it is an exit to QEMU.
CMDLINE = "console=ttyS0 loglevel=4 panic=-1 mitigations=off tsc=reliable cryptomgr.notests"
# A card that the driver vp_vdpa can take: behind an IOMMU that snoops, without which vhost-vdpa
# refuses it, and with a page per virtqueue for kicks. It has a cable to a card of L1's own.
VDPA_CARD = [
    "-device", "intel-iommu,intremap=off,snoop-control=on",
    "-netdev", "hubport,id=cable0,hubid=0", "-netdev", "hubport,id=cable1,hubid=0",
    "-device", ("virtio-net-pci,netdev=cable0,mac=52:54:11:22:44:01,addr=1c.0,romfile=,"
                "iommu_platform=on,disable-legacy=on,page-per-vq=on"),
    "-device", "virtio-net-pci,netdev=cable1,mac=52:54:11:22:44:02,addr=1d.0,romfile=",
]  # fmt: skip
BOOT_TIMEOUT = 120.0  # seconds
PING_EVERY = 1.0  # seconds
CONSOLE_KEPT = 64 << 10  # bytes of L1's console that are kept for the log


def l1_cpus(cpus: int) -> int:
    """How many vCPUs L1 needs so that commands can use ``cpus`` of them (see
    ``agent.keep_off_cpu_0``).
    """
    return cpus + 1 if cpus > 1 else 1


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
    - cpus: the number of vCPUs for commands, or 0 for as many as QEMU supports, at most two;
    - memory: bytes;
    - kernel: a prefix of the kernel's version, or None;
    - writable: the directories that commands may write;
    - watchdog: seconds without a sign of life after which L1 counts as hung;
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
        #: For so many seconds L1 may cache a name or an attribute in a writable directory. A
        #: command starts so long after its client asked for it: by then every older entry has
        #: expired, and the command sees every change that was made before the client asked.
        self.fresh = 0.0
        self.waiting: list[Client] = []
        self.console = bytearray()
        self.port_out = bytearray()
        self.framer = p.Framer()
        self.ready = False
        self.notes: list[str] = []
        self.stopping = 0.0
        self.children: list[subprocess.Popen[bytes]] = []
        self.last_pong = 0.0
        self.last_ping = 0.0
        self.commands = 0
        self.qemu: Qemu
        self.kernel: assets.Kernel
        self.cpus = 0
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
        """Start virtiofsd and QEMU.

        :raises TestbedError: something that they need is missing.
        """
        lacks = assets.missing()
        if lacks:
            raise TestbedError(f"{lacks[0][0]} is missing", lacks[0][1])
        self.kernel = assets.find_kernel(self.options["kernel"])
        self.qemu = newest()
        wanted = self.options["cpus"] or min(2, os.cpu_count() or 1)
        self.cpus = wanted if self.options["cpus"] else min(wanted, self.qemu.max_cpus)
        if self.cpus > self.qemu.max_cpus:
            raise TestbedError(
                f"{self.qemu} hangs with more than one vCPU",
                "run: pyvmm testbed setup, or use --cpus 1",
            )
        vmlinux, initrd = assets.boot_files(self.kernel, self.say)
        self.say(f"starting Linux {self.kernel.version} on {self.cpus} vCPU(s) under {self.qemu}")
        root = self.share("root", None)
        work = self.share("work", self.options["writable"])
        port, port_qemu = socket.socketpair()
        console, console_qemu = socket.socketpair()
        qmp, qmp_qemu = socket.socketpair()
        python = os.path.realpath(sys.executable)
        if any(c.isspace() for c in python):
            python = "/usr/bin/python3"
        memory = self.options["memory"] >> 20
        cards, more = (VDPA_CARD, " intel_iommu=on") if self.options["vdpa_card"] else ([], "")
        argv = [
            *self.qemu.argv, "-nodefaults", "-no-user-config",
            "-display", "none", "-no-reboot", "-name", "pyvmm-testbed",
            "-machine", "q35,memory-backend=mem", "-accel", "tcg,thread=multi", "-cpu", CPU,
            "-smp", str(l1_cpus(self.cpus)), "-m", f"{memory}M",
            "-object", f"memory-backend-memfd,id=mem,size={memory}M,share=on",
            "-chardev", f"socket,id=root,fd={root.fileno()}",
            "-device", "vhost-user-fs-pci,chardev=root,tag=root,queue-size=1024",
            "-chardev", f"socket,id=work,fd={work.fileno()}",
            "-device", "vhost-user-fs-pci,chardev=work,tag=work,queue-size=1024",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,fd={port_qemu.fileno()}",
            "-device", "virtserialport,chardev=agent,name=agent",
            "-chardev", f"socket,id=console,fd={console_qemu.fileno()}",
            "-serial", "chardev:console",
            "-chardev", f"socket,id=qmp,fd={qmp_qemu.fileno()}", "-mon", "chardev=qmp,mode=control",
            "-kernel", vmlinux, "-initrd", initrd, "-append", f"{CMDLINE} l1python={python}{more}",
            *cards,
        ]  # fmt: skip
        fds = [s.fileno() for s in (root, work, port_qemu, console_qemu, qmp_qemu)]
        self.vm = self.spawn(argv, fds, None)
        for s in (root, work, port_qemu, console_qemu, qmp_qemu):
            s.close()
        self.port, self.qmp = port, qmp
        for s, handler in ((port, self.from_port), (console, self.from_console)):
            s.setblocking(False)
            self.selector.register(s, selectors.EVENT_READ, handler)
        self.console_socket = console

    def share(self, tag: str, writable: list[str] | None) -> socket.socket:
        """Start one virtiofsd that exports the root directory; returns the connection for QEMU.

        :param writable: the directories that virtiofsd may write, in which files change; None if
            L1 may take it that none does.
        """
        path = f"{self.options['socket']}.{tag}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        os.unlink(path)
        server = assets.virtiofsd()
        assert server is not None
        argv = server.argv(listener.fileno(), changing=writable is not None)
        if writable is not None:
            self.fresh = server.fresh
        self.spawn(argv, [listener.fileno()], writable or [])
        listener.close()
        return client

    def spawn(
        self, argv: list[str], fds: list[int], writable: list[str] | None
    ) -> subprocess.Popen[bytes]:
        env, lent, shim = dict(os.environ), list(fds), None
        if writable is not None and os.geteuid():
            shim, more = open_shim()
            env |= more
            lent.append(shim.fileno())
        told, tell = os.pipe()

        def protect() -> None:
            try:
                isolate.protect(writable or [])
            except OSError as e:
                os.write(tell, str(e).encode())

        child = subprocess.Popen(
            tethered(argv),
            stdin=subprocess.DEVNULL,
            env=env,
            pass_fds=lent,
            preexec_fn=protect if writable is not None else None,
        )
        os.close(tell)
        if shim is not None:
            shim.close()
        with os.fdopen(told) as f:
            failure = f.read()
        if failure:
            self.notes.append(f"the host's files are not write-protected: {failure}")
        self.children.append(child)
        return child

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
            for child in self.children:
                if child.poll() is None:
                    child.kill()
                child.wait()
            for client in list(self.clients.values()):
                client.sock.setblocking(True)
                client.sock.settimeout(1)
                try:
                    client.sock.sendall(client.out)
                except OSError:
                    pass

    def loop(self) -> int:
        last = time.monotonic()
        while True:
            for key, _mask in self.selector.select(self.fresh / 4 if self.waiting else 0.25):
                key.data()
            now = time.monotonic()
            if self.ready and self.waiting:
                self.open_due(now)
            if now - last > 5:  # this process was suspended: L1's silence means nothing
                self.last_pong = now
            last = now
            if not self.stopping and any(child.poll() is not None for child in self.children):
                raise TestbedError(self.obituary(), self.hint())
            if self.stopping:
                if self.vm.poll() is not None or now - self.stopping > 5:
                    self.tell("the testbed was stopped")
                    return 0
            elif self.ready:
                if now - self.last_ping >= PING_EVERY:
                    self.last_ping = now
                    self.to_port(p.frame(p.PING))
                if now - self.last_pong > self.options["watchdog"]:
                    raise TestbedError(
                        f"L1 hung: no sign of life for {self.options['watchdog']:g} s"
                        f"{self.registers()}",
                        self.hint(),
                    )
            elif now - self.started > BOOT_TIMEOUT:
                raise TestbedError(
                    f"L1 did not start within {BOOT_TIMEOUT:g} s{self.last_words(failed=False)}",
                    self.hint(),
                )

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

    def obituary(self) -> str:
        """Why L1 died: which program was the first to end, how, and its last words."""
        time.sleep(0.3)  # each child ends when another one has; those that fail do so by themselves
        self.take_console()
        ended = [child for child in self.children if child.poll() is not None]
        child = next((c for c in ended if c is not self.vm and c.returncode), None)
        what = "QEMU" if child is None and self.vm in ended else "virtiofsd"
        status = (child or (self.vm if self.vm in ended else ended[0])).returncode
        how = signal.Signals(-status).name if status < 0 else str(status)
        return f"L1 died: {what} ended with {how}{self.last_words(failed=bool(status))}"

    def take_console(self) -> None:
        """Read what QEMU still wrote to L1's console before it ended."""
        try:
            while data := self.console_socket.recv(65536):
                self.console += data
        except OSError:
            pass  # all is read

    def last_words(self, *, failed: bool) -> str:
        """The line that best explains why L1 died, in brackets.

        :param failed: one of our programs did: then that is the last line of the log. Else the
            first line of L1's console that names a panic or the like, or its last line.
        """
        said = "" if failed else self.console.decode(errors="replace")
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

    def registers(self) -> str:
        """Write the registers of L1's vCPUs to the log; returns their instruction pointers as text
        for a message.
        """
        self.qmp.settimeout(2)
        said = b""
        try:
            self.qmp.sendall(
                b'{"execute":"qmp_capabilities"}{"execute":"human-monitor-command",'
                b'"arguments":{"command-line":"info registers -a"},"id":1}'
            )
            while b'"id": 1' not in said:
                data = self.qmp.recv(65536)
                if not data:
                    break
                said += data
        except OSError:
            pass
        text = said.decode(errors="replace").replace("\\r\\n", "\n")
        print(text, file=sys.stderr)
        rips = re.findall(r"RIP=([0-9a-f]+)", text)
        return f" (RIP {', '.join(rips)})" if rips else ""

    def say(self, text: str) -> None:
        """Write a line of progress to the log and to all clients."""
        print(text, file=sys.stderr, flush=True)
        for client in list(self.clients.values()):
            self.to(client, p.frame(p.NOTE, 0, text.encode()))

    def stop(self) -> None:
        if not self.stopping:
            self.stopping = time.monotonic()
            if self.ready:
                self.to_port(p.frame(p.STOP))
            else:
                self.vm.kill()

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
        return {
            "protocol": p.VERSION,
            "pid": os.getpid(),
            "ready": self.ready,
            "ready_after_s": round(self.ready_after, 2),
            "up_s": round(time.monotonic() - self.started, 1),
            "kernel": self.kernel.version,
            "qemu": str(self.qemu),
            "max_cpus": self.qemu.max_cpus,
            "cpus": self.cpus,
            "memory": self.options["memory"],
            "writable": self.options["writable"],
            "vdpa_card": self.options["vdpa_card"],
            "running": len(self.channels),
            "commands": self.commands,
            "notes": self.notes,
        }

    # --- L1 ---------------------------------------------------------------------------------------

    def to_port(self, data: bytes) -> None:
        self.port_out += data
        self.push_port()

    def push_port(self) -> None:
        try:
            while self.port_out:
                n = self.port.send(memoryview(self.port_out)[: 1 << 16])
                del self.port_out[:n]
        except BlockingIOError:
            pass
        except OSError:
            return  # QEMU has gone; the loop finds out and reports it
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.port_out else 0)
        self.selector.modify(self.port, events, self.from_port)

    def from_console(self) -> None:
        try:
            data = self.console_socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(self.console_socket)
            return
        self.console += data
        del self.console[:-CONSOLE_KEPT]

    def from_port(self) -> None:
        if self.port_out:
            self.push_port()
        try:
            data = self.port.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(self.port)
            return
        for kind, channel, stream, payload in self.framer.feed(data):
            if kind == p.PONG:
                self.last_pong = time.monotonic()
            elif kind == p.HELLO:
                self.say(f"the agent runs ({time.monotonic() - self.started:.1f} s)")
                self.to_port(p.frame(p.CONFIG, 0, marshal.dumps(self.config(), 2)))
            elif kind == p.READY:
                self.became_ready(payload.decode(errors="replace"))
            elif channel in self.channels:
                client = self.channels[channel]
                if kind == p.EXIT:
                    del self.channels[channel]
                if client is not None:
                    client.closing = kind == p.EXIT
                    self.to(client, p.frame(kind, 0, payload, stream))

    def config(self) -> dict[str, Any]:
        binds = [(f"/.work{d}", d) for d in self.options["writable"]]
        if self.kernel.root:
            binds.append((f"{self.kernel.root}/lib/modules", "/lib/modules"))
        files = [
            ("/proc/sys/kernel/perf_event_paranoid", "-1"),
            # With huge pages for shared memory, a guest boots in a fifth less time.
            ("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise"),
        ]
        return {"binds": binds, "files": files}

    def became_ready(self, notes: str) -> None:
        self.ready = True
        self.last_pong = time.monotonic()
        self.ready_after = self.last_pong - self.started
        self.notes += notes.splitlines()
        for note in self.notes:
            self.say(f"L1: {note}")
        self.say(f"ready ({self.ready_after:.1f} s)")
        for client in list(self.clients.values()):
            if not client.early:
                self.to(client, p.frame(p.READY))


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
