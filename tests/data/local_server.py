"""A web server on this machine, in place of those that publish data."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """Serves files by name; with ``cut`` it stops in the middle, at a known length or in ``"chunked"`` encoding."""

    cut: str | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.files: dict[str, bytes] = {}
        self.requested: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.close_connection = True
        name = self.path[1:]
        self.server.requested.add(name)
        content = self.server.files.get(name)
        if content is None:
            self.send_error(404)
            return
        half = content[: len(content) // 2]
        self.send_response(200)
        if self.server.cut == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(content) + half)
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(half if self.server.cut else content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""
