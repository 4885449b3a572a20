"""What several commands share: options, outputs, signals, terminals, tables, verdicts, the choice
of a host, and the connection to a running machine.
"""
