"""Plugs cards into a running guest and removes them; runs in the testbed: `python -m
tests.boot.plugger ROUNDS`. Prints one JSON object.

The first card's traffic goes on all the while: echoes from the host, each of which counts. After
each mode has been used once, what this process holds must not grow any more.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from pyvmm import Machine, Net
from pyvmm.card.nic import Nic
from pyvmm.errors import GuestTimeout
from pyvmm.images import find
from tests.boot.guest import ECHO, PATIENCE, pings
from tests.descriptors import open_fds

#: One data path after another.
MODES = ("emulated", "vhost-net,queues=2", "vhost-user")
IN_GUEST = r"""
while :; do
  for dir in /sys/class/net/*; do
    [ "$(cat $dir/address)" != {mac} ] || iface=${{dir##*/}}
  done
  [ -z "$iface" ] || break
  sleep 0.05
done
ip link set $iface up && ip addr add {guest} dev $iface && {pings}
"""


#: See ``rest``.
Rest = tuple[dict[str, int], int, int, int]


def held() -> dict[str, int]:
    """What this process has: descriptors, threads, children, network namespaces."""
    fds = [target for _, target in open_fds()]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "fds": len(fds),
        "namespaces": sum(fd.startswith("net:") for fd in fds),
        "threads": sum(1 for _ in Path("/proc/self/task").iterdir()),
        "children": len(children),
    }


def rest(vm: Machine) -> Rest:
    """What the process and the machine have."""
    return held(), len(vm.vm._msi), vm.vm._next_gsi, len(vm.bus._regions)


def grown(first: Rest, now: Rest) -> bool:
    """Whether there is more of anything."""
    more = [now[0][name] > count for name, count in first[0].items()]
    return any(more) or any(n > f for f, n in zip(first[1:], now[1:], strict=True))


def use(vm: Machine, nic: Nic) -> None:
    """Ping through a card from the guest."""
    assert nic.host and nic.guest
    address = nic.host.partition("/")[0]
    script = IN_GUEST.format(mac=nic.device.mac.hex(":"), guest=nic.guest, pings=pings(address))
    result = vm.run(script, timeout=PATIENCE)
    assert result.status == 0 and result.stdout.count(b" 0% packet loss") == 3, result


def gone(vm: Machine, nic: Nic) -> None:
    """The guest has no such interface any more, and the machine no such card."""
    addresses = vm.run("cat /sys/class/net/*/address").stdout.decode().split()
    assert nic.device.mac.hex(":") not in addresses, addresses
    assert nic not in vm.nets


def rounds(vm: Machine, count: int) -> None:
    first = None
    for number in range(count):
        nic = vm.add_nic(MODES[number % len(MODES)])
        assert (nic.name, nic.slot) == ("net1", 2)
        use(vm, nic)
        assert any("net1 " in line.what for line in vm.ledger().lines)
        vm.remove_nic("net1")
        gone(vm, nic)
        if number == len(MODES) - 1:
            first = rest(vm)
    assert first is not None
    now = rest(vm)
    until = time.monotonic() + PATIENCE
    # A thread that has done its work may not have ended yet, neither now nor at the first time.
    while grown(first, now):
        assert time.monotonic() < until, f"{first} became {now}"
        time.sleep(0.1)
        now = rest(vm)


def stubborn(vm: Machine) -> None:
    """A guest that does not react: the request stands, and is met later, or by a reset."""
    gpe = "/sys/firmware/acpi/interrupts/gpe01"
    nic = vm.add_nic("emulated")
    use(vm, nic)
    for again in (False, True):
        vm.run(f"echo disable >{gpe}")
        for _ in range(2):
            try:
                vm.remove_nic(nic, timeout=0.5)
                raise AssertionError("the guest has reacted")
            except GuestTimeout:
                assert vm.nic_state(nic) == "removing"
        if again:
            removal = vm.ask_removal(nic)
            vm.reset()
            assert removal.done.wait(60) and removal.gone
        else:
            vm.run(f"echo enable >{gpe}")
            vm.remove_nic(nic)
            gone(vm, nic)
            nic = vm.add_nic("emulated", name="net7")
            use(vm, nic)
    assert [n.name for n in vm.nets] == ["net0"] and "pyvmm.net=" in vm.cmdline()
    gone(vm, nic)


def main() -> int:
    image = find("default")
    with (
        tempfile.TemporaryFile("w+") as log,
        Machine(image.kernel, initrd=image.initrd, nets=[Net("emulated")], agent=True) as vm,
    ):
        vm.start()
        assert vm.run("true").status == 0
        first = vm.nets[0]
        assert first.guest and first.namespace
        target = first.guest.partition("/")[0]
        # At SIGINT, ping(8) would not wait for the echoes that are on their way.
        ping = first.namespace.popen([*ECHO, target, "0", "56"], stdout=log)
        try:
            rounds(vm, int(sys.argv[1]))
        finally:
            ping.send_signal(signal.SIGINT)
            ping.wait()
        log.seek(0)
        match = re.search(r"(\d+) packets transmitted, (\d+) received", log.read())
        assert match is not None
        stubborn(vm)
        end = vm.power_off()
    print(json.dumps({"sent": int(match[1]), "received": int(match[2]), "end": end.kind}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
