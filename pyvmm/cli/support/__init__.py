"""What several commands share: terminals, signals, tables, the choice of a host, verdicts."""
