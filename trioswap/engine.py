"""`python -m trioswap.engine`: llama.cpp's HTTP server, out of the `xllamacpp` wheel, as an ordinary program.

For people who have a model file and no llama-server: it takes the flags of llama-server that a
swapped model needs, under the same names, and serves the same API.  It is a child like any
other; the daemon supervises it and never imports it.

Exit codes: 0 after SIGTERM or SIGINT, 1 when the model cannot be served, 2 on bad arguments or
without the wheel.  A signal that comes while the model loads ends the process as signals do by
default, because the wheel holds the interpreter until the load is over.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    import xllamacpp

# Enough for a chat; the context a model was trained with can ask for more memory than there is.
# llama.cpp lowers it to the training context of a smaller model.
CTX_SIZE: Final = 4096
# As many as llama-server takes by itself.
PARALLEL: Final = 4
# llama.cpp's n_batch, used where the context is left to the model.
BATCH_SIZE: Final = 2048
POOLINGS: Final = ("mean", "cls", "last", "rank")

_STOPPING_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def main(argv: list[str] | None = None) -> NoReturn:
    """Serve the model that *argv* (default: the command line) names until told to stop; never returns."""
    for number in _STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        params = _params(args)
    except ImportError:
        parser.exit(2, f"{parser.prog}: the wheel xllamacpp is not installed; run: pip install 'trioswap[llama]'\n")
    except OSError as exc:
        parser.exit(1, f"{parser.prog}: cannot read {exc.filename}: {exc.strerror}\n")
    try:
        server = _start(params)
    except RuntimeError:
        where = f"{args.host} port {args.port}"
        # On a line of its own: llama.cpp writes its log from a thread, which may be in the middle of one.
        parser.exit(1, f"\n{parser.prog}: cannot serve {args.model} on {where}; the lines of llama.cpp say why\n")
    caught = _catch_signals()  # before we say that we are there
    sys.stdout.write(f"listening on {server.listening_address}\n")
    sys.stdout.flush()
    os.read(caught, 1)
    # Not by way of the server's destructor, which waits for the answers being generated.
    os._exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trioswap.engine", description="Serve one GGUF model over HTTP with llama.cpp.", allow_abbrev=False
    )
    add = parser.add_argument
    add("-m", "--model", type=Path, required=True, metavar="FILE", help="the GGUF file")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=_port, required=True, help="port to listen on; 0: any free one")
    add("-a", "--alias", metavar="NAME", help="the model's name in answers (default: the file's name)")
    add(
        "-c",
        "--ctx-size",
        type=_count,
        default=CTX_SIZE,
        metavar="N",
        help="context in tokens, at most the model's own, shared by the requests running at once; "
        "0: the model's own (default: %(default)s)",
    )
    add(
        "-np",
        "--parallel",
        type=_positive,
        default=PARALLEL,
        metavar="N",
        help="requests that run at once (default: %(default)s)",
    )
    add("-t", "--threads", type=_positive, metavar="N", help="CPU threads (default: as llama.cpp thinks best)")
    add(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        type=_count,
        metavar="N",
        help="layers to put on the GPU (default: as many as fit)",
    )
    add("--embedding", "--embeddings", action="store_true", dest="embeddings", help="answer /v1/embeddings too")
    add("--pooling", choices=POOLINGS, help="how token vectors become one (default: as the model says)")
    add("--chat-template-file", type=Path, metavar="FILE", help="Jinja template instead of the model's own")
    return parser


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port (0 to 65535)")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _params(args: argparse.Namespace) -> xllamacpp.CommonParams:
    """The arguments in llama.cpp's own words.

    Raises:
        ImportError: the wheel is missing.
        OSError: the model or the template cannot be read.

    """
    import xllamacpp

    with args.model.open("rb"):
        pass  # llama.cpp would say it less clearly
    params = xllamacpp.CommonParams()
    params.model.path = str(args.model)
    params.hostnames, params.port = [args.host], args.port
    params.n_ctx, params.n_parallel = args.ctx_size, args.parallel
    # One pool instead of equal parts, so that a single request may fill the context we advertise.
    params.kv_unified = True
    params.model_alias = {args.alias or args.model.name}
    if args.threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    if args.gpu_layers is not None:
        params.n_gpu_layers = args.gpu_layers
    if args.embeddings:
        params.embedding = True
        # An input to be pooled must fit into one batch, else llama.cpp answers 500.
        params.n_batch = params.n_ubatch = args.ctx_size or BATCH_SIZE
    if args.pooling is not None:
        params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{args.pooling.upper()}")
    if args.chat_template_file is not None:
        params.chat_template = args.chat_template_file.read_text(encoding="utf-8")
    return params


def _start(params: xllamacpp.CommonParams) -> xllamacpp.Server:
    """Load the model and serve it from threads of the wheel's own.

    Raises:
        RuntimeError: the file is no model, the port is taken, the memory does not suffice;
            llama.cpp has written which to stderr.

    """
    import xllamacpp

    return xllamacpp.Server(params)


def _catch_signals() -> int:
    """Catch SIGTERM and SIGINT from now on; return a descriptor that becomes readable when one comes.

    A pipe, because a signal may be taken by one of the wheel's threads, which would not wake
    `signal.pause` in this one.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in _STOPPING_SIGNALS:
        signal.signal(number, lambda _number, _frame: None)
    return reader


if __name__ == "__main__":
    main()
