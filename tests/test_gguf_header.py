"""GGUF headers, the estimate made of them, and the command line of a llama-server."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.gguf import Header, Incomplete, LlamaArguments, estimate, llama_arguments, read_header, split_files
from trioswap.tinymodels import CONTEXT, WORDS, write_tiny_models

MIB = 2**20
PROCESS = 512 * MIB


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, type_: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", type_) + value


def array(type_: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", type_, count) + content


def file_of(*pairs: bytes, version: int = 3, count: int | None = None) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs) if count is None else count) + b"".join(pairs)


def llama3_8b(**changes) -> Header:
    """The numbers of Llama 3 8B."""
    own = {
        "block_count": 32,
        "context_length": 8192,
        "embedding_length": 4096,
        "attention.head_count": 32,
        "attention.head_count_kv": 8,
        "vocab_size": 128256,
    } | changes
    values = {f"llama.{key.replace('__', '.')}": value for key, value in own.items() if value is not None}
    return Header({"general.architecture": "llama", **values}, {})


# ---- the header ------------------------------------------------------------------------------


@pytest.mark.llama
def test_the_header_of_a_real_model_is_read(tmp_path):
    """The demonstration models, as the writer of llama.cpp's own package writes them."""
    pytest.importorskip("gguf")
    for name, path in write_tiny_models(tmp_path).items():
        header = read_header(path.read_bytes())
        assert header.values["general.name"] == name
        assert header.number("context_length") == CONTEXT
        assert header.number("block_count") == 1
        assert header.lengths["tokenizer.ggml.tokens"] == header.number("vocab_size") == 260 + len(WORDS[name])
        assert "tokenizer.ggml.tokens" not in header.values


@pytest.mark.llama
def test_the_estimate_of_a_real_model_counts_its_parts(tmp_path):
    """One layer, two heads of 32, 2048 tokens: 512 KiB of cache beside the weights, and what any server takes."""
    pytest.importorskip("gguf")
    path = write_tiny_models(tmp_path)["colors"]
    header, size = read_header(path.read_bytes()), path.stat().st_size
    assert size + 2**19 + PROCESS < estimate(header, size) < size + 2**19 + PROCESS + 10 * MIB


@pytest.mark.llama
def test_every_type_of_value_is_read(tmp_path):
    """Whatever the writer of llama.cpp's own package can write, the values behind it are found."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -5)
    writer.add_uint16("t.u16", 60_000)
    writer.add_int16("t.i16", -30_000)
    writer.add_uint32("t.u32", 2**32 - 1)
    writer.add_int32("t.i32", -(2**31))
    writer.add_float32("t.f32", 0.5)
    writer.add_bool("t.bool", True)
    writer.add_string("t.text", "h\u00e9 \u2603")
    writer.add_uint64("t.u64", 2**64 - 1)
    writer.add_int64("t.i64", -(2**63))
    writer.add_float64("t.f64", 0.25)
    writer.add_array("t.layers", [1, 0, 3])
    writer.add_array("t.scores", [0.5, 1.5])
    writer.add_array("t.words", ["a", "", "\u2603"])
    writer.add_array("t.long", list(range(5000)))
    writer.add_string("t.last", "end")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    header = read_header((tmp_path / "all.gguf").read_bytes())

    own = {key.removeprefix("t."): value for key, value in header.values.items() if key.startswith("t.")}
    assert own == {
        "u8": 200,
        "i8": -5,
        "u16": 60_000,
        "i16": -30_000,
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "f32": 0.5,
        "bool": True,
        "text": "h\u00e9 \u2603",
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f64": 0.25,
        "layers": (1, 0, 3),
        "scores": (0.5, 1.5),
        "last": "end",
    }
    assert header.lengths == {"t.layers": 3, "t.scores": 2, "t.words": 3, "t.long": 5000}


SAMPLE = file_of(
    pair("general.architecture", 8, text("llama")),
    pair("tokens", 9, array(8, 3, text("one") + text("") + text("three"))),
    pair("scores", 9, array(6, 3, struct.pack("<3f", 0, 1, 2))),
    pair("llama.block_count", 4, struct.pack("<I", 7)),
)


def test_a_header_may_come_in_pieces():
    """Cut anywhere, the answer asks for more than was given and for no more than there is."""
    whole = read_header(SAMPLE)
    assert isinstance(whole, Header)
    assert whole.number("block_count") == 7
    assert read_header(SAMPLE + b"tensors") == whole
    for cut in range(len(SAMPLE)):
        part = read_header(SAMPLE[:cut])
        assert isinstance(part, Incomplete), cut
        assert cut < part.needed <= len(SAMPLE)


def test_a_cut_in_the_last_word_is_noticed():
    """Also where nothing comes behind it."""
    data = file_of(pair("tokens", 9, array(8, 2, text("one") + text("three"))))
    assert read_header(data[:-1]) == Incomplete(len(data))


def test_a_file_is_read_in_few_pieces():
    """A large vocabulary: asked for the length that is needed, or twice what it has, a caller is done soon."""
    words = b"".join(text(f"word{number}") for number in range(50_000))
    file = io.BytesIO(file_of(pair("tokens", 9, array(8, 50_000, words)), pair("last", 4, b"\1\0\0\0")) + bytes(100))
    data, rounds = file.read(64 * 1024), 1
    while isinstance(header := read_header(data), Incomplete):
        data += file.read(max(header.needed - len(data), len(data)))
        rounds += 1
    assert header.values == {"last": 1}
    assert header.lengths == {"tokens": 50_000}
    assert rounds <= 6


def test_version_2_is_read_too():
    """It differs only in what tensors may be."""
    assert isinstance(read_header(file_of(version=2)), Header)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"PK\3\4 some other file of more than a few bytes", "beginning"),
        (b"GGML", "beginning"),
        (file_of(version=1), "version 0x1"),
        (file_of(version=4), "version 0x4"),
        (file_of(version=0x03000000), "little endian"),
        (file_of(pair("k", 13, b"")), "type 13 of 'k'"),
        (file_of(pair("k", 9, array(9, 1, array(4, 0)))), "arrays in arrays"),
        (file_of(pair("k", 99, b"")), "type 99"),
        (file_of(pair("k", 8, struct.pack("<Q", 2**63))), "length of"),
        (file_of(pair("k", 9, array(8, 2**63))), "length of"),
        (file_of(pair("k", 9, array(0, 2**64 - 1))), "length of"),
        (file_of(pair("k", 9, array(8, 2, struct.pack("<Q", 2**64 - 1)))), "length of"),
    ],
)
def test_a_damaged_header_is_refused(data, complaint):
    """With words, whatever it claims, and without asking for more than any file has."""
    with pytest.raises(ValueError, match=complaint):
        read_header(data)


def test_a_count_beyond_the_data_asks_for_more():
    """A file that promises more values than it has is cut, not damaged."""
    assert read_header(file_of(count=2**64 - 1)) == Incomplete(32)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, len(SAMPLE)))
def test_any_bytes_give_an_answer(noise, cut):
    """A header, a wish for more, or a ValueError; never another error."""
    for data in (noise, SAMPLE[:cut] + noise):
        try:
            answer = read_header(data)
        except ValueError:
            continue
        if isinstance(answer, Incomplete):
            assert answer.needed > len(data)
        else:
            try:
                estimate(answer, 0)
            except ValueError:
                continue


# ---- the estimate ------------------------------------------------------------------------------


def test_the_estimate_is_the_sum_of_its_parts():
    """Llama 3 8B at 8192 tokens: llama.cpp itself reports 1024 MiB of cache and 258.5 MiB of buffers."""
    mask = 6 * 512 * 8192
    assert estimate(llama3_8b(), 4_000 * MIB) == 4_000 * MIB + 1024 * MIB + int(258.5 * MIB) + mask + PROCESS


@pytest.mark.parametrize(("type_", "share"), [("f32", 2), ("bf16", 1), ("q8_0", 34 / 64), ("q4_0", 18 / 64)])
def test_cache_types_scale_the_cache(type_, share):
    """Keys and values each by their own type; half of the 1024 MiB are keys."""
    plain, keys = estimate(llama3_8b(), 0), estimate(llama3_8b(), 0, cache_k=type_)
    both = estimate(llama3_8b(), 0, cache_k=type_, cache_v=type_)
    assert plain - keys == (1 - share) * 512 * MIB
    assert plain - both == (1 - share) * 1024 * MIB
    narrow = llama3_8b(**{"attention.value_length": 32})
    assert estimate(narrow, 0) - estimate(narrow, 0, cache_v=type_) == (1 - share) * 128 * MIB


def test_an_unknown_cache_type_counts_as_f16():
    """Rather too much than too little."""
    assert estimate(llama3_8b(), 0, cache_k="q3_x") == estimate(llama3_8b(), 0)


def test_the_context_is_shared_by_all_requests():
    """Twice the context is twice the cache; more requests only round it up."""
    one, two = (estimate(llama3_8b(), 0, context=n, parallel=1) for n in (8192, 16384))
    assert two - one == 1024 * MIB + 6 * 512 * 8192
    assert estimate(llama3_8b(), 0, parallel=1) == estimate(llama3_8b(), 0, parallel=4)
    per_token = 128 * 1024 + 6 * 512
    # 8192 by 3 is 2730, which becomes 2816.
    assert estimate(llama3_8b(), 0, parallel=3) - estimate(llama3_8b(), 0) == (3 * 2816 - 8192) * per_token


def test_layers_may_differ():
    """Only layers with heads keep anything: half of them, half of the cache."""
    mixed = llama3_8b(**{"attention.head_count_kv": (8, 0) * 16})
    assert estimate(llama3_8b(), 0) - estimate(mixed, 0) == 512 * MIB


def test_the_size_of_a_head():
    """As the header says, else the embedding by the heads; without key-value heads all heads store."""
    assert estimate(llama3_8b(**{"attention.key_length": 256}), 0) - estimate(llama3_8b(), 0) == 512 * MIB
    assert estimate(llama3_8b(**{"attention.value_length": 64}), 0) - estimate(llama3_8b(), 0) == -256 * MIB
    assert estimate(llama3_8b(**{"attention.head_count_kv": None}), 0) - estimate(llama3_8b(), 0) == 3 * 1024 * MIB


def test_recurrent_layers_keep_a_state_for_each_request():
    """A model without attention: no cache, but a state, whatever the context."""
    ssm = {"ssm.inner_size": 5120, "ssm.state_size": 16, "ssm.conv_kernel": 4, "ssm.group_count": 2}
    mamba = llama3_8b(**{"attention.head_count": 0, "attention.head_count_kv": 0, **ssm})
    state = 4 * (3 * (5120 + 2 * 2 * 16) + 16 * 5120) * 32
    rest = int(258.5 * MIB) + 6 * 512 * 8192 + PROCESS
    assert estimate(mamba, 0, parallel=1) == state + rest
    assert estimate(mamba, 0) == 4 * state + rest


def test_the_vocabulary_may_be_known_by_its_length_only():
    """Most files do not say its size apart."""
    bare = llama3_8b(vocab_size=None)
    assert estimate(Header(bare.values, {"tokenizer.ggml.tokens": 128256}), 0) == estimate(llama3_8b(), 0)


@pytest.mark.parametrize("missing", ["block_count", "embedding_length", "context_length"])
def test_what_is_no_language_model_is_not_estimated(missing):
    """A projector, a picture model: the error names what is missing."""
    with pytest.raises(ValueError, match=f"no {missing} of architecture 'llama'"):
        estimate(llama3_8b(**{missing: None}), 0)


def test_negative_numbers_are_no_numbers():
    """A damaged header does not make the estimate smaller."""
    with pytest.raises(ValueError, match="no block_count"):
        estimate(llama3_8b(block_count=-32), 0)
    damaged = llama3_8b(**{"attention.head_count_kv": (8, -8) * 16})
    assert estimate(damaged, 0) == estimate(llama3_8b(**{"attention.head_count_kv": (8, 0) * 16}), 0)


# ---- the command line ---------------------------------------------------------------------------


def test_what_is_not_said_is_the_servers_default():
    """No model, the model's own context, f16."""
    assert llama_arguments(["llama-server"]) == LlamaArguments()


SHORT = "llama-server -m a.gguf -c 4096 -np 2 -ngl 99 -ctk q8_0 -ctv q4_0 -mm p.gguf -md d.gguf -ub 256 --port 1"
LONG = (
    "x --model a.gguf --ctx-size 4096 --parallel 2 --gpu-layers 99 --cache-type-k q8_0 --cache-type-v q4_0"
    " --mmproj p.gguf --model-draft d.gguf --ubatch-size 256 --jinja"
)
EQUALS = (
    "--model=a.gguf --ctx-size=4096 --parallel=2 --n-gpu-layers=99 --cache-type-k=q8_0 --cache-type-v=q4_0"
    " --mmproj=p.gguf --spec-draft-model=d.gguf --ubatch-size=256"
)
UNDERSCORES = (
    "--model a.gguf --ctx_size 4096 --parallel 2 --n_gpu_layers 99 --cache_type_k q8_0 --cache_type_v=q4_0"
    " --mmproj p.gguf --model_draft d.gguf --ubatch_size 256"
)


@pytest.mark.parametrize("line", [SHORT, LONG, EQUALS, UNDERSCORES])
def test_every_spelling_is_understood(line):
    """Short and long flags, with a space or an equals sign, with hyphens or underscores."""
    assert llama_arguments(line.split()) == LlamaArguments(
        model="a.gguf",
        mmproj="p.gguf",
        draft="d.gguf",
        context=4096,
        parallel=2,
        ubatch=256,
        gpu_layers=99,
        cache_k="q8_0",
        cache_v="q4_0",
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-c 1 -c 2", LlamaArguments(context=2)),
        ("-c 0", LlamaArguments()),
        ("-c", LlamaArguments()),
        ("-c many", LlamaArguments()),
        ("-c=5 _c 5 --c 5", LlamaArguments()),
        ("-c -1", LlamaArguments()),
        ("-c 99999999999999999999", LlamaArguments()),
        ("-np -1 -ngl auto", LlamaArguments()),
        ("-ngl all", LlamaArguments()),
        ("-ngl 0", LlamaArguments(gpu_layers=0)),
        ("-ub 0", LlamaArguments()),
        ("--model=a=b.gguf", LlamaArguments(model="a=b.gguf")),
        ("-m my_model.gguf", LlamaArguments(model="my_model.gguf")),
        ("--context 5 --ctx-size-draft 7 -cd 9", LlamaArguments()),
        ("-m -c -c 5", LlamaArguments(model="-c", context=5)),
    ],
)
def test_odd_lines(line, said):
    """The last one counts, nonsense is as if it were not said, and values are taken as they are."""
    assert llama_arguments(line.split(" ")) == said


def test_split_files_are_all_named():
    """Whichever of them is given; other names stand for themselves."""
    parts = ("/m/big-00001-of-00003.gguf", "/m/big-00002-of-00003.gguf", "/m/big-00003-of-00003.gguf")
    assert split_files(parts[0]) == split_files(parts[2]) == parts
    for single in ("/m/a.gguf", "a-1-of-3.gguf", "a-00001-of-00003.bin", "a-00001-of-00000.gguf"):
        assert split_files(single) == (single,)
