"""A small model server that misbehaves on request: a stand-alone script, run with `python -S -E`.

It imports little, so that it listens some 30 ms after it was spawned; no test framework, no
`http.server`.  What it does wrong is said by flags (`FLAGS` below), and for one request by the
JSON body: `{"script": {"chunks": 5, "chunk_delay": 0.01}}` takes any flag that concerns answers.

    GET /health           200 "ok", or 503 while not ready
    GET /pid              its pid
    GET /children         JSON list of the pids that --fork and --setsid-child left behind
    GET /requests         JSON {"started": n, "finished": n, "aborted": n}
    GET /seen             JSON of the last request that counted, byte for byte: method, target, headers, body (text
                          in latin-1); null before the first
    GET /closes           JSON list of how clients closed their websockets: a code, null for a close frame without
                          one, "broken" for none; these six do not count
    a websocket anywhere  what `model_websocket.py` says
    GET anything else     200 "NAME /the/raw/target", undecoded
    POST anything         JSON with the name, the pid, the path, the headers, and the request as "echo";
                          with "stream": true, server-sent events; both as an OpenAI client expects them
    POST .../speech       audio, which is the name in bytes
    POST to some others   the same JSON with what the endpoint is asked for beside it (`SHAPES`)

"aborted" counts the requests whose client left before the answer was complete.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time

import model_answers
import model_websocket

STARTED_AT = time.monotonic()

# name -> default; the type of the default is the type of the value, False means a bare flag.
FLAGS = {
    "port": 0,
    "name": "model",
    # Starting.
    "bind-delay": 0.0,  # seconds before the port is bound
    "wrong-port": False,  # never binds
    "ready-delay": 0.0,  # seconds since the start for which /health answers 503
    "ready-once": "",  # /health answers 503 until this file exists; from then on it does not matter
    "never-ready": False,
    "exit-at-start": -1,  # exit code; exits at once, with a line on stderr
    "out-of-memory-unless": "",  # exits for want of memory unless this file exists; makes it, so the next start works
    "killed-unless": "",  # the same by SIGKILL, without a word
    "allocate": 0,  # bytes that are in use before it is ready
    "exit-after": -1.0,  # seconds since the start; then exits with 1
    "spam": 0,  # bytes written to stdout at the start, as one line that does not end
    "silent": False,  # prints nothing
    # Family and stopping.
    "fork": False,  # leaves a child in the same group that holds stdout and ignores SIGTERM
    "setsid-child": False,  # leaves a double-forked child in a session of its own that ignores SIGTERM
    "ignore-sigterm": False,
    "stop-delay": 0.0,  # seconds between SIGTERM and the exit
    # Answers.
    "formats": False,  # answers what `model_answers.py` knows as it says, without the echo
    "grow": 0,  # bytes more that are in use after each POST
    "hold": False,  # never answers a counted request
    "answer-delay": 0.0,  # seconds before the first byte
    "chunks": 3,  # events in a stream
    "chunk-delay": 0.0,  # seconds before each of them
    "status": 200,  # of every POST; websockets are refused with another one
    "truncate": False,  # declares more bytes than it sends, then closes; a stream ends without its last chunk
    "die-on-request": False,  # exits upon a POST, before any byte
    "die-on-error": False,  # exits behind an answer that --status has made one
    "dying": 0.0,  # seconds that this takes, in which nobody is served and nobody can connect
    "die-mid-stream": -1,  # exits after that many events
}
DIED = 3  # exit code of --die-...
# However a test ends, what it left behind is gone after this many seconds.
CHILD_LIFETIME = 120.0

counts = {"started": 0, "finished": 0, "aborted": 0}
counts_lock = threading.Lock()
children = []
listening = []
seen = [None]  # what /seen says
closes = []  # what /closes says
ballast = []  # what --allocate and --grow take


class ClientLeft(Exception):
    """The connection ended before the answer did."""


class Options:
    """The flags as attributes, dashes replaced by underscores."""

    def __init__(self, values):
        self.__dict__.update(values)

    def overridden(self, script):
        return Options({**self.__dict__, **script})


def parse_flags(argv):
    values = {name.replace("-", "_"): default for name, default in FLAGS.items()}
    words = iter(argv)
    for word in words:
        default = FLAGS[word.removeprefix("--")]
        value = True if default is False else type(default)(next(words))
        values[word.removeprefix("--").replace("-", "_")] = value
    return Options(values)


def wait(seconds):
    threading.Event().wait(seconds)


def say(options, text):
    if not options.silent:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


# ---- the life of the process ----------------------------------------------------------


def main():
    options = parse_flags(sys.argv[1:])
    if options.exit_at_start >= 0:
        sys.stderr.write(f"{options.name}: cannot load the model\n")
        sys.exit(options.exit_at_start)
    if options.out_of_memory_unless and is_first_start(options.out_of_memory_unless):
        sys.stderr.write("cudaMalloc failed: out of memory\n")
        sys.exit(1)
    if options.killed_unless and is_first_start(options.killed_unless):
        os.kill(os.getpid(), signal.SIGKILL)
    install_signals(options)
    leave_children(options)
    allocate(options.allocate)
    if options.exit_after >= 0:
        threading.Thread(target=exit_later, args=(options.exit_after,), daemon=True).start()
    if options.spam:
        sys.stdout.write("x" * options.spam)
        sys.stdout.flush()
    wait(options.bind_delay)
    if options.wrong_port:
        wait(None)
    serve(options)


def is_first_start(path):
    """Whether the file is not there; from now on it is."""
    if os.access(path, os.F_OK):
        return False
    os.close(os.open(path, os.O_CREAT))
    return True


def allocate(size):
    """Take memory for good, and write into all of it, or the kernel would not give it."""
    ballast.append(b"x" * size)


def install_signals(options):
    def stop(_number, _frame):
        wait(options.stop_delay)
        os._exit(0)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if options.ignore_sigterm else stop)
    signal.signal(signal.SIGINT, stop)


def exit_later(seconds):
    wait(seconds)
    os._exit(1)


def leave_children(options):
    """Before the port is bound and threads run, so that a child holds no more than it should."""
    if options.fork:
        children.append(leave_child(escape=False))
    if options.setsid_child:
        children.append(leave_child(escape=True))


def leave_child(escape):
    """Fork; return the pid of the child, or of the grandchild, once it ignores SIGTERM."""
    reader, writer = os.pipe()
    first = os.fork()
    if first == 0:
        if escape:
            os.setsid()
            if os.fork():
                os._exit(0)
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(nothing, descriptor)
        linger(writer)
    os.close(writer)
    if escape:
        os.waitpid(first, 0)
    with os.fdopen(reader, "rb") as pipe:
        return int(pipe.read())


def linger(writer):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(writer, b"%d" % os.getpid())
    os.close(writer)
    wait(CHILD_LIFETIME)
    os._exit(0)


def serve(options):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", options.port))
    listener.listen(1024)
    listening.append(listener)
    options.ready_at = max(time.monotonic(), STARTED_AT + options.ready_delay)
    say(options, "listening")
    if not options.never_ready and not options.ready_once:
        threading.Thread(target=tell_ready, args=(options,), daemon=True).start()
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # it is dying
            wait(CHILD_LIFETIME)
        threading.Thread(target=serve_connection, args=(connection, options), daemon=True).start()


def tell_ready(options):
    wait(max(0.0, STARTED_AT + options.ready_delay - time.monotonic()))
    say(options, "ready")


def is_ready(options):
    if options.ready_once:
        if not os.access(options.ready_once, os.F_OK):
            return False
        options.ready_once = ""
    return not options.never_ready and time.monotonic() >= STARTED_AT + options.ready_delay


# ---- one connection --------------------------------------------------------------------


class Request:
    """One request, read to its end."""

    def __init__(self, method, target, fields, body):
        self.method, self.target, self.fields, self.body = method, target, fields, body
        self.headers = dict(fields)
        try:
            self.json = json.loads(body)
        except ValueError:
            self.json = None

    @property
    def said(self):
        """All of it, for /seen."""
        body = self.body.decode("latin-1")
        return {"method": self.method, "target": self.target, "headers": self.fields, "body": body}

    @property
    def wants(self):
        """The body as an object, empty when it is none."""
        return self.json if isinstance(self.json, dict) else {}


def serve_connection(connection, options):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, connection.makefile("rb") as reader:
        try:
            while serve_request(connection, reader, options):
                pass
        except OSError:
            pass


def serve_request(connection, reader, options):
    """Answer one request; return whether the connection may carry another."""
    line = reader.readline()
    if not line.strip():
        return False
    method, target, _version = line.decode("latin-1").split(" ", 2)
    fields = read_fields(reader)
    if method == "GET" and target in REPORTS:
        status, text = REPORTS[target](options)
        send(connection, status, "text/plain" if status != 200 else "application/json", text.encode())
        return dict(fields).get("connection") != "close"
    return counted(connection, reader, options, (method, target, fields))


REPORTS = {
    "/health": lambda options: (200, "ok") if is_ready(options) else (503, "loading"),
    "/pid": lambda _: (200, str(os.getpid())),
    "/children": lambda _: (200, json.dumps(children)),
    "/requests": lambda _: (200, json.dumps(counts)),
    "/seen": lambda _: (200, json.dumps(seen[0])),
    "/closes": lambda _: (200, json.dumps(closes)),
}


def counted(connection, reader, options, head):
    count("started")
    outcome = "aborted"
    try:
        request = Request(*head, read_body(connection, reader, dict(head[2])))
        seen[0] = request.said
        options = options.overridden(request.wants.get("script", {}))
        if model_websocket.is_asked_for(request.headers) and options.status == 200 and not options.hold:
            keep = talk(connection, reader, request)
        else:
            keep = answer(connection, request, options)
        outcome = "finished"
    except (OSError, ClientLeft):
        return False
    finally:
        count(outcome)
    return keep and request.headers.get("connection") != "close"


def talk(connection, reader, request):
    """Serve a websocket; return that the connection may carry nothing else."""
    end = "broken"
    try:
        end = model_websocket.talk(connection, reader, request.headers, DIED)
    except EOFError:
        raise ClientLeft from None
    finally:
        closes.append(end)
    return False


def count(what):
    with counts_lock:
        counts[what] += 1


def read_fields(reader):
    fields = []
    while (line := reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        fields.append((name.strip().lower(), value.strip()))
    return fields


def read_body(connection, reader, headers):
    if headers.get("expect", "").lower() == "100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return b"".join(read_chunks(reader))
    return read_exactly(reader, int(headers.get("content-length", 0)))


def read_chunks(reader):
    while length := int(read_line(reader).partition(b";")[0], 16):
        yield read_exactly(reader, length)
        read_line(reader)
    read_fields(reader)  # trailers


def read_line(reader):
    line = reader.readline()
    if not line:
        raise ClientLeft
    return line


def read_exactly(reader, length):
    body = reader.read(length)
    if len(body) < length:
        raise ClientLeft
    return body


# ---- answers ---------------------------------------------------------------------------


def answer(connection, request, options):
    """Send what is due; return whether the connection may carry another request."""
    if options.die_on_request and request.method == "POST":
        die(connection, options)
    if options.grow and request.method == "POST":
        allocate(options.grow)
    if options.hold:
        wait_for_departure(connection, None)
    wait_for_departure(connection, options.answer_delay)
    if request.method != "POST" and not model_websocket.is_asked_for(request.headers):
        send(connection, 200, "text/plain", f"{options.name} {request.target}".encode())
        return True
    if options.status != 200:
        error = {"error": {"message": f"{options.name} says {options.status}", "type": "scripted", "code": None}}
        send(connection, options.status, "application/json", json.dumps(error).encode())
        if options.die_on_error:
            die(connection, options)
        return True
    if options.formats and formatted(connection, request, options):
        return True
    if request.wants.get("stream") is True:
        return stream(connection, options)
    endpoint = request.target.partition("?")[0].rpartition("/")[2]
    kind, body = "application/json", json.dumps(completion(request, options) | SHAPES.get(endpoint, {})).encode()
    if endpoint == "speech":
        kind, body = "audio/mpeg", b"\xff\xfb" + options.name.encode()
    send(connection, 200, kind, body, missing=100 if options.truncate else 0)
    return not options.truncate


# What answers have beside what `completion` says, by the last word of the path.
SHAPES = {
    "count_tokens": {"input_tokens": 1},
    "embeddings": {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.0, 1.0]}]},
    "rerank": {"results": [{"index": 0, "relevance_score": 1.0}]},
    "reranking": {"results": [{"index": 0, "relevance_score": 1.0}]},
    "infill": {"content": "x"},
    "completion": {"content": "x"},
    "transcriptions": {"text": "x"},
    "translations": {"text": "x"},
    "generations": {"data": [{"b64_json": "eA=="}]},
    "edits": {"data": [{"b64_json": "eA=="}]},
    "variations": {"data": [{"b64_json": "eA=="}]},
    "txt2img": {"images": ["eA=="]},
    "img2img": {"images": ["eA=="]},
    "tokenize": {"tokens": [1]},
    "detokenize": {"content": "x"},
    "apply-template": {"prompt": "x"},
}


def wait_for_departure(connection, seconds):
    """Wait for *seconds* (None: for ever); raise ClientLeft as soon as the client closes."""
    deadline = None if seconds is None else time.monotonic() + seconds
    poll = select.poll()  # unlike select.select it takes descriptors above 1023
    poll.register(connection, select.POLLIN)
    if not poll.poll(None if seconds is None else 1000 * seconds):
        return
    if not connection.recv(1, socket.MSG_PEEK):
        raise ClientLeft
    # The next request is here already, so a poll would return at once: sleep out the rest.
    wait(None if deadline is None else max(0.0, deadline - time.monotonic()))


def send(connection, status, kind, body, missing=0):
    head = f"HTTP/1.1 {status} Scripted\r\nContent-Type: {kind}\r\nContent-Length: {len(body) + missing}\r\n\r\n"
    connection.sendall(head.encode() + body)


def completion(request, options):
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": options.name,
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": options.name}},
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        "pid": os.getpid(),
        "ready_at": options.ready_at,  # on the monotonic clock that all processes share
        "path": request.target,
        "headers": request.headers,
        "bytes": len(request.body),
        "echo": request.json,
    }


def stream(connection, options):
    head = b"HTTP/1.1 200 Scripted\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection.sendall(head)
    for number in range(options.chunks):
        die_if_due(options, number)
        wait_for_departure(connection, options.chunk_delay)
        send_chunk(connection, f"data: {json.dumps(chunk(options, number))}\n\n".encode())
    die_if_due(options, options.chunks)
    if options.truncate:
        return False
    send_chunk(connection, b"data: [DONE]\n\n")
    connection.sendall(b"0\r\n\r\n")
    return True


def formatted(connection, request, options):
    """Answer as the endpoint's own documentation has it; return whether it is known."""
    asked = (request.target, request.wants, options.name)
    streams = request.wants.get("stream") is True or b'name="stream"\r\n\r\ntrue' in request.body
    events = model_answers.events(*asked) if streams else None
    if events is None:
        answer = model_answers.answer(*asked)
        if answer is not None:
            send(connection, 200, *answer)
        return answer is not None
    head = b"HTTP/1.1 200 Scripted\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection.sendall(head)
    for event in events:
        wait_for_departure(connection, options.chunk_delay)
        send_chunk(connection, event)
    connection.sendall(b"0\r\n\r\n")
    return True


def die(connection, options):
    if options.dying:
        listening[0].shutdown(socket.SHUT_RDWR)
        connection.shutdown(socket.SHUT_RDWR)
        wait(options.dying)
    os._exit(DIED)


def die_if_due(options, sent):
    if sent == options.die_mid_stream:
        os._exit(DIED)


def send_chunk(connection, data):
    connection.sendall(b"%x\r\n%s\r\n" % (len(data), data))


def chunk(options, number):
    last = number == options.chunks - 1
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": options.name,
        "choices": [
            {"index": 0, "delta": {"content": f"{options.name} "}, "finish_reason": "stop" if last else None},
        ],
    }


if __name__ == "__main__":
    main()
