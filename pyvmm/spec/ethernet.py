"""Ethernet constants (linux/if_ether.h). Kernel spellings."""

ETH_HLEN = 14
ETH_DATA_LEN = 1500
# virtio 1.2, 5.1.4.1, has the same bounds.
ETH_MIN_MTU = 68
ETH_MAX_MTU = 0xFFFF
#: The largest MTU that the kernel allows a tap (drivers/net/tun.c).
TAP_MAX_MTU = ETH_MAX_MTU - ETH_HLEN
