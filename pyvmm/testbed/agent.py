"""The agent: process 1 of L1. It starts commands for the testbed's clients and carries their input,
output and status.

It speaks ``pyvmm.testbed.protocol`` on the virtio-serial port ``agent``, or on the serial ports
that its arguments name: one for input, one for output. With the argument ``-``, it uses stdin and
stdout, and is process 1 of namespaces that share a kernel with others: then it does nothing that
could be felt outside of them, and ends with its input. It stays resident because
starting Python takes about a second under emulation, while fork and exec take tens of milliseconds.
For the same reason it imports only modules that are built in or tiny. The initramfs holds a copy of
it. The copy imports nothing of pyvmm, so editing pyvmm cannot break a running testbed.
"""

from __future__ import annotations

import errno
import fcntl
import marshal
import os
import resource
import select
import signal
import sys
import termios
import time

sys.path.insert(0, "/run/pyvmm")
import protocol as p  # type: ignore[import-not-found, unused-ignore]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BUSYBOX = "/run/pyvmm/busybox"
CGROUPS = "/sys/fs/cgroup"
KVM_CREATE_VM = 0xAE01  # linux/kvm.h: _IO(KVMIO, 0x01); the agent has no cffi
#: For so many seconds after a command has ended, the agent waits for more output from its terminal
#: if background processes hold the terminal open.
TTY_LINGER = 0.3
FILES = 1 << 20  # the limit of open descriptors


class Command:
    """One running command and its streams."""

    def __init__(self, channel: int) -> None:
        self.channel = channel
        self.pid = 0
        self.cgroup = ""
        self.status: int | None = None
        self.ended = 0.0
        self.credit = p.OUT_WINDOW
        #: The descriptor by stream that the agent reads.
        self.outputs: dict[int, int] = {}
        #: Data that waits to be written to ``stdin``, a pipe or the terminal's master.
        self.input = bytearray()
        self.stdin = -1
        self.input_ends = False
        self.tty = -1


class Agent:
    """The event loop: the port, the commands' descriptors and SIGCHLD."""

    def __init__(self, source: int, sink: int, *, owner: bool = True) -> None:
        self.source, self.sink = source, sink
        #: Whether this kernel is L1's own.
        self.owner = owner
        #: Seconds without a frame after which the agent ends; 0 for never.
        self.silence = 0.0
        self.heard = time.monotonic()
        self.framer = p.Framer()
        self.queue: list[bytes] = []
        self.commands: dict[int, Command] = {}
        self.by_pid: dict[int, Command] = {}
        #: (command, stream) by descriptor; the stream is STDIN if the agent writes the descriptor.
        self.watched: dict[int, tuple[Command, int]] = {}
        self.lingering: list[Command] = []
        self.epoll = select.epoll()
        self.epoll.register(source, select.EPOLLIN)
        self.sink_watched = False
        r, w = os.pipe()
        for fd in (r, w):
            os.set_blocking(fd, False)
        self.wakeup = r
        self.epoll.register(r, select.EPOLLIN)
        signal.set_wakeup_fd(w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, at: None)
        self.keep: list[int] = []
        self.started = 0

    def send(self, kind: int, channel: int = 0, payload: bytes = b"", stream: int = 0) -> None:
        self.queue.append(p.frame(kind, channel, payload, stream))

    def flush(self) -> None:
        """Write as many frames as the port takes. Small frames are joined because each write is an
        exit to QEMU.
        """
        while self.queue:
            data = self.queue[0]
            n = 1
            while n < len(self.queue) and len(data) + len(self.queue[n]) <= 32768:
                data += self.queue[n]
                n += 1
            try:
                done = os.write(self.sink, data)
            except BlockingIOError:
                done = 0
            self.queue[:n] = [data[done:]] if done < len(data) else []
            if not done:
                break
        if self.queue and not self.sink_watched:
            self.epoll.register(self.sink, select.EPOLLOUT)
        elif self.sink_watched and not self.queue:
            self.epoll.unregister(self.sink)
        self.sink_watched = bool(self.queue)

    def loop(self) -> None:
        while True:
            self.flush()
            patience = TTY_LINGER if self.lingering else self.silence or None
            for fd, _events in self.epoll.poll(patience):
                if fd == self.source:
                    try:
                        data = os.read(self.source, 65536)
                    except BlockingIOError:
                        continue
                    if not data:
                        self.power_off()
                    self.heard = time.monotonic()
                    for kind, channel, stream, payload in self.framer.feed(data):
                        self.handle(kind, channel, stream, payload)
                elif fd == self.wakeup:
                    os.read(self.wakeup, 4096)
                    self.reap()
                elif fd in self.watched:
                    command, stream = self.watched[fd]
                    if stream == p.STDIN:
                        self.pump_in(command)
                    else:
                        self.pump_out(command, stream)
            if self.silence and time.monotonic() - self.heard > self.silence:
                self.power_off()
            for command in self.lingering[:]:
                if time.monotonic() - command.ended > TTY_LINGER:
                    self.drop_output(command, p.TTY)

    def handle(self, kind: int, channel: int, stream: int, payload: bytes) -> None:
        if kind == p.PING:
            self.send(p.PONG)
            return
        if kind == p.CONFIG:
            self.configure(marshal.loads(payload))
            return
        if kind == p.STOP:
            self.power_off()
            return
        if kind == p.OPEN:
            try:
                self.start(channel, marshal.loads(payload))
            except OSError as e:
                self.send(p.DATA, channel, f"pyvmm testbed: {e}\n".encode(), p.STDERR)
                self.send(p.EXIT, channel, b"%d" % (126 << 8))
            return
        command = self.commands.get(channel)
        if command is None:  # the command ended while this frame was on its way
            return
        if kind == p.DATA:
            command.input += payload
            self.pump_in(command)
        elif kind == p.EOF:
            if stream == p.STDIN:
                command.input_ends = True
                self.pump_in(command)
            else:
                self.drop_output(command, stream)
        elif kind == p.CREDIT:
            command.credit += int(payload)
            for one in list(command.outputs):
                self.pump_out(command, one)
        elif kind == p.SIGNAL:
            self.signal(command, int(payload))
        elif kind == p.WINDOW and command.tty >= 0:
            rows, columns = payload.split()
            termios.tcsetwinsize(command.tty, (int(rows), int(columns)))
        elif kind == p.CLOSE:
            command.credit = 1 << 40  # nobody returns credit any more, and nothing must block
            self.signal(command, signal.SIGKILL)
            for one in list(command.outputs):
                self.drop_output(command, one)

    def signal(self, command: Command, number: int) -> None:
        """Send a signal to the foreground process group of the command's terminal, or, without a
        terminal, to the command's process group. SIGKILL goes to every process that the command
        has started.
        """
        if command.status is not None and number != signal.SIGKILL:
            return
        if number == signal.SIGKILL:
            if command.cgroup:
                try:
                    write_file(f"{command.cgroup}/cgroup.kill", "1")
                except OSError:
                    pass
            else:
                kill_family(command.pid)
            if command.status is None:  # a new child may not have entered its cgroup yet
                os.kill(command.pid, number)
            return
        group = command.pid
        if command.tty >= 0:
            try:
                group = os.tcgetpgrp(command.tty) or group
            except OSError:
                pass
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            pass

    def start(self, channel: int, spec: dict[str, Any]) -> None:
        """Fork and execute one command.

        ``spec`` has these keys:

        - argv, env, cwd: a list, a dict and a value of bytes;
        - umask;
        - tty: which of the descriptors 0, 1 and 2 are the terminal; empty for no terminal;
        - stdin: False for /dev/null;
        - window: the terminal's size, (rows, columns).

        :raises OSError: no descriptor or process is to be had.
        """
        command = Command(channel)
        tty = spec["tty"]
        child = [-1, -1, -1]
        opened: list[int] = []

        def pipe() -> tuple[int, int]:
            ends = os.pipe()
            opened.extend(ends)
            return ends

        slave = -1
        try:
            if tty:
                master, slave = os.openpty()
                opened += (master, slave)
                termios.tcsetwinsize(slave, tuple(spec["window"]))
                command.tty = command.outputs[p.TTY] = master
            for n in (0, 1, 2):
                if n in tty:
                    child[n] = slave
                elif n:
                    command.outputs[n], child[n] = pipe()
                elif spec["stdin"]:
                    child[0], command.stdin = pipe()
                else:
                    child[0] = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
                    opened.append(child[0])
            if 0 in tty:
                # The input gets a descriptor of its own, so that input and output can be polled
                # separately.
                command.stdin = os.dup(command.tty)
                opened.append(command.stdin)
            self.started += 1
            command.cgroup = f"{CGROUPS}/c{self.started}" if self.owner else ""
            try:
                if command.cgroup:
                    os.mkdir(command.cgroup)
            except OSError:
                command.cgroup = ""
            command.pid = os.fork()
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        if command.pid == 0:
            self.child(spec, child, command.cgroup, slave)
        for fd in {*child, slave} - {-1}:
            os.close(fd)
        for stream, fd in command.outputs.items():
            os.set_blocking(fd, False)
            self.watch(command, stream, fd)
        if command.stdin >= 0:
            os.set_blocking(command.stdin, False)
        self.commands[channel] = self.by_pid[command.pid] = command

    def child(self, spec: dict[str, Any], fds: list[int], cgroup: str, tty: int) -> None:
        """Execute the command in the forked child. This never returns."""
        try:
            signal.set_wakeup_fd(-1)
            os.setsid()
            if tty >= 0:
                fcntl.ioctl(tty, termios.TIOCSCTTY, 0)
            if cgroup:
                write_file(f"{cgroup}/cgroup.procs", "0")
            # All of ``fds`` are above 2, so no dup2 overwrites a descriptor that is still needed.
            for n, fd in enumerate(fds):
                os.dup2(fd, n)
            for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
            os.umask(spec["umask"])
            status = 126
            try:
                os.chdir(spec["cwd"])
            except OSError as e:
                os.write(
                    2,
                    b"pyvmm testbed: cannot enter %s in the testbed: %s\n"
                    % (spec["cwd"], os.strerror(e.errno or 0).encode()),
                )
                os._exit(126)
            try:
                os.execvpe(spec["argv"][0], spec["argv"], spec["env"])
            except OSError as e:
                status = 127 if e.errno == errno.ENOENT else 126
                os.write(
                    2,
                    b"pyvmm testbed: %s: %s\n"
                    % (spec["argv"][0], os.strerror(e.errno or 0).encode()),
                )
            os._exit(status)
        except BaseException:
            # The traceback goes to the command's standard error, if the child has it already.
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(126)

    def watch(self, command: Command, stream: int, fd: int) -> None:
        if fd not in self.watched:
            self.watched[fd] = (command, stream)
            self.epoll.register(fd, select.EPOLLOUT if stream == p.STDIN else select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        if self.watched.pop(fd, None):
            self.epoll.unregister(fd)

    def pump_out(self, command: Command, stream: int) -> None:
        """Send the command's output as far as its credit allows."""
        fd = command.outputs.get(stream)
        if fd is None:
            return
        # While the command runs, other commands get their turn after 8 reads.
        for _ in range(8 if command.status is None else 1 << 30):
            if command.credit <= 0:
                self.unwatch(fd)
                return
            try:
                data = os.read(fd, min(p.CHUNK, command.credit))
            except BlockingIOError:
                if command.status is None:
                    self.watch(command, stream, fd)
                elif stream != p.TTY:
                    # All of the command's output has been read. Background processes may still hold
                    # the pipe open, but nobody waits for them.
                    self.drop_output(command, stream)
                return
            except OSError as e:
                if e.errno != errno.EIO:  # EIO: the last holder of the terminal has closed it
                    raise
                data = b""
            if not data:
                self.drop_output(command, stream)
                return
            command.credit -= len(data)
            self.send(p.DATA, command.channel, data, stream)
        self.watch(command, stream, fd)

    def drop_output(self, command: Command, stream: int) -> None:
        fd = command.outputs.pop(stream, -1)
        if fd >= 0:
            self.unwatch(fd)
            if fd == command.tty:
                command.tty = -1
            os.close(fd)
        self.finish(command)

    def pump_in(self, command: Command) -> None:
        """Write input to the command, and return credit for the bytes that it took."""
        done = 0
        while command.input:
            n = len(command.input)
            if command.stdin >= 0:
                try:
                    n = os.write(command.stdin, command.input)
                except BlockingIOError:
                    break
                except OSError:  # the command has closed its stdin: drop the rest
                    self.close_input(command)
            del command.input[:n]
            done += n
        if done:
            self.send(p.CREDIT, command.channel, b"%d" % done)
        if command.input:
            self.watch(command, p.STDIN, command.stdin)
        elif command.stdin >= 0:
            self.unwatch(command.stdin)
            if command.input_ends:
                self.close_input(command)

    def close_input(self, command: Command) -> None:
        fd, command.stdin = command.stdin, -1
        if fd >= 0:
            self.unwatch(fd)
            os.close(fd)

    def reap(self) -> None:
        """Collect ended children: the agent's own, and the orphans that process 1 inherits."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            command = self.by_pid.pop(pid, None)
            if command:
                command.status = status
                command.ended = time.monotonic()
                self.close_input(command)
                for stream in list(command.outputs):
                    self.pump_out(command, stream)
                self.finish(command)

    def finish(self, command: Command) -> None:
        """Report the status once the command has ended and its output has been sent."""
        if command.status is None:
            return
        if p.TTY in command.outputs and command not in self.lingering:
            self.lingering.append(command)
        if command.outputs or self.commands.get(command.channel) is not command:
            return
        if command in self.lingering:
            self.lingering.remove(command)
        del self.commands[command.channel]
        self.send(p.EXIT, command.channel, b"%d" % command.status)
        if command.cgroup:
            try:
                os.rmdir(command.cgroup)
            except OSError:
                pass  # the command left processes running, such as daemons

    def configure(self, config: dict[str, Any]) -> None:
        """Set up the system as the supervisor's ``config`` says. Then send READY with notes about
        the steps that failed.
        """
        notes = []
        self.silence = config["silence"]
        for source, target in config["binds"]:
            if not os.path.isdir(target):
                try:
                    os.makedirs(target)
                except OSError:
                    pass
            if busybox("mount", "--bind", source, target):
                notes.append(f"cannot make {target} writable")
        for path, value in config["files"]:
            try:
                write_file(path, value)
            except OSError as e:
                notes.append(f"{path}: {e.strerror}")
        for _ in range(1000):  # wait up to 20 s until late.sh has loaded the modules
            if os.path.exists("/run/pyvmm/loaded"):
                break
            time.sleep(0.02)
        # Keep one VM open for good: creating the first VM and closing the last one make the kernel
        # patch a static key inside __schedule().
        try:
            kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
            self.keep = [kvm, create_vm(kvm)]
        except OSError as e:
            notes.append(f"/dev/kvm: {e.strerror}")
        for path in ("/dev/net/tun", "/dev/vhost-net"):
            if not os.path.exists(path):
                notes.append(f"{path} is missing")
        self.send(p.READY, 0, "\n".join(notes).encode())

    def power_off(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if not self.owner:
            os._exit(0)
        busybox("sync")
        busybox("poweroff", "-f")


def kill_family(pid: int) -> None:
    """Kill a command's process and all that descend from it or are in its session, for lack of a
    cgroup. They are stopped first, so that none has children while we look. A daemon whose parents
    have all ended escapes.
    """
    stopped: set[int] = set()
    number = signal.SIGSTOP
    while True:
        family = {pid}
        parents = {}
        for name in os.listdir("/proc"):
            if name.isdecimal():
                try:
                    with open(f"/proc/{name}/stat") as f:
                        state, parent, _, session = f.read().rpartition(")")[2].split()[:4]
                except OSError:
                    continue  # it has ended
                if state != "Z":
                    parents[int(name)] = int(parent)
                    if int(session) == pid:
                        family.add(int(name))
        fresh = family & set(parents)
        while fresh:
            family |= fresh
            fresh = {child for child, parent in parents.items() if parent in fresh} - family
        left = (family & set(parents)) - stopped
        if not left:
            number, left = signal.SIGKILL, stopped
        for one in left:
            try:
                os.kill(one, number)
            except ProcessLookupError:
                pass
        if number == signal.SIGKILL:
            return
        stopped |= left


def create_vm(kvm: int) -> int:
    """Create a VM; returns its descriptor. SIGCHLD can interrupt the ioctl, which Python does not
    restart by itself.
    """
    while True:
        try:
            vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        except InterruptedError:
            continue
        os.set_inheritable(vm, False)
        return vm


def busybox(*argv: str) -> int:
    """Run one of busybox's applets; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        os.execv(BUSYBOX, ["busybox", *argv])
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write_file(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def keep_off_cpu_0() -> None:
    """If L1 has several CPUs, keep this process, and so every command, off CPU 0.

    This works around a race in QEMU's TCG. Whichever CPU loads x87 state (FXRSTOR, XRSTOR) clears a
    bit of CPU 0's ``hflags2``, and not atomically (``cpu_clear_ignne``). If CPU 0 takes a #VMEXIT
    at the same time, nested paging stays on in the hypervisor, whose state then goes into the
    guest's VMCB: the guest hangs or triple-faults. As long as no command runs on CPU 0, it never
    executes VMRUN. Interrupts and kernel threads still run there.
    """
    cpus = os.sched_getaffinity(0)
    if len(cpus) > 1:
        os.sched_setaffinity(0, cpus - {0})


def virtio_port() -> tuple[int, int]:
    """The virtio-serial port for the agent, twice: for input and for output."""
    for name in os.listdir("/sys/class/virtio-ports"):
        with open(f"/sys/class/virtio-ports/{name}/name") as f:
            if f.read().strip() == "agent":
                port = os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                return port, os.dup(port)
    sys.exit("L1: no virtio-serial port named agent")


def serial_port(path: str) -> int:
    """A serial port that passes all bytes on as they are."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    cc = termios.tcgetattr(fd)[6]
    cflag = termios.CS8 | termios.CREAD | termios.CLOCAL | termios.B115200
    modes = [0, 0, cflag, 0, termios.B115200, termios.B115200, cc]
    termios.tcsetattr(fd, termios.TCSANOW, modes)
    return fd


def interrupt_at_once(path: str) -> None:
    """Let a serial port interrupt for its first byte: no byte is lost then, unless the kernel is
    deaf until 15 more have come (1.3 ms at 115,200 baud). A lost byte would not go unnoticed: no
    frame would be in its place any more.
    """
    write_file(f"/sys/class/tty/{os.path.basename(path)}/rx_trig_bytes", "1")


def standard_streams() -> tuple[int, int]:
    """stdin and stdout, in whose places /dev/null and stderr come."""
    ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in (0, 1)]
    for fd in ends:
        os.set_blocking(fd, False)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return ends[0], ends[1]


def raise_limit(kind: int, value: int) -> None:
    """Raise a limit of resources to a value, or as far as is allowed."""
    try:
        resource.setrlimit(kind, (value, value))
    except (OSError, ValueError):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (hard, hard))


def hello() -> bytes:
    """The version of the protocol, and what L1 is."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpus = len(os.sched_getaffinity(0))
    return f"{p.VERSION} {os.uname().release} {cpus} {memory}".encode()


def main() -> None:
    """Open the port and serve it until power-off."""
    owner = sys.argv[1:] != ["-"]
    if owner:
        keep_off_cpu_0()
    if not owner:
        source, sink = standard_streams()
    elif len(sys.argv) > 1:
        source, sink = map(serial_port, sys.argv[1:3])
        interrupt_at_once(sys.argv[1])
    else:
        source, sink = virtio_port()
    # vhost-vdpa counts pinned guest memory against RLIMIT_MEMLOCK, and fails with EFAULT above it.
    raise_limit(resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY)
    raise_limit(resource.RLIMIT_NOFILE, FILES)
    agent = Agent(source, sink, owner=owner)
    agent.send(p.HELLO, 0, hello())
    agent.loop()


if __name__ == "__main__":
    main()
