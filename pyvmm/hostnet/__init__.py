"""Host networking: taps, network namespaces, what rtnetlink says. Knows nothing of virtio rings."""
