"""A model server of `chaos.py`: `model_server.py`, but it says for whom an answer is, and its start may go wrong.

    python -S -E chaos_child.py DIRECTORY --port N --name NAME

In DIRECTORY each file is a JSON list of more flags; a start takes the first and removes it.  In an answer
"token" is what the request's script says, else its header x-chaos-token, and "sum" the CRC of its body; the
chunks of a stream have the token, their number, and how many there are.  Three more flags are for answers:
`token`; `nonsense`, bytes that are no HTTP; and `die-behind`, a text of a stream with which it ends: nothing behind
it is sent.  A websocket's message "!who" is answered with the name, and then as always.
"""

# As little as possible is imported, for it starts again and again:
# ruff: noqa: PTH108, PTH123, PTH208

import json
import os
import sys
import zlib

import model_server
import model_websocket

model_server.FLAGS["token"] = ""
model_server.FLAGS["nonsense"] = False
model_server.FLAGS["die-behind"] = ""
_answer, _completion, _chunk = model_server.answer, model_server.completion, model_server.chunk
_stream = model_server.stream
_misbehave = model_websocket._misbehave


def answer(connection, request, options):
    if options.nonsense and request.method == "POST":
        connection.sendall(b"\x16\x03\x01 what would you like?\r\n\r\n")
        return False
    return _answer(connection, request, options)


class Ending:
    """A connection on which a certain text is the last."""

    def __init__(self, connection, last):
        self.connection, self.last = connection, last.encode()

    def __getattr__(self, name):
        return getattr(self.connection, name)

    def sendall(self, data):
        before, found, _ = data.partition(self.last)
        self.connection.sendall(before + found)
        if found:
            os._exit(model_server.DIED)


def stream(connection, options):
    return _stream(Ending(connection, options.die_behind) if options.die_behind else connection, options)


def completion(request, options):
    token = options.token or request.headers.get("x-chaos-token", "")
    return _completion(request, options) | {"token": token, "sum": zlib.crc32(request.body)}


def chunk(options, number):
    return _chunk(options, number) | {"token": options.token, "number": number, "of": options.chunks}


def misbehave(connection, command, died):
    if command == "who":
        name = sys.argv[sys.argv.index("--name") + 1]
        model_websocket._send(connection, model_websocket._TEXT, name.encode())
    _misbehave(connection, command, died)


def more_flags(directory):
    """What is to go wrong this time."""
    for name in sorted(os.listdir(directory)):
        path = f"{directory}/{name}"
        with open(path) as file:
            flags = json.load(file)
        os.unlink(path)
        return flags
    return []


if __name__ == "__main__":
    sys.argv[1:] = sys.argv[2:] + more_flags(sys.argv[1])
    model_server.answer, model_server.completion, model_server.chunk = answer, completion, chunk
    model_server.stream = stream
    model_websocket._misbehave = misbehave
    model_server.main()
