"""A TCP proxy before a PostgreSQL server that knows where requests begin and end, and loses one of them, or its reply.

A *request* is what a client sends before it waits for an answer: one simple query, or the messages of a prepared
statement up to the one that asks for an answer (protocol 3.0, without encryption).
"""

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterator
from typing import IO, Final, Literal

from tests.kit.processes import HOST

Cut = Literal["before", "half a request", "sent", "after", "half a reply", "silence"]
"""Where a connection ends: before a request reaches the server; with half of it there; as soon as all of it is there,
while the server still works on it; when the server has done it and before its reply arrives; within the reply. With
``silence`` the connection stays, and the reply never comes."""

CUTS: Final[tuple[Cut, ...]] = ("before", "half a request", "sent", "after", "half a reply")

_ENDS = frozenset({b"Q", b"S", b"H", b"p", b"X"})
"""Messages of a client with which a request is complete: query, sync, flush, password, terminate."""

_FLUSH = b"H"
_READY = b"Z"


class PostgresProxy:
    """Stands before a server; connections through it live until their end, or its own."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server((HOST, 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._at = 0
        self._how: Cut = "before"
        self._only = ""
        self._counted = 0
        self._requests: list[str] = []
        self.cut = ""
        """The request at which a connection was cut since the proxy was armed; empty if none was."""
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def url(self, direct: str) -> str:
        """Return the URL of a database of the server through this proxy."""
        port = self._listener.getsockname()[1]
        return re.sub(rf":{self._server_port}/", f":{port}/", direct) + "?sslmode=disable&gssencmode=disable"

    def arm(self, at: int, how: Cut, only: str = "") -> None:
        """Cut the connection at the ``at``-th request from now on, of those that begin so; with 0 only note them."""
        with self._lock:
            self._at, self._how, self._only = at, how, only
            self._counted = 0
            self._requests = []
            self.cut = ""

    def requests(self) -> list[str]:
        """Return the requests since the proxy was armed, as texts."""
        with self._lock:
            return list(self._requests)

    def close(self) -> None:
        """End all connections."""
        self._listener.close()
        with self._lock:
            left = list(self._open)
        for one in left:
            _end(one)

    def decide(self, request: bytes) -> Cut | None:
        """Note a request; return how its connection is to be cut, if it is."""
        told = _describe(request)
        with self._lock:
            self._requests.append(told)
            self._counted += told.startswith(self._only)
            if self.cut or self._counted != self._at:
                return None
            self.cut = told
            return self._how

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection((HOST, self._server_port))
            except OSError:
                _end(client)
                continue
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {client, server}
            _Connection(self, client, server).start()

    def forget(self, *ended: socket.socket) -> None:
        with self._lock:
            self._open -= set(ended)


class _Connection:
    """One client's connection to the server."""

    def __init__(self, proxy: PostgresProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._losing: Cut | None = None

    def start(self) -> None:
        for target in (self._upward, self._downward):
            threading.Thread(target=target, daemon=True).start()

    def _end(self) -> None:
        _end(self._client)
        _end(self._server)
        self._proxy.forget(self._client, self._server)

    def _upward(self) -> None:
        with contextlib.suppress(OSError, EOFError), self._client.makefile("rb") as stream:
            head = _exactly(stream, 4)
            self._server.sendall(head + _exactly(stream, struct.unpack("!I", head)[0] - 4))
            while True:
                request = b""
                kind = b""
                while kind not in _ENDS:
                    kind, message = _message(stream)
                    request += message
                if not self._pass_on(request, kind):
                    break
        if self._losing is None:
            self._end()

    def _pass_on(self, request: bytes, ends_with: bytes) -> bool:
        """Send a request to the server; return whether the connection is to go on."""
        how = self._proxy.decide(request)
        if how in {"after", "half a reply"} and ends_with == _FLUSH:
            # Nothing in the reply to a flush says where it ends.
            how = "sent"
        if how == "before":
            self._end()
            return False
        if how == "half a request":
            self._server.sendall(request[: len(request) // 2])
            self._end()
            return False
        self._losing = None if how == "sent" else how
        self._server.sendall(request)
        if how == "silence":
            # Until the client has had enough.
            while self._client.recv(4096):
                pass
        if how in {"sent", "silence"}:
            self._end()
            return False
        return how is None

    def _downward(self) -> None:
        reply = b""
        with contextlib.suppress(OSError, EOFError), self._server.makefile("rb") as stream:
            while True:
                kind, message = _message(stream)
                if self._losing is None:
                    self._client.sendall(message)
                    continue
                reply += message
                if kind != _READY or self._losing == "silence":
                    continue
                if self._losing == "half a reply":
                    self._client.sendall(reply[: len(reply) // 2])
                break
        self._end()


def _message(stream: IO[bytes]) -> tuple[bytes, bytes]:
    """Read one message; return its kind, and all of it."""
    head = _exactly(stream, 5)
    (length,) = struct.unpack("!I", head[1:])
    return head[:1], head + _exactly(stream, length - 4)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _describe(request: bytes) -> str:
    """Return the SQL in a request: what a simple query or a statement to be prepared begins with, or its kind."""
    found = re.search(rb"[A-Z]{4,}[^\0]*", request)
    return " ".join(found[0].decode(errors="replace").split())[:60] if found else request[:1].decode()


def _end(one: socket.socket) -> None:
    # The other thread may be reading from it: closing alone would leave it there.
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@contextlib.contextmanager
def run_proxy(server_port: int) -> Iterator[PostgresProxy]:
    """Run a proxy before a server on this machine."""
    proxy = PostgresProxy(server_port)
    try:
        yield proxy
    finally:
        proxy.close()
