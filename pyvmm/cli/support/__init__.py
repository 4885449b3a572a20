"""What several commands share: options, outputs, signals, terminals, tables, verdicts, the choice
of a host, the way to a running machine.
"""
