"""A virtual machine with real KVM and vhost-net, in which commands run (docs/testbed.md)."""
