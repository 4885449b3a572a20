"""A network card of a machine: its host side, its device, and the hand-over between data paths."""
