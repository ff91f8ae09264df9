"""A real HTTP server on loopback, for the Hubs of the tests."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """The base of handlers, which define do_GET and the like; `hub` is their server."""

    protocol_version = "HTTP/1.1"
    hub: Server

    def send(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        """Sends bytes as they are, and anything else as JSON."""
        raw = isinstance(body, bytes)
        content = body if raw else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Logs nothing, so that only tests write to standard error."""


class Server:
    """A server that answers at `url` until it is closed."""

    def __init__(self, handler: type[Handler]) -> None:
        own = type("Handler", (handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), own)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
