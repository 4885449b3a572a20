"""What a guest of ``--net user`` finds on the host's loopback: a TCP and a UDP server and a name
server; and a client of a port that leads into the guest. Ends with the client's connection.

Usage: outside.py PORT FORWARDED: TCP and UDP at PORT, names at 53; connects to FORWARDED.
"""

import hashlib
import os
import socket
import sys
import threading
import time

SIZE = 3 << 20


def tcp(server: socket.socket) -> None:
    """To each client: SIZE bytes, then the MD5 of all that it has sent."""
    while True:
        client, _ = server.accept()
        with client:
            taken = hashlib.md5()
            sender = threading.Thread(target=client.sendall, args=(os.urandom(1) * SIZE,))
            sender.start()
            while data := client.recv(65536):
                taken.update(data)
            sender.join()
            client.sendall(taken.hexdigest().encode())


def udp(server: socket.socket) -> None:
    """Send back what comes."""
    while True:
        data, peer = server.recvfrom(2000)
        server.sendto(data, peer)


def names(server: socket.socket) -> None:
    """192.0.2.7 for all names (RFC 1035)."""
    while True:
        data, peer = server.recvfrom(2000)
        end = 12
        while data[end]:
            end += data[end] + 1
        kind = data[end + 1 : end + 3]
        known = kind == b"\0\1"
        head = data[:2] + b"\x81\x80\0\1" + (b"\0\1" if known else b"\0\0") + bytes(4)
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton("192.0.2.7")
        server.sendto(head + data[12 : end + 5] + (answer if known else b""), peer)


def main() -> None:
    """Serve, and talk to the guest's own server."""
    port, forwarded = int(sys.argv[1]), int(sys.argv[2])
    one = socket.create_server(("127.0.0.1", port))
    two, three = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    two.bind(("127.0.0.1", port))
    three.bind(("127.0.0.1", 53))
    for serve, server in ((tcp, one), (udp, two), (names, three)):
        threading.Thread(target=serve, args=(server,), daemon=True).start()
    print("ready", flush=True)
    sent = os.urandom(1000) * 1000
    while True:  # until the guest listens
        try:
            with socket.create_connection(("127.0.0.1", forwarded)) as guest:
                guest.sendall(sent)
                guest.shutdown(socket.SHUT_WR)
                back = b""
                while data := guest.recv(65536):
                    back += data
            if back:
                break
        except OSError:
            pass
        time.sleep(0.2)
    print("forwarded", back == hashlib.md5(sent).hexdigest().encode(), flush=True)
    time.sleep(600)


main()
