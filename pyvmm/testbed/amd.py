"""L1 as QEMU's machine with an AMD processor: it sees this machine's files by virtiofsd."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

from pyvmm.errors import TestbedError
from pyvmm.host.qemu import newest
from pyvmm.host.shim import open_shim
from pyvmm.host.virtiofsd import all_descriptors
from pyvmm.hostnet import isolate
from pyvmm.testbed import assets
from pyvmm.testbed.machine import Machine, Port, pair, python

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# An EPYC without the features that TCG does not emulate or gets wrong under nested SVM.
CPU = (
    "EPYC,+svm,+npt,-x2apic,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,"
    "-nrip-save,-xsavec"
)
# Without tsc=reliable, L1's clock would fall back to the HPET. loglevel=4 keeps the console short
# because each character on it is an exit to QEMU. Without no_timer_check, L1 counts ticks of the
# timer while its processor spins, and panics ("IO-APIC + timer doesn't work!") if a busy host has
# kept QEMU from delivering them.
CMDLINE = (
    "console=ttyS0 loglevel=4 panic=-1 mitigations=off tsc=reliable no_timer_check"
    " cryptomgr.notests"
)
# A card that the driver vp_vdpa can take: behind an IOMMU that snoops, without which vhost-vdpa
# refuses it, and with a page per virtqueue for kicks. It has a cable to a card of L1's own.
VDPA_CARD = [
    "-device", "intel-iommu,intremap=off,snoop-control=on",
    "-netdev", "hubport,id=cable0,hubid=0", "-netdev", "hubport,id=cable1,hubid=0",
    "-device", ("virtio-net-pci,netdev=cable0,mac=52:54:11:22:44:01,addr=1c.0,romfile=,"
                "iommu_platform=on,disable-legacy=on,page-per-vq=on"),
    "-device", "virtio-net-pci,netdev=cable1,mac=52:54:11:22:44:02,addr=1d.0,romfile=",
]  # fmt: skip


def l1_cpus(cpus: int) -> int:
    """How many vCPUs L1 needs so that commands can use ``cpus`` of them (see
    ``agent.keep_off_cpu_0``).
    """
    return cpus + 1 if cpus > 1 else 1


class Amd(Machine):
    """QEMU with two virtiofsd: one for the root directory, one for the writable ones."""

    def __init__(self, options: dict[str, Any], say: Callable[[str], None]) -> None:
        super().__init__(options, say)
        lacks = self.missing()
        if lacks:
            raise TestbedError(f"{lacks[0][0]} is missing", lacks[0][1])
        self.kernel = assets.find_kernel(options["kernel"])
        self.qemu = newest()
        wanted = options["cpus"] or min(2, os.cpu_count() or 1)
        self.cpus = wanted if options["cpus"] else min(wanted, self.qemu.max_cpus)
        if self.cpus > self.qemu.max_cpus:
            raise TestbedError(
                f"{self.qemu} hangs with more than one vCPU",
                "run: pyvmm testbed setup, or use --cpus 1",
            )

    missing = staticmethod(assets.missing)
    setup = staticmethod(assets.setup)

    @staticmethod
    def prepare(progress: Callable[[str], None], version: str | None) -> None:
        """The boot files."""
        assets.boot_files(assets.find_kernel(version), progress)

    def start(self) -> None:
        """Start virtiofsd and QEMU."""
        vmlinux, initrd = assets.boot_files(self.kernel, self.say)
        port, port_qemu = pair()
        console, console_qemu = pair()
        self._qmp, qmp_qemu = socket.socketpair()
        root, root_listener = self._connection("root")
        work, work_listener = self._connection("work")
        memory = self.memory >> 20
        cmdline = f"{CMDLINE} l1python={python()} l1kvm={','.join(self.options['kvm'])}"
        cards = []
        if self.options["vdpa_card"]:
            cards, cmdline = VDPA_CARD, f"{cmdline} intel_iommu=on"
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
            "-kernel", vmlinux, "-initrd", initrd, "-append", cmdline, *cards,
        ]  # fmt: skip
        theirs = (root, work, port_qemu, console_qemu, qmp_qemu)
        self.spawn("QEMU", argv, fds=[s.fileno() for s in theirs])
        for s in theirs:
            s.close()
        self._share(root_listener, None)
        self._share(work_listener, self.options["writable"])
        self._sockets = port, console
        self.port = Port(port.fileno(), port.fileno())
        self.console = console.fileno()

    def _connection(self, tag: str) -> tuple[socket.socket, socket.socket]:
        """QEMU's connection to a virtiofsd, and the listening socket at which it waits."""
        path = f"{self.options['socket']}.{tag}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        client = socket.socket(socket.AF_UNIX)
        client.connect(path)
        os.unlink(path)
        return client, listener

    def _share(self, listener: socket.socket, writable: list[str] | None) -> None:
        """Start one virtiofsd that exports the root directory to the connection at ``listener``.

        :param writable: the directories that virtiofsd may write, in which files change; None if
            L1 may take it that none does.
        """
        server = assets.virtiofsd()
        assert server is not None
        if writable is not None:
            self.fresh = server.fresh
        told, tell = os.pipe()

        def protect() -> None:
            all_descriptors()
            try:
                isolate.protect(writable or [])
            except OSError as e:
                os.write(tell, str(e).encode())

        with ExitStack() as lent:
            fds, env = [lent.enter_context(listener).fileno()], None
            if os.geteuid():
                shim, env = open_shim()
                fds.append(lent.enter_context(shim).fileno())
            self.spawn(
                "virtiofsd",
                server.argv(listener.fileno(), changing=writable is not None),
                fds=fds,
                env=env,
                before=protect,
            )
        os.close(tell)
        with os.fdopen(told) as f:
            failure = f.read()
        if failure:
            self.notes.append(f"the host's files are not write-protected: {failure}")

    def emulator(self) -> str:
        """QEMU's version."""
        return str(self.qemu)

    def facts(self) -> dict[str, Any]:
        """What only QEMU has."""
        return {"qemu": str(self.qemu), "max_cpus": self.qemu.max_cpus}

    def config(self) -> dict[str, Any]:
        """The writable directories and the kernel's modules besides."""
        binds = [(f"/.work{d}", d) for d in self.options["writable"]]
        if self.kernel.root:
            binds.append((f"{self.kernel.root}/lib/modules", "/lib/modules"))
        return {**super().config(), "binds": binds}

    def registers(self) -> str:
        """By QEMU's monitor."""
        self._qmp.settimeout(2)
        said = b""
        try:
            self._qmp.sendall(
                b'{"execute":"qmp_capabilities"}{"execute":"human-monitor-command",'
                b'"arguments":{"command-line":"info registers -a"},"id":1}'
            )
            while b'"id": 1' not in said:
                data = self._qmp.recv(65536)
                if not data:
                    break
                said += data
        except OSError:
            pass
        return said.decode(errors="replace").replace("\\r\\n", "\n")
