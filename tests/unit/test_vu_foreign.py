"""In-flight tracking (INFLIGHT_SHMFD) with other people's programs: QEMU is the front-end of our
back-end, and DPDK's library for vhost-user the back-end of our front-end. Both demand 24 bytes.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pyvmm.backend.server import Backend
from pyvmm.datapath.base import HandOverTimes
from pyvmm.memory import GuestMemory
from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.connect import Connector
from pyvmm.vhostuser.device import VhostUserDevice
from tests import dpdk
from tests.driver import Events, Ring, bits, wait_for
from tests.unit.test_vhost_user import no_leak, path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyvmm.backend.frontend import Frontend, Handler
    from pyvmm.vhostuser.wire import Message

__all__ = ["no_leak", "path"]  # fixtures

PATIENCE = 60.0
VERSION_1 = bits("VIRTIO_F_VERSION_1")
CONFIG_HEADER = "<III"  # offset, size, flags
SECTORS = 2048


class Disk:
    """A back-end's part for a disk of 1 MiB that never answers."""

    name, rings, queue_num, in_order = "disk", 1, 1, True
    protocol_features = 1 << spec.VHOST_USER_PROTOCOL_F_CONFIG

    def __init__(self) -> None:
        self.requests: Mapping[int, Handler] = {
            spec.VHOST_USER_GET_CONFIG: self._get_config,
        }
        self.seen: list[int] = []
        self.started: list[Any] = []

    def _get_config(self, frontend: Frontend, m: Message) -> tuple[bytes, list[Any]]:
        offset, size, _ = struct.unpack_from(CONFIG_HEADER, m.payload)
        config = struct.pack("<Q", SECTORS) + bytes(12) + struct.pack("<I", 512) + bytes(256)
        return m.payload[:12] + config[offset : offset + size], []

    def features(self) -> int:
        return VERSION_1

    def check_features(self, acked: int) -> None:
        pass

    def start(self, acked: int, memory: Any, rings: Any, events: Any) -> None:
        self.started.append([(ring.size, bool(ring.inflight)) for ring in rings])

    def stop(self) -> list[int]:
        return [0]

    def counters(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


#: The in-flight region is as large as the device's queue size says.
BLK = "chardev=c,num-queues=1,queue-size=256,disable-legacy=on"


@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="QEMU is not installed")
def test_qemu_as_front_end(path: str, tmp_path: Path) -> None:
    """The firmware drives the disk. QEMU has us make an in-flight region and gives it back, with
    its own memory, which is sealed.
    """
    disk, log = Disk(), list[str]()
    with Backend(disk, log=log.append) as backend:
        thread = threading.Thread(target=backend.run, args=(path,))
        thread.start()
        assert wait_for(lambda: Path(path).exists(), PATIENCE)
        argv = ["qemu-system-x86_64", "-machine", "q35,accel=tcg,memory-backend=m", "-nodefaults"]
        argv += ["-object", "memory-backend-memfd,id=m,size=64M,share=on", "-m", "64"]
        argv += ["-chardev", f"socket,id=c,path={path}", "-display", "none"]
        argv += ["-device", f"vhost-user-blk-pci,{BLK}"]
        with (tmp_path / "log").open("w") as out, subprocess.Popen(argv, stderr=out) as qemu:
            try:
                assert wait_for(lambda: disk.started, PATIENCE), (log, Path(out.name).read_text())
            finally:
                qemu.kill()
        backend.stop()
        thread.join(PATIENCE)
        # A newer firmware makes larger rings than an older one.
        assert disk.started[0] in ([(128, True)], [(256, True)]), log
        assert backend.counters()["refused"] == 0, log


#: Arguments: the socket, the directory of DPDK's libraries.
RTE_VHOST = """
import ctypes, glob, sys, threading
path, where = sys.argv[1].encode(), sys.argv[2]
library = lambda name: ctypes.CDLL(glob.glob(where + name + ".so.[0-9]*")[0], ctypes.RTLD_GLOBAL)
eal, vhost = library("librte_eal"), library("librte_vhost")
words = [b"x", b"--no-huge", b"-m", b"64", b"--no-shconf", b"--no-pci", b"--no-telemetry",
         b"--lcores", b"0@0"]
assert eal.rte_eal_init(len(words), (ctypes.c_char_p * len(words))(*words)) >= 0
new = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda vid: print("new", flush=True) or 0)
gone = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda vid: print("gone", flush=True))
ops = (ctypes.c_void_p * 16)(*(ctypes.cast(f, ctypes.c_void_p) for f in (new, gone)))
inflight, config = 1 << 12, 0
assert not vhost.rte_vhost_driver_register(path, ctypes.c_uint64(0))
features = ctypes.c_uint64()
assert not vhost.rte_vhost_driver_get_protocol_features(path, ctypes.byref(features))
features.value |= inflight
assert not vhost.rte_vhost_driver_set_protocol_features(path, features)
assert not vhost.rte_vhost_driver_callback_register(path, ops)
assert not vhost.rte_vhost_driver_start(path)
print("listens", flush=True)
threading.Event().wait()
"""


def test_dpdk_s_library_as_back_end(path: str, tmp_path: Path) -> None:
    """It makes an in-flight region; its successor, a new process, gets that of the one before."""
    home = dpdk.root() / dpdk.LIB
    if not home.exists():
        pytest.skip(dpdk.REMEDY)
    (tmp_path / "b.py").write_text(RTE_VHOST)
    argv = [sys.executable, str(tmp_path / "b.py"), path, f"{home}/"]

    def start() -> subprocess.Popen[str]:
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                argv,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "LD_LIBRARY_PATH": str(home)},
            )
        assert process.stdout
        while (line := process.stdout.readline()).strip() != "listens":
            assert line, (tmp_path / "log").read_text()
        return process

    backend = start()
    with closing(GuestMemory(1 << 20)) as memory:
        rings = [Ring(memory, 64, 0x10000 * (i + 1), index=i) for i in (0, 1)]
        device = VhostUserDevice(Connector(path), 2, HandOverTimes(), timeout=PATIENCE)
        try:
            device.connect(PATIENCE)
            device.start(VERSION_1, memory, [r.vring() for r in rings], Events())
            assert device.report()["inflight"] and not device.problems, (
                device.problems,
                (tmp_path / "log").read_text(),
            )
            assert "INFLIGHT_SHMFD" in str(device.report()["protocol_features"])
            backend.kill()
            backend.communicate()
            Path(path).unlink()
            backend = start()
            assert wait_for(
                lambda: device.counters()["connections"] == 2 and device.connected, PATIENCE
            ), device.problems
            assert device.stop() == [0, 0]
            # That the first one has gone; it may have died with the next connection in its queue.
            assert all("closed the connection" in text for text in device.problems), device.problems
        finally:
            device.close()
            backend.kill()
            backend.communicate()
            for ring in rings:
                ring.close()
