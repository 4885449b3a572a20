"""pyvmm.spec's virtio and PCI constants against the installed kernel headers."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pyvmm.spec import pci, virtio, virtio_net, virtio_pci

HEADERS = ["virtio_ids", "virtio_config", "virtio_ring", "virtio_net", "virtio_pci", "pci_regs"]
# Constants of our own, and those that the headers of Linux 6.1 lack.
NOT_IN_HEADERS = {
    "VRING_SIZE_MAX",
    "PCI_D0",
    "PCI_D3HOT",
    "PCI_AF_CAP_TP_FLR",
    "VIRTIO_F_NOTIFICATION_DATA",
    "VIRTIO_F_NOTIF_CONFIG_DATA",
    "VIRTIO_NET_HDR_SIZE",
    "VIRTIO_NET_HDR_V1_SIZE",
    "VIRTIO_NET_HDR_V1_HASH_SIZE",
    "VIRTIO_NET_F_GUEST_USO4",
    "VIRTIO_NET_F_GUEST_USO6",
    "VIRTIO_NET_F_HOST_USO",
    "VIRTIO_NET_F_GUEST_HDRLEN",
    "VIRTIO_NET_HDR_GSO_UDP_L4",
    # These are in the kernel's internal headers only (linux/pci_ids.h, virtio_pci_modern.c).
    "PCI_VENDOR_ID_REDHAT_QUMRANET",
    "VIRTIO_PCI_DEVICE_ID_BASE",
    "VIRTIO_PCI_ISR_QUEUE",
    "VIRTIO_NET_F_VQ_NOTF_COAL",
    "VIRTIO_NET_CTRL_NOTF_COAL_VQ_SET",
    "VIRTIO_NET_CTRL_NOTF_COAL_VQ_GET",
    "VIRTIO_NET_F_DEVICE_STATS",
    "VIRTIO_NET_CTRL_STATS",
    "VIRTIO_NET_CTRL_STATS_QUERY",
    "VIRTIO_NET_CTRL_STATS_GET",
    *(
        f"VIRTIO_NET_STATS_TYPE_{way}_{kind}"
        for way in ("RX", "TX")
        for kind in ("BASIC", "CSUM", "GSO")
    ),
    "VIRTIO_NET_STATS_TYPE_CVQ",
    *(
        f"VIRTIO_NET_F_{way}_UDP_TUNNEL_GSO{kind}"
        for way in ("GUEST", "HOST")
        for kind in ("", "_CSUM", "_MAPPED", "_CSUM_MAPPED")
    ),
    "VIRTIO_NET_HDR_V1_HASH_TUNNEL_SIZE",
    "VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM",
    "VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4",
    "VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6",
}


def test_constants_match_the_kernel_headers(tmp_path: Path) -> None:
    ours = {
        name: value
        for module in (virtio, virtio_net, virtio_pci, pci)
        for name, value in vars(module).items()
        if name.startswith(("VIRTIO_", "VRING_", "PCI_"))
    }
    assert len(ours) > 160
    lines = [f"#include <linux/{h}.h>" for h in HEADERS]
    lines += ["#include <stdio.h>", "int main(void) {"]
    for name in ours:
        lines += [f"#ifdef {name}", f'printf("{name} %lld\\n", (long long)({name}));', "#endif"]
    lines += [
        'printf("VIRTIO_NET_HDR_SIZE %zu\\n", sizeof(struct virtio_net_hdr));',
        'printf("VIRTIO_NET_HDR_V1_SIZE %zu\\n", sizeof(struct virtio_net_hdr_v1));',
        'printf("VIRTIO_NET_HDR_V1_HASH_SIZE %zu\\n", sizeof(struct virtio_net_hdr_v1_hash));',
        "return 0; }",
    ]
    source = tmp_path / "spec.c"
    source.write_text("\n".join(lines))
    subprocess.run(["gcc", "-o", tmp_path / "spec", source], check=True)
    out = subprocess.run([tmp_path / "spec"], check=True, capture_output=True, text=True).stdout
    kernel = {name: int(value) for name, value in (line.split() for line in out.splitlines())}
    assert {n: (v, kernel[n]) for n, v in ours.items() if n in kernel and kernel[n] != v} == {}
    assert set(ours) - set(kernel) <= NOT_IN_HEADERS
