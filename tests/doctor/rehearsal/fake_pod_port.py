"""A pod's port behind the API server's port forward: channels in a WebSocket (RFC 6455)."""

import base64
import hashlib
import json
import struct
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_BINARY, _CLOSE = 2, 8
_DATA, _ERROR = b"\x00", b"\x01"


def forward_port(
    handler: BaseHTTPRequestHandler,
    refuses: bool,
    answer: Callable[[str], tuple[int, dict[str, Any]]],
) -> None:
    """Answer one HTTP request in the port's channel; ``answer`` takes its Authorization."""
    if refuses:
        handler.send_error(500, "error upgrading connection: unable to upgrade")
        return
    key = handler.headers["Sec-WebSocket-Key"].encode()
    handler.send_response(101)
    handler.send_header("Upgrade", "websocket")
    handler.send_header("Connection", "Upgrade")
    accepted = base64.b64encode(hashlib.sha1(key + _MAGIC).digest()).decode()
    handler.send_header("Sec-WebSocket-Accept", accepted)
    handler.send_header("Sec-WebSocket-Protocol", "v4.channel.k8s.io")
    handler.end_headers()
    handler.close_connection = True
    [port] = parse_qs(urlsplit(handler.path).query)["ports"]
    for channel in (_DATA, _ERROR):
        _send(handler, _BINARY, channel + struct.pack("<H", int(port)))
    request = b""
    while not _is_whole(request):
        opcode, data = _receive(handler)
        if opcode == _CLOSE:
            return
        request += data[1:]
    headers = dict(
        line.split(": ", 1) for line in request.split(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    )
    status, content = answer(headers.get("Authorization", ""))
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    _send(handler, _BINARY, _DATA + head.encode() + body)
    # The client has what it wants, and ends it.
    while _receive(handler)[0] != _CLOSE:
        pass
    _send(handler, _CLOSE, struct.pack(">H", 1000))


def _is_whole(request: bytes) -> bool:
    head, end, body = request.partition(b"\r\n\r\n")
    if not end:
        return False
    [length] = [
        int(line.partition(b":")[2])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length")
    ]
    return len(body) >= length


def _receive(handler: BaseHTTPRequestHandler) -> tuple[int, bytes]:
    start = handler.rfile.read(2)
    if len(start) < 2:
        return _CLOSE, b""
    first, second = start
    length = second & 127
    if length == 126:
        [length] = struct.unpack(">H", handler.rfile.read(2))
    mask = handler.rfile.read(4)
    data = handler.rfile.read(length)
    return first & 15, bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))


def _send(handler: BaseHTTPRequestHandler, opcode: int, data: bytes) -> None:
    short = len(data) < 126
    length = bytes([len(data)]) if short else b"\x7e" + struct.pack(">H", len(data))
    handler.wfile.write(bytes([0x80 | opcode]) + length + data)
