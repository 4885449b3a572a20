"""Everybody: a network in which every address answers pings.

python3 docs/examples/everybody.py SOCKET &
pyvmm run --net vhost-user,socket=SOCKET -- ping -c 3 192.168.100.77
"""

import sys

from pyvmm.backend.net import NetService
from pyvmm.backend.ports import PythonPort
from pyvmm.backend.server import Backend

MAC = bytes.fromhex("020000000001")


def receive(packet, pair):
    kind, ip = packet[12:14], packet[14:34]
    if kind == b"\x08\x06" and packet[20:22] == b"\x00\x01":  # ARP: who has?
        answer = b"\x00\x02" + MAC + packet[38:42] + packet[22:32]
        port.send(packet[6:12] + MAC + packet[12:20] + answer, pair)
    elif kind == b"\x08\x00" and ip[0] == 0x45 and ip[9] == 1 and packet[34] == 8:  # ICMP echo
        checksum = int.from_bytes(packet[36:38]) + 0x0800  # as the type goes from 8 to 0
        answer = b"\x00\x00" + (checksum % 0xFFFF).to_bytes(2) + packet[38:]
        port.send(packet[6:12] + MAC + packet[12:26] + ip[16:20] + ip[12:16] + answer, pair)


port = PythonPort(receive)
with Backend(NetService(port), log=print) as backend:
    backend.run(sys.argv[1])  # until backend.stop() from another thread, or Ctrl-C
