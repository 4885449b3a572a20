"""L1 as Bochs' machine with an Intel processor, whose VMX Bochs emulates. It sees no file of this
machine: what it needs travels in its initramfs (``layers``), and what a command has written is
fetched by the agent's port (``travel``).

The port is two serial ports. ``com2`` is the way in: Bochs takes a byte from a terminal whenever
L1's time has come for the next one, whether or not L1 has read those before, so L1 reads each one
at once (``agent.interrupt_at_once``). ``com1`` is the way out, to a named pipe: Bochs waits if
nobody reads the pipe. A terminal there would lose bytes. ``com3`` has L1's console, which the
kernel writes without interrupts, because it would have to share the interrupt with ``com1``.

Faults of Bochs 3.0 that are worked round here or are to be known:

- A guest of KVM that spins with interrupts disabled freezes L1: at VM entry Bochs masks interrupts
  by the guest's flag before it knows that it is in VMX operation. The watchdog ends L1.
- L1 gets general protection faults from MSRs that the model should have: ``ignore_bad_msrs``.
  Linux reads APERF and MPERF 500 times per second, and each would be a line of the log: errors
  are not logged.
- Ice Lake: VM entry fails with error 7, because Bochs wants posted-interrupt descriptors on a page
  of their own. Sapphire Rapids: L1 dies in fpu__init_cpu_xstate. The models below have neither.
- It has no display that needs no terminal: it gets a pseudo-terminal that nobody looks at.
- An L1 that waits uses a whole processor: Bochs is stopped while no command runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import termios
import time
import tty

from pyvmm.errors import HostError, TestbedError
from pyvmm.host import bochs
from pyvmm.host.paths import cache_dir
from pyvmm.programs import install, which
from pyvmm.testbed import assets, disk, layers
from pyvmm.testbed.machine import Machine, Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: Instructions per emulated second. More of them make L1's clock slower than this machine's.
IPS = 50_000_000
#: The model by the beginning of the kernel's version. Haswell: EPT with accessed and dirty flags,
#: unrestricted guests, VPID, preemption timer, no APIC virtualisation.
MODELS = {"6.1.": "corei7_haswell_4770", "": "broadwell_ult"}
# The kernel cannot measure its clock against emulated timers, and does not need to. It stays with
# the boot console because the real one would be interrupted. After a panic it must not reset.
CMDLINE = (
    "earlycon=uart8250,io,0x3e8,115200n8 keep_bootcon loglevel=5 panic=0 nokaslr mitigations=off"
    " tsc=reliable no_timer_check cryptomgr.notests random.trust_cpu=on"
)
CONFIG = """\
config_interface: textconfig
display_library: term
megs: {megs}
cpu: model={model}, count=1, ips={ips}, reset_on_triple_fault=0, ignore_bad_msrs=1, msrs="/dev/null"
romimage: file=bios
vgaromimage: file=vgabios
pci: enabled=1, chipset=i440fx
clock: sync=none, time0=utc
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path=disk, mode=flat, cylinders={cylinders}, heads=16, spt=63
boot: disk
com1: enabled=1, mode=file, dev=out
com2: enabled=1, mode=term, dev={terminal}
com3: enabled=1, mode=file, dev=console
sound: waveoutdrv=dummy
speaker: enabled=0
log: log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"""
PIPE = 1 << 20  # bytes that a named pipe holds before Bochs waits
SETUP_HINT = "run: pyvmm testbed setup --cpu intel"


class Intel(Machine):
    """Bochs and the files that it opens, which are removed when it has opened them."""

    BOOT_TIMEOUT = 120.0
    WATCHDOG = 60.0
    MEMORY = 1 << 30
    SHARES = False
    ORDERLY = False
    RESTLESS = True

    def __init__(self, options: dict[str, Any], say: Callable[[str], None]) -> None:
        super().__init__(options, say)
        lacks = self.missing()
        if lacks:
            raise TestbedError(f"{lacks[0][0]} is missing", lacks[0][1])
        if options["cpus"] > 1 or options["vdpa_card"]:
            raise TestbedError(
                "the testbed with an Intel processor has one vCPU and no card for vp_vdpa",
                "leave --cpus and --vdpa-card out, or use --cpu amd",
            )
        if self.memory > 2 << 30:
            raise TestbedError("Bochs has at most 2 GiB of memory", "use --memory 2G or less")
        self.kernel = assets.find_kernel(options["kernel"], SETUP_HINT)
        found = bochs.find()
        assert found is not None
        self.bochs = found
        self.model = next(m for start, m in MODELS.items() if self.kernel.version.startswith(start))
        self._work = ""
        self._used = 0.0
        self._kept: list[int] = []

    @staticmethod
    def missing() -> list[tuple[str, str]]:
        """Bochs, a kernel and the tools that make the disk."""
        lacks = [] if bochs.find() else [("Bochs", SETUP_HINT)]
        if not assets.busybox():
            lacks.append(("a static busybox", install("busybox-static")))
        if not assets.kernels():
            lacks.append(("Debian's cloud kernel", SETUP_HINT))
        if not which("gcc") or not which("ld"):
            lacks.append(("gcc", install("gcc")))
        return lacks

    @staticmethod
    def setup(progress: Callable[[str], None], version: str | None = None) -> None:
        """Fetch Bochs and the kernel; make the lower layers."""
        try:
            bochs.fetch(progress)
            try:
                assets.find_kernel(version)
            except TestbedError:
                assets.fetch_kernel(version, progress)
        except HostError as e:
            raise TestbedError(e.cause, e.hint) from None
        lacks = Intel.missing()
        if lacks:
            raise TestbedError(f"{lacks[0][0]} is missing", lacks[0][1])
        disk.loader()
        layers.lower(assets.find_kernel(version), progress)

    @staticmethod
    def prepare(progress: Callable[[str], None], version: str | None) -> None:
        """The lower layers."""
        layers.lower(assets.find_kernel(version, SETUP_HINT), progress)

    def start(self) -> None:
        """Make the disk and start Bochs."""
        _sweep()
        self._work = work = tempfile.mkdtemp(prefix=f"run-{os.getpid()}-", dir=cache_dir())
        add = [*self.options["add"], *(f"{d}:{d}" for d in self.options["writable"])]
        archives = layers.archives(
            self.kernel, add, self.options["directories"], f"{work}/top", self.say
        )
        cmdline = f"{CMDLINE} l1kvm={','.join(self.options['kvm'])}"
        cylinders = disk.write(
            f"{work}/disk",
            disk.loader(),
            assets.vmlinux(self.kernel),
            archives,
            cmdline,
            self.memory,
        )
        for name in archives:
            if name.startswith(work):
                os.unlink(name)
        os.symlink(self.bochs.bios, f"{work}/bios")
        os.symlink(self.bochs.vga_bios, f"{work}/vgabios")
        master, terminal = self._terminal()
        self.port = Port(self._pipe("out"), master)
        self.console = self._pipe("console")
        screen, its_screen = self._terminal()
        with open(f"{work}/config", "w", encoding="utf-8") as f:
            f.write(
                CONFIG.format(
                    megs=self.memory >> 20,
                    model=self.model,
                    ips=IPS,
                    cylinders=cylinders,
                    terminal=os.ttyname(terminal),
                )
            )
        self.screen = screen
        self.spawn(
            "Bochs",
            [*self.bochs.argv, "-q", "-f", "config"],
            env=self.bochs.env,
            stdio=(its_screen, its_screen, its_screen),
            cwd=work,
        )

    def _terminal(self) -> tuple[int, int]:
        """A raw pseudo-terminal: our end, which does not block, and its other end. The other end
        stays open here: without it, our end could not be read before Bochs has opened it.
        """
        master, slave = os.openpty()
        tty.setraw(slave)
        termios.tcsetwinsize(slave, (25, 80))
        os.set_blocking(master, False)
        self._kept += (master, slave)
        return master, slave

    def _pipe(self, name: str) -> int:
        """A named pipe: our end, which does not block. It is open for writing as well, so that it
        does not end.
        """
        path = f"{self._work}/{name}"
        os.mkfifo(path, 0o600)
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE)
        self._kept.append(fd)
        return fd

    def started(self, hello: str) -> None:
        """Bochs has opened all files: their names can go."""
        self.close()

    def emulator(self) -> str:
        """Bochs' version and the model."""
        return f"{self.bochs}, {self.model}"

    def facts(self) -> dict[str, Any]:
        """What only Bochs has."""
        return {"model": self.model}

    def trouble(self, console: bytes | bytearray) -> str:
        """Why L1 cannot go on: Bochs would run a kernel that has panicked for ever."""
        at = console.find(b"Kernel panic")
        if at < 0 or b"end Kernel panic" not in console[at:]:  # the call trace is in between
            return ""
        return console[at:].split(b"\n")[0].decode(errors="replace").strip()

    def clock(self) -> float:
        """The processor time that Bochs has had. A frozen L1 takes all that it can get; on a busy
        machine, one that works gets little and may be silent for minutes. If Bochs itself waits, a
        twentieth of the time that passes here counts.
        """
        with contextlib.suppress(OSError), open(f"/proc/{self.vm.pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])  # utime, stime of proc(5)
            self._used = ticks / os.sysconf("SC_CLK_TCK")
        return self._used + time.monotonic() / 20

    def rest(self, on: bool) -> None:
        """Stop Bochs, or let it go on."""
        if self.vm.poll() is None:
            self.vm.send_signal(signal.SIGSTOP if on else signal.SIGCONT)

    def close(self) -> None:
        """Remove the directory of Bochs' files."""
        if self._work:
            shutil.rmtree(self._work, ignore_errors=True)


def _sweep() -> None:
    """Remove the files of supervisors that were killed while their L1 started."""
    base = cache_dir()
    for name in os.listdir(base):
        words = name.split("-")
        if words[0] == "run" and len(words) > 2 and not os.path.exists(f"/proc/{words[1]}"):
            shutil.rmtree(f"{base}/{name}", ignore_errors=True)
