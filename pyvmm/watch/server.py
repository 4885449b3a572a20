"""The live page of a machine, by HTTP on loopback.

Theory of operation: ``http.server`` accepts connections, one thread per connection, and each
connection carries one request. The page asks for the next look again and again, and each request
waits for it (``Watch.after``): so nothing is asked of the machine unless a page asks.

Whoever is on this host can connect, and every web site that the user visits can make the user's
browser connect. So everything is refused but a GET or HEAD, by the name of this server, for a path
with the token, which only the user has been told: 256 random bits. The name is checked because a
site can have its own name resolve to 127.0.0.1 and then read what it gets (DNS rebinding). A
connection gives at most ``REQUEST_MAX`` bytes within ``REQUEST_S`` seconds. There are no more than
``CLIENTS`` connections; one more takes the place of the oldest that has not shown the token, so
that strangers cannot keep the user out. Beyond ``LOOKERS`` requests that wait, a client is told to
come later.
"""

from __future__ import annotations

import hmac
import io
import json
import secrets
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socket import SHUT_RDWR, SO_REUSEADDR, SOL_SOCKET
from socketserver import ThreadingMixIn

from pyvmm.errors import UsageError
from pyvmm.threads import report_bug

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket
    from typing import Any

    from pyvmm.watch.look import Watch

HERE = Path(__file__).parent
ADDRESS = "127.0.0.1"
CLIENTS = 32
LOOKERS = 16
#: Seconds for a connection that was turned out to give its place up.
PLACE_S = 1.0
REQUEST_MAX = 8192
REQUEST_S = 5.0
ANSWER_S = 10.0  # for a client to take an answer
#: Seconds for pages to ask once more after the machine has ended, and so to learn of the end.
LINGER_S = 3.0
#: Path behind the token -> (file, type).
FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
#: The page loads its own script and style and asks this server: nothing else, by anybody.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
WORDS = {
    HTTPStatus.BAD_REQUEST: "This is no whole request.",
    HTTPStatus.FORBIDDEN: "The address of the page has a token that pyvmm watch prints; this one is"
    " not it.",
    HTTPStatus.MISDIRECTED_REQUEST: "This server does not have that name.",
    HTTPStatus.METHOD_NOT_ALLOWED: "The page is to be read only.",
    HTTPStatus.NOT_FOUND: "There is nothing here.",
    HTTPStatus.SERVICE_UNAVAILABLE: "Too many look at once; try again later.",
}


class _Bounded(io.RawIOBase):
    """What a client sends: at most ``REQUEST_MAX`` bytes, within ``REQUEST_S`` seconds.

    :ivar ended: somebody has asked for more than that, or than the client has sent.
    """

    def __init__(self, sock: socket) -> None:
        self.ended = False
        self._sock, self._left = sock, REQUEST_MAX
        self._until = time.monotonic() + REQUEST_S

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read on; 0 at the end of the client's words, or of our patience."""
        patience, got = self._until - time.monotonic(), 0
        if self._left and patience > 0:
            self._sock.settimeout(patience)
            try:
                got = self._sock.recv_into(buffer, min(len(buffer), self._left))
            except OSError:
                pass
            self._sock.settimeout(ANSWER_S)
        self._left -= got
        self.ended = not got
        return got


class _Request(BaseHTTPRequestHandler):
    """One connection with one request."""

    server: Server
    server_version, sys_version = "pyvmm", ""

    def setup(self) -> None:
        """Bound what the client may send."""
        super().setup()
        self._bounded = _Bounded(self.connection)
        self.rfile = io.BufferedReader(self._bounded)

    def parse_request(self) -> bool:
        """Refuse, before any method is looked at, who does not know the server's name or token."""
        if not super().parse_request():
            return False
        if self._bounded.ended:  # the base class takes the end for the end of the headers
            return self._refuse(HTTPStatus.BAD_REQUEST)
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.server.names:
            return self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        path, _, self.query = self.path.partition("?")
        token, slash, self.rest = path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("latin-1"), self.server.token.encode()):
            return self._refuse(HTTPStatus.FORBIDDEN)
        self.server.welcome(self.connection)
        if self.command not in ("GET", "HEAD"):
            return self._refuse(HTTPStatus.METHOD_NOT_ALLOWED)
        # Browsers say who asks. Only the page itself may ask for its parts; the page is typed in.
        site = self.headers.get("Sec-Fetch-Site", "none")
        if site not in ("none", "same-origin") and (self.rest or not self._navigates()):
            return self._refuse(HTTPStatus.FORBIDDEN)
        if not slash:
            return self._refuse(HTTPStatus.NOT_FOUND)
        return True

    def _navigates(self) -> bool:
        """Whether a browser opens the page in a window, as a click on its address does."""
        return self.headers.get("Sec-Fetch-Dest") == "document"

    def do_GET(self) -> None:
        """The page, its parts, or the next look."""
        if self.rest in FILES:
            name, kind = FILES[self.rest]
            self._answer(HTTPStatus.OK, kind, (HERE / name).read_bytes())
        elif self.rest == "look":
            self._look()
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_HEAD(self) -> None:
        """The same without its content."""
        self.do_GET()

    def _look(self) -> None:
        name, _, number = self.query.partition("=")
        if name != "after" or not number.isdecimal() or len(number) > 12:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        if not self.server.lookers.acquire(blocking=False):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        try:
            look = self.server.watch.after(int(number))
        finally:
            self.server.lookers.release()
        text = json.dumps(look, separators=(",", ":"))
        self._answer(HTTPStatus.OK, "application/json", text.encode())

    def _refuse(self, status: HTTPStatus) -> bool:
        """Answer with a line; False, for ``parse_request``."""
        self._answer(status, "text/plain; charset=utf-8", f"{WORDS[status]}\n".encode())
        return False

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Say what the base class finds wrong, without the page that it makes of it."""
        self._answer(HTTPStatus(code), "text/plain; charset=utf-8", b"That is no request.\n")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.close_connection = True
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        try:
            self.end_headers()
            if getattr(self, "command", None) != "HEAD":
                self.wfile.write(body)
        except OSError:
            pass  # the client has gone

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: whoever connects could fill the terminal."""


class Server(ThreadingMixIn, HTTPServer):
    """Listens from the beginning, serves in ``serve``; close it.

    :param watch: lent. :param port: 0 for any that is free.
    :ivar token: part of the page's address. :ivar names: that the server answers to.
    :raises UsageError: the port is taken, or not for this user.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = CLIENTS

    def __init__(self, watch: Watch, port: int = 0) -> None:
        self.watch = watch
        self.token = secrets.token_urlsafe(32)
        self.lookers = threading.BoundedSemaphore(LOOKERS)
        self._clients = threading.BoundedSemaphore(CLIENTS)
        self._strangers: dict[socket, None] = {}  # have not shown the token; the oldest first
        self._ended = 0.0
        try:
            super().__init__((ADDRESS, port), _Request)
        except OSError as e:
            raise UsageError(f"--port {port}: {e.strerror}", "use another, or none") from e
        port = self.server_address[1]
        self.names = frozenset(f"{name}:{port}" for name in (ADDRESS, "localhost"))

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{ADDRESS}:{self.server_address[1]}/{self.token}/"

    def server_bind(self) -> None:
        """Bind, without asking the resolver for the host's name as the base class does."""
        self.allow_reuse_address = True
        self.socket.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own. If there are too many, the oldest that has not
        shown the token gives its place up.
        """
        if not self._clients.acquire(blocking=False):
            self._turn_one_out()
            if not self._clients.acquire(timeout=PLACE_S):
                self.shutdown_request(request)
                return
        self._strangers[request] = None
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # there can be no more threads
            self._leave(request)
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """A connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    def welcome(self, request: socket) -> None:
        """A connection has shown the token: it keeps its place. Any thread."""
        self._strangers.pop(request, None)

    def _leave(self, request: socket) -> None:
        self._strangers.pop(request, None)
        self._clients.release()

    def _turn_one_out(self) -> None:
        """End the oldest stranger's connection, so that its thread reads the end."""
        oldest = next(iter(tuple(self._strangers)), None)
        if oldest is not None:
            with suppress(OSError):  # it has closed the connection in the meantime
                oldest.shutdown(SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error; anything else is a bug of ours."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            report_bug(error)

    def serve(self, tick: Callable[[], None] = lambda: None) -> str:
        """Serve until the machine ends; returns how that was, in words. ``close`` in another thread
        ends it, too.
        """
        self.timeout = 0.5
        while not self._over():
            self.handle_request()
            tick()
            self.watch.hear()
        return self.watch.ended

    def _over(self) -> bool:
        """Whether the machine has ended, and whoever looked knows it."""
        if not self.watch.ended:
            return False
        self._ended = self._ended or time.monotonic()
        return time.monotonic() - self._ended > LINGER_S

    def close(self) -> None:
        """Close the socket, and let those who wait for a look go."""
        self.watch.close()
        self.server_close()
