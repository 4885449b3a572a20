"""Boot a Linux guest with a virtio-net card and show what happens: discovery, negotiation, packets
both ways, exits.

Example:
  pyvmm demo --cpus 2

Exit status: 0; as of pyvmm run if the guest cannot run, or ends early; 132 --sandbox on is
impossible.
"""

from __future__ import annotations

import time

from pyvmm.cli.support.options import add_host, add_sandbox
from pyvmm.errors import GuestEnded, GuestTimeout, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from pyvmm.card.nic import Nic
    from pyvmm.machine import Machine

#: One iperf3 server per direction: a server that has just served does not listen for a moment.
PORTS = ("5201", "5202")
#: The guest's commands. Each `@` line begins a stage for which the host's side waits.
GUEST = r"""
echo "@device"
cd /sys/bus/pci/devices/0000:00:01.0
echo "PCI 00:01.0 vendor $(cat vendor) device $(cat device) class $(cat class)," \
  "driver $(basename $(readlink driver))"
dmesg | grep -E 'pci 0000:00:01.0:' | sed 's/^\[ *\([0-9.]*\)\] /\1 s  /'
echo "interrupts:"; grep virtio /proc/interrupts | tr -s ' '
ip addr show eth0 | grep -E 'mtu|ether|inet '
echo "@ping"
ping -q -c 5 -i 0.2 HOST
for port in PORTS; do iperf3 -s -1 -p $port >/dev/null & done
until [ $(cat /proc/net/tcp* | grep -c ' 0A ') = 2 ]; do sleep 0.1; done
echo "@serve"
wait
echo "@end"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--cpus", metavar="N", type=int, default=1, help="virtual CPUs (1)")
    parser.add_argument(
        "--net", metavar="MODE", default="emulated", help="as in `pyvmm run` (emulated)"
    )
    add_sandbox(parser, "this process before the guest runs")
    add_host(parser, "where to run (auto)")


def run(args: argparse.Namespace) -> int:
    """Choose the host, then run the demo there."""
    from pyvmm.cli.support.hostchoice import elsewhere

    argv = ["demo", "--host", "local", "--cpus", str(args.cpus), "--net", args.net]
    argv += ["--sandbox", args.sandbox]
    vhost = args.net.partition(",")[0] == "vhost-net"
    vdpa = args.net.partition(",")[0] == "vhost-vdpa"
    status = elsewhere(args.host, None, argv, vhost=vhost, vdpa=vdpa)
    return _demo(args) if status is None else status


class Story:
    """Prints each step with its time."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def head(self, text: str) -> None:
        """Begin a step."""
        print(f"\n[{time.monotonic() - self._start:5.1f} s] {text}", flush=True)

    def lines(self, text: str) -> None:
        """Show the output of a step."""
        for line in text.strip().splitlines():
            print(f"          {line.rstrip()}", flush=True)


def _demo(args: argparse.Namespace) -> int:
    from pyvmm.hostnet import tools
    from pyvmm.images import CMDLINE, find
    from pyvmm.machine import Machine
    from pyvmm.netopt import Net

    story = Story()
    net = Net.parse(args.net)
    if net.mode == "none" or not net.own_network:
        raise UsageError(
            f"pyvmm demo --net {args.net}", "the demo wants a card with a tap of its own"
        )
    image = find("default")
    story.head(
        f"booting Linux {image.version} on {args.cpus} vCPU(s), one virtio-net card, "
        f"data path: {args.net}"
    )
    script = GUEST.replace("HOST", "192.168.100.1").replace("PORTS", " ".join(PORTS))
    with Machine(
        image.kernel,
        initrd=image.initrd,
        append=CMDLINE,
        cpus=args.cpus,
        nets=[net],
        command=["sh", "-c", script],
        sandbox=args.sandbox,
    ) as machine:
        nic = machine.nets[0]
        tools.permit()
        machine.confine()
        story.lines(f"sandbox: {machine.sandbox}")
        machine.start()
        _stage(machine, "device", story)
        device = _stage(machine, "ping", story)
        up = (machine.phases["init"] - machine.phases["vmm"]) / 1e9
        story.head(f"the guest's init ran after {up:.1f} s; the device as the guest found it")
        story.lines(device)
        _negotiation(story, nic)
        story.head("ping: guest to host")
        story.lines(_stage(machine, "serve", story))
        _from_host(story, nic)
        outcome = machine.wait(60)
        story.head(f"the guest has ended: {outcome.kind}, exit status {outcome.status}")
        _summary(story, machine)
        error = outcome.error()
        if error is not None:
            raise error
        status = outcome.status or 0
    story.head("closed: tap, network namespace, threads and descriptors are gone")
    return status


def _stage(machine: Machine, name: str, story: Story, limit: float = 600) -> str:
    """Wait until the guest has reached stage ``name``; returns its output of the stage before.

    :param limit: seconds, for a guest that is emulated on a busy machine.
    """

    until = time.monotonic() + limit
    while True:
        try:
            match = machine.stdout.expect(rf"(?:@[a-z]+\n|\A)([^@]*)@{name}\n", 5)
            return match.group(1).decode(errors="replace")
        except TimeoutError:
            outcome = machine.outcome
            if outcome is not None:
                raise outcome.error() or GuestEnded("the guest ended before the demo did") from None
            if time.monotonic() > until:
                raise GuestTimeout(
                    f"the guest did not get to {name!r} within {limit:g} s",
                    "an emulated guest needs an idle machine; its console: pyvmm run",
                ) from None
            story.head(
                "waiting for the guest "
                f"({', '.join(p for p in machine.phases if p != 'vmm') or 'kernel'})"
            )


def _negotiation(story: Story, nic: Nic) -> None:
    from pyvmm.virtio.features import names

    device = nic.device
    declined = device.offered() & ~device.negotiated
    story.head("feature negotiation")
    story.lines(f"negotiated: {' '.join(names(device.negotiated))}")
    story.lines(f"declined:   {' '.join(names(declined)) or 'none'}")
    for q in device.queues:
        way = "control" if q.index in device.own_queues() else ("receive", "transmit")[q.index % 2]
        story.lines(
            f"queue {q.index} ({way}): {q.size} entries, descriptors at {q.desc:#x}, "
            f"vector {q.vector}"
        )


def _from_host(story: Story, nic: Nic) -> None:
    from pyvmm.hostnet import tools
    from pyvmm.workloads import run_tool

    assert nic.guest is not None
    guest = nic.guest.partition("/")[0]
    story.head("ping: host to guest")
    story.lines(run_tool(nic.namespace, tools.ping(guest, 5, 0.2), 60))
    ways = (("TCP: host to guest", False), ("TCP: guest to host", True))
    for port, (title, reverse) in zip(PORTS, ways, strict=True):
        story.head(title)
        words = tools.iperf3(guest, int(port), 2, reverse=reverse, json=False)
        text = run_tool(nic.namespace, words, 60)
        story.lines(
            "\n".join(line for line in text.splitlines() if "sender" in line or "receiver" in line)
        )


def _summary(story: Story, machine: Machine) -> None:
    from pyvmm.cli.support.tables import exits_table

    counters = machine.nets[0].device.datapath.counters()
    for way in ("rx", "tx"):
        name = {"rx": "to guest", "tx": "from guest"}[way]
        text = f"packets {name}: {counters[f'{way}_packets']}"
        if f"{way}_kicks" in counters:  # vhost's worker in the kernel does not count kicks
            text += (
                f", with {counters[f'{way}_kicks']} kicks and {counters[f'{way}_calls']} interrupts"
            )
        story.lines(text)
    stats = machine.kvm_stats()
    if stats is not None:
        total = sum(v["exits"] for v in stats["vcpus"])
        story.lines(f"exits in KVM: {total}, of which {machine.ledger().total} reached the VMM")
    story.lines(exits_table(machine))
