"""QEMU migrates a guest away from one of our back-ends to another, while packets come and go."""

from __future__ import annotations

import shutil
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvmm.backend.net import NetService
from pyvmm.backend.ports import PythonPort
from pyvmm.backend.server import Backend
from pyvmm.control.client import Client
from pyvmm.errors import ControlError, MachineMissing
from pyvmm.spec import vhost_user as spec
from tests.driver import wait_for
from tests.unit.test_vhost_user import no_leak

__all__ = ["no_leak"]  # a fixture

PATIENCE = 60.0
GUESTS = Path(__file__).resolve().parents[2] / "guest"
MAC, GATEWAY = "52:54:00:12:34:56", bytes.fromhex("020000000001")
MEMORY, PAGE = 16 << 20, 4096
ARP, RARP = b"\x08\x06", b"\x80\x35"

pytestmark = pytest.mark.skipif(
    not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed"
)


class Network:
    """Answers ARP requests, each with other bytes behind the answer, and counts them.

    :ivar asked: how many requests have come. :ivar holds: give no answer from now on.
    :ivar held: the answer that was not given; the guest waits for it.
    """

    def __init__(self) -> None:
        self.asked = self.rarps = 0
        self.holds = False
        self.held = b""
        self.port = PythonPort(self.receive)

    def receive(self, frame: bytes, pair: int) -> None:
        self.rarps += frame[12:14] == RARP
        if frame[12:14] != ARP:
            return
        self.asked += 1
        head = frame[6:12] + GATEWAY + frame[12:20] + b"\x00\x02" + GATEWAY
        answer = head + frame[38:42] + frame[22:32] + self.asked.to_bytes(4) * 340
        if self.holds:
            self.held = answer
        else:
            self.port.send(answer)

    def hold(self) -> bytes:
        """Let the guest wait for an answer: it sends nothing, and writes nothing. (Without that, a
        page may differ in the end: QEMU 7.2 without KVM misses a write of a processor that comes
        while it reads which pages were written.)
        """
        self.holds = True
        assert wait_for(lambda: self.held, PATIENCE)
        return self.held


class Side:
    """One of our back-ends with a QEMU as its front-end."""

    def __init__(
        self, home: Path, stack: ExitStack, kernel: Path, *qemu: str, protocol_features: int = -1
    ) -> None:
        home.mkdir()
        self.network, self.log = Network(), list[str]()
        self.backend = stack.enter_context(
            Backend(
                NetService(self.network.port),
                log=self.log.append,
                protocol_features=protocol_features,
            )
        )
        thread = threading.Thread(target=self.backend.run, args=(str(home / "net"),))
        thread.start()
        stack.callback(thread.join, PATIENCE)
        stack.callback(self.backend.stop)
        assert wait_for((home / "net").exists, PATIENCE)
        argv = ["qemu-system-x86_64", "-machine", "q35,accel=tcg,memory-backend=m", "-nodefaults"]
        argv += ["-object", f"memory-backend-memfd,id=m,size={MEMORY},share=on"]
        argv += ["-m", f"{MEMORY >> 20}M", "-display", "none", *qemu]
        argv += ["-chardev", f"socket,id=c,path={home}/net", "-netdev", "vhost-user,id=n,chardev=c"]
        argv += ["-device", f"virtio-net-pci,netdev=n,disable-legacy=on,mac={MAC}"]
        # QEMU 7.2 without KVM crashes in msix_set_vector_notifiers(), so the guest polls.
        argv += ["-kernel", str(kernel), "-append", "count=1000000000 irq=poll"]
        argv += ["-qmp", f"unix:{home}/qmp,server=on,wait=off"]
        with (home / "log").open("w") as out:
            process = subprocess.Popen(argv, stderr=out)
        stack.callback(process.wait, PATIENCE)
        stack.callback(process.kill)
        self._socket = f"{home}/qmp"
        assert wait_for(self._connect, PATIENCE), (home / "log").read_text()
        stack.enter_context(self.qmp)

    def _connect(self) -> bool:
        try:
            self.qmp = Client(self._socket, timeout=PATIENCE)
        except MachineMissing:
            return False  # it does not listen yet
        return True

    def has_migrated(self) -> bool:
        return bool(self.qmp.command("query-migrate").get("status") == "completed")

    def memory(self, file: Path) -> bytes:
        """The guest's memory; the guest is stopped."""
        self.qmp.command("pmemsave", val=0, size=MEMORY, filename=str(file))
        return file.read_bytes()

    def places(self) -> list[int]:
        """The guest-physical addresses of the indices: used and available of ring 0, of ring 1."""
        frontend = self.backend.frontend
        assert frontend is not None
        rings = [ring.addresses for ring in frontend.rings]
        return [frontend.memory.gpa(a, "") + 2 for ring in rings if ring for a in ring[1:]]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guest/pcinet.c: asks by ARP, and waits for each answer."""
    out = tmp_path_factory.mktemp("guest")
    argv = ["make", "-s", "-C", str(GUESTS), f"BUILD={out}", f"{out}/pcinet.elf"]
    subprocess.run(argv, check=True)
    return out / "pcinet.elf"


def test_a_guest_migrates(tmp_path: Path, kernel: Path) -> None:
    """It has the same memory, and goes on where it was; no packet is lost or repeated."""
    with ExitStack() as stack:
        source = Side(tmp_path / "a", stack, kernel)
        assert wait_for(lambda: source.network.asked >= 100, PATIENCE), source.log
        uri = f"unix:{tmp_path}/b/migration"
        target = Side(tmp_path / "b", stack, kernel, "-S", "-incoming", uri)
        # The log is in use, and packets come and go, while memory is copied.
        source.qmp.command("migrate-set-parameters", **{"max-bandwidth": 1 << 16})
        source.qmp.command("migrate", uri=uri)
        frontend = source.backend.frontend
        assert frontend is not None
        assert wait_for(lambda: frontend.log_map is not None, PATIENCE), source.log
        before = source.network.asked
        assert wait_for(lambda: source.network.asked >= before + 200, PATIENCE), source.log
        answer = source.network.hold()
        source.qmp.command("migrate-set-parameters", **{"max-bandwidth": 1 << 30})
        for side in (source, target):
            assert wait_for(side.has_migrated, PATIENCE), side.qmp.command("query-migrate")
        a, b = source.memory(tmp_path / "a.mem"), target.memory(tmp_path / "b.mem")
        different = [hex(i) for i in range(0, MEMORY, PAGE) if a[i : i + PAGE] != b[i : i + PAGE]]
        assert not different

        target.qmp.command("cont")
        target.network.port.send(answer)
        assert wait_for(lambda: target.network.asked >= 200, PATIENCE), target.log
        assert target.network.rarps
        places = target.places()
        target.network.hold()
        target.qmp.command("stop")
        c = target.memory(tmp_path / "c.mem")
        rx_used, _, tx_used, tx_available = (int.from_bytes(c[i : i + 2], "little") for i in places)
        asked = source.network.asked + target.network.asked
        counts = [side.backend.counters() for side in (source, target)]
        assert tx_available == tx_used == asked & 0xFFFF
        assert asked == sum(n["tx_packets"] for n in counts)
        assert rx_used == asked - 1 & 0xFFFF  # and the last answer was not given
        for n, side in zip(counts, (source, target), strict=True):
            wrong = ("refused", "faults", "bases_corrected", "log_missed", "sessions_broken")
            assert not any(n[name] for name in wrong), (n, side.log)


def test_without_a_log(tmp_path: Path, kernel: Path) -> None:
    """Of a back-end that keeps no log, QEMU does not take a guest away."""
    with ExitStack() as stack:
        without = ~(1 << spec.VHOST_USER_PROTOCOL_F_LOG_SHMFD)
        source = Side(tmp_path / "a", stack, kernel, protocol_features=without)
        with pytest.raises(ControlError, match="VHOST_USER_PROTOCOL_F_LOG_SHMFD"):
            source.qmp.command("migrate", uri=f"unix:{tmp_path}/nowhere")
