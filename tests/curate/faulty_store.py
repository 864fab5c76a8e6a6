"""An S3 server on loopback, and a proxy before it that throttles, drops connections and cuts transfers short."""

from __future__ import annotations

import http.client
import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behind: tuple[str, int]
    faults: Counter
    number: Iterator[int]
    faulty = True

    def log_message(self, *_: object) -> None:
        pass

    def _pass_on(self) -> None:
        number = next(self.number)
        if self.faulty and number % 7 == 3:
            return self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN, "throttled")
        length = int(self.headers.get("Content-Length") or 0)
        if self.faulty and self.command == "PUT" and length and number % 5 == 1:
            self.rfile.read(length // 2)
            return self._drop("upload cut")
        body = self.rfile.read(length)
        if self.faulty and number % 11 == 5:
            return self._drop("dropped")
        server = http.client.HTTPConnection(*self.behind)
        server.request(self.command, self.path, body, dict(self.headers))
        answer = server.getresponse()
        data = answer.read()
        headers = {name: value for name, value in answer.getheaders() if name.lower() != "transfer-encoding"}
        if self.faulty and self.command == "GET" and len(data) > 1 and number % 6 == 4:
            self._head(answer.status, headers | {"Content-Length": str(len(data))})
            self.wfile.write(data[: len(data) // 2])
            return self._drop("download cut")
        self._answer(answer.status, headers, data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, headers: dict[str, str], data: bytes, fault: str = "") -> None:
        if fault:
            self.faults[fault] += 1
            self.close_connection = True
        if self.command != "HEAD":
            headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
            headers["Content-Length"] = str(len(data))
        self._head(status, headers)
        if self.command != "HEAD":
            self.wfile.write(data)

    def _drop(self, fault: str) -> None:
        self.faults[fault] += 1
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()


@contextmanager
def s3_server() -> Iterator[tuple[str, type[_Proxy]]]:
    """URL of the proxy, and its class, which counts the ``faults`` it made and makes none when not ``faulty``."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    handler = type("Proxy", (_Proxy,), {
        "behind": server.get_host_and_port(), "faults": Counter(), "number": itertools.count(),
    })  # fmt: skip
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_port}", handler
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()
