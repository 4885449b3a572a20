"""The commands of the control socket: QEMU's, with QEMU's schemas, and ours (docs/control.md).

Each command is a function of the machine and the checked arguments. The control thread runs it. A
command that looks at devices, VM or vCPUs holds the machine's I/O lock, so that no restart happens
meanwhile.
"""

from __future__ import annotations

import time
from functools import partial

from pyvmm import __version__
from pyvmm.control.server import Command, QmpError, TakingCommand, WaitingCommand, version
from pyvmm.errors import PyvmmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence
    from socket import socket
    from typing import Any, Protocol

    from pyvmm.boot import BootState
    from pyvmm.card.nic import Nic
    from pyvmm.card.peripheral import Peripheral
    from pyvmm.devices.guest_channel import Channel
    from pyvmm.exits.accounts import MachineAccounts
    from pyvmm.kvm.vcpu import Vcpu
    from pyvmm.memory import GuestMemory
    from pyvmm.netopt import Net

    Given = dict[str, Any]

    class Controlled(Protocol):
        """A machine, as the commands see it; ``pyvmm.machine.Machine`` describes the members."""

        accounts: MachineAccounts
        channel: Channel | None
        memory: GuestMemory

        @property
        def boot(self) -> BootState: ...
        @property
        def name(self) -> str | None: ...
        @property
        def state(self) -> str: ...
        @property
        def io_lock(self) -> threading.RLock: ...
        @property
        def nets(self) -> Sequence[Nic]: ...
        @property
        def devices(self) -> Sequence[Peripheral]: ...
        @property
        def vcpus(self) -> Sequence[Vcpu]: ...
        def pause(self) -> bool: ...
        def resume(self) -> bool: ...
        def reset(self) -> None: ...
        def powerdown(self) -> None: ...
        def add_nic(self, net: Net, *, name: str | None = None) -> Nic: ...
        def ask_removal(self, nic: Nic) -> object: ...
        def nic_state(self, nic: Nic) -> str: ...
        def wake(self) -> None: ...
        def quit(self) -> None: ...
        def emit(self, event: str, **data: object) -> None: ...
        def report(self) -> dict[str, object]: ...


RINGS_MAX = 256  # x-pyvmm-rings follows at most so many chains of a queue


def _vcpu_path(index: int) -> str:
    return f"/machine/unattached/device[{index}]"


def _nic(machine: Controlled, name: str) -> Nic:
    for nic in machine.nets:
        if nic.name == name:
            return nic
    raise QmpError(f"Device '{name}' not found", "DeviceNotFound")


def _numbered(machine: Controlled, given: Given) -> Nic:
    index = given.get("nic", 0)
    nets = machine.nets
    for nic in nets:
        if nic.index == index:
            return nic
    raise QmpError(f"there is no card {index}: the machine has {len(nets)}", "DeviceNotFound")


# --- about the machine ----------------------------------------------------------------------------


def _version(machine: Controlled, given: Given) -> object:
    return version(__version__)


def _commands(machine: Controlled, given: Given) -> object:
    return [{"name": name} for name in sorted([*COMMANDS, "qmp_capabilities"])]


def _help(machine: Controlled, given: Given) -> object:
    return [
        {"name": name, "help": c.help, "arguments": c.arguments}
        for name, c in sorted(COMMANDS.items())
    ]


def _name(machine: Controlled, given: Given) -> object:
    return {"name": machine.name}


def _status(machine: Controlled, given: Given) -> object:
    state = machine.state
    return {"status": state, "running": state == "running", "singlestep": False}


def _machine(machine: Controlled, given: Given) -> object:
    return {
        "status": machine.state,
        "cpus": len(machine.vcpus),
        "memory": machine.memory.size,
        "reboots": machine.accounts.reboots,
        "kernel": machine.boot.kind,
        "nets": [
            {
                "name": n.name,
                "mode": n.mode,
                "tap": n.tap,
                "link": n.device.link_up,
                "transport": n.net.transport,
                "slot": n.slot,
                "mac": n.device.mac.hex(":"),
                "host": n.host,
                "guest": n.guest,
                "state": machine.nic_state(n),
                "enter": n.namespace.command() if n.namespace is not None else None,
            }
            for n in machine.nets
        ],
        "devices": [
            {
                "name": d.name,
                "kind": d.kind,
                "slot": d.slot,
                "connected": d.connected,
            }
            for d in machine.devices
        ],
    }


def _kvm(machine: Controlled, given: Given) -> object:
    return {"enabled": True, "present": True}


def _cpus(machine: Controlled, given: Given) -> object:
    return [
        {
            "cpu-index": v.index,
            "qom-path": _vcpu_path(v.index),
            "thread-id": v.thread_id,
            "target": "x86_64",
            "props": {"socket-id": v.index, "core-id": 0, "thread-id": 0},
        }
        for v in machine.vcpus
    ]


# --- KVM's statistics -----------------------------------------------------------------------------


def _providers(providers: Any) -> list[str] | None:
    """The names that are wanted of provider kvm; [] for all; None if kvm is not wanted."""
    if providers is None:
        return []
    for item in providers:
        if not isinstance(item, dict) or not isinstance(names := item.get("names", []), list):
            raise QmpError("Invalid parameter type for 'providers', expected: array of objects")
        if item.get("provider") == "kvm":
            return [str(n) for n in names]
        raise QmpError(f"Parameter 'provider' does not accept value '{item.get('provider')}'")
    return None


def _stats(machine: Controlled, given: Given) -> object:
    target = given["target"]
    if target not in ("vm", "vcpu"):
        raise QmpError(f"Parameter 'target' does not accept value '{target}'")
    if "vcpus" in given and target != "vcpu":
        raise QmpError("Parameter 'vcpus' is unexpected")
    wanted = _providers(given.get("providers"))
    if wanted is None:
        return []
    with machine.io_lock:
        all_stats = machine.accounts.kvm_stats()
    if all_stats is None:
        return []

    def result(values: dict[str, Any], path: str | None = None) -> dict[str, object]:
        stats = [{"name": n, "value": v} for n, v in values.items() if not wanted or n in wanted]
        return {"provider": "kvm", **({"qom-path": path} if path else {}), "stats": stats}

    if target == "vm":
        return [result(all_stats["vm"])]
    paths = given.get("vcpus")
    rows = [(_vcpu_path(i), values) for i, values in enumerate(all_stats["vcpus"])]
    return [result(values, path) for path, values in rows if paths is None or path in paths]


def _schemas(machine: Controlled, given: Given) -> object:
    if given.get("provider", "kvm") != "kvm":
        raise QmpError(f"Parameter 'provider' does not accept value '{given['provider']}'")
    with machine.io_lock:
        schemas = machine.accounts.kvm_stats_schemas()
    if schemas is None:
        return []
    return [
        {"provider": "kvm", "target": target, "stats": schemas[target]} for target in ("vm", "vcpu")
    ]


# --- run control ----------------------------------------------------------------------------------


def _stop(machine: Controlled, given: Given) -> object:
    machine.pause()
    return {}


def _cont(machine: Controlled, given: Given) -> object:
    machine.resume()
    return {}


def _reset(machine: Controlled, given: Given) -> object:
    machine.reset()
    return {}


def _wakeup(machine: Controlled, given: Given) -> object:
    machine.wake()
    return {}


def _powerdown(machine: Controlled, given: Given) -> object:
    machine.powerdown()
    return {}


def _quit(machine: Controlled, given: Given) -> object:
    machine.quit()
    return {}


# --- network --------------------------------------------------------------------------------------


def _device_add(machine: Controlled, given: Given) -> object:
    from pyvmm.netopt import Net

    if given["driver"] not in ("virtio-net-pci", "virtio-net"):
        raise QmpError(f"'{given['driver']}' is not a valid device model name")
    mac = f",mac={given['mac']}" if "mac" in given else ""
    net = Net.parse(given.get("net", "emulated") + mac)
    if net.fds:
        raise QmpError("fd= names a descriptor of this machine's process: name a tap by tap=")
    nic = machine.add_nic(net, name=given.get("id"))
    return {"id": nic.name}


def _device_del(machine: Controlled, given: Given) -> object:
    machine.ask_removal(_nic(machine, given["id"]))
    return {}


def _set_link(machine: Controlled, given: Given) -> object:
    _nic(machine, given["name"]).set_link(given["up"])
    return {}


def _rx_filter(machine: Controlled, given: Given) -> object:
    nics = machine.nets if "name" not in given else [_nic(machine, given["name"])]
    with machine.io_lock:
        return [_rx_info(nic) for nic in nics]


def _rx_info(nic: Nic) -> dict[str, object]:
    """RxFilterInfo (qapi/net.json), as QEMU's virtio-net fills it."""
    rx = nic.device.rx
    nic.rx_told = False

    def state(no: str, every: str) -> str:
        return "none" if no in rx.flags else "all" if every in rx.flags else "normal"

    return {
        "name": nic.name,
        "promiscuous": "promisc" in rx.flags,
        "multicast": state("nomulti", "allmulti"),
        "unicast": state("nouni", "alluni"),
        "vlan": "normal" if rx.filters_vlans else "all",
        "broadcast-allowed": "nobcast" not in rx.flags,
        "multicast-overflow": "multicast-overflow" in rx.flags,
        "unicast-overflow": "unicast-overflow" in rx.flags,
        "main-mac": rx.mac.hex(":"),
        "vlan-table": sorted(rx.vlans),
        "unicast-table": [a.hex(":") for a in rx.unicast],
        "multicast-table": [a.hex(":") for a in rx.multicast],
    }


# --- ours -----------------------------------------------------------------------------------------


def _switch(machine: Controlled, given: Given) -> object:
    nic = _numbered(machine, given)
    report = nic.switch(given["mode"])
    if report.outcome == "switched":
        machine.emit(
            "X_PYVMM_SWITCHED",
            name=nic.name,
            mode=report.mode,
            duration_ns=time.monotonic_ns() - report.at_ns,
        )
    return report.as_dict()


def _ledger(machine: Controlled, given: Given) -> object:
    with machine.io_lock:
        now = time.monotonic_ns()
        stats = machine.accounts.kvm_stats()
        return {
            "time-ns": now,
            "name": machine.name,
            "status": machine.state,
            "reboots": machine.accounts.reboots,
            "exits": machine.accounts.ledger().as_dict(),
            "vcpus": [
                {
                    "index": v.index,
                    "thread-id": v.thread_id,
                    "kvm-run-returns": v.runs,
                    "interrupts": stats["vcpus"][v.index].get("irq_injections")
                    if stats is not None
                    else None,
                    "exits-in-kvm": stats["vcpus"][v.index].get("exits")
                    if stats is not None
                    else None,
                }
                for v in machine.vcpus
            ],
            "nets": [
                {
                    "name": nic.name,
                    "mode": nic.mode,
                    "notify": nic.net.notify,
                    "queue-pairs": nic.device.pairs,
                    "link": nic.device.link_up,
                    "counters": nic.counters(),
                    "workers": nic.device.datapath.workers(),
                }
                for nic in machine.nets
            ],
        }


def _fault(machine: Controlled, given: Given) -> object:
    from pyvmm.faultopt import check_acts, of_wire

    nic = _numbered(machine, given)
    seed = given.get("seed")
    try:
        acts = [str(word) for word in given.get("acts", [])]
        check_acts(acts)  # all of them before the first is done
        for word in acts:
            nic.act(word)
        if "rules" not in given:
            return {"name": nic.name, **nic.faults()}
        return {"name": nic.name, **nic.fault(*of_wire(given["rules"]), seed=seed)}
    except UsageError as e:
        raise QmpError(str(e)) from e


def _exec(machine: Controlled, given: Given) -> Callable[[socket], None]:
    from pyvmm.control.sessions import READY_MAX, READY_S, carry

    channel, patience = machine.channel, given.get("timeout", READY_S)
    if channel is None:
        raise QmpError(
            f"this guest ({machine.boot.kind}) takes no commands: it is not Linux", "DeviceNotFound"
        )
    if not 0 <= patience <= READY_MAX:
        raise QmpError(f"Parameter 'timeout' expects seconds, at most {READY_MAX}")
    return lambda sock: carry(sock, channel, patience)


def _capture(machine: Controlled, given: Given) -> Callable[[socket], None]:
    from pyvmm.capture.bpf import check_expression, of_rows
    from pyvmm.capture.session import LIMIT_MIN, SNAPLEN
    from pyvmm.control.captures import carry
    from pyvmm.netopt import MAX_QUEUES

    nets = list(machine.nets) if "nic" not in given else [_numbered(machine, given)]
    if not nets:
        raise QmpError("the machine has no card", "DeviceNotFound")
    snaplen = given.get("snaplen", SNAPLEN)
    if not 1 <= snaplen <= SNAPLEN:
        raise QmpError(f"Parameter 'snaplen' expects 1 to {SNAPLEN}")
    try:
        code = of_rows(given["filter"]) if "filter" in given else b""
    except PyvmmError as e:
        raise QmpError(f"Parameter 'filter': {e}") from e
    try:
        expression = check_expression(given.get("expression", ""))
    except PyvmmError as e:
        raise QmpError(f"Parameter 'expression': {e}") from e
    limit = given.get("limit")
    if limit is not None and limit < LIMIT_MIN:
        raise QmpError(f"Parameter 'limit' expects bytes, {LIMIT_MIN} at least")
    queue = given.get("queue")
    if queue is not None and not 0 <= queue < 2 * MAX_QUEUES:
        raise QmpError(f"Parameter 'queue' expects 0 to {2 * MAX_QUEUES - 1}")
    return lambda sock: carry(sock, nets, snaplen, code, expression, limit, queue)


def _report(machine: Controlled, given: Given) -> object:
    with machine.io_lock:
        return machine.report()


def _position(nic: Nic, index: int) -> int | None:
    """Where the data path is in a virtqueue; None if nobody tells."""
    return nic.device.datapath.positions().get(index)


def _rings(machine: Controlled, given: Given) -> object:
    from pyvmm.datapath.ringformat import ring_format
    from pyvmm.virtio.rings import ring_snapshot

    nic = _numbered(machine, given)
    chains = given.get("chains", 16)
    if not 0 <= chains <= RINGS_MAX:
        raise QmpError(f"Parameter 'chains' expects 0 to {RINGS_MAX}")
    queues = []
    with machine.io_lock:
        device = nic.device
        chosen = given.get("queue")
        if chosen is not None and not 0 <= chosen < len(device.queues):
            raise QmpError(f"there is no queue {chosen}: the card has {len(device.queues)}")
        for q in device.queues:
            if chosen is not None and q.index != chosen:
                continue
            row: dict[str, object] = {
                "index": q.index,
                "role": device.queue_role(q.index),
                "enabled": q.enabled,
                "size": q.size,
                "vector": q.vector,
                "desc-addr": q.desc,
                "avail-addr": q.avail,
                "used-addr": q.used,
            }
            acked = device.driver_features
            if q.enabled and device.active and not q.problem(machine.memory, ring_format(acked)):
                try:
                    row |= ring_snapshot(
                        machine.memory,
                        q,
                        acked,
                        chains=chains,
                        position=partial(_position, nic, q.index),
                    )
                except IndexError as e:
                    row["problems"] = [str(e)]
            queues.append(row)
        return {
            "name": nic.name,
            "mode": nic.mode,
            "active": device.active,
            "machine": machine.state,
            "queues": queues,
        }


COMMANDS: dict[str, Command] = {
    "query-version": Command(_version, "version of pyvmm"),
    "query-commands": Command(_commands, "names of all commands"),
    "query-name": Command(_name, "name of the machine"),
    "query-status": Command(_status, "whether it runs"),
    "query-kvm": Command(_kvm, "whether KVM is in use (always)"),
    "query-cpus-fast": Command(_cpus, "vCPUs and their threads"),
    "query-stats": Command(
        _stats,
        "KVM's statistics of the VM or of vCPUs",
        target="str",
        vcpus="list?",
        providers="list?",
    ),
    "query-stats-schemas": Command(_schemas, "meaning of KVM's statistics", provider="str?"),
    "query-rx-filter": Command(_rx_filter, "what a card's driver wants to receive", name="str?"),
    "stop": WaitingCommand(_stop, "pause the machine"),
    "cont": WaitingCommand(_cont, "let a paused machine go on"),
    "system_reset": Command(_reset, "press the reset button"),
    "system_powerdown": Command(_powerdown, "press the power button"),
    "system_wakeup": Command(_wakeup, "wake up a guest that is suspended to memory"),
    "quit": Command(_quit, "end the machine at once"),
    "device_add": WaitingCommand(
        _device_add, "plug in a card", driver="str", id="str?", net="str?", mac="str?"
    ),
    "device_del": Command(
        _device_del, "ask the guest to let go of a card; DEVICE_DELETED tells the end", id="str"
    ),
    "set_link": WaitingCommand(_set_link, "plug or pull a card's cable", name="str", up="bool"),
    "x-pyvmm-capture": TakingCommand(
        _capture,
        "make this connection a stream of packets (docs/capture.md)",
        nic="int?",
        queue="int?",
        snaplen="int?",
        filter="list?",
        expression="str?",
        limit="int?",
    ),
    "x-pyvmm-exec": TakingCommand(
        _exec, "make this connection a command's streams (docs/exec.md)", timeout="int?"
    ),
    "x-pyvmm-fault": WaitingCommand(
        _fault,
        "do wrong on purpose what these rules say; without rules, tell what was done"
        " (docs/fault-injection.md)",
        nic="int?",
        rules="list?",
        seed="int?",
        acts="list?",
    ),
    "x-pyvmm-help": Command(_help, "all commands with a line of help and their arguments"),
    "x-pyvmm-ledger": Command(_ledger, "exits, interrupts and packets so far"),
    "x-pyvmm-machine": Command(_machine, "what the machine is made of"),
    "x-pyvmm-report": Command(_report, "the report of the run so far (docs/report.md)"),
    "x-pyvmm-rings": Command(
        _rings, "what is in a card's virtqueues now", nic="int?", queue="int?", chains="int?"
    ),
    "x-pyvmm-switch": WaitingCommand(
        _switch, "change a card's data path under the running guest", nic="int?", mode="str"
    ),
}
