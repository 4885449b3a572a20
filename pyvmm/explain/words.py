"""What registers, ioctls and messages mean, in a sentence, and which clause has them.

"virtio" is the virtio specification 1.2, "PCI" the PCI Local Bus Specification 3.0.
"""

from __future__ import annotations

import re

#: Topics of the set-up, in the order of a driver that knows what it wants.
FIND = "The driver finds the card on the bus"
CAPS = "Capabilities say where the registers are"
STATUS = "Status and features: driver and device agree"
CONFIG = "The device's configuration"
MSIX = "Interrupts: MSI-X vectors"
QUEUES = "Virtqueues get size, addresses and vector"
GO = "DRIVER_OK: the data path starts"
OTHER = "Other registers"


class Meaning:
    """What is known of a register or step: its topic, its clause, and a sentence."""

    __slots__ = ("clause", "text", "topic")

    def __init__(self, topic: str, clause: str, text: str) -> None:
        self.topic, self.clause, self.text = topic, clause, text


#: Patterns of a register's name in a trace; the first that fits counts.
REGISTERS = [
    (re.compile(pattern), Meaning(topic, clause, text))
    for pattern, topic, clause, text in (
        (
            "^(vendor|device) id",
            FIND,
            "virtio 4.1.2",
            "Says whose device this is, and of which kind.",
        ),
        ("^command", FIND, "PCI 6.2.2", "Lets the device answer at its BARs, and reach memory."),
        (
            "^status",
            FIND,
            "PCI 6.2.3",
            "Says among others whether there is a list of capabilities.",
        ),
        ("^BAR", FIND, "PCI 6.2.5.1", "Asks for the size of the registers, then places them."),
        ("^capabilities pointer", CAPS, "PCI 6.7", "Where the list of capabilities begins."),
        ("^notify-cfg", CAPS, "virtio 4.1.4.4", "Where the driver kicks."),
        ("^isr-cfg", CAPS, "virtio 4.1.4.5", "Where interrupts without MSI-X are acknowledged."),
        ("^device-cfg", CAPS, "virtio 4.1.4.6", "Where the card's own configuration is."),
        ("^pci-cfg", CAPS, "virtio 4.1.4.9", "Another way to the registers, for firmware."),
        ("^common-cfg", CAPS, "virtio 4.1.4.3", "Where status, features and queues are set up."),
        ("^MSI-X", MSIX, "PCI 6.8.2", "Where the table of interrupt vectors is; enables it."),
        ("^(power management|advanced features)", CAPS, "PCI 6.7", "Sleep and reset of the card."),
        (
            "^msix-(table|pba)",
            MSIX,
            "PCI 6.8.2",
            "An entry is an address, and a word to write there: that write is the interrupt.",
        ),
        (
            "config_msix_vector",
            MSIX,
            "virtio 4.1.5.1.2",
            "The vector that tells of changes of the configuration.",
        ),
        (
            "queue_msix_vector",
            QUEUES,
            "virtio 4.1.5.1.2",
            "The vector with which the device interrupts for this queue.",
        ),
        (
            "device_feature",
            STATUS,
            "virtio 2.2",
            "What the device offers, in words of 32 bits.",
        ),
        ("driver_feature", STATUS, "virtio 2.2", "What the driver accepts of it."),
        (
            "device_status",
            STATUS,
            "virtio 2.1, 3.1.1",
            "Each step of the set-up sets one more bit; 0 resets the device.",
        ),
        ("config_generation", CONFIG, "virtio 2.5.1", "Changes while the configuration changes."),
        ("num_queues", QUEUES, "virtio 4.1.4.3", "How many virtqueues there are."),
        ("queue_select", QUEUES, "virtio 4.1.4.3", "Which queue the other registers show."),
        (
            "queue_size",
            QUEUES,
            "virtio 4.1.4.3",
            "Entries of the queue; the driver may take fewer.",
        ),
        ("queue_desc", QUEUES, "virtio 2.7.5", "Guest-physical address of the descriptor table."),
        ("queue_driver", QUEUES, "virtio 2.7.6", "Guest-physical address of the available ring."),
        ("queue_device", QUEUES, "virtio 2.7.8", "Guest-physical address of the used ring."),
        ("queue_pfn", QUEUES, "virtio 2.7.2", "Page number of the rings (legacy interface)."),
        ("queue_enable", QUEUES, "virtio 4.1.4.3", "From now on the queue may be used."),
        ("queue_reset", QUEUES, "virtio 2.6.1", "Resets this queue alone."),
        ("queue_notify_off", QUEUES, "virtio 4.1.4.4", "Where to kick this queue."),
        ("notify", QUEUES, "virtio 4.1.5.2", "A kick: there is something in this queue."),
        ("^isr", OTHER, "virtio 4.1.4.5", "Reads and clears the cause of an interrupt."),
        ("^(legacy )?config ", CONFIG, "virtio 5.1.4", "A field of the card's configuration."),
        ("^mmio", OTHER, "virtio 4.2.2", "A register of the device over MMIO."),
    )
]

#: The control plane: ioctls of KVM and vhost (linux/kvm.h, linux/vhost.h), by prefix.
STEPS = {
    "faults by tc": "What the counters of tc's queues have grown by between two looks at them: tc "
    "tells neither which frames these were, nor when within this time.",
    "KVM_SET_GSI_ROUTING": "Gives an MSI-X message a number, the GSI.",
    "KVM_IRQFD": "From now on a signal of the eventfd makes KVM send the message of this GSI.",
    "KVM_IOEVENTFD": "From now on a write to the address makes KVM signal the eventfd: no exit.",
    "KVM_SET_USER_MEMORY_REGION": "Maps memory into the guest.",
    "VHOST_SET_OWNER": "This process owns the vhost device; the kernel makes its thread.",
    "VHOST_GET_FEATURES": "What vhost can do.",
    "VHOST_SET_FEATURES": "What guest and vhost have agreed on.",
    "VHOST_SET_MEM_TABLE": "Where the guest's memory lies in this process.",
    "VHOST_SET_VRING_NUM": "Entries of the queue.",
    "VHOST_SET_VRING_BASE": "The position from which vhost goes on.",
    "VHOST_GET_VRING_BASE": "Stops the queue, and takes back its position.",
    "VHOST_SET_VRING_ADDR": "Where descriptor table and rings lie.",
    "VHOST_SET_VRING_KICK": "The eventfd that wakes vhost: the same that KVM signals.",
    "VHOST_SET_VRING_CALL": "The eventfd that vhost signals: the same that KVM's irqfd waits for.",
    "VHOST_SET_VRING_ERR": "The eventfd by which vhost tells of a malformed queue.",
    "VHOST_NET_SET_BACKEND": "Connects the queue with the tap: from now on packets move.",
    "VHOST_VDPA_GET_DEVICE_ID": "Which kind of device this is.",
    "VHOST_VDPA_SET_STATUS": "The same steps that the guest's driver takes (virtio 3.1.1).",
    "VHOST_VDPA_GET_CONFIG": "The device's configuration.",
    "VHOST_VDPA_SET_VRING_ENABLE": "From now on the device serves this queue.",
    "VHOST_VDPA_SET_GROUP_ASID": "Gives a group of queues an address space of its own.",
    "VHOST_IOTLB_UPDATE": "Maps memory for the device.",
    "VHOST_IOTLB_INVALIDATE": "Unmaps memory of the device.",
    "start data path": "The data path serves the rings from these positions on.",
    "stop data path": "The data path has let go of the rings, at these positions.",
    "hand-over: open": "Opens the new data path, beside the old one.",
    "hand-over: prepare": "Agrees with the new data path on all that needs no rings.",
    "hand-over: wait": "Waits for the card's thread.",
    "hand-over: move": "Tells the network of the new place, and empties the old one.",
    "hand-over: park": "The old data path finishes its chains, and lets go of the rings.",
    "hand-over: close": "Closes the old data path.",
    "GET_FEATURES": "What the back-end can do.",
    "SET_FEATURES": "What guest and back-end have agreed on.",
    "GET_PROTOCOL_FEATURES": "Which messages the back-end knows.",
    "SET_PROTOCOL_FEATURES": "Which of them are used.",
    "ADD_MEM_REG": "Hands over guest memory, as a file descriptor.",
    "SET_MEM_TABLE": "Hands over guest memory, as file descriptors.",
    "SET_VRING_NUM": "Entries of the queue.",
    "SET_VRING_BASE": "The position from which the back-end goes on.",
    "GET_VRING_BASE": "Stops the queue, and takes back its position.",
    "SET_VRING_ADDR": "Where descriptor table and rings lie.",
    "SET_VRING_KICK": "Hands over the eventfd that KVM signals when the guest kicks.",
    "SET_VRING_CALL": "Hands over the eventfd that makes KVM interrupt the guest.",
    "SET_VRING_ERR": "Hands over the eventfd by which the back-end tells of a malformed queue.",
    "SET_VRING_ENABLE": "From now on the back-end serves this queue, or no more.",
    "GET_INFLIGHT_FD": "Asks for memory in which chains in flight survive the back-end.",
    "SET_INFLIGHT_FD": "Hands over that memory.",
    "SET_STATUS": "The driver's device_status.",
    "SEND_RARP": "Has the network learn where the guest's MAC address is.",
}


def register(name: str) -> Meaning:
    """What a register is for; ``name`` as in a trace, without card and bus."""
    for pattern, meaning in REGISTERS:
        if pattern.search(name):
            return meaning
    return Meaning(OTHER, "", "")


def step(name: str) -> str:
    """What a step of the control plane is for, in a sentence; empty if it is not known."""
    if name.startswith("hand-over: start "):
        return "The new data path takes the rings at the positions where the old one stopped."
    return STEPS.get(name) or STEPS.get(name.removeprefix("send ").removeprefix("receive "), "")
