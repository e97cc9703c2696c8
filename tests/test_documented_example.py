"""A file of llama-swap in which every key occurs: it loads, and means the same in both languages."""

from __future__ import annotations

from pathlib import Path

import pytest

from trioswap.config.document import Document
from trioswap.config.keys import Key, keys_of
from trioswap.config.llamaswap import SETTINGS, translate
from trioswap.config.loading import load_sources
from trioswap.config.mistakes import Mistakes
from trioswap.config.raw import RawConfig
from trioswap.config.schema import Config
from trioswap.config.yaml_source import parse_yaml
from trioswap.convert import TOML, YAML, convert

EXAMPLE = Path(__file__).parent / "data" / "llama-swap-example.yaml"
ENVIRON = {"EXAMPLE_KEY": "key-of-the-cloud", "EXAMPLE_HOME": "/home/x"}

OURS = {
    "listen", "maxRequestBody", "stateDir", "policy", "parallelLoads", "maxWait", "drainTimeout", "unloadDrainTimeout",
    "turnLease", "linger", "parallel", "memory", "models.*.gguf", "models.*.args", "models.*.portOwner",
    "models.*.stopSignal", "models.*.maxWait", "models.*.drainTimeout", "models.*.unloadDrainTimeout",
    "models.*.turnLease", "models.*.linger", "models.*.parallel", "models.*.weight", "models.*.priority",
    "models.*.loadCost", "models.*.stopCost", "models.*.memory", "models.*.device", "models.*.queueTimeout",
    "queueTimeout", "maxQueue", "maxUpload", "heartbeat", "trustedProxies", "keys", "tls", "cors",
    "backoff", "backoffMax", "models.*.backoff", "models.*.backoffMax",
    "logDir", "logFileSize", "logFiles",
    "liveness", "livenessMisses", "models.*.liveness", "models.*.livenessMisses", "models.*.neverKill",
    "models.*.hooks", "models.*.hookTimeout", "hooks.on_idle",
}  # fmt: skip
"""Keys that llama-swap does not have, or not there; with them goes all that is within."""
ROUTING = {
    "routing.router.use",
    "routing.scheduler.use",
    "routing.scheduler.settings.fifo.priority.coder",
    "routing.scheduler.settings.fifo.priority.whisper-1",
}
"""What only llama-swap has; groups and matrix stand there as well."""


def spellings(table: type = RawConfig, path: str = "", left_out: set[str] = OURS) -> dict[str, Key]:
    """The keys by their paths in YAML, `*` for free names."""
    keys: dict[str, Key] = {}
    for key in keys_of(table).values():
        here = f"{path}{key.yaml}"
        if here not in left_out:
            keys[here] = key
            if key.table is not None:
                keys |= spellings(key.table, f"{here}.*." if key.is_by_name else f"{here}.", left_out)
    return keys


def written(document: Document) -> set[str]:
    """The paths of all that occurs in *document*, in the same form."""
    keys, paths = spellings(), set()
    for place in document.places:
        path = ""
        for part in place[len(SETTINGS) :] if place[: len(SETTINGS)] == SETTINGS else place:
            is_free = path in keys and keys[path].table is not None and keys[path].is_by_name
            path = f"{path}.{'*' if is_free else part}".removeprefix(".")
        paths.add(path)
    return paths


@pytest.fixture(params=["group", "matrix"])
def example(request, tmp_path) -> Path:
    """The file as it is, and with its matrix in force instead of its groups."""
    text = EXAMPLE.read_text()
    assert text.count("use: group\n") == 1
    file = tmp_path / "example.yaml"
    file.write_text(text.replace("use: group\n", f"use: {request.param}\n"))
    return file


def read(file: Path) -> Config:
    """What *file* means."""
    return load_sources([file], None, ENVIRON, translate)


def test_it_has_every_key():
    """So whatever holds of the example holds with all keys."""
    mistakes = Mistakes()
    paths = written(parse_yaml(EXAMPLE.read_text(), EXAMPLE.name, mistakes))

    assert mistakes.lines() == []
    assert (spellings().keys() | ROUTING) - paths == set()


def test_our_own_keys_are_keys():
    """Nothing is left out of the above by a name that is none."""
    assert OURS - spellings(left_out=set()).keys() == set()


def test_what_it_means():
    """Samples of what is written in another way in our own files."""
    config = read(EXAMPLE)
    coder, embedder, ranker, listener = (config.models[name] for name in ("coder", "embedder", "ranker", "listener"))

    assert (config.log_level, config.capture_buffer, config.performance.every) == ("warning", 25 * 2**20, 20.0)
    assert config.api_keys == ("first-key-of-the-house", "key-of-the-cloud")
    assert (coder.argv[0], coder.argv[-2:]) == ("/opt/llama/bin/llama-server", ("--alias", "coder"))
    assert coder.argv[coder.argv.index("--port") + 1] == "7100"
    assert coder.proxy == "http://127.0.0.1:7100/base"
    assert (coder.ttl, embedder.ttl, ranker.ttl, listener.ttl) == (900.0, None, 1800.0, 1800.0)
    assert coder.env == {"CUDA_VISIBLE_DEVICES": "0", "MODELS": "/home/x/models"}
    assert coder.metadata["port"] == 7100
    assert (coder.metadata["warmth"], coder.metadata["about"], coder.metadata["context"]) == (0.7, "at 0.7", 65536)
    assert {"coder:think", "coder:quick"} <= {*coder.aliases}
    assert coder.filters.strip_params == ("options.seed", "temperature", "top_p")
    assert (ranker.filters.strip_params, listener.aliases) == (("user",), ("whisper-1", "0123"))
    assert (coder.priority, listener.priority, ranker.priority) == (10, 5, 0)
    assert config.profiles["night"].pins == {"gpt-5": "embedder", "coder": "best-effort", "gone": None}


def test_which_rule_is_in_force(example):
    """What `routing.router.use` names, and nothing else."""
    config = read(example)
    has_matrix = "use: matrix" in example.read_text()

    assert [group.name for group in config.groups] == ([] if has_matrix else ["always", "large"])
    assert (config.matrix is not None) == has_matrix
    if config.matrix is not None:
        assert [entry.name for entry in config.matrix.sets] == ["work", "talk", "either"]
        assert config.matrix.costs == {"coder": 20, "ranker": 2}


def test_there_and_back(example, tmp_path):
    """As TOML it means the same, and so does that as YAML."""
    native, back = tmp_path / "example.toml", tmp_path / "back.yaml"
    native.write_text(convert(example, TOML, ENVIRON).text)
    back.write_text(convert(native, YAML, ENVIRON).text)

    assert read(native) == read(example)
    assert read(back) == read(example)


def test_macros_and_secrets_stay_in_what_is_converted(example):
    """What the environment holds is in neither text."""
    text = convert(example, TOML, ENVIRON).text

    assert text.count("${env.EXAMPLE_KEY}") == 2
    assert ENVIRON["EXAMPLE_KEY"] not in text
    assert "${server}" in text
