"""Host networking: taps, network namespaces and rtnetlink. Knows nothing of virtio rings."""

#: How an administrator lets an ordinary user make the namespaces that pyvmm's own taps need.
ALLOW_USER_NAMESPACES = "sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000"
