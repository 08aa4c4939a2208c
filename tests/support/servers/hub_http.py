"""The HTTP of the test Hub: a handler that plays planned faults, and the store for large objects."""

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.servers.hub_state import HubError, Seen, State


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    state: State
    who: str


class Lost(Exception):
    """The request ends without an answer."""


class Handler(BaseHTTPRequestHandler):
    """Reads a request, plays the fault that is due, and answers."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: two cost 40 ms each, for Nagle waits on a delayed ACK
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        pass

    def route(self) -> None:
        raise NotImplementedError

    @property
    def state(self) -> State:
        return self.server.state

    def handle_any(self) -> None:
        self.status, self.fault = 0, None
        self.body = self._read()
        line = f"{self.command} {self.path}"
        try:
            self.fault = self.state.due(line)
            self._misbehave()
            self.route()
        except HubError as error:
            extra = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            headers = error.headers | {name: value for name, value in extra.items() if value}
            self.send(error.status, {"error": error.message}, headers)
        except Lost:
            self._reset()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.state.log.append(Seen(self.server.who, self.command, unquote(urlsplit(self.path).path), self.status))

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any  # noqa: N815  the base class's names

    def _read(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _misbehave(self) -> None:
        if self.fault is None:
            return
        if self.fault.call and self.fault.how != "lose":
            self.fault.call()
        if self.fault.how == "hang":
            self.state.stopping.wait()
        if self.fault.how in ("reset", "hang"):
            raise Lost
        if self.fault.how == "answer":
            raise HubError(self.fault.status, message="as planned", headers=self.fault.headers)

    def _reset(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)
            self.connection.close()

    def send(
        self,
        status: int = 200,
        body: bytes | dict[str, Any] | list[Any] = b"",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answers, or loses the answer if that is the fault that is due."""
        if self.fault and self.fault.how == "lose":
            if self.fault.call:
                self.fault.call()
            raise Lost
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status = status
        self.send_response(status)
        kind = {} if isinstance(body, bytes) else {"Content-Type": "application/json; charset=utf-8"}
        for name, value in (kind | {"Content-Length": str(len(data))} | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_bytes(self, data: bytes, headers: Mapping[str, str]) -> None:
        """Answers with a file or the asked-for range of it."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked is None or not data:
            self.send(200, data, {"Accept-Ranges": "bytes", **headers})
            return
        first = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
        last = min(int(asked[2]), len(data) - 1) if asked[1] and asked[2] else len(data) - 1
        if first >= len(data):
            raise HubError(416, headers={"Content-Range": f"bytes */{len(data)}"})
        self.send(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}", **headers})


class Store(Handler):
    """The storage behind the Hub: an address is the right to use it."""

    def route(self) -> None:
        if self.headers.get("Authorization"):
            raise HubError(400, message="Only one auth mechanism allowed")
        sha256 = urlsplit(self.path).path.rsplit("/", 1)[-1]
        if self.command in ("GET", "HEAD"):
            self.send_bytes(self.state.large(sha256).read_bytes(), {"ETag": f'"{sha256}"'})
            return
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, message="BadDigest: the sha256 you specified did not match")
        temporary = self.state.objects / f"{sha256}.{threading.get_ident()}"
        temporary.write_bytes(self.body)
        temporary.replace(self.state.objects / sha256)
        self.send(headers={"ETag": f'"{sha256[:32]}"'})
