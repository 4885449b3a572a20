"""Traces as sequence diagrams: one page that explains what driver, KVM, VMM and data path did."""
