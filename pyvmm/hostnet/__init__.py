"""Host networking: taps, network namespaces and rtnetlink. Knows nothing of virtio rings."""

from pyvmm.spec.ethernet import ETH_HLEN, ETH_MAX_MTU

#: How an administrator lets an ordinary user make the namespaces that pyvmm's own taps need.
ALLOW_USER_NAMESPACES = "sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000"

#: The largest MTU that the kernel allows a tap (drivers/net/tun.c).
TAP_MAX_MTU = ETH_MAX_MTU - ETH_HLEN
