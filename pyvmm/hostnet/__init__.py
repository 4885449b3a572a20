"""Host networking: taps, network namespaces, what rtnetlink says. Knows nothing of virtio rings."""

#: How an administrator allows an ordinary user the namespaces that taps of their own need.
ALLOW_USER_NAMESPACES = "sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000"
