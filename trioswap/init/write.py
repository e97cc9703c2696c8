"""The text of a configuration, with comments that say why it is so."""

from __future__ import annotations

import enum
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs
import tomli_w

from trioswap import __version__
from trioswap.config import Config, MemoryConfig
from trioswap.config.mistakes import key_path
from trioswap.config.values import format_size
from trioswap.devices import Device
from trioswap.engine import CTX_SIZE
from trioswap.gguf import UBATCH
from trioswap.init.discover import Skipped
from trioswap.init.fitting import Fit, Room
from trioswap.init.models import Kind, Model, Projector

LLAMA_SERVER: Final = "llama-server"
INSTALL: Final = "pip install 'trioswap[llama]'"
_WIDTH: Final = 100
# In llama-server's words (tools/server/README.md, and llama.cpp's pull request 14208: --reranking
# says --embeddings by itself) and in those of the embedded engine.
_SERVER_FLAGS: Final = {Kind.CHAT: [], Kind.EMBEDDING: ["--embeddings"], Kind.RERANKER: ["--reranking"]}
_ENGINE_FLAGS: Final = {
    Kind.CHAT: [],
    Kind.EMBEDDING: ["--embeddings"],
    Kind.RERANKER: ["--embeddings", "--pooling", "rank"],
}


class Engine(enum.Enum):
    """What runs the models."""

    SERVER = "llama-server"
    EMBEDDED = "embedded"
    MISSING = "embedded, not installed"

    @property
    def context(self) -> int | None:
        """Tokens when nothing is said; None: as many as the model was trained with."""
        return None if self is Engine.SERVER else CTX_SIZE


@attrs.frozen
class Entry:
    """A model with what was decided about it."""

    name: str
    model: Model
    projector: Projector | None
    fit: Fit


@attrs.frozen
class Frame:
    """What the models are to run on."""

    engine: Engine
    devices: Sequence[Device]
    room: Room | None
    """None: nobody tells how much memory there is."""
    unmeasured: bool
    """There is a GPU that nobody tells about, or who uses it."""


def document(entries: Sequence[Entry], frame: Frame, places: Iterable[Path], skipped: Sequence[Skipped]) -> str:
    """The configuration, as TOML."""
    lines = [
        *_head(places),
        f"listen = {_value(Config().listen)}",
        "",
        *_rule("memory"),
        *_memory(frame),
        "",
        *_rule("models"),
        *_engine(frame.engine),
    ]
    for entry in entries:
        lines += ["", *_model(entry, frame)]
    if skipped:
        lines += ["", *_rule("left out"), *(f"# {shown(each.path)}: {shown(each.reason)}" for each in skipped)]
    return "\n".join([*lines, ""])


def shown(what: object) -> str:
    """*what* as text on one line, with everything escaped when some of it cannot be seen."""
    text = str(what)
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def amount(size: int) -> str:
    """*size* bytes for people, in few digits."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{-(-size // 2**20)} MiB"


# ---- the parts ---------------------------------------------------------------------------


def _head(places: Iterable[Path]) -> Iterator[str]:
    yield f"# Written by `trioswap init`, version {__version__}.  The file is yours: change what you like."
    yield "#"
    yield "# Next: `trioswap serve` runs it, `trioswap check` finds mistakes in what you change."
    yield "# What else can be said here: configs/full.toml among trioswap's sources."
    yield "#"
    yield "# Looked for models in:"
    yield from (f"#   {shown(place)}" for place in places)
    yield ""


def _rule(title: str) -> list[str]:
    return [f"# ---- {title} ".ljust(_WIDTH, "-")]


def _memory(frame: Frame) -> Iterator[str]:
    yield "# Whoever fits is resident; when a model does not fit beside the others, some of them go."
    if frame.devices:
        yield "# Found on this machine, and looked up anew at every start:"
        yield from (f"#   {device.name}: {amount(device.total)} ({device.kind})" for device in frame.devices)
    if frame.unmeasured:
        yield from _comment(
            "Not of all memory of this machine can it be told how large it is and who uses it.  Where that is the "
            "memory of NVIDIA's GPUs, this helps: pip install 'trioswap[nvidia]'"
        )
    yield "[memory]"
    yield f"headroom = {_value(format_size(MemoryConfig().headroom))}  # kept free on each device"


def _engine(engine: Engine) -> Iterator[str]:
    match engine:
        case Engine.SERVER:
            yield from _comment(f"They run in llama.cpp's {LLAMA_SERVER}, which is on the PATH.")
        case Engine.EMBEDDED:
            yield from _comment(f"They run in the embedded engine, because no {LLAMA_SERVER} is on the PATH.")
        case Engine.MISSING:
            text = f"They run in the embedded engine, because no {LLAMA_SERVER} is on the PATH."
            yield from _comment(f"{text}  It is not installed either: {INSTALL}")


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH - 2, break_long_words=False, break_on_hyphens=False)]


# ---- a model ----------------------------------------------------------------------------


def _model(entry: Entry, frame: Frame) -> Iterator[str]:
    yield from (f"# {line}" for line in _about(entry, frame))
    yield f"[{key_path(('models', entry.name))}]"
    served = frame.engine is Engine.SERVER
    rows = _server(entry) if served else _embedded(entry)
    if not served:
        yield f"gguf = {_value(str(entry.model.path))}"
    if rows:
        key = "cmd" if served else "args"
        yield f"{key} = ["
        yield from ("    " + " ".join(f"{_value(word)}," for word in row) for row in rows)
        yield "]"


def _about(entry: Entry, frame: Frame) -> Iterator[str]:
    model = entry.model
    yield shown(model.title[:_WIDTH])
    size = amount(model.size) + (f" in {model.files} files" if model.files > 1 else "")
    facts = [model.kind.value, model.architecture, model.size_label, model.quantisation, size]
    yield f"  {', '.join(shown(fact) for fact in facts if fact)}"
    if entry.projector is not None:
        projector = f"{shown(entry.projector.path.name)} ({amount(entry.projector.size)})"
        if frame.engine is Engine.SERVER:
            yield f"  takes images or sound through {projector}"
        else:
            yield f"  could take images or sound through {projector}, but only in {LLAMA_SERVER}"
    if model.kind is Kind.EMBEDDING and frame.engine is Engine.SERVER:
        yield f"  takes inputs of up to {UBATCH} tokens; with --ubatch-size of longer ones"
    yield from _needs(entry, frame)


def _needs(entry: Entry, frame: Frame) -> list[str]:
    """What it needs, and why it is started so."""
    fitted, trained, room = entry.fit, entry.model.context, frame.room
    all_of_it = f"with all {trained} tokens of context that it was trained with"
    if fitted.context == trained:
        text = f"needs about {amount(fitted.need)} {all_of_it}"
    else:
        text = f"needs about {amount(fitted.need)} with {fitted.context} tokens of context"
        text += f", and {amount(fitted.whole)} {all_of_it}"
    if room is not None and fitted.whole > room.size:
        text += f"; {room.device} has {amount(room.size)} for models"
    if not fitted.fits:
        text = f"WARNING, does not fit: {text}.  Leave it out, or say with `memory` which devices it goes to"
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")


def _server(entry: Entry) -> list[list[str]]:
    """The command, line by line."""
    rows = [[LLAMA_SERVER, "--port", "${PORT}", "--alias", "${MODEL_ID}"], ["--model", str(entry.model.path)]]
    if entry.projector is not None:
        rows.append(["--mmproj", str(entry.projector.path)])
    return [*rows, *_context(entry), *filter(None, [_SERVER_FLAGS[entry.model.kind]])]


def _embedded(entry: Entry) -> list[list[str]]:
    """The arguments, line by line."""
    return [*_context(entry), *filter(None, [_ENGINE_FLAGS[entry.model.kind]])]


def _context(entry: Entry) -> list[list[str]]:
    """How much context, unless it is the whole.

    Said even where the engine takes as much by itself: the daemon guesses what a server needs from its arguments.
    """
    whole = entry.fit.context == entry.model.context or not entry.fit.fits
    return [] if whole else [["--ctx-size", str(entry.fit.context)]]


def _value(value: str) -> str:
    """*value* as TOML."""
    return tomli_w.dumps({"key": value}).removeprefix("key = ").removesuffix("\n")
