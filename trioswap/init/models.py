"""Reads the headers of GGUF files: which are models, of what kind, and which belong to a model.

What a model is called is the business of `names`, which projector it gets of `projectors`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import attrs

from trioswap.gguf import Header, Incomplete, estimate, read_header, split_files
from trioswap.init.discover import Skipped

# The header of most models fits into this many bytes.
_HEADER: Final = 2**20
# The magic, the version, and then the number of tensors (ggml, docs/gguf.md).
_TENSORS: Final = slice(8, 16)
_RANK: Final = 4  # LLAMA_POOLING_TYPE_RANK (llama.cpp, include/llama.h)
# general.file_type, counted from 0: `llama_ftype` in llama.cpp's include/llama.h.  The gaps are types that are gone.
_FILE_TYPES: Final = (
    "F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K "
    "IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 - - - "
    "TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0 Q2_0"
)
_QUANTISED: Final = re.compile(
    r"(?<![A-Z0-9])((?:UD-)?(?:I?Q[1-9]_[A-Z0-9]+(?:_[A-Z0-9]+)*|TQ[12]_0|B?F16|F32|MXFP4|NVFP4))(?![A-Z0-9])"
)
_PART: Final = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")
# Architectures of llama.cpp that only make vectors, besides everything that is called BERT (src/llama-arch.cpp).
_EMBEDDERS: Final = frozenset({"t5encoder", "gemma-embedding", "llama-embed"})
# Kinds of files that say of themselves that they are no models (`GGUFType` of the package gguf).
_TYPES: Final = {"adapter": "an adapter (LoRA), which needs a model", "imatrix": "an importance matrix, no model"}


class Kind(enum.Enum):
    """What a model is asked for."""

    CHAT = "chat"
    EMBEDDING = "embedding"
    RERANKER = "reranking"


@attrs.frozen
class Model:
    """A file, or several, that a server can be started with."""

    path: Path
    """The first file."""
    header: Header = attrs.field(repr=False)
    size: int
    """Bytes of all files."""
    files: int
    kind: Kind
    context: int
    """Tokens it was trained with."""

    @property
    def stem(self) -> str:
        """The name of its file, without the numbers of a part and the ending."""
        return _PART.sub("", self.path.stem)

    @property
    def title(self) -> str:
        """What it calls itself, else the name of its file."""
        return text(self.header, "general.name") or self.stem

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return text(self.header, "general.architecture")

    @property
    def size_label(self) -> str:
        """Such as 7B; may be empty."""
        return text(self.header, "general.size_label")

    @property
    def quantisation(self) -> str:
        """Such as Q4_K_M, of the most of it; empty when nobody tells."""
        return quantisation(self.path, self.header)


@attrs.frozen
class Projector:
    """What makes tokens of images or sound for a model ("mmproj")."""

    path: Path
    header: Header = attrs.field(repr=False)
    size: int
    """Bytes."""


def read_models(files: Iterable[Path]) -> tuple[list[Model], list[Projector], list[Skipped]]:
    """What *files* are, in their order."""
    models, projectors, skipped = list[Model](), list[Projector](), list[Skipped]()
    for path in files:
        match _what(path):
            case Model() as model:
                models.append(model)
            case Projector() as projector:
                projectors.append(projector)
            case str(reason):
                skipped.append(Skipped(path, reason))
            case None:
                pass
    return models, projectors, skipped


def _what(path: Path) -> Model | Projector | str | None:
    """What the file is; text: why it gives no model; None: it is a part of a model whose first file is there."""
    if (reason := _unwritable(path)) is not None:
        return reason
    parts = [Path(name) for name in split_files(str(path))]
    if path != parts[0]:
        return None if parts[0].is_file() else f"is a part of a model whose first file is missing: {parts[0].name}"
    if missing := [part.name for part in parts if not part.is_file()]:
        return f"{len(missing)} of its {len(parts)} files are missing, the first of them is {missing[0]}"
    try:
        size = sum(part.stat().st_size for part in parts)
        header, tensors = _header(path)
        return _read(path, header, size, len(parts), tensors)
    except OSError as exc:
        return f"cannot be read: {exc.strerror}"
    except ValueError as exc:
        return str(exc)


def _unwritable(path: Path) -> str | None:
    """Why a configuration cannot name the file; None: it can."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its path is not UTF-8, as a configuration must be"
    return "its path has ${ in it, which begins a placeholder in a configuration" if "${" in str(path) else None


def _read(path: Path, header: Header, size: int, files: int, tensors: int) -> Model | Projector | str:
    if text(header, "general.architecture") == "clip":
        return Projector(path, header, size)
    if (type_ := text(header, "general.type")) in _TYPES:
        return f"is {_TYPES[type_]}"
    if not tensors and files == 1:  # the first of several may have none (llama-gguf-split --no-tensor-first-split)
        return "has no weights"
    estimate(header, size)  # a ValueError says what it lacks to be a language model
    context = header.number("context_length")
    assert context is not None  # or there was no estimate
    return Model(path, header, size, files, _kind(path, header), context)


def _header(path: Path) -> tuple[Header, int]:
    """The header, and how many tensors the file has."""
    with path.open("rb") as file:
        data = file.read(_HEADER)
        while isinstance(header := read_header(data), Incomplete):
            more = file.read(max(header.needed - len(data), len(data)))
            if not more:
                raise ValueError("GGUF header: the file ends within it")
            data += more
    return header, int.from_bytes(data[_TENSORS], "little")


def _kind(path: Path, header: Header) -> Kind:
    """What the model is for.

    A reranker is pooled by rank, or has the labels of a classifier (llama.cpp's converters write both, the
    second alone for some), or is called so.  A model that says how to pool makes vectors: that is
    Ollama's rule (server/images.go), and the converters write it for no other.
    """
    architecture = text(header, "general.architecture")
    pooling = header.number("pooling_type")
    names = (text(header, "general.name"), text(header, "general.basename"), path.name)
    if pooling == _RANK or any("rerank" in name.lower() for name in names):
        return Kind.RERANKER
    if pooling is None and f"{architecture}.classifier.output_labels" in header.lengths:
        return Kind.RERANKER
    if pooling is not None or "bert" in architecture or architecture in _EMBEDDERS:
        return Kind.EMBEDDING
    return Kind.CHAT


def quantisation(path: Path, header: Header) -> str:
    """The type of most weights, as the header has it, else the name of the file; empty when neither tells."""
    names, file_type = _FILE_TYPES.split(), header.values.get("general.file_type")
    if isinstance(file_type, int) and 0 <= file_type < len(names) and names[file_type] != "-":
        return names[file_type]
    found = _QUANTISED.findall(path.stem.upper())
    return str(found[-1]) if found else ""


def text(header: Header, key: str) -> str:
    """The text *key*, without spaces around it; empty when there is none."""
    value = header.values.get(key)
    return value.strip() if isinstance(value, str) else ""
