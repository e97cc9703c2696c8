"""Native TOML: turns, waits and costs, and which of groups, matrix and memory rules over residency."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_texts import mistakes, model

from trioswap.config import Config, GroupConfig, MemoryConfig, ModelConfig, load, loads

GIB = 2**30
DURATIONS = 'allowed is a number of seconds from 0 up, or text such as "90s", "1h30m", "500ms", "2d"'
SIZES = 'allowed is a whole number of bytes from 0 up, or text such as "18GiB", "512MiB", "2GB"'
NUMBERS = "allowed is a number from 0 up"
COUNTS = "allowed is a whole number from 1 up"
DEVICE = 'allowed is the name of a device, such as "ram" or "gpu0", of letters, digits, - and _, but not "auto"'
CLASH = (
    'models.b.proxy: found "http://127.0.0.1:9000", which is the address of model "a" too, '
    "allowed is that only for models of which groups never let two be resident together"
)


# ---- single values --------------------------------------------------------------------------


def test_settings_of_the_scheduler_arrive():
    """Those that are not for models are in the Config itself."""
    config = loads("policy = 'fifo'\nparallel_loads = 2")

    assert config == Config(policy="fifo", parallel_loads=2)


def test_every_scheduling_key_of_a_model_arrives():
    """Each key ends up in its field: durations in seconds, sizes in bytes, plain numbers as floats."""
    config = loads(
        model("""
        turn_lease = 2
        linger = 0
        parallel = 4
        weight = 0.5
        priority = -3
        load_cost = "1m"
        stop_cost = 1.5
        memory = "18GiB"
        device = "gpu0"
    """)
    )

    assert config.models["a"] == ModelConfig(
        name="a",
        argv=("x", "5800"),
        proxy="http://127.0.0.1:5800",
        turn_lease=2.0,
        linger=0.0,
        parallel=4,
        weight=0.5,
        priority=-3,
        load_cost=60.0,
        stop_cost=1.5,
        memory=18 * GIB,
        device="gpu0",
    )


def test_what_is_not_said_of_costs_and_memory_stays_unknown():
    """None is not 0: the scheduler learns what nobody says."""
    silent = loads(model()).models["a"]
    outspoken = loads(model("load_cost = 0\nstop_cost = 0\nmemory = 0")).models["a"]

    assert (silent.load_cost, silent.stop_cost, silent.memory, silent.device) == (None, None, None, None)
    assert (outspoken.load_cost, outspoken.stop_cost, outspoken.memory) == (0.0, 0.0, 0)


def test_memory_may_be_a_table_by_device():
    """Each device with a size of its own."""
    config = loads(model("memory = { gpu0 = '2GiB', ram = 7 }"))

    assert config.models["a"].memory == {"gpu0": 2 * GIB, "ram": 7}


def test_models_inherit_turns_and_parallel():
    """The settings of the file are defaults for each model; what a model says wins."""
    settings = "turn_lease = 1\nlinger = 2\nparallel = 3"
    config = loads(settings + model(name="heir") + model("turn_lease = 0\nlinger = 0\nparallel = 1", name="own"))

    own, heir = config.models["own"], config.models["heir"]
    assert (heir.turn_lease, heir.linger, heir.parallel) == (1.0, 2.0, 3)
    assert (own.turn_lease, own.linger, own.parallel) == (0.0, 0.0, 1)


@pytest.mark.parametrize("written", ["state", "../other", "/var/lib/x", "~/x"])
def test_the_state_directory_is_absolute(tmp_path, monkeypatch, written):
    """It is relative to the file's directory, `~` is the home, and it need not exist."""
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "c.toml"
    file.write_text(f"state_dir = '{written}'")

    expected = Path("/home/me/x") if written == "~/x" else tmp_path / written
    assert load(file).state_dir == expected


# ---- which rule of residency holds ------------------------------------------------------------

TWO = model(name="a") + model(name="b")
GROUP_A = "\n[groups.g]\nmembers = ['a']"
MATRIX = "\n[matrix]\nsets.s = 'a & b'"
ONE_GROUP = (GroupConfig("g", ("a",)),)


def test_without_groups_and_matrix_memory_decides():
    """Also when the file says nothing of memory; there are no groups then, not even a default one."""
    config = loads(TWO)

    assert (config.groups, config.matrix, config.memory) == ((), None, MemoryConfig())


def test_groups_alone():
    """Models in no group form the default group, and memory plays no part."""
    config = loads(TWO + GROUP_A)

    assert config.groups == (*ONE_GROUP, GroupConfig("(default)", ("b",)))
    assert (config.matrix, config.memory) == (None, None)


def test_an_empty_table_of_groups_is_one_model_at_a_time():
    """It is written, so it rules, and all models are in the default group."""
    config = loads(TWO + "\n[groups]")

    assert config.groups == (GroupConfig("(default)", ("a", "b")),)
    assert config.memory is None


@pytest.mark.parametrize(
    "text",
    [
        TWO + GROUP_A + "\n[memory]",
        model("memory = 1") + model(name="b") + GROUP_A,
        model("memory = { ram = 1 }") + model(name="b") + GROUP_A,
        model() + model("device = 'auto'", name="b") + GROUP_A,
    ],
    ids=["table", "size", "sizes", "device"],
)
def test_groups_with_memory(text):
    """One word about memory, and models in no group are in none."""
    config = loads(text)

    assert (config.groups, config.memory) == (ONE_GROUP, MemoryConfig())


def test_a_matrix_alone():
    """No group is made up beside it, and memory plays no part."""
    config = loads(TWO + MATRIX)

    assert (config.groups, config.memory) == ((), None)
    assert [entry.name for entry in config.matrix.sets] == ["s"]


def test_a_matrix_with_memory():
    """Both count."""
    config = loads(model("memory = 5") + model(name="b") + MATRIX)

    assert config.matrix is not None
    assert config.memory == MemoryConfig()


def test_a_matrix_beside_groups_is_a_mistake():
    """One of them has to go; what is wrong within them is told all the same."""
    assert mistakes(TWO + GROUP_A + "\n[matrix]\nsets.s = 'a & c'") == [
        "matrix: found matrix beside groups, allowed is one of them",
        'matrix.sets.s: found "c" at column 5, allowed is the name of a var or of a model',
    ]


def test_the_matrix_is_handed_over_whole():
    """Vars, costs and sets arrive, in the order in which they are written."""
    config = loads(TWO + "\n[matrix]\nvars = { x = 'a' }\nevict_costs = { x = 3 }\nsets = { t = 'x', s = 'b | +t' }")

    assert [(entry.name, entry.source) for entry in config.matrix.sets] == [("t", "x"), ("s", "b | +t")]
    assert config.matrix.costs == {"a": 3}


def test_every_key_of_memory_arrives():
    """Sizes in bytes; a device whose size is asked for is None."""
    config = loads("""
        [memory]
        headroom = 0
        yield_to_others = true
        learn = false
        devices = { ram = "48GiB", my-gpu_1 = "auto" }
    """)

    devices = {"ram": 48 * GIB, "my-gpu_1": None}
    assert config.memory == MemoryConfig(headroom=0, yield_to_others=True, learn=False, devices=devices)


def test_a_table_without_devices_says_nothing():
    """They are found as if it were not there."""
    assert loads("[memory.devices]").memory == MemoryConfig()


def test_a_config_made_by_hand_has_a_rule_too():
    """Memory, unless groups or a matrix are given."""
    assert Config().memory == MemoryConfig()
    assert Config(groups=ONE_GROUP).memory is None


# ---- one address for two models ---------------------------------------------------------------

SHARED = """
models.a = { cmd = "x", proxy = "http://localhost:9000" }
models.b = { cmd = "x", proxy = "http://127.0.0.1:9000" }
"""


@pytest.mark.parametrize(
    "rule",
    [
        "",
        "memory = {}",
        "matrix.sets.s = 'a | b'",
        "groups.g = { members = ['a'] }\nmemory = {}",
        "groups.g = { members = ['a', 'b'], swap = false }\nmemory = {}",
    ],
)
def test_models_that_groups_do_not_keep_apart_must_not_share_an_address(rule):
    """Where memory or a matrix decides, any two may come to be resident together."""
    assert mistakes(SHARED + rule) == [CLASH]


@pytest.mark.parametrize("memory", ["", "memory = {}"])
def test_models_that_groups_keep_apart_may_share_an_address(memory):
    """Memory beside groups only ever takes away from what groups allow."""
    assert set(loads(SHARED + "groups.g = { members = ['a', 'b'] }\n" + memory).models) == {"a", "b"}


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        ("groups = 5", "groups: found 5, allowed is a table"),
        (
            "groups.g.members = ['a', 5]\nmemory = {}",
            'groups.g.members[1]: found 5, allowed is text in quotes, did you mean "5"?',
        ),
        (
            "groups.g.members = ['a', 'bb']\nmemory = {}",
            'groups.g.members[1]: found "bb", allowed is the name of a model, did you mean "b"?',
        ),
    ],
)
def test_a_mistake_in_groups_makes_no_clash(groups, line):
    """A model that a mistake may have put out of its group is not said to collide."""
    assert mistakes(SHARED + groups) == [line]


# ---- what fits ----------------------------------------------------------------------------------

DEVICES = "\n[memory]\nheadroom = '512MiB'\ndevices = { gpu0 = '24GiB', gpu1 = '8GiB', ram = 'auto' }\n"
SIZED = "\n[memory]\nheadroom = '512MiB'\ndevices = { gpu0 = '24GiB', gpu1 = '8GiB' }\n"


@pytest.mark.parametrize(
    "text",
    [
        SIZED + model("memory = '23.5GiB'"),
        SIZED + model("memory = '23.5GiB'\ndevice = 'auto'"),
        SIZED + model("memory = '23.5GiB'\ndevice = 'gpu0'"),
        SIZED + model("memory = { gpu0 = '23.5GiB', gpu1 = '7.5GiB' }"),
        SIZED + model("memory = { gpu1 = '1GiB' }\ndevice = 'gpu0'"),
        "\n[memory.devices]\ngpu0 = '9GiB'\ngpu1 = 'auto'\n" + model("memory = '900GiB'"),
        "\n[memory.devices]\nram = '9GiB'\n" + model("memory = '8.5GiB'"),
        DEVICES + model("memory = '900GiB'\ndevice = 'ram'"),
        DEVICES + model("memory = { ram = '900GiB' }"),
        "\n[memory.devices]\ngpu0 = 0\n" + model("memory = 0\ndevice = 'gpu0'"),
        model("memory = '900GiB'\ndevice = 'anything'"),
    ],
)
def test_what_may_fit_is_right(text):
    """Up to the headroom; and what only the machine knows is not judged."""
    assert list(loads(text).models) == ["a"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            SIZED + model("memory = '24GiB'"),
            "models.a.memory: found 24GiB, allowed is at most 23.5GiB, which is gpu0 without the headroom",
        ),
        (
            SIZED + model("memory = '24GiB'\ndevice = 'auto'"),
            "models.a.memory: found 24GiB, allowed is at most 23.5GiB, which is gpu0 without the headroom",
        ),
        (
            DEVICES + model("memory = '24GiB'"),
            "models.a.memory: found 24GiB, allowed is at most 23.5GiB, which is gpu0 without the headroom",
        ),
        (
            "\n[memory.devices]\nram = '9GiB'\n" + model("memory = '9GiB'\ndevice = 'auto'"),
            "models.a.memory: found 9GiB, allowed is at most 8.5GiB, which is ram without the headroom",
        ),
        (
            DEVICES + model("memory = '8GiB'\ndevice = 'gpu1'"),
            "models.a.memory: found 8GiB, allowed is at most 7.5GiB, which is gpu1 without the headroom",
        ),
        (
            DEVICES + model("memory = { gpu0 = 1, gpu1 = 8053063681 }"),
            "models.a.memory.gpu1: found 8053063681B, allowed is at most 7.5GiB, which is gpu1 without the headroom",
        ),
        (
            "\n[memory.devices]\ngpu0 = 5\n" + model("memory = 1\ndevice = 'gpu0'"),
            "models.a.memory: found 1B, allowed is at most 0B, which is gpu0 without the headroom",
        ),
        (
            SIZED + model("memory = 1\ndevice = 'gup0'"),
            'models.a.device: found "gup0", allowed is one of auto, gpu0, gpu1, did you mean "gpu0"?',
        ),
        (
            SIZED + model("device = 'cpu'"),
            'models.a.device: found "cpu", allowed is one of auto, gpu0, gpu1',
        ),
        (
            SIZED + model("memory = { gpu0 = 1, auto = 1 }"),
            'models.a.memory.auto: found "auto", allowed is one of gpu0, gpu1',
        ),
        (model("memory = { 'gpu 0' = 1 }"), f'models.a.memory."gpu 0": found "gpu 0", {DEVICE}'),
        (model("memory = { auto = 1 }"), f'models.a.memory.auto: found "auto", {DEVICE}'),
        (model("device = ''"), f'models.a.device: found "", {DEVICE}'),
        ("[memory.devices]\nauto = 1", f'memory.devices.auto: found "auto", {DEVICE}'),
        ("[memory.devices]\n'gpu:0' = 1", f'memory.devices."gpu:0": found "gpu:0", {DEVICE}'),
        (
            model("memory = { gpu0 = 1, gpu1 = 1 }\ndevice = 'auto'"),
            'models.a.device: found "auto" beside a table of memory by device, allowed is one of them',
        ),
    ],
)
def test_what_never_fits_is_a_mistake(text, line):
    """A model that could never start is told before anything runs."""
    assert mistakes(text) == [line]


# ---- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("policy = 'lifo'", 'policy: found "lifo", allowed is one of lease, fifo, did you mean "fifo"?'),
        ("policy = 1", 'policy: found 1, allowed is text in quotes, did you mean "1"?'),
        ("parallel_loads = 0", f"parallel_loads: found 0, {COUNTS}"),
        ("parallel = 1.0", f"parallel: found 1.0, {COUNTS}"),
        ("parallel = true", f"parallel: found true, {COUNTS}"),
        ("turn_lease = -1", f"turn_lease: found -1, {NUMBERS}"),
        ("turn_lease = nan", f"turn_lease: found nan, {NUMBERS}"),
        ("linger = inf", f"linger: found inf, {NUMBERS}"),
        ("linger = '1s'", f'linger: found "1s", {NUMBERS}'),
        ("linger = true", f"linger: found true, {NUMBERS}"),
        ("weight = 2", "weight: unknown key"),
        ("state_dir = ''", 'state_dir: found "", allowed is the path of a directory'),
        (
            "state_dir = '~no-such-user/x'",
            (
                'state_dir: found "~no-such-user/x", allowed is the path of a directory '
                "(Could not determine home directory.)"
            ),
        ),
        (model("weight = 0"), f"models.a.weight: found 0, {NUMBERS}, but not 0"),
        (model("weight = -0.5"), f"models.a.weight: found -0.5, {NUMBERS}"),
        (model("weight = inf"), f"models.a.weight: found inf, {NUMBERS}"),
        (model("weight = 1_000_000_000_000_000"), f"models.a.weight: found 1000000000000000, {NUMBERS}"),
        (model("priority = 1.5"), "models.a.priority: found 1.5, allowed is a whole number"),
        (model("priority = true"), "models.a.priority: found true, allowed is a whole number"),
        (model("load_cost = 'long'"), f'models.a.load_cost: found "long", {DURATIONS}'),
        (model("stop_cost = -1"), f"models.a.stop_cost: found -1, {DURATIONS}"),
        (model("memory = -1"), f"models.a.memory: found -1, {SIZES}"),
        (model("memory = true"), f"models.a.memory: found true, {SIZES}"),
        (model("memory = ['1GiB']"), f"models.a.memory: found an array, {SIZES}, or a table of such sizes by device"),
        (model("memory = { gpu0 = '1 gig' }"), f'models.a.memory.gpu0: found "1 gig", {SIZES}'),
        (model("device = 0"), 'models.a.device: found 0, allowed is text in quotes, did you mean "0"?'),
        ("memory = 5", "memory: found 5, allowed is a table"),
        ("memory.headrom = 5", 'memory.headrom: unknown key, did you mean "headroom"?'),
        ("memory.headroom = -1", f"memory.headroom: found -1, {SIZES}"),
        ("memory.learn = 'no'", 'memory.learn: found "no", allowed is true or false'),
        ("memory.devices = ['ram']", "memory.devices: found an array, allowed is a table"),
        ("memory.devices.ram = 'all'", f'memory.devices.ram: found "all", {SIZES}, or "auto"'),
        ("matrix = 5", "matrix: found 5, allowed is a table"),
        ("matrix = {}", "matrix.sets: found no set, allowed is at least one"),
        (TWO + MATRIX + "\nvar.x = 'a'", 'matrix.var: unknown key, did you mean "vars"?'),
        (TWO + MATRIX + "\nevict_costs.a = 0", f"matrix.evict_costs.a: found 0, {COUNTS}"),
        (TWO + MATRIX + "\nevict_costs.a = true", f"matrix.evict_costs.a: found true, {COUNTS}"),
    ],
)
def test_a_mistake_is_told_in_one_line(text, line):
    """One mistake, one line: where, what was found, what is allowed; no other that follows from it."""
    if line.endswith("unknown key"):
        assert [told.partition(", ")[0] for told in mistakes(text)] == [line]
    else:
        assert mistakes(text) == [line]


@pytest.mark.parametrize(
    "text",
    [
        "memory = { headroom = 'x', devices = { gpu0 = 5 } }" + model("memory = '1GiB'"),
        "memory = { devices = { gpu0 = 'x', ram = 1 } }" + model("memory = '1GiB'\ndevice = 'gpu0'"),
        "memory = { devices = { 'gpu 0' = 1 } }" + model("device = 'gpu 0'"),
        "memory = 5" + model("device = 'gpu0'"),
        TWO + "\n[matrix]\nvars = { x = 5 }\nsets = { s = 'x & b' }",
        TWO + "\n[matrix]\nsets = { s = 'a', t = 5, u = '+t & b' }",
        TWO + "\n[matrix]\nsets = { s = 'a | x' }",
        "models = 5\nmatrix = { vars = { x = 'a' }, evict_costs = { a = 2 }, sets = { s = 'x | b' } }",
    ],
)
def test_a_mistake_hides_what_only_follows_from_it(text):
    """What others refer to keeps its place, even when it is wrong itself."""
    assert len(mistakes(text)) == 1
