"""`pyvmm exec` and `pyvmm shell` with a Linux guest whose own command goes on meanwhile. Each
client takes a second or two to start in the testbed, so a few do everything.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest

from tests.boot.guest import PYVMM, Run
from tests.boot.test_console import play

if TYPE_CHECKING:
    from tests.boot.guest import Host

pytestmark = pytest.mark.usefixtures("nothing_left")
NAME = f"exec-{os.getpid()}"
EXEC = [*PYVMM, "exec", "--host", "local", NAME, "--"]
TERMINAL = [*EXEC[:-2], "-t", *EXEC[-2:]]

#: $E runs a command in the guest, $T with a terminal there. What fails is said on standard output.
SCRIPT = r"""
cd "$(mktemp -d)"
check() { [ "$2" = "$3" ] || echo "$1: '$2', not '$3'"; }

# A slow reader: it takes a line and then nothing, while everything else goes on.
mkfifo go
$E yes | { read -r line; echo "$line" >slow; read -r end <go; } &
slow=$!
until [ -s slow ]; do sleep 0.1; done

# 20 MB there and back.
head -c 20000000 /dev/urandom >data
{ $E cat <data >back; echo $? >status.cat; } &
cat=$!

# Five at once.
five=
for i in 1 2 3 4 5; do
    { $E sh -c "echo $i; sleep 1; echo $i >&2; exit $i" >out.$i 2>err.$i; echo $? >status.$i; } &
    five="$five $!"
done
wait $five
for i in 1 2 3 4 5; do
    check "one of five" "$(cat out.$i err.$i status.$i | tr '\n' ' ')" "$i $i $i "
done
check "the slow one" "$(cat slow)" y

# A signal reaches the command, whose status is the client's.
$E sh -c 'trap "exit 9" TERM; echo begun; while :; do sleep 0.1; done' >begun &
client=$!
until grep -q begun begun; do sleep 0.1; done
kill -TERM $client
wait $client
check "SIGTERM" $? 9

# Without its client a command is ended.
$E sh -c 'trap "" HUP; echo begun; sleep 4321' >begun2 &
client=$!
until grep -q begun begun2; do sleep 0.1; done
kill -KILL $client
wait $client 2>/dev/null
$E sh -c 'while ps | grep -q "sleep [4]321"; do sleep 0.1; done'
check "the end of the orphan" $? 0

# On a terminal, input ends behind a part of a line, too.
check "a part of a line" "$(printf abc | $T sh -c 'cat; echo ended' | grep -c ended)" 1

check "no reader" "$($E sh -c 'yes; echo $? >/tmp/yes' | head -1)" y
$E nonsense 2>err
check "not found" "$?: $(cat err)" \
    "127: pyvmm-init: cannot run 'nonsense': No such file or directory"
wait $cat
check "20 MB" "$(cat status.cat) $(sha256sum <back)" "0 $(sha256sum <data)"
echo go >go
wait $slow
rm -rf "$PWD"
"""


def test_commands_beside_the_guests_own(host: Host) -> None:
    with Run(host, "--name", NAME, "--", "sh", "-c", "echo up; sleep 1000") as run:
        run.expect("up")
        beside = host.run(
            *EXEC[:-2], "--net", NAME, "--", "ip", "-o", "-4", "addr", "show", "dev", "tap0"
        )
        assert beside.status == 0 and " 192.168.100.1/24 " in beside.out, beside
        script = f"E='{' '.join(EXEC)}'\nT='{' '.join(TERMINAL)}'\n{SCRIPT}"
        assert host.run("sh", "-c", script).out == ""
        argv = [*PYVMM, "shell", "--host", "local", "-u", "1000:5", "-C", "/tmp", NAME]
        shell, left = play(
            host,
            [
                ["expect", "/tmp \\$ "],
                ["type", "id; stty size\r"],
                ["expect", "^uid=1000 gid=5"],
                ["resize", [132, 50]],
                ["type", "until stty size | grep 132; do sleep 0.1; done\r"],
                ["expect", "^50 132"],
                ["type", "sh -c 'echo begun; exec sleep 1000'\r"],
                ["expect", "^begun"],
                ["type", "\x03"],
                ["expect", "/tmp \\$ "],
                ["type", "exit 4\r"],
            ],
            [["expect", "/tmp \\$ "], ["type", "\x01x"]],
            argv=argv,
        )
        assert (shell["status"], left["status"]) == (4, 129)
        for result in (shell, left):
            assert result["raw"] and result["restored"]
        waiting = host.start(*EXEC, "sh", "-c", "sleep 1234; true")
        done = host.run(
            *EXEC, "sh", "-c", "until ps | grep -q 'sleep [1]234'; do :; done; poweroff"
        )
        for ended in (done, waiting.result()):
            assert ended.status == 119
            assert re.search("pyvmm: the guest has ended .poweroff", ended.err), ended
        assert run.wait() == 119, run
    gone = host.run(*EXEC, "true")
    assert gone.status == 113 and f"no machine named {NAME}" in gone.err
