"""`trioswap init`: real files in real directories, and the configuration made of them, read back."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import sys
import tomllib
from pathlib import Path

import pytest
import trio
from children import PATIENCE, ask
from commands import daemon
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trioswap.config import load, loads
from trioswap.devices import Machine, Roots
from trioswap.errors import Misuse
from trioswap.gguf import Header, estimate, llama_arguments, read_header
from trioswap.init import InitFailed, init, models
from trioswap.init.discover import find, usual_places
from trioswap.init.fitting import Room, fit, largest
from trioswap.init.models import Kind, Model, read_models
from trioswap.init.names import names
from trioswap.tinymodels import WORDS, write_tiny_models

GIB = 2**30
LLAMA = {"context_length": 8192, "block_count": 2, "embedding_length": 64, "attention.head_count": 2}


# ---- files and machines ------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(content: str | int | list[str]) -> bytes:
    match content:
        case str():
            return struct.pack("<I", 8) + text(content)
        case int():
            return struct.pack("<II", 4, content)
        case _:
            return struct.pack("<IIQ", 9, 8, len(content)) + b"".join(map(text, content))


def gguf(path: Path, *, arch: str = "llama", tensors: int = 1, own: dict | None = None, **general) -> Path:
    """Write a file with a header as *path*; *own* are keys of the architecture, *general* those of everybody."""
    own = LLAMA if own is None else own
    pairs = {"general.architecture": arch}
    pairs |= {f"general.{key}": content for key, content in general.items()}
    pairs |= {f"{arch}.{key}": content for key, content in own.items()}
    data = b"".join(text(key) + value(content) for key, content in pairs.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs)) + data)
    return path


@pytest.fixture
def machine(tmp_path) -> Machine:
    """One with 64 GiB of memory and no GPU."""
    return machine_of(tmp_path / "machine", 64 * GIB)


def machine_of(root: Path, memory: int) -> Machine:
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: {memory // 1024} kB\n")
    return Machine(Roots(*(root / name for name in ("proc", "sys", "dev", "cgroup"))), nvml=None)


@pytest.fixture
def home(tmp_path) -> Path:
    directory = tmp_path / "home"
    directory.mkdir()
    return directory


@pytest.fixture
def server(tmp_path) -> dict[str, str]:
    """An environment with a llama-server on its PATH."""
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return {"PATH": str(program.parent)}


@pytest.fixture
def run(tmp_path, machine):
    """Run init on directories, with nothing on the PATH unless said; return what it did."""

    def run(*directories: Path, output: str = "-", environment: dict | None = None, **options):
        environment = {"PATH": "/nonexistent"} if environment is None else environment
        return init(
            [str(each) for each in directories], output, **{"machine": machine} | options, environment=environment
        )

    return run


def arguments(document: str, name: str) -> list[str]:
    """What the configuration says of the model besides its file."""
    table = tomllib.loads(document)["models"][name]
    return table.get("cmd", table.get("args", []))


def left_out(document: str) -> dict[str, str]:
    """Names of the files that are told to give no model -> the reason."""
    lines = document.partition("# ---- left out")[2].splitlines()[1:]
    return {Path(line[2:].partition(": ")[0]).name: line.partition(": ")[2] for line in lines}


def tables(document: str) -> list[str]:
    return list(tomllib.loads(document)["models"])


# ---- the whole ------------------------------------------------------------------------------------


@pytest.mark.llama
def test_the_tiny_models(tmp_path, run):
    """The demonstration models get a table each, and what is written is a configuration."""
    pytest.importorskip("gguf")
    paths = write_tiny_models(tmp_path / "models")
    output = tmp_path / "trioswap.toml"
    outcome = run(tmp_path / "models", output=str(output))

    config = load(output)
    assert output.read_text() == outcome.document == run(tmp_path / "models").document
    assert {name: llama_arguments(model.argv).model for name, model in config.models.items()} == {
        name: str(path) for name, path in paths.items()
    }
    assert config.memory is not None
    assert config.memory.devices is None
    assert "64.0 GiB" in outcome.document
    assert outcome.summary.startswith(f"{output}: 2 models (2 chat)")
    assert outcome.summary.endswith(f"next: trioswap serve -c {output}")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.llama
async def test_what_was_written_serves(tmp_path, run):
    """`trioswap serve` on it answers a chat with the words of the model that was asked."""
    pytest.importorskip("xllamacpp")
    write_tiny_models(tmp_path / "models")
    output = tmp_path / "trioswap.toml"
    run(tmp_path / "models", output=str(output))
    # The file is the user's.  Below the ports of outgoing connections, two for each process of tests;
    # and one thread, because such small models are slower with more.
    changed = output.read_text().replace("gguf =", 'args = ["--threads", "1"]\ngguf =')
    output.write_text(f"start_port = {16_000 + 2 * (os.getpid() % 4_000)}\n{changed}")

    async with daemon("serve", "-c", str(output), "--listen", "127.0.0.1:0") as served:
        for model in WORDS:
            body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "temperature": 0})
            with trio.fail_after(PATIENCE):
                status, answer = await ask(served.port, "POST", "/v1/chat/completions", body.encode())
            assert status == 200
            assert json.loads(answer)["choices"][0]["message"]["content"].split() == list(WORDS[model])
        assert await served.stop() == 0


def test_nothing_found(home, run, monkeypatch):
    """Says where it looked, what is not there, and what was left out."""
    monkeypatch.chdir(home)
    (home / "models").mkdir()
    (home / "models" / "bad.gguf").write_bytes(b"no model")
    with pytest.raises(InitFailed) as caught:
        run(environment={"PATH": "", "HOME": str(home)}, output="out.toml")

    assert f"  {home}/.cache/llama.cpp (not there)\n" in caught.value.message
    assert f"  {home}/models\n" in caught.value.message
    assert "bad.gguf: GGUF header: found b'no m'" in caught.value.message
    assert not (home / "out.toml").exists()


def test_a_directory_that_is_none(home, run):
    """Is the user's mistake, not an empty result."""
    with pytest.raises(Misuse, match="nowhere"):
        run(home / "nowhere")


# ---- where ------------------------------------------------------------------------------------------


def test_the_usual_places(home, monkeypatch):
    """The caches as their programs look for them, the models in the home, and here."""
    monkeypatch.chdir(home)
    cache = home / ".cache"
    rest = [home / "models", home]
    assert usual_places({"HOME": str(home)}) == [cache / "llama.cpp", cache / "huggingface" / "hub", *rest]
    moved = {"HOME": str(home), "LLAMA_CACHE": "/l", "HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}
    assert usual_places(moved) == [Path("/l"), Path("/x/llama.cpp"), Path("/h/hub"), *rest]
    assert Path("/c") in usual_places(moved | {"HUGGINGFACE_HUB_CACHE": "/c"})
    assert usual_places(moved | {"HF_HUB_CACHE": "/b", "HUGGINGFACE_HUB_CACHE": "/c"})[2] == Path("/b")
    assert usual_places({}) == [home]


def test_models_are_found_where_they_usually_are(home, run, monkeypatch):
    """One in each place, without a directory being named."""
    monkeypatch.chdir(home)
    gguf(home / ".cache" / "llama.cpp" / "org_repo_a.gguf", name="A")
    gguf(home / "models" / "deep" / "b.GGUF", name="B")
    snapshot(home / ".cache" / "huggingface" / "hub", "c" * 40, "C.gguf")
    gguf(home / "here.gguf", name="D")

    assert tables(run(environment={"PATH": "", "HOME": str(home)}).document) == ["a", "b", "c", "d"]


def snapshot(hub: Path, commit: str, name: str, main: str | None = None) -> Path:
    """A file in the cache of Hugging Face: a link from the revision into the blobs."""
    repository = hub / "models--org--repo"
    blob = gguf(repository / "blobs" / f"{commit}{name}", name=Path(name).stem)
    link = repository / "snapshots" / commit / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(Path("../../blobs") / blob.name)
    if main is not None:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(main)
    return link


@pytest.mark.parametrize(
    ("main", "expected"),
    [("a" * 40, "a" * 40), (None, "b" * 40), ("c" * 40, "b" * 40), ("d" * 40, "b" * 40), ("\xff", "b" * 40)],
    ids=["named", "no refs", "without models", "not there", "nonsense"],
)
def test_one_revision_of_a_repository(tmp_path, main, expected):
    """What refs/main names counts, else the newest with models; and by the link, which has a name."""
    links = {commit: snapshot(tmp_path, commit, "x.gguf", main) for commit in ("a" * 40, "b" * 40)}
    (tmp_path / "models--org--repo" / "snapshots" / ("c" * 40)).mkdir()
    for age, commit in enumerate("abc"):
        os.utime(tmp_path / "models--org--repo" / "snapshots" / (commit * 40), ns=(age, age))

    assert find([tmp_path]).files == (links[expected],)


def test_a_file_is_found_once(tmp_path):
    """Whatever links lead to it, and however often its directory is named."""
    path = gguf(tmp_path / "a" / "x.gguf")
    (tmp_path / "a" / "y.gguf").symlink_to(path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.gguf").hardlink_to(path)
    (tmp_path / "c").symlink_to(tmp_path / "a")

    assert find([tmp_path, tmp_path / "b", tmp_path]).files == (path,)


def test_loops_and_odd_files(tmp_path):
    """Loops end, pipes are not opened, links to nothing are told, hidden directories are left alone."""
    path = gguf(tmp_path / "a" / "x.gguf")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self.gguf").symlink_to("self.gguf")
    (tmp_path / "a" / "gone.gguf").symlink_to("nothing")
    os.mkfifo(tmp_path / "a" / "pipe.gguf")
    (tmp_path / "a" / "directory.gguf").mkdir()
    gguf(tmp_path / ".hidden" / "y.gguf")
    found = find([tmp_path])

    assert found.files == (path,)
    assert {skipped.path.name: skipped.reason for skipped in found.skipped} == {
        "self.gguf": "cannot be read: Too many levels of symbolic links",
        "gone.gguf": "cannot be read: No such file or directory",
        "pipe.gguf": "is no regular file",
    }


def test_what_may_not_be_read_is_told(tmp_path, run):
    """A closed directory and a closed file are left out with the reason."""
    gguf(tmp_path / "open.gguf", name="open")
    closed = gguf(tmp_path / "closed.gguf")
    closed.chmod(0)
    (tmp_path / "room").mkdir(mode=0)
    if os.access(closed, os.R_OK):
        pytest.skip("whoever runs this may read everything")
    document = run(tmp_path).document

    assert left_out(document) == dict.fromkeys(["room", "closed.gguf"], "cannot be read: Permission denied")


def test_the_search_is_bounded(tmp_path, monkeypatch):
    """Neither too deep nor too much is looked at, and too much is told."""
    shallow = gguf(tmp_path.joinpath("d", *"12345678"[:7]) / "x.gguf")
    gguf(tmp_path.joinpath("d", *"12345678") / "y.gguf")
    assert find([tmp_path]).files == (shallow,)

    monkeypatch.setattr("trioswap.init.discover._ENTRIES", 3)
    [skipped] = find([tmp_path]).skipped
    assert skipped.reason == "looked at only in part: it has more than 3 entries"
    monkeypatch.undo()

    monkeypatch.setattr("trioswap.init.discover._FILES", 1)
    [skipped] = find([tmp_path]).skipped
    assert skipped.reason == "looked at only in part: there are more than 1 GGUF files"


def test_a_thousand_files(tmp_path, run):
    """All are written, under names and ports of their own."""
    for number in range(1000):
        gguf(tmp_path / f"{number:04}.gguf", name="the same")
    config = loads(run(tmp_path).document)

    assert len(config.models) == len({model.proxy for model in config.models.values()}) == 1000


# ---- what ------------------------------------------------------------------------------------------


def test_what_is_no_model_is_told(tmp_path, run):
    """Broken and foreign files are comments with the reason."""
    whole = gguf(tmp_path / "good.gguf", name="good").read_bytes()
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "cut.gguf").write_bytes(whole[:-1])
    (tmp_path / "big-endian.gguf").write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 1, 0))
    gguf(tmp_path / "lora.gguf", type="adapter")
    gguf(tmp_path / "imatrix.gguf", type="imatrix")
    gguf(tmp_path / "ggml-vocab-x.gguf", tensors=0)
    gguf(tmp_path / "flux.gguf", arch="flux", own={})
    gguf(tmp_path / "mmproj-other.gguf", arch="clip", own={})
    document = run(tmp_path).document

    assert tables(document) == ["good"]
    assert left_out(document) == {
        "big-endian.gguf": "GGUF header: found version 0x3000000, allowed are 2 and 3 in little endian",
        "cut.gguf": "GGUF header: the file ends within it",
        "empty.gguf": "GGUF header: the file ends within it",
        "flux.gguf": "GGUF header: found no context_length of architecture 'flux'",
        "ggml-vocab-x.gguf": "has no weights",
        "imatrix.gguf": "is an importance matrix, no model",
        "lora.gguf": "is an adapter (LoRA), which needs a model",
        "mmproj-other.gguf": "is a projector (mmproj) of which no model is beside it",
        "text.gguf": "GGUF header: found b'not ' at the beginning, allowed is b'GGUF'",
    }


def test_split_files(tmp_path, run):
    """Only the first is a model; its size is that of all; what is missing is told, once."""
    for part in (1, 2, 3):
        path = gguf(tmp_path / f"whole-{part:05}-of-00003.gguf", tensors=part - 1)
        path.write_bytes(path.read_bytes() + bytes(2**20))
    for part in (1, 3):
        gguf(tmp_path / f"half-{part:05}-of-00004.gguf")
    gguf(tmp_path / "tail-00002-of-00002.gguf")
    document = run(tmp_path).document

    assert tables(document) == ["whole"]
    assert "4 MiB in 3 files" in document
    assert left_out(document) == {
        "half-00001-of-00004.gguf": "2 of its 4 files are missing, the first of them is half-00002-of-00004.gguf",
        "tail-00002-of-00002.gguf": "is a part of a model whose first file is missing: tail-00001-of-00002.gguf",
    }


@pytest.mark.llama
def test_kinds_as_the_writer_of_llama_cpp_writes_them(tmp_path):
    """By the keys of the package gguf, by the architecture, or by the name."""
    package = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")

    def write(name: str, arch: str, *change) -> None:
        writer = package.GGUFWriter(tmp_path / f"{name}.gguf", arch)
        writer.add_name(name)
        writer.add_context_length(512)
        writer.add_embedding_length(64)
        writer.add_block_count(1)
        writer.add_head_count(2)
        for method, *values in change:
            getattr(writer, method)(*values)
        writer.add_tensor("x", numpy.zeros(32, numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write("chat", "qwen3", ("add_chat_template", "{{ x }}"))
    write("by-pooling", "qwen3", ("add_pooling_type", package.PoolingType.LAST))
    write("by-architecture", "nomic-bert")
    write("gemma", "gemma-embedding")
    write("ranked", "qwen3", ("add_pooling_type", package.PoolingType.RANK))
    write("labelled", "bert", ("add_classifier_output_labels", ["LABEL_0"]))
    write("BGE-Reranker", "bert", ("add_pooling_type", package.PoolingType.CLS))
    write("mmproj", "clip", ("add_type", package.GGUFType.MMPROJ))
    found, projectors, skipped = read_models(find([tmp_path]).files)

    assert {model.title: model.kind.name for model in found} == {
        "chat": "CHAT",
        "by-pooling": "EMBEDDING",
        "by-architecture": "EMBEDDING",
        "gemma": "EMBEDDING",
        "ranked": "RERANKER",
        "labelled": "RERANKER",
        "BGE-Reranker": "RERANKER",
    }
    assert [projector.path.name for projector in projectors] == ["mmproj.gguf"]
    assert skipped == []


@pytest.mark.llama
def test_quantisations_are_llama_cpp_s():
    """Every file type that the package gguf knows has the same number and name here."""
    package = pytest.importorskip("gguf")
    theirs = {each.value: re.sub("^(ALL|MOSTLY)_|_MOE$", "", each.name) for each in package.LlamaFileType}
    del theirs[package.LlamaFileType.GUESSED]

    assert {number: models.quantisation(Path("x"), header(file_type=number)) for number in theirs} == theirs


def header(**general) -> Header:
    return Header({f"general.{key}": content for key, content in general.items()}, {})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen2.5-7B-Instruct-Q4_K_M", "Q4_K_M"),
        ("gemma-3-27b-it-UD-Q4_K_XL-00001-of-00002", "UD-Q4_K_XL"),
        ("model.iq3_xxs", "IQ3_XXS"),
        ("org_repo_x-BF16", "BF16"),
        ("llama-2-7b.q8_0", "Q8_0"),
        ("gpt-oss-20b-MXFP4", "MXFP4"),
        ("phi", ""),
        ("SEQ4_1", ""),
    ],
)
@pytest.mark.parametrize("file_type", [{}, {"file_type": 1024}, {"file_type": 5}, {"file_type": "x"}])
def test_quantisation_by_the_name_of_the_file(name, expected, file_type):
    """Where the header does not tell."""
    assert models.quantisation(Path(f"{name}.gguf"), header(**file_type)) == expected


# ---- projectors -------------------------------------------------------------------------------------


def paired(directory: Path, server: dict[str, str], run) -> dict[str, str]:
    """Model -> the name of the projector in its command."""
    document = run(directory, environment=server).document
    found = {name: llama_arguments(arguments(document, name)).mmproj for name in tables(document)}
    return {name: Path(path).name for name, path in found.items() if path is not None}


def projector(path: Path, **general) -> Path:
    return gguf(path, arch="clip", own={}, **general)


def test_a_projector_by_its_own_name(tmp_path, server, run):
    """Beside several models it goes with all files of the one that its header names, and to no other."""
    gguf(tmp_path / "a-Q4.gguf", name="Gemma 3 4b It", file_type=15)
    gguf(tmp_path / "a-Q8.gguf", name="Gemma 3 4b It", file_type=7)
    gguf(tmp_path / "b.gguf", name="Llama 3")
    projector(tmp_path / "mmproj.gguf", name="gemma-3-4b-it")

    assert paired(tmp_path, server, run) == dict.fromkeys(["gemma-3-4b-it-q4_k_m", "gemma-3-4b-it-q8_0"], "mmproj.gguf")


def test_a_projector_by_the_name_of_its_file(tmp_path, server, run):
    """Where headers do not tell: the beginning of the model's file."""
    gguf(tmp_path / "Pixtral-12B-Q4_K_M.gguf", name="x")
    gguf(tmp_path / "LLaVA-7B-Q4_K_M.gguf", name="y")
    projector(tmp_path / "mmproj-Pixtral-12B-f16.gguf")
    projector(tmp_path / "mmproj-Unknown-9B-f16.gguf")

    assert paired(tmp_path, server, run) == {"x": "mmproj-Pixtral-12B-f16.gguf"}


def test_a_projector_without_a_name(tmp_path, server, run):
    """Goes with what is alone beside it, or split in a directory below; where models differ, with none."""
    gguf(tmp_path / "one" / "m.gguf", name="one")
    projector(tmp_path / "one" / "mmproj-model-f16.gguf")
    gguf(tmp_path / "two" / "Q4_K_M" / "m-00001-of-00001.gguf", name="two")
    projector(tmp_path / "two" / "mmproj-BF16.gguf")
    gguf(tmp_path / "mixed" / "a.gguf", name="a")
    gguf(tmp_path / "mixed" / "b.gguf", name="b")
    projector(tmp_path / "mixed" / "mmproj.gguf")

    assert paired(tmp_path, server, run) == {"one": "mmproj-model-f16.gguf", "two": "mmproj-BF16.gguf"}


def test_the_projector_that_every_backend_computes_well(tmp_path, server, run):
    """Of several for one model F16 is taken; the others are no models, and told so."""
    gguf(tmp_path / "m.gguf", name="m")
    for name, file_type in (("BF16", 32), ("F16", 1), ("F32", 0), ("Q8_0", 7)):
        projector(tmp_path / f"mmproj-{name}.gguf", file_type=file_type)

    assert paired(tmp_path, server, run) == {"m": "mmproj-F16.gguf"}
    assert len(left_out(run(tmp_path).document)) == 3


def test_a_projector_takes_memory_where_it_is_loaded(tmp_path, server, run):
    """By llama-server, and not by the embedded engine."""
    gguf(tmp_path / "m.gguf", name="m")
    os.truncate(projector(tmp_path / "mmproj.gguf"), 2 * GIB)

    assert "needs about 2.5 GiB with all 8192 tokens" in run(tmp_path, environment=server).document
    assert re.search("needs about 5.. MiB with 4096 tokens", run(tmp_path).document)


def test_vectors_take_no_pictures(tmp_path, server, run):
    """A projector goes with no embedding model."""
    gguf(tmp_path / "m.gguf", name="m", own=LLAMA | {"pooling_type": 3})
    projector(tmp_path / "mmproj.gguf")

    assert paired(tmp_path, server, run) == {}


# ---- names ------------------------------------------------------------------------------------------


def named(*described: dict) -> list[str]:
    """Names for models of these headers; `path` is that of the file."""
    return names(
        [
            Model(Path(general.pop("path", "/m/file.gguf")), header(**general), 1, 1, Kind.CHAT, 1)
            for general in map(dict, described)
        ]
    )


@pytest.mark.parametrize(
    ("general", "expected"),
    [
        ({"name": "Qwen2.5 7B Instruct", "size_label": "7B", "file_type": 15}, "qwen2.5-7b-instruct"),
        ({"name": '  Llama--3 / Chat\n"x" '}, "llama-3-chat-x"),
        ({"name": "通义千问 7B"}, "通义千问-7b"),
        ({"basename": "Phi-3"}, "phi-3"),
        ({"name": "models", "basename": "Phi-3"}, "phi-3"),
        ({"name": "5f0b02c75b57c5855da9ae460ce51323ea669d8a", "path": "/m/Yi-Q4_0.gguf"}, "yi-q4_0"),
        ({"name": "★", "path": "/m/big-00001-of-00003.gguf"}, "big"),
        ({"name": "", "path": "/m/★.gguf"}, "model"),
        ({"name": "long " * 50}, "-".join(["long"] * 13)[:64]),
    ],
)
def test_a_name(general, expected):
    """Of what the model calls itself, or else of its file."""
    assert named(general) == [expected]


def test_names_say_more_only_where_they_must():
    """The size where models are called the same, then the quantisation, then the file, then a number."""
    small, large = {"name": "Qwen", "size_label": "7B"}, {"name": "Qwen", "size_label": "72B"}
    other = {"name": "Phi", "size_label": "3B", "file_type": 15}
    assert named(small, large, other) == ["qwen-7b", "qwen-72b", "phi"]
    assert named(small | {"file_type": 15}, small | {"file_type": 7}) == ["qwen-7b-q4_k_m", "qwen-7b-q8_0"]
    assert named(small | {"name": "Qwen 7B"}, large) == ["qwen-7b", "qwen"]
    assert named(*[small | {"name": "Qwen 7B", "file_type": type_} for type_ in (7, 8)]) == [
        "qwen-7b-q8_0",
        "qwen-7b-q5_0",
    ]
    assert named(small | {"path": "/a/x.gguf"}, small | {"path": "/a/y.gguf"}) == ["x", "y"]
    assert named(small | {"path": "/a/x.gguf"}, small | {"path": "/b/x.gguf"}, {"name": "x 2"}) == ["x", "x-3", "x-2"]


TITLES = st.text(max_size=8) | st.sampled_from(["Qwen", "qwen 7B", "qwen-7b-2", "7B", "models", "", "Ǆ", "ß", "x" * 70])


@given(st.lists(st.tuples(TITLES, st.sampled_from(["", "7B", "13B"]), st.sampled_from([0, 15, 99])), max_size=8))
def test_names_are_always_good(described):
    """Different, short, printable, in small letters, whatever models call themselves."""
    found = named(*({"name": name, "size_label": size, "file_type": type_} for name, size, type_ in described))

    assert len(set(found)) == len(described)
    for name in found:
        assert name.isprintable()
        assert name == name.strip() == name.casefold()
        assert 0 < len(name) < 70


# ---- how ------------------------------------------------------------------------------------------


def test_llama_server_s_flags(tmp_path, server, run):
    """In its own words, with a port, and answering under the name of the model."""
    vectors = LLAMA | {"pooling_type": 1}
    for name, own in (("chat", LLAMA), ("vectors", vectors), ("rerank", LLAMA | {"pooling_type": 4})):
        gguf(tmp_path / f"{name}.gguf", name=name, own=own)
    document = run(tmp_path, environment=server).document
    config = loads(document)

    for name, flag in (("chat", ()), ("vectors", ("--embeddings",)), ("rerank", ("--reranking",))):
        port = config.models[name].proxy.rpartition(":")[2]
        command = ("llama-server", "--port", port, "--alias", name, "--model", str(tmp_path / f"{name}.gguf"))
        assert config.models[name].argv == (*command, *flag)


def test_the_embedded_engine_s_flags(tmp_path, run):
    """Its context is its own, and said; a projector is for llama-server."""
    gguf(tmp_path / "a" / "chat.gguf", name="chat")
    projector(tmp_path / "a" / "mmproj.gguf")
    small = LLAMA | {"context_length": 512}
    gguf(tmp_path / "b" / "vectors.gguf", name="vectors", own=small | {"pooling_type": 1})
    gguf(tmp_path / "b" / "rerank.gguf", name="rerank", own=small | {"pooling_type": 4})
    document = run(tmp_path).document

    assert arguments(document, "chat") == ["--ctx-size", "4096"]
    assert arguments(document, "vectors") == ["--embeddings"]
    assert arguments(document, "rerank") == ["--embeddings", "--pooling", "rank"]
    assert "could take images or sound through mmproj.gguf" in document
    assert left_out(document) == {}
    loads(document)


def test_without_any_engine(tmp_path, run, monkeypatch):
    """Both the file and the summary say what to install."""
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    gguf(tmp_path / "x.gguf")
    outcome = run(tmp_path)

    assert "pip install 'trioswap[llama]'" in outcome.document
    assert "pip install 'trioswap[llama]'" in outcome.summary


def model_of(context: int, size: int = GIB) -> Model:
    """A model as large as Llama 3 8B in everything but its weights."""
    own = {"context_length": context, "block_count": 32, "embedding_length": 4096, "attention.head_count": 32}
    own |= {"attention.head_count_kv": 8, "vocab_size": 128256}
    values = {"general.architecture": "llama"} | {f"llama.{key}": number for key, number in own.items()}
    return Model(Path("/m/x.gguf"), Header(values, {}), size, 1, Kind.CHAT, context)


@pytest.mark.parametrize("context", [100, 2048, 4096, 5000, 131072, 131073])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 6, 8, 12, 17, 18, 19, 100])
def test_the_largest_context_that_fits(context, size):
    """All of it where that fits; else the largest power of two below that does, down to 2048."""
    model, room = model_of(context), Room("ram", size * GIB)
    fitted = fit(model, room)
    need = {
        tokens: estimate(model.header, model.size, context=tokens) for tokens in (context, *(2**n for n in range(20)))
    }
    possible = [
        tokens for tokens in (context, *(2**n for n in range(11, 18) if 2**n < context)) if need[tokens] <= room.size
    ]

    assert fitted.fits == bool(possible)
    assert fitted.whole == need[context]
    assert fitted.need == need[fitted.context]
    if possible:
        assert fitted.context == max(possible)


def test_a_context_to_begin_with_and_a_projector():
    """An engine's own limit counts, and so does what is loaded besides."""
    model = model_of(131072)
    assert fit(model, None).context == 131072
    assert fit(model, None, most=4096).context == 4096
    assert fit(model_of(512), None, most=4096).context == 512
    room = Room("gpu0", fit(model, None, most=4096).need)
    assert fit(model, room, most=4096, beside=0).context == 4096
    assert fit(model, room, most=4096, beside=1).context == 2048


def test_the_room_for_a_model():
    """The largest GPU, else host memory: what the daemon would give it."""
    assert largest({"gpu0": 8, "gpu1": 16, "ram": 64}) == Room("gpu1", 16)
    assert largest({"ram": 64}) == Room("ram", 64)
    assert largest({}) is None


LARGE = {"block_count": 32, "embedding_length": 4096, "attention.head_count": 32, "context_length": 131072}


def test_a_context_that_does_not_fit_is_cut(tmp_path, server, run):
    """Only then is one written, with the reason; the daemon reckons the same from what was written."""
    gguf(tmp_path / "m" / "large.gguf", name="large", own=LARGE)
    gguf(tmp_path / "m" / "small.gguf", name="small")
    document = run(tmp_path / "m", environment=server, machine=machine_of(tmp_path / "8", 8 * GIB)).document

    assert llama_arguments(arguments(document, "small")).context is None
    context = llama_arguments(arguments(document, "large")).context
    data = (tmp_path / "m" / "large.gguf").read_bytes()
    need = estimate(read_header(data), len(data), context=context)
    assert need < 7.5 * GIB < estimate(read_header(data), len(data), context=2 * context)
    assert f"needs about {need / GIB:.1f} GiB with {context} tokens of context" in document
    assert "ram has 7.5 GiB for models" in document.replace("\n#    ", "")


def test_a_model_that_cannot_fit_is_warned_of(tmp_path, server, run):
    """In the file, where it stays, and in the summary."""
    gguf(tmp_path / "m" / "large.gguf", name="large", own=LARGE)
    outcome = run(tmp_path / "m", environment=server, machine=machine_of(tmp_path / "1", GIB))

    assert "WARNING, does not fit" in outcome.document
    assert llama_arguments(arguments(outcome.document, "large")).context is None
    assert "too large for this machine: large" in outcome.summary


def test_a_machine_that_tells_nothing(tmp_path, run):
    """Without /proc there is no device to name and nothing to compare with."""
    gguf(tmp_path / "m" / "large.gguf", own=LARGE)
    nowhere = tmp_path / "nowhere"
    document = run(tmp_path / "m", machine=Machine(Roots(nowhere, nowhere, nowhere, nowhere), nvml=None)).document

    assert "Found on this machine" not in document
    assert "# Not of all memory of this machine can it be told" in document
    assert "WARNING" not in document


# ---- strange names ------------------------------------------------------------------------------------


STRANGE = [
    "a b",
    "q'uo\"te",
    "new\nline",
    "t\tab",
    "käse 漢字 😀",
    "\x7f\x85\u2028\u202e",
    "back\\slash",
    "-m",
    "#[x]",
    "$HOME",
]


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("with_server", [True, False], ids=["llama-server", "embedded"])
def test_strange_names(tmp_path, server, run, name, with_server):
    """In directories, files and headers: the configuration leads to the very file."""
    directory = tmp_path / "m" / name
    path = gguf(directory / f"{name}.gguf", name=name, size_label=name)
    picture = projector(directory / f"{name}-mmproj.gguf", name=name)
    (directory / f"{name} broken.gguf").write_bytes(b"x")
    outcome = run(directory, environment=server if with_server else None)

    [model] = loads(outcome.document).models.values()
    said = llama_arguments(model.argv)
    assert said.model == str(path)
    assert said.mmproj == (str(picture) if with_server else None)
    assert len(left_out(outcome.document)) == 1
    assert all(line.isprintable() for line in outcome.summary.split("\n"))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    title=st.text(max_size=40),
    label=st.text(max_size=40),
    arch=st.text(max_size=10).filter(lambda arch: arch != "clip"),
)
def test_any_text_in_a_header(tmp_path, run, title, label, arch):
    """Whatever a file says of itself, the configuration is valid."""
    gguf(tmp_path / "m" / "x.gguf", arch=arch, name=title, size_label=label)

    assert len(loads(run(tmp_path / "m").document).models) == 1


def test_names_that_no_configuration_can_say(tmp_path, run):
    """Placeholders would be filled in, and what is not UTF-8 cannot be written."""
    gguf(tmp_path / "m" / "x.gguf", name="x")
    gguf(tmp_path / "m" / "${PORT}.gguf")
    shutil.copy(tmp_path / "m" / "x.gguf", os.fsencode(tmp_path / "m") + b"/\xff.gguf")
    document = run(tmp_path / "m").document

    assert tables(document) == ["x"]
    assert left_out(document) == {
        "${PORT}.gguf": "its path has ${ in it, which begins a placeholder in a configuration",
        r"\udcff.gguf": "its path is not UTF-8, as a configuration must be",
    }


# ---- the file ------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path) -> Path:
    """A directory with a model."""
    return gguf(tmp_path / "models" / "x.gguf").parent


def test_a_file_is_not_overwritten(tmp_path, run, directory):
    """But with force it is, at once, with its mode; links are followed."""
    output = tmp_path / "own.toml"
    output.write_text("mine")
    output.chmod(0o600)
    link = tmp_path / "link.toml"
    link.symlink_to(output)
    for name in (output, link):
        with pytest.raises(Misuse, match="--force"):
            run(directory, output=str(name))
        assert output.read_text() == "mine"
    with pytest.raises(Misuse, match="--force"):  # before anything is looked at
        run(directory / "nowhere", output=str(output))

    run(directory, output=str(link), force=True)
    assert link.is_symlink()
    assert len(load(output).models) == 1
    assert output.stat().st_mode & 0o777 == 0o600


def test_somebody_else_was_quicker(tmp_path, run, directory, monkeypatch):
    """A file that appears while we look at models is not overwritten either."""
    output = tmp_path / "out.toml"
    monkeypatch.setattr("trioswap.init.find", lambda places: (output.write_text("theirs"), find(places))[1])
    with pytest.raises(Misuse, match="--force"):
        run(directory, output=str(output))

    assert output.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".toml"] == ["out.toml"]


def test_standard_output_is_no_file(tmp_path, run, directory, monkeypatch):
    """With "-" nothing is written."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    outcome = run(directory, output="-")

    assert sorted(tmp_path.rglob("*")) == before
    assert len(loads(outcome.document).models) == 1


def test_places_where_no_file_can_be(tmp_path, run, directory):
    """A directory, a pipe, a name that is no configuration's, a directory that is not there, a name too long."""
    (tmp_path / "directory.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    for name in ("directory", "pipe"):
        with pytest.raises(Misuse, match="no regular file"):
            run(directory, output=str(tmp_path / f"{name}.toml"), force=True)
    for name in ("x.yaml", "x", ""):
        with pytest.raises(Misuse, match=r"ends in \.toml"):
            run(directory, output=name)
    with pytest.raises(InitFailed, match="No such file or directory"):
        run(directory, output=str(tmp_path / "nowhere" / "x.toml"))
    with pytest.raises(InitFailed, match="File name too long"):
        run(directory, output=str(tmp_path / f"{'x' * 251}.toml"))
    run(directory, output=str(tmp_path / f"{'x' * 250}.toml"))


@pytest.mark.parametrize("to_file", [True, False])
def test_a_bug_of_ours_is_loud(tmp_path, run, directory, monkeypatch, to_file):
    """What is no valid configuration is not left in the file."""
    output = tmp_path / "own.toml"
    output.write_text("mine")
    monkeypatch.setattr("trioswap.init.document", lambda *_: "listen = 1\n")
    with pytest.raises(RuntimeError, match="listen"):
        run(directory, output=str(output) if to_file else "-", force=True)

    assert output.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".toml"] == ["own.toml"]
