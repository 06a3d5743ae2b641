"""Object stores on 127.0.0.1: moto's, and one that fails, lies and stops in the middle."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "access-of-a-test", "AWS_SECRET_ACCESS_KEY": "secret-of-a-test"}
NOWHERE = "http://127.0.0.1:9"  # nobody listens there


def environment(endpoint: str, keys: dict[str, str] = KEYS) -> dict[str, str]:
    """What a user would set."""
    return {
        **keys,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_METADATA_ENDPOINT": NOWHERE,  # else who has no keys asks the machine's cloud for some
        "NO_PROXY": "127.0.0.1",
    }


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, keys: dict[str, str] = KEYS) -> None:
    """Let this process speak to the store at ``endpoint``, and to no other."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_SESSION_TOKEN", *KEYS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(endpoint, keys).items():
        monkeypatch.setenv(name, value)


@contextmanager
def moto() -> Iterator[str]:
    """moto's server; yields its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def make_bucket(endpoint: str, name: str) -> str:
    """A new bucket; returns its address."""
    with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")):
        return f"s3://{name}"


class Faulty:
    """A store in memory, of any bucket. ``faults`` of a name are done to its next requests, one each:

    a status; ``"stop"`` breaks the body off in the middle; ``"swap"`` sends as many other bytes, ``"cut"`` half of them,
    ``"endless"`` more and more; ``"hang up"`` closes without a word; None is no fault.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str | None]] = {}
        self.always: dict[str, int | str] = {}
        self.asked: list[tuple[str, str]] = []
        self.sent = 0
        self.delay = 0.0  # seconds before every answer

    @contextmanager
    def serve(self) -> Iterator[str]:
        handler = type("Handler", (_Handler,), {"store": self})
        server = _Server(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def fault(self, name: str) -> int | str | None:
        if self.faults.get(name):
            return self.faults[name].pop(0)
        return self.always.get(name)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever hung up knows."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Faulty

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _name(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]

    def _answer(self, status: int, body: bytes = b"", length: int | None = None) -> None:
        time.sleep(self.store.delay)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.store.sent += len(body)

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            return self._list(query.get("prefix", [""])[0])
        name = self._name()
        self.store.asked.append(("GET", name))
        fault, data = self.store.fault(name), self.store.objects.get(name)
        if isinstance(fault, int):
            return self._answer(fault, b"<Error><Code>Told</Code></Error>")
        if data is None:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        if fault == "swap":
            return self._answer(200, bytes(b ^ 1 for b in data))
        if fault == "cut":
            return self._answer(200, data[: len(data) // 2])
        if fault == "endless":
            return self._endless()
        if fault in ("stop", "hang up"):
            if fault == "stop":
                self._answer(200, data[: len(data) // 2], len(data))
            self.close_connection = True
            self.connection.close()
            return None
        return self._answer(200, data)

    do_HEAD = do_GET  # noqa: N815

    def _endless(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(1 << 40))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(1 << 16))
                self.store.sent += 1 << 16
        except OSError:
            self.close_connection = True

    def _list(self, prefix: str) -> None:
        self.store.asked.append(("LIST", prefix))
        fault = self.store.fault("LIST")
        if isinstance(fault, int):
            return self._answer(fault, b"<Error><Code>Told</Code></Error>")
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        rows = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size>"
            f"<LastModified>{now}</LastModified><ETag>0</ETag></Contents>"
            for name, data in sorted(self.store.objects.items())
            if name.startswith(prefix)
        )
        return self._answer(
            200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
        )

    def do_PUT(self) -> None:
        name, data = self._name(), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.store.asked.append(("PUT", name))
        fault = self.store.fault(name)
        if isinstance(fault, int):
            return self._answer(fault, b"<Error><Code>Told</Code></Error>")
        if self.headers.get("If-None-Match") == "*" and name in self.store.objects:
            return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        self.store.objects[name] = data
        return self._answer(200)
