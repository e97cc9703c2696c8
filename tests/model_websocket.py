"""The websockets of `model_server.py`: an echo that misbehaves on request, by hand, for there are no packages.

Every message comes back as it was, text or binary, but a text that begins with "!" is a command:

    !close CODE REASON    send a close frame (without a code: an empty one) and wait for the client's
    !break                end the connection without one
    !die                  end the process
    !flood                send for ever, and read no more
    !deaf                 read no more

Of the subprotocols that the client offers the last one is taken.
"""

import binascii
import os
import threading

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3
_TEXT, _BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10
_PIECE = bytes(2**16)


def is_asked_for(headers):
    """Whether the request is the handshake of one."""
    return headers.get("upgrade", "").lower() == "websocket"


def talk(connection, reader, headers, died):
    """Accept, and echo until one side ends it; return how the client closed: its code, or None without one.

    Raises EOFError or OSError when the connection ends without a close frame.  *died* is the exit code of "!die".
    """
    _accept(connection, headers)
    while True:
        kind, data = _read_message(connection, reader)
        if kind == _CLOSE:
            _send(connection, _CLOSE, data)
            return _code(data)
        if kind == _TEXT and data.startswith(b"!"):
            command, _, rest = data[1:].decode().partition(" ")
            if command == "close":
                return _close(connection, reader, rest)
            _misbehave(connection, command, died)
        _send(connection, kind, data)


def _accept(connection, headers):
    import hashlib  # here, for it brings OpenSSL along, and most model servers never need it

    digest = hashlib.sha1(headers["sec-websocket-key"].encode() + _GUID).digest()
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {binascii.b2a_base64(digest, newline=False).decode()}",
        "Set-Cookie: seen=yes",
    ]
    offered = headers.get("sec-websocket-protocol")
    if offered:
        lines.append(f"Sec-WebSocket-Protocol: {offered.split(',')[-1].strip()}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode())


def _misbehave(connection, command, died):
    if command == "break":
        raise EOFError
    if command == "die":
        os._exit(died)
    while command == "flood":
        _send(connection, _BINARY, _PIECE)
    if command == "deaf":
        threading.Event().wait()


def _close(connection, reader, words):
    code, _, reason = words.partition(" ")
    _send(connection, _CLOSE, int(code).to_bytes(2, "big") + reason.encode() if code else b"")
    while True:
        kind, data = _read_message(connection, reader)
        if kind == _CLOSE:
            return _code(data)


def _code(data):
    return int.from_bytes(data[:2], "big") if data else None


def _read_message(connection, reader):
    """The next message or close frame; pings are answered meanwhile."""
    kind, data = None, b""
    while True:
        first, opcode, piece = _read_frame(reader)
        if opcode == _PING:
            _send(connection, _PONG, piece)
        elif opcode == _CLOSE:
            return opcode, piece
        elif opcode != _PONG:
            kind, data = kind or opcode, data + piece
            if first & 0x80:
                return kind, data


def _read_frame(reader):
    first, second = _exactly(reader, 2)
    size = second & 0x7F
    if size >= 126:
        size = int.from_bytes(_exactly(reader, 2 if size == 126 else 8), "big")
    mask = _exactly(reader, 4)
    data = _exactly(reader, size)
    key = int.from_bytes((mask * (size // 4 + 1))[:size], "big")
    return first, first & 0x0F, (int.from_bytes(data, "big") ^ key).to_bytes(size, "big")


def _exactly(reader, size):
    data = reader.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _send(connection, opcode, data):
    size = len(data)
    if size < 126:
        length = bytes([size])
    elif size < 2**16:
        length = b"\x7e" + size.to_bytes(2, "big")
    else:
        length = b"\x7f" + size.to_bytes(8, "big")
    connection.sendall(bytes([0x80 | opcode]) + length + data)
