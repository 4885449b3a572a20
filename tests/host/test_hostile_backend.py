"""`pyvmm run` with a vhost-user back-end that makes our eventfds full and blocking, and answers
nothing any more: signals and the control socket work all the same.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.spec import vhost_user as spec
from pyvmm.vhostuser.wire import Listener
from tests.driver import wait_for
from tests.vu_fake import Fake

if TYPE_CHECKING:
    import socket

    from pyvmm.vhostuser.wire import Message

PATIENCE = 120.0
PYVMM = [sys.executable, "-m", "pyvmm"]


@pytest.mark.parametrize("notify", ["ioeventfd", "exit"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "quit"])
def test_it_ends(
    guest: Callable[[str], str], tmp_path: Path, notify: str, how: signal.Signals | str
) -> None:
    kept: list[int] = []

    def grab(sock: socket.socket, m: Message) -> None:
        (fd,) = m.take_fds(1, 1)
        kept.append(fd)
        with suppress(BlockingIOError):
            os.eventfd_read(fd)
        os.eventfd_write(fd, 2**64 - 2)
        os.set_blocking(fd, True)

    requests = (
        spec.VHOST_USER_SET_VRING_ERR,
        spec.VHOST_USER_SET_VRING_KICK,
        spec.VHOST_USER_SET_VRING_CALL,
    )
    path = str(tmp_path / "s")
    with closing(Listener(path)) as listener, Fake(listener) as fake:
        fake.answers = dict.fromkeys(requests, grab)
        fake.answers[spec.VHOST_USER_GET_VRING_BASE] = lambda sock, m: None
        name = f"hostile-{os.getpid()}"
        argv = [*PYVMM, "run", "--host", "local", "--name", name, "--kernel", guest("pcinet")]
        argv += ["--net", f"vhost-user,socket={path},notify={notify}"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                assert wait_for(
                    lambda: fake.seen.count(spec.VHOST_USER_SET_VRING_ENABLE) == 2, PATIENCE
                )
                query = [*PYVMM, "qmp", name, "query-status"]
                assert (
                    subprocess.run(query, timeout=PATIENCE, stdout=subprocess.DEVNULL).returncode
                    == 0
                )
                if isinstance(how, str):
                    command = [*PYVMM, "qmp", name, how]
                    assert (
                        subprocess.run(
                            command, timeout=PATIENCE, stdout=subprocess.DEVNULL
                        ).returncode
                        == 0
                    )
                else:
                    process.send_signal(how)
                status = process.wait(PATIENCE)
                expected = {signal.SIGTERM: 143, signal.SIGINT: 130, "quit": 0}
                assert status == expected[how], process.stdout and process.stdout.read()
            finally:
                process.kill()
    for fd in kept:
        os.close(fd)
