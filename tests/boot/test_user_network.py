"""`--net user` and `internet=on` with Linux: to the host's servers and back, as a user without any
privilege.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.images import find
from tests.boot.guest import PATIENCE, PYVMM

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")

NOBODY = 65534
PORT, FORWARDED = 8071, 8072
SIZE = 3 << 20
#: In the guest.
SCRIPT = f"""
set -e
grep -q nameserver.10.0.2.3 /etc/resolv.conf
nslookup -type=a pyvmm.example 10.0.2.3 | grep 192.0.2.7
echo question | nc.openbsd -u -W 1 10.0.2.2 {PORT} | grep question
tr '\\0' g </dev/zero | head -c {SIZE} >/tmp/own
nc.openbsd -N 10.0.2.2 {PORT} </tmp/own >/tmp/theirs
[ "$(head -c {SIZE} /tmp/theirs | tr -d "$(head -c 1 /tmp/theirs)" | wc -c)" = 0 ]
[ "$(tail -c 32 /tmp/theirs)" = "$(md5sum </tmp/own | head -c 32)" ]
echo tcp-right
echo 'md5sum | head -c 32' >/tmp/serve
busybox nc -l -p 22 -e sh /tmp/serve
# Not before all has arrived: the guest's end takes along what is on its way.
while grep -q ':0016 .* 0[1459] ' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
echo served
"""


def readable_by_all(directory: Path) -> bool:
    """Whether other users may enter ``directory``."""
    return all(one.stat().st_mode & 0o1 for one in (directory, *directory.parents))


@pytest.mark.parametrize("mode", ["user", "emulated,internet=on", "vhost-net,internet=on"])
def test_a_way_out(host: Host, open_path: Path, mode: str) -> None:
    """Names, UDP, TCP with data both ways, and a port of the host that leads into the guest."""
    if not (Path(__file__).stat().st_mode & 0o4 and readable_by_all(Path(__file__).parents[2])):
        pytest.skip("others may not read this checkout")
    outside = Path(__file__).with_name("outside.py")
    shutil.copytree(find("default").directory, open_path / "cache/pyvmm/images/default")
    log, resolv = open_path / "log", open_path / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\n")
    net = f"{mode},hostfwd={FORWARDED}-22"
    run = [*PYVMM, "run", "--host", "local", "--net", net, "--", "sh", "-c", SCRIPT]
    ids = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
    script = f"""
        python3 {outside} {PORT} {FORWARDED} >{log} 2>&1 & servers=$!
        trap 'kill $servers' EXIT
        until grep -q ready {log}; do sleep 0.1; done
        mount --bind {resolv} /etc/resolv.conf
        chmod a+rw /dev/kvm /dev/vhost-net /dev/net/tun; chmod -R a+rX {open_path}/cache
        export HOME=/nowhere XDG_CACHE_HOME={open_path}/cache
        {shlex.join(["setpriv", *ids, *run])}
        status=$?
        [ $status != 0 ] || until grep -q forwarded {log}; do sleep 0.1; done
        cat {log}
        exit $status"""
    done = host.run("unshare", "--mount", "sh", "-c", script, timeout=3 * PATIENCE)
    assert done.status == 0, done
    assert "tcp-right\n" in done.out and "served\n" in done.out, done
    assert "forwarded True" in done.out, done
