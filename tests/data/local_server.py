"""A server on this machine, in place of those that publish data."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Serves files: ``whole``, their first ``half`` of the announced length, or half of a ``chunked`` answer."""

    content = b""
    manner = "whole"
    requests = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.contents: dict[str, bytes] = {}
        """By name; ``content`` is any other file."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.close_connection = True
        content = self.server.contents.get(self.path[1:], self.server.content)
        half = content[: len(content) // 2]
        if self.server.manner == "missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.server.manner == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(content) + half)
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(half if self.server.manner == "half" else content)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are quiet."""
