"""The testbed: a virtual machine with real KVM and vhost-net, in which commands run
(docs/testbed.md).

QEMU emulates the machine, which is called L1 here. A supervisor process on the host starts it and
carries the streams of commands; an agent is its init. A guest of pyvmm in L1 is called L2.
"""
