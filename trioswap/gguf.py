"""What a model server will need, guessed from its command line and the header of its model file.

Knows the GGUF format and llama-server's arguments.  It opens no file: the caller reads as
many bytes as it is asked for, and adds up the sizes of the files.

A guess is too high rather than too low.  What is not counted: prompts that the server caches
in host memory (8 GiB by default, taken as they come) and buffers for images.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from typing import Final

import attrs

# ---- the header ------------------------------------------------------------------------------

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_COUNT: Final = struct.Struct("<Q")
_TYPE: Final = struct.Struct("<I")
_START: Final = struct.Struct("<4sIQQ")  # magic, version, tensors, values
# Numbers of the types of values, from the specification of the format (ggml, docs/gguf.md).
_NUMBERS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING: Final = 8
_ARRAY: Final = 9
# A header of a vocabulary of 256 thousand words takes about 16 MiB; who needs more is not telling the truth.
_LONGEST: Final = 2**28
# Arrays of numbers up to this length are kept: one for each layer, and no model has so many.
_KEPT: Final = 1024

Value = int | float | str | tuple[int | float, ...]


@attrs.frozen
class Header:
    """The values before the tensors."""

    values: Mapping[str, Value]
    """Without arrays of text and long ones."""
    lengths: Mapping[str, int]
    """Of every array."""

    def number(self, key: str) -> int | None:
        """The whole number *key*, from 0 up, of the model's architecture; None: there is none."""
        value = self._own(key)
        return value if isinstance(value, int) and value >= 0 else None

    def total(self, key: str, layers: int) -> int | None:
        """The sum of *key* over all layers, whether it is given once or for each; None: it is not given."""
        value = self._own(key)
        if isinstance(value, tuple):
            return sum(each for each in value if isinstance(each, int) and each > 0)
        once = self.number(key)
        return None if once is None else once * layers

    def _own(self, key: str) -> Value | None:
        return self.values.get(f"{self.values.get('general.architecture')}.{key}")


@attrs.frozen
class Incomplete:
    """The header goes on behind the bytes given."""

    needed: int
    """Bytes from the beginning of the file that are needed at least, it may be more; above what was given."""


def read_header(data: bytes) -> Header | Incomplete:
    """The header at the beginning of a GGUF file of which *data* is the first part.

    Little endian files of version 2 and 3.  When the answer is `Incomplete`, come again with
    as many bytes, or better twice as many.

    Raises:
        ValueError: it is no such file, or its header is damaged.
    """
    reader = _Reader(data)
    try:
        return _read(reader)
    except _TooShort as short:
        if short.needed > _LONGEST:
            raise ValueError(f"GGUF header: found a length of {short.needed} bytes, allowed is {_LONGEST}") from None
        return Incomplete(short.needed)


class _TooShort(Exception):
    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


@attrs.define(eq=False)
class _Reader:
    data: bytes
    at: int = 0

    def skip(self, size: int) -> int:
        """Where the next *size* bytes begin, all of which are there."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise _TooShort(self.at)
        return start

    def number(self, format_: struct.Struct) -> int:
        value: int = format_.unpack_from(self.data, self.skip(format_.size))[0]
        return value

    def text(self) -> str:
        size = self.number(_COUNT)
        start = self.skip(size)
        return self.data[start : start + size].decode(errors="replace")

    def skip_texts(self, count: int) -> None:
        """Past *count* texts: vocabularies are long, so no list is made and no text decoded."""
        data, at, end = self.data, self.at, len(self.data)
        for number in range(count):
            if at + _COUNT.size > end:
                raise _TooShort(at + _COUNT.size * (count - number))
            at += _COUNT.size + _COUNT.unpack_from(data, at)[0]
        self.at = at
        self.skip(0)


def _read(reader: _Reader) -> Header:
    if not _MAGIC.startswith(reader.data[: len(_MAGIC)]):
        raise ValueError(f"GGUF header: found {reader.data[: len(_MAGIC)]!r} at the beginning, allowed is {_MAGIC!r}")
    _, version, _, count = _START.unpack_from(reader.data, reader.skip(_START.size))
    if version not in _VERSIONS:
        raise ValueError(f"GGUF header: found version {version:#x}, allowed are 2 and 3 in little endian")
    values, lengths = dict[str, Value](), dict[str, int]()
    for _ in range(count):
        key, type_ = reader.text(), reader.number(_TYPE)
        if type_ != _ARRAY:
            values[key] = _value(reader, key, type_)
            continue
        type_, lengths[key] = reader.number(_TYPE), reader.number(_COUNT)
        array = _array(reader, key, type_, lengths[key])
        if array is not None:
            values[key] = array
    return Header(values, lengths)


def _value(reader: _Reader, key: str, type_: int) -> Value:
    return reader.text() if type_ == _STRING else reader.number(_format(key, type_))


def _array(reader: _Reader, key: str, type_: int, length: int) -> Value | None:
    if type_ == _STRING:
        reader.skip_texts(length)
        return None
    # Arrays in arrays are refused here: llama.cpp does not read them either.
    format_ = _format(key, type_)
    start = reader.skip(format_.size * length)
    if length > _KEPT:
        return None
    return tuple(number for (number,) in format_.iter_unpack(reader.data[start : reader.at]))


def _format(key: str, type_: int) -> struct.Struct:
    if type_ not in _NUMBERS:
        raise ValueError(f"GGUF header: found type {type_} of {key!r}, allowed are 0 to 12, and no arrays in arrays")
    return _NUMBERS[type_]


# ---- the estimate ------------------------------------------------------------------------------

# Bytes of 32 numbers in the cache: the block formats of ggml (a scale of 2 bytes, with a minimum 4, and the bits).
_CACHE_BLOCK: Final = {
    "f32": 128,
    "f16": 64,
    "bf16": 64,
    "q8_0": 34,
    "q5_1": 24,
    "q5_0": 22,
    "q4_1": 20,
    "q4_0": 18,
    "iq4_nl": 18,
}
CACHE_TYPE: Final = "f16"
"""llama-server's default."""
UBATCH: Final = 512
"""Tokens computed at once; llama-server's default."""
_SLOTS: Final = 4  # requests at once when --parallel is not given (llama.cpp, tools/server/server.cpp)
_PAD: Final = 256  # the cells of each sequence are a multiple of this (llama.cpp, src/llama-context.cpp)
# The context of the GPU driver and the libraries' work space.  Ollama sets 457 MiB aside
# for it (discover/gpu.go), on NVIDIA and AMD alike; a process on the CPU takes less.
_PROCESS: Final = 512 * 2**20


def estimate(
    header: Header,
    size: int,
    *,
    context: int | None = None,
    parallel: int | None = None,
    cache_k: str = CACHE_TYPE,
    cache_v: str = CACHE_TYPE,
    ubatch: int = UBATCH,
) -> int:
    """Bytes that llama-server needs for a model wholly on one device, too many rather than too few.

    *size* is that of all its files, in bytes: the header in it is small, and the rest is
    weights.  *context* counts tokens of all requests together, as `--ctx-size` does; None: the
    length the model was trained with, which is llama-server's default (tools/server/README.md).
    Where that does not fit, today's llama-server shortens it by itself (`--fit`).  *cache_k* and
    *cache_v* are names of cache types; one unknown here counts as f16, which is larger than any quantized one.

    Sliding windows are ignored: such layers count as if they kept the whole context.  Flash
    attention is supposed ("auto" by default); without it long contexts need much more.

    Raises:
        ValueError: the header does not describe a language model, or the context is nowhere given.
    """
    tokens = _cells(context or _required(header, "context_length"), parallel or _SLOTS)
    cache = _attention_cache(header, tokens, cache_k, cache_v)
    states = _recurrent_states(header) * (parallel or _SLOTS)
    return size + cache + states + _compute(header, tokens, ubatch) + _PROCESS


def _required(header: Header, key: str) -> int:
    value = header.number(key)
    if value is None:
        raise ValueError(f"GGUF header: found no {key} of architecture {header.values.get('general.architecture')!r}")
    return value


def _cells(context: int, sequences: int) -> int:
    """How many tokens the cache has room for: the context is shared out, each share rounded up."""
    share = _padded(context) // sequences
    return _padded(share) * sequences


def _padded(tokens: int) -> int:
    return -(-tokens // _PAD) * _PAD


def _attention_cache(header: Header, tokens: int, cache_k: str, cache_v: str) -> int:
    """Bytes of keys and values: for each token, layer and head that stores them (src/llama-kv-cache.cpp)."""
    layers = _required(header, "block_count")
    queries = header.total("attention.head_count", layers) or 0
    heads = header.total("attention.head_count_kv", layers)
    heads = queries if heads is None else heads
    # Models that do not say how long a key is divide the embedding among the heads of a layer.
    usual = _required(header, "embedding_length") * layers // queries if queries else 0
    keys = header.number("attention.key_length") or usual
    values = header.number("attention.value_length") or usual
    f16 = _CACHE_BLOCK[CACHE_TYPE]
    block = keys * _CACHE_BLOCK.get(cache_k, f16) + values * _CACHE_BLOCK.get(cache_v, f16)
    return tokens * heads * block // 32


def _recurrent_states(header: Header) -> int:
    """Bytes of one request's state in layers without attention, as if all were such; 0 where there are none.

    In 32-bit floats: the last inputs of the convolution and the state of each channel
    (Ollama, fs/ggml/ggml.go, after src/llama-hparams.cpp of llama.cpp).
    """
    inner, state = header.number("ssm.inner_size") or 0, header.number("ssm.state_size") or 0
    groups, kernel = header.number("ssm.group_count") or 0, header.number("ssm.conv_kernel") or 1
    convolution = (kernel - 1) * (inner + 2 * groups * state)
    return 4 * (convolution + inner * state) * _required(header, "block_count")


def _compute(header: Header, tokens: int, ubatch: int) -> int:
    """Bytes of the buffers for intermediate results.

    The output of one batch, 4 bytes for each word of the vocabulary and each channel: Ollama's
    formula, and to the byte the 258.5 MiB that llama.cpp reports for Llama 3 8B.  And the mask of what each token of
    the batch may see, once in 4 bytes and once in 2 (src/llama-graph.cpp).
    """
    words = header.number("vocab_size") or header.lengths.get("tokenizer.ggml.tokens", 0)
    return ubatch * (4 * (words + _required(header, "embedding_length")) + 6 * tokens)


# ---- the command line ---------------------------------------------------------------------------

# From llama-server's help (tools/server/README.md), and the older name of a flag beside the newer one.
_FLAGS: Final = {
    "-m": "model",
    "--model": "model",
    "-mm": "mmproj",
    "--mmproj": "mmproj",
    "-md": "draft",
    "--model-draft": "draft",
    "--spec-draft-model": "draft",
    "-c": "context",
    "--ctx-size": "context",
    "-np": "parallel",
    "--parallel": "parallel",
    "-ub": "ubatch",
    "--ubatch-size": "ubatch",
    "-ngl": "gpu_layers",
    "--gpu-layers": "gpu_layers",
    "--n-gpu-layers": "gpu_layers",
    "-ctk": "cache_k",
    "--cache-type-k": "cache_k",
    "-ctv": "cache_v",
    "--cache-type-v": "cache_v",
}
_WHOLE: Final = re.compile(r"[0-9]{1,9}")
_SPLIT: Final = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})\.gguf", re.DOTALL)


@attrs.frozen
class LlamaArguments:
    """What the command line of a llama-server says about memory."""

    model: str | None = None
    """Path as written; see `split_files`."""
    mmproj: str | None = None
    """Path of the projector that makes tokens of images."""
    draft: str | None = None
    """Path of the small model that guesses ahead."""
    context: int | None = None
    """Tokens of all requests together; None: as many as the model was trained with."""
    parallel: int | None = None
    """Requests at once; None: as the server likes."""
    ubatch: int = UBATCH
    """Tokens computed at once."""
    gpu_layers: int | None = None
    """Layers on the GPU; 0: none; None: as many as fit ("auto") or all."""
    cache_k: str = CACHE_TYPE
    cache_v: str = CACHE_TYPE


def llama_arguments(argv: Sequence[str]) -> LlamaArguments:
    """What *argv*, which is taken for the command line of a llama-server, says about memory.

    Both `--flag value` and `--flag=value`, and as there underscores in long flags stand for
    hyphens and the last one counts.  Unknown arguments and values that make no sense are
    ignored: to complain of them is the server's business.
    """
    said = _said(argv)

    def whole(name: str, least: int) -> int | None:
        text = said.get(name, "")
        return int(text) if _WHOLE.fullmatch(text) and int(text) >= least else None

    return LlamaArguments(
        model=said.get("model"),
        mmproj=said.get("mmproj"),
        draft=said.get("draft"),
        context=whole("context", 1),
        parallel=whole("parallel", 1),
        ubatch=whole("ubatch", 1) or UBATCH,
        gpu_layers=whole("gpu_layers", 0),
        cache_k=said.get("cache_k", CACHE_TYPE),
        cache_v=said.get("cache_v", CACHE_TYPE),
    )


def _said(argv: Sequence[str]) -> dict[str, str]:
    """Our name of the flag -> its last value."""
    said = dict[str, str]()
    rest = iter(argv)
    for argument in rest:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else (argument, "", "")
        name = _FLAGS.get(flag.replace("_", "-") if flag.startswith("--") else flag)
        if name is not None:
            said[name] = value if equals else next(rest, "")
    return said


def split_files(path: str) -> tuple[str, ...]:
    """All files of the model at *path*: itself, or for `...-00001-of-00003.gguf` the three of them.

    Only the first has the whole header.  The form of the names is llama.cpp's (`llama_split_path`).
    """
    match = _SPLIT.fullmatch(path)
    if match is None:
        return (path,)
    stem, total = match.groups()
    return tuple(f"{stem}-{number:05d}-of-{total}.gguf" for number in range(1, int(total) + 1)) or (path,)
