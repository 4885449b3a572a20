"""Captures of network cards: pcapng files with each packet that a card's data path hands over
(docs/capture.md).

``cext/capture.h`` says how packets get from the workers, or from a tap, into blocks of the file.
"""
