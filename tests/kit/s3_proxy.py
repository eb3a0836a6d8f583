"""A real HTTP proxy between an S3 client and an S3 server, which does to requests and answers what networks do to them.

It keeps the ``Host`` of a request, which the client's signature covers, so the server checks what the client signed.
"""

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import unescape

from tests.kit.faults import Asked, Kinds, Plan
from tests.kit.processes import HOST
from tests.kit.s3 import S3Key, S3Server

_ALL: Final = ("put", "get", "head", "list", "delete")
TRANSIENT: Final[Kinds] = {
    "500": _ALL,
    "503": _ALL,
    "429": _ALL,
    "hang": _ALL,
    "reset before": _ALL,
    "reset after": _ALL,
    "lost reply": ("put", "delete"),
    "truncated": ("get", "list"),
    "cut error": ("put", "get", "list", "delete"),
    "trickle": ("put", "get", "list"),
    "stale listing": ("list",),
    "flipped upload": ("put",),
}
"""Nobody should notice them as long as they pass."""
PERMANENT: Final[Kinds] = {
    "swallowed put": ("put",),
    "skewed": _ALL,
    "denied": _ALL,
}
"""``swallowed put``: the server says that it took what it did not take."""

_ERRORS: Final[Mapping[str, tuple[int, str, dict[str, str]]]] = {
    "500": (500, "InternalError", {}),
    "503": (503, "SlowDown", {"Retry-After": "1"}),
    "429": (429, "TooManyRequests", {"Retry-After": "1"}),
    "skewed": (403, "RequestTimeTooSkewed", {}),
    "denied": (403, "AccessDenied", {}),
}
_HOP_BY_HOP = frozenset({"connection", "transfer-encoding", "keep-alive", "expect"})
_LISTED = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)
_LISTED_KEY = re.compile(rb"<Key>(.*?)</Key>", re.DOTALL)
_LISTED_TIME = re.compile(rb"<LastModified>(.*?)</LastModified>")
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class S3Proxy:
    """A proxy that runs. Faults are counted when they strike, by kind and verb."""

    def __init__(self, server: S3Server, *, hang_seconds: float, trickle_seconds: float) -> None:
        self.server = server
        self.plan: Plan | None = None
        self.injected: Counter[tuple[str, str]] = Counter()
        self.asked: Counter[str] = Counter()
        self.hang_seconds = hang_seconds
        self.trickle_seconds = trickle_seconds
        self.clock_ahead = timedelta(0)
        """How much later the server's clock seems than it is: in ``Date``, ``Last-Modified`` and listings."""
        self.fresh_seconds = 1.0
        """How long a stale listing does not show what was put."""
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.put_at: dict[str, float] = {}
        upstream = urlsplit(server.endpoint_url)
        self.upstream = (str(upstream.hostname), int(upstream.port or 80))
        self._http = _Server(self)
        self.endpoint_url = f"http://{HOST}:{self._http.server_address[1]}"

    def storage_options(self, key: S3Key | None = None, **more: Any) -> dict[str, Any]:
        """Return what ``S3Server.storage_options`` does, through the proxy; ``more`` is added."""
        return {**self.server.storage_options(key), "endpoint_url": self.endpoint_url, **more}

    def count(self, kind: str | None = None) -> int:
        """Return how many faults struck, in all or of a kind."""
        return sum(count for (found, _), count in self.injected.items() if kind in (None, found))

    @contextlib.contextmanager
    def faults(self, plan: Plan) -> Iterator[Counter[tuple[str, str]]]:
        """Follow a plan for as long as a ``with`` block lasts; gives what struck in it."""
        with self.lock:
            self.injected, self.plan = Counter(), plan
        try:
            yield self.injected
        finally:
            self.plan = None

    def serve(self) -> None:
        self._http.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.drop_connections()
        self._http.server_close()


@contextlib.contextmanager
def run_proxy(server: S3Server, *, hang_seconds: float = 30, trickle_seconds: float = 0.3) -> Iterator[S3Proxy]:
    """Run a proxy before an S3 server.

    Args:
        server: that is asked in the end.
        hang_seconds: how long a request that hangs is held before its connection is closed without an answer.
        trickle_seconds: how long a slow answer takes.
    """
    proxy = S3Proxy(server, hang_seconds=hang_seconds, trickle_seconds=trickle_seconds)
    thread = threading.Thread(target=proxy.serve, name="s3-proxy")
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, proxy: S3Proxy) -> None:
        self.proxy = proxy
        self._connections: set[socket.socket] = set()
        super().__init__((HOST, 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that give up are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self._upstream: http.client.HTTPConnection | None = None
        self._continued = False

    def finish(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def handle_expect_100(self) -> bool:
        # The answer belongs to the one who knows what is to happen to the request.
        self._continued = True
        return True

    def handle_request(self) -> None:
        proxy = self.server.proxy
        asked = self._describe()
        plan = proxy.plan
        kind = plan(asked) if plan is not None else None
        if kind is not None and kind not in ("truncated", "stale listing", "cut error", "flipped upload"):
            self._note(kind, asked)
        if kind == "hang":
            proxy.closing.wait(proxy.hang_seconds)
            return self._hang_up()
        if kind == "reset before":
            return self._reset()
        if self._continued:
            self._continued = False
            self.send_response_only(100)
            self.end_headers()
        body = self._body(slow=kind == "trickle")
        if kind is not None and kind in _ERRORS:
            return self._refuse(kind)
        if kind == "cut error":
            self._note(kind, asked)
            return self._cut_error()
        if kind == "swallowed put":
            return self._answer(200, {"ETag": '"00000000000000000000000000000000"'}, b"")
        if kind == "flipped upload" and body:
            self._note(kind, asked)
            body = bytes([body[0] ^ 1]) + body[1:]
        status, headers, content = self._forward(body)
        if asked.verb == "put" and status == 200:
            with proxy.lock:
                proxy.put_at[asked.key] = time.monotonic()
        if kind == "reset after":
            return self._reset()
        if kind == "lost reply":
            return self._hang_up()
        if kind == "stale listing":
            content = self._stale(content, asked)
        if proxy.clock_ahead:
            headers, content = _shifted(headers, content, proxy.clock_ahead, listing=asked.verb == "list")
        if kind == "truncated" and len(content) > 1:
            self._note(kind, asked)
            return self._cut(status, headers, content)
        return self._answer(status, headers, content, slow=kind == "trickle")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_request  # noqa: N815 - the names that http.server wants

    def _describe(self) -> Asked:
        proxy = self.server.proxy
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        key = parts.path.lstrip("/").partition("/")[2]
        verb: str = "other"
        if self.command == "GET" and ("list-type" in query or not key):
            verb, key = "list", query.get("prefix", [""])[0]
        elif (self.command == "POST" and "delete" in query) or self.command == "DELETE":
            verb = "delete"
        elif self.command in ("PUT", "GET", "HEAD"):
            verb = self.command.lower()
        with proxy.lock:
            proxy.asked[verb] += 1
        return Asked(verb, key)

    def _note(self, kind: str, asked: Asked) -> None:
        with self.server.proxy.lock:
            self.server.proxy.injected[kind, asked.verb] += 1

    def _body(self, *, slow: bool) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            size = int(self.headers.get("Content-Length") or 0)
            if not slow or not size:
                return self.rfile.read(size)
            proxy, step = self.server.proxy, -(-size // 16)
            parts = []
            for start in range(0, size, step):
                proxy.closing.wait(proxy.trickle_seconds / 16)
                parts.append(self.rfile.read(min(step, size - start)))
            return b"".join(parts)
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for attempt in (1, 2):
            try:
                if self._upstream is None:
                    self._upstream = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=120)
                self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                        self._upstream.putheader(name, value)
                self._upstream.putheader("Content-Length", str(len(body)))
                self._upstream.endheaders(body)
                answer = self._upstream.getresponse()
                content = answer.read()
            except (OSError, http.client.HTTPException):
                # The server closed a connection that was idle.
                self._upstream = None
                if attempt == 2:
                    raise
            else:
                return answer.status, dict(answer.getheaders()), content
        raise AssertionError

    def _answer(self, status: int, headers: Mapping[str, str], content: bytes, *, slow: bool = False) -> None:
        self._head(status, headers, len(content))
        pieces = max(1, min(16, len(content))) if slow else 1
        step = -(-len(content) // pieces) or 1
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            if slow:
                self.server.proxy.closing.wait(self.server.proxy.trickle_seconds / pieces)

    def _head(self, status: int, headers: Mapping[str, str], size: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP and (name.lower() != "content-length" or self.command == "HEAD"):
                self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(size))
        self.end_headers()

    def _refuse(self, kind: str) -> None:
        status, code, headers = _ERRORS[kind]
        text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
        content = b"" if self.command == "HEAD" else text.encode()
        self._answer(status, {"Content-Type": "application/xml", **headers}, content)

    def _cut_error(self) -> None:
        """Begin an answer of 500 and break off in the middle of its body."""
        self._head(500, {"Content-Type": "application/xml"}, 1000)
        self.wfile.write(b"<?xml version='1.0'?><Err")
        self._hang_up()

    def _cut(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self._head(status, headers, len(content))
        self.wfile.write(content[: len(content) // 2])
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        # `socketserver` would shut it down in order; the descriptor is closed under its hands.
        self.rfile.close()
        self.connection.close()

    def _stale(self, content: bytes, asked: Asked) -> bytes:
        """Leave out of a listing what was put a moment ago."""
        proxy, now = self.server.proxy, time.monotonic()
        hidden = [0]

        def entry(match: re.Match[bytes]) -> bytes:
            found = _LISTED_KEY.search(match[0])
            key = unescape(found[1].decode(), {"&quot;": '"', "&#34;": '"'}) if found else ""
            with proxy.lock:
                fresh = now - proxy.put_at.get(key, -1e9) < proxy.fresh_seconds
            hidden[0] += fresh
            return b"" if fresh else match[0]

        shown = _LISTED.sub(entry, content)
        if hidden[0]:
            self._note("stale listing", asked)
        return shown


def _shifted(
    headers: Mapping[str, str], content: bytes, by: timedelta, *, listing: bool
) -> tuple[dict[str, str], bytes]:
    """Return an answer as a server with another clock would give it."""
    moved = {
        name: format_datetime(parsedate_to_datetime(value) + by, usegmt=True)
        if name.lower() in ("date", "last-modified")
        else value
        for name, value in headers.items()
    }

    def entry(match: re.Match[bytes]) -> bytes:
        moment = datetime.fromisoformat(match[1].decode()) + by
        return f"<LastModified>{moment.isoformat().replace('+00:00', 'Z')}</LastModified>".encode()

    return moved, _LISTED_TIME.sub(entry, content) if listing else content
