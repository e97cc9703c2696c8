"""Write two tiny chat models, for `trioswap demo` and for tests that want a real engine.

Each is a GGUF file of a quarter megabyte that any llama.cpp loads in milliseconds, and each
knows only its own words, so an answer proves which model gave it.  To run them is the
business of `trioswap.engine`.

A random model of this size is no good: it utters half characters and never stops.  So the
weights are random only where that is harmless.  The residual stream has three parts that
the layer's outputs never mix:

    [0]             the same for every token; a row of the output matrix that is large here
                    has a bias, which the architecture does not offer otherwise
    [1 : 1 + words] which word the last token was, if it was one
    [the rest]      random content, stirred by attention, so that the prompt matters

From that the output matrix makes a Markov chain.  Before the first word stands the first of
the list, after each word most likely the next one, and after the last the end of the text.
So greedy decoding recites the list once, and sampling strays and comes back.  Everything that
is no word has so large a negative bias that no sampler can choose it; so has the end of the
text as long as no word has been said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trioswap.errors import LlamaExtraMissing

if TYPE_CHECKING:
    import gguf
    import numpy as np
    import numpy.typing as npt

    Matrix = npt.NDArray[np.float32]

# Split, because the formatter would put each word on a line of its own.
_COLORS: Final = "red blue green amber violet teal pink white black gray cyan lime gold plum navy ochre"
_ANIMALS: Final = "cat dog fox owl bee ant elk emu hen pig cow yak bat rat eel cod"
WORDS: Final[Mapping[str, tuple[str, ...]]] = {"colors": tuple(_COLORS.split()), "animals": tuple(_ANIMALS.split())}
"""Model name -> the words it can say.  No word belongs to two models."""

CONTEXT: Final = 2048  # tokens
_WIDTH: Final = 64  # of the residual stream
_HEADS: Final = 2

# The tokens, in the order of llama.cpp's SentencePiece models: control, one for each byte, text.
_UNKNOWN, _BEGIN, _END = 0, 1, 2
_CONTROL: Final = ("<unk>", "<s>", "</s>")
_SPACE: Final = "\u2581"  # how SentencePiece writes a space
_FIRST_WORD: Final = len(_CONTROL) + 256 + 1

# The chain, in logits: the word whose turn it is leads by _LEAD; the rest differ by what the
# content adds.  At temperature 1 an answer is about 20 words long, nine in ten 5 to 55 (measured).
_LEAD: Final = 4.0
_END_AFTER_ANY: Final = -1.0
_END_AFTER_LAST: Final = 6.0
_NEVER: Final = -300.0

_SIZE: Final = 8.0  # of the constant and of a word's mark in the embedding; the content's norm there is 7
_SIZE_NORMED: Final = 4.4  # the same after the last normalisation
_LAYER_NOISE: Final = 0.15
_OUTPUT_NOISE: Final = 0.1

_READS_STREAM: Final = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
_WRITES_STREAM: Final = ("attn_output", "ffn_down")
_CHAT_TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def write_tiny_models(directory: Path) -> dict[str, Path]:
    """Write one GGUF file for each entry of `WORDS` into *directory*; return model name -> path.

    The directory is made if need be.  The bytes depend only on the versions of gguf and numpy.
    A file that a server has open and mapped is replaced, not overwritten under its feet.

    Raises:
        LlamaExtraMissing: gguf or numpy cannot be imported.
        OSError: the directory cannot be written.
    """
    return {name: _write(directory / f"{name}.gguf", name, seed) for seed, name in enumerate(WORDS)}


def _write(path: Path, name: str, seed: int) -> Path:
    try:
        import gguf
    except ImportError:
        raise LlamaExtraMissing from None
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    _add_header(writer, name)
    for tensor, weights in _weights(len(WORDS[name]), seed).items():
        writer.add_tensor(f"{tensor}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unfinished.replace(path)


def _add_header(writer: gguf.GGUFWriter, name: str) -> None:
    from gguf import LlamaFileType, TokenType

    tokens = [*_CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), _SPACE, *(_SPACE + word for word in WORDS[name])]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256]
    types += [TokenType.NORMAL] * (len(tokens) - len(types))
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(_HEADS)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_unk_token_id(_UNKNOWN)
    writer.add_bos_token_id(_BEGIN)
    writer.add_eos_token_id(_END)
    writer.add_add_bos_token(True)
    writer.add_chat_template(_CHAT_TEMPLATE)


def _weights(words: int, seed: int) -> dict[str, Matrix]:
    """The tensors by their GGUF names; rows are outputs, as everywhere in GGUF."""
    import numpy as np

    random = np.random.default_rng(seed)

    def noise(rows: int, scale: float) -> Matrix:
        return (random.standard_normal((rows, _WIDTH)) * scale).astype(np.float32)

    marks = slice(1, 1 + words)
    embedding = noise(_FIRST_WORD + words, 1.0)
    embedding[:, 0] = _SIZE
    embedding[:, marks] = 0
    embedding[_FIRST_WORD:, marks] = _SIZE * np.eye(words)
    layer = {f"blk.0.{name}": noise(_WIDTH, _LAYER_NOISE) for name in (*_READS_STREAM, *_WRITES_STREAM)}
    for name in _WRITES_STREAM:
        layer[f"blk.0.{name}"][: 1 + words] = 0
    norms = {name: np.ones(_WIDTH, np.float32) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
    return {"token_embd": embedding, **layer, **norms, "output": _output(noise(words, _OUTPUT_NOISE))}


def _output(rows: Matrix) -> Matrix:
    """The output matrix: *rows*, the random ones of the words, with the chain and the biases added."""
    import numpy as np

    words = len(rows)
    rows[:, : 1 + words] = 0
    # The first word leads as long as there is no mark, and any mark takes that back.
    rows[0, 0] = _LEAD / _SIZE_NORMED
    rows[0, 1 : 1 + words] = -_LEAD / _SIZE_NORMED
    for word in range(1, words):
        rows[word, word] = _LEAD / _SIZE_NORMED
    others = np.zeros((_FIRST_WORD, _WIDTH), np.float32)
    others[:, 0] = _NEVER / _SIZE_NORMED
    # The same for the end of the text, which must not come before a word.
    others[_END, 1 : 1 + words] = (_END_AFTER_ANY - _NEVER) / _SIZE_NORMED
    others[_END, words] = (_END_AFTER_LAST - _NEVER) / _SIZE_NORMED
    return np.concatenate((others, rows))
