"""The small devices of the board: each answers at a few ports and is described in the firmware
tables.
"""
