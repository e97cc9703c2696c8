"""Macros and environment: order, scope, types, text of numbers, what stays, every mistake, and bombs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config import environment
from trioswap.config.document import Document
from trioswap.config.environment import fill_environment
from trioswap.config.macros import expand_macros, float_text
from trioswap.config.mistakes import Mistakes
from trioswap.config.toml import parse_toml
from trioswap.config.yaml_source import parse_yaml

ENVIRON = {"HOME": "/home/me", "EMPTY": "", "N": "08", "YES": "true", "LINES": "a\nb", "AGAIN": "${env.HOME} ${m}"}


def expand(text: str, environ: dict[str, str] = ENVIRON) -> tuple[Document, list[str]]:
    """The YAML *text*, which uses native names, with everything filled in, and the mistakes."""
    mistakes = Mistakes()
    document = fill_environment(parse_yaml(text, "c.yaml", mistakes), environ, mistakes)
    document = expand_macros(document, environ, mistakes)
    return document, mistakes.lines()


def values(text: str) -> dict[str, object]:
    """The values of *text*, which has no mistakes."""
    document, mistakes = expand(text)
    assert mistakes == []
    return document.values


def mistakes_of(text: str) -> list[str]:
    """The mistakes of *text*."""
    return expand(text)[1]


# ---- the environment ----------------------------------------------------------------------------


def test_environment_variables_are_filled_in_everywhere():
    """In texts of every kind, in keys, in arrays, in definitions of macros."""
    text = """
        macros: {dir: "${env.HOME}/m"}
        models:
          ${env.N}:
            cmd: 'x ${env.HOME} "${env.EMPTY}" ${dir}'
            aliases: ["${env.HOME}!"]
    """

    assert values(text) == {
        "macros": {"dir": "/home/me/m"},
        "models": {"08": {"cmd": 'x /home/me "" /home/me/m', "aliases": ["/home/me!"]}},
    }


def test_plain_yaml_gets_its_type_anew():
    """What is written in quotes stays text; in TOML all text is in quotes."""
    document, _ = expand("a: ${env.N}\nb: '${env.N}'\nc: ${env.YES}\nd: ${env.EMPTY}\ne: 1${env.N}\nf: [${env.N}]\n")

    assert document.values == {"a": 8.0, "b": "08", "c": True, "d": None, "e": 108, "f": [8.0]}
    assert document.texts[("a",)] == "08"
    assert ("b",) not in document.texts


def test_toml_text_stays_text():
    """A variable cannot change the type of a value there."""
    document = fill_environment(parse_toml("a = '${env.N}'", "c.toml"), ENVIRON, Mistakes())

    assert document.values == {"a": "08"}


def test_a_variable_needs_no_escapes():
    """llama-swap puts backslashes before quotes and backslashes, which stay there outside double quotes."""
    environ = {"X": "a\\b \"c\" 'd' # e: [f"}

    document, mistakes = expand("a: ${env.X}\nb: '${env.X}'\nc: \"${env.X}\"\nd: |-\n  ${env.X}\n", environ)

    assert (document.values, mistakes) == (dict.fromkeys("abcd", environ["X"]), [])


def test_what_a_variable_holds_is_not_filled_in_again():
    """But it may refer to macros, which come after."""
    assert values("macros: {m: 5}\na: ${env.AGAIN}\n")["a"] == "${env.HOME} 5"


def test_references_in_comments_do_not_count():
    """Neither in those of the file nor in those of a command."""
    text = "a: 1 # ${env.NOT} ${not}\nmodels:\n  m:\n    cmd: |\n      # ${env.NOT} ${not}\n      x\n        # ${not}\n"

    assert values(text)["models"] == {"m": {"cmd": "#\nx\n  #\n"}}


def test_comments_are_found_as_commands_find_them():
    """A # within a line is none, and in an array of arguments there are none; the lines keep their numbers."""
    text = """
        macros: {a: 1}
        models: {m: {cmd: "x # ${a}\\n\\t#${b}\\ny", cmd_stop: ["#${a}"], description: "# ${a}"}}
    """

    model = values(text)["models"]["m"]

    assert model == {"cmd": "x # 1\n\t#\ny", "cmd_stop": ["#1"], "description": "# 1"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "a: {b: ['${env.HOMM}']}",
            (
                "a.b[0]: found ${env.HOMM}, but no such variable is set, "
                'allowed are variables of the environment, did you mean "HOME"?'
            ),
        ),
        (
            "a: x ${env.LINES}",
            "a: found ${env.LINES}, which holds line breaks or NUL characters, allowed are variables without",
        ),
        (
            "a: ${env.1x}",
            "a: found ${env.1x}, allowed are names of letters, digits and _ that do not begin with a digit",
        ),
        (
            "models: {'${env.ZZZZ}': {}}",
            (
                'models."${env.ZZZZ}": found ${env.ZZZZ}, but no such variable is set, '
                "allowed are variables of the environment"
            ),
        ),
        (
            "macros: {m: '${env.ZZZZ}'}\na: ${m}\nb: ${m}x",
            "macros.m: found ${env.ZZZZ}, but no such variable is set, allowed are variables of the environment",
        ),
        (
            "a: {'${env.YES}': 1, 'true': 2}",
            "a.true: found it again on line 1 once the names are filled in, allowed is once",
        ),
    ],
)
def test_a_variable_that_cannot_be_filled_in(text, line):
    """Is told where it is used, once, and never with what it holds."""
    assert mistakes_of(text) == [line]


def test_an_unset_variable_that_is_not_used_is_no_mistake():
    """Of a definition it is one: macros are read all."""
    assert mistakes_of('models: {m: {cmd: "# ${env.ZZZZ}"}}') == []
    assert len(mistakes_of("macros: {m: '${env.ZZZZ}'}")) == 1


# ---- macros: order, scope, types ------------------------------------------------------------------


def test_a_macro_may_use_those_before_it():
    """Also through others, and as often as it likes."""
    text = "macros: {a: x, b: '${a}-${a}', c: '<${b}>'}\nv: ${c}${a}\n"

    assert values(text)["v"] == "<x-x>x"


def test_definitions_stay_as_they_are_written():
    """They are for who reads or converts the file."""
    text = "macros: {a: x, b: '${a}'}\nmodels: {m: {macros: {c: '${b}'}}}\n"

    assert values(text) == {"macros": {"a": "x", "b": "${a}"}, "models": {"m": {"macros": {"c": "${b}"}}}}


@pytest.mark.parametrize(
    ("definition", "alone", "within"),
    [
        ("5", 5, "5"),
        ("-0x10", -16, "-16"),
        ("1_000", 1000, "1000"),
        ("true", True, "true"),
        ("FALSE", False, "false"),
        ("0.70", 0.7, "0.7"),
        ("4096.0", 4096.0, "4096"),
        ("1e6", 1e6, "1e+06"),
        ("'5'", "5", "5"),
        ("text", "text", "text"),
        ("'${n}'", 7, "7"),
        ("x${n}", "x7", "x7"),
        ("0123", 83, "0123"),
    ],
)
def test_a_reference_alone_keeps_the_type(definition, alone, within):
    """Quotes do not matter; in a longer text it is text, numbers as llama-swap writes them.

    But what begins with 0 is written as it was: who writes a key of digits means the digits.
    """
    document, mistakes = expand(f"macros: {{n: 7, m: {definition}}}\na: ${{m}}\nb: '${{m}}'\nc: <${{m}}>\n")
    got = document.values

    assert mistakes == []
    assert (type(got["a"]), got["a"], got["b"], got["c"]) == (type(alone), alone, alone, f"<{within}>")
    if not isinstance(alone, str):
        assert document.texts[("b",)] == within


def test_scopes():
    """A model sees its own macros before those of the file, and nobody sees those of another model."""
    text = """
        macros: {g: file, h: "<${g}>", i: "${h}${MODEL_ID}"}
        models:
          one:
            macros: {g: one, own: "${h}!"}
            cmd: "${g} ${h} ${i} ${own}"
            metadata: {list: ["${own}", {deep: "${MODEL_ID}"}]}
          two:
            cmd: "${g} ${h} ${i}"
        listen: "${g}"
    """

    got = values(text)

    assert got["models"]["one"]["cmd"] == "one <one> <one>one <one>!"
    assert got["models"]["one"]["metadata"] == {"list": ["<one>!", {"deep": "one"}]}
    assert got["models"]["two"]["cmd"] == "file <file> <file>two"
    assert got["listen"] == "file"


def test_a_model_macro_takes_the_place_of_that_of_the_file():
    """What the file defines before it cannot use it; what it defines after it can."""
    text = "macros: {a: '${x}', x: 1, b: '${x}'}\nmodels: {m: {macros: {x: 2}, cmd: '${b}'}}\n"
    wrong = text.replace("'${b}'}}", "'${a}'}}")

    assert values(text)["models"]["m"]["cmd"] == 2
    assert mistakes_of(wrong) == ["macros.a: found ${x}, which is defined after it, allowed are macros defined before"]


def test_the_name_of_a_model_is_taken_as_it_is():
    """It is no place for references."""
    text = "macros: {x: 1}\nmodels: {'a${x}': {name: '${MODEL_ID}'}}\n"

    assert values(text)["models"] == {"a${x}": {"name": "a${x}"}}


def test_keys_stay_but_those_of_names_in_filters():
    """Where the requested name may be composed; its places come along."""
    text = """
        macros: {size: 7}
        models:
          m:
            env: {"${size}": "${size}"}
            filters:
              set_params_by_id:
                "${MODEL_ID}:${size}": {"${size}": "${size}"}
                "${PORT}": {}
    """
    document, mistakes = expand(text)
    model = document.values["models"]["m"]

    assert mistakes == []
    assert model["env"] == {"${size}": 7}
    assert model["filters"]["set_params_by_id"] == {"m:7": {"${size}": 7}, "${PORT}": {}}
    assert document.places[("models", "m", "filters", "set_params_by_id", "m:7")].line == 8


def test_port_and_pid_stay():
    """They are known later; ${PORT} anywhere in a model, ${PID} when it stops."""
    text = """
        macros: {p: "--port ${PORT}"}
        models:
          m: {cmd: "x ${p}", cmd_stop: "kill ${PID} ${PORT}", proxy: "http://h:${PORT}", metadata: {p: "${PORT}"}}
    """

    assert values(text)["models"]["m"] == {
        "cmd": "x --port ${PORT}",
        "cmd_stop": "kill ${PID} ${PORT}",
        "proxy": "http://h:${PORT}",
        "metadata": {"p": "${PORT}"},
    }


def test_other_dollars_are_text():
    """Only ${NAME} is a reference."""
    text = "a: '$HOME $(x) ${} ${a b} ${a.b} $${'\n"

    assert values(text) == {"a": "$HOME $(x) ${} ${a b} ${a.b} $${"}


def test_places_stay():
    """What is filled in stands where the reference is written."""
    document, _ = expand("macros:\n  a: 1\nb:\n- x\n- ${a}\n")

    assert document.places[("b", 1)].line == 5
    assert document.places[("macros", "a")].line == 2


# ---- mistakes ---------------------------------------------------------------------------------------

LONG = "m" * 64


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # definitions, used or not
        (f"macros: {{{LONG}: 1}}", f"macros.{LONG}: found a name of 64 characters, allowed are at most 63"),
        ("macros: {a b: 1}", 'macros."a b": found the name "a b", allowed are letters, digits, _ and -'),
        ("macros: {é: 1}", 'macros."é": found the name "é", allowed are letters, digits, _ and -'),
        ("macros: {a: }\nb: <${a}>", "macros.a: found nothing, allowed is text, a number, true or false"),
        ("macros: {a: []}", "macros.a: found an array, allowed is text, a number, true or false"),
        ("macros: {a: {}}", "macros.a: found a table, allowed is text, a number, true or false"),
        ("macros: {a: 'x${a}'}", "macros.a: found ${a} in its own definition, allowed are macros defined before it"),
        (
            "macros: {PORT: 1}",
            ("macros.PORT: found the name PORT, which trioswap gives a meaning to, allowed is any other name"),
        ),
        (
            "models: {m: {macros: {MODEL_ID: 1}, name: '${MODEL_ID}'}}",
            (
                "models.m.macros.MODEL_ID: found the name MODEL_ID, "
                "which trioswap gives a meaning to, allowed is any other name"
            ),
        ),
        (
            "models: {m: {macros: {PID: }}}",
            "models.m.macros.PID: found nothing, allowed is text, a number, true or false",
        ),
        # references
        ("macros: {a: 1}\nb: ${aa}", 'b: found ${aa}, allowed is one of ${a}, did you mean "a"?'),
        ("b: {c: [x, 'y${z}']}", "b.c[1]: found ${z}, allowed are macros, of which none is defined"),
        (
            "macros: {ctx: 1}\nmodels: {m: {cmd: 'x ${cxt} ${y}'}}",
            ('models.m.cmd: found ${cxt}, ${y}, allowed is one of ${MODEL_ID}, ${PORT}, ${ctx}, did you mean "ctx"?'),
        ),
        ("models: {m: {cmd: 'x ${PID}'}}", "models.m.cmd: found ${PID}, allowed is one of ${MODEL_ID}, ${PORT}"),
        (
            "macros: {p: 'x${PID}'}\nmodels: {m: {description: '${p}'}}",
            ("models.m.description: found ${PID}, allowed is one of ${MODEL_ID}, ${PORT}, ${p}"),
        ),
        (
            "models: {m: {cmd_stop: 'x ${pidd}'}}",
            ('models.m.cmd_stop: found ${pidd}, allowed is one of ${MODEL_ID}, ${PID}, ${PORT}, did you mean "PID"?'),
        ),
        (
            "models: {m: {macros: {a: 1}}, n: {name: '${a}'}}",
            ("models.n.name: found ${a}, allowed is one of ${MODEL_ID}, ${PORT}"),
        ),
        ("a: ${PORT}", "a: found ${PORT}, allowed is that only within models"),
        ("a: ${MODEL_ID} ${PID}", "a: found ${MODEL_ID}, ${PID}, allowed is that only within models"),
        ("a: ${case}\nmacros: {CASE: 1}", 'a: found ${case}, allowed is one of ${CASE}, did you mean "CASE"?'),
        (
            "models: {m: {filters: {set_params_by_id: {'${z}': {}}}}}",
            ('models.m.filters.set_params_by_id."${z}": found ${z}, allowed is one of ${MODEL_ID}, ${PORT}'),
        ),
        (
            "macros: {x: a}\nmodels: {m: {filters: {set_params_by_id: {'${x}': {}, a: {}}}}}",
            (
                "models.m.filters.set_params_by_id.a: "
                "found it again on line 2 once the names are filled in, allowed is once"
            ),
        ),
        # references of macros: told at the macro, however often it is used
        (
            "macros: {a: '<${b}>', b: 1}\nv: ${a}\nw: ${a}",
            ("macros.a: found ${b}, which is defined after it, allowed are macros defined before"),
        ),
        (
            "macros: {a: 1, b: '<${zz}>'}\nmodels: {m: {cmd: '${b}'}, n: {cmd: '${b} ${PORT}'}}",
            "macros.b: found ${zz}, allowed is one of ${MODEL_ID}, ${PID}, ${PORT}, ${a}",
        ),
        (
            "macros: {a: '<${MODEL_ID}>'}\nv: ${a}",
            "macros.a: found ${MODEL_ID} in a macro used outside models, allowed is that only within models",
        ),
        (
            "models: {m: {macros: {a: '${b}', b: '${a}'}, cmd: '${b}'}}",
            "models.m.macros.a: found ${b}, which is defined after it, allowed are macros defined before",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(text, line):
    """One mistake, one line; no other that follows from it."""
    assert mistakes_of(text) == [line]


def test_a_reference_in_a_macro_that_nobody_uses_is_no_mistake():
    """As in llama-swap, where only what is left in values counts."""
    assert mistakes_of("macros: {a: '${later}', later: 1}\n") == []


def test_many_macros_are_not_listed():
    """The closest one is named all the same."""
    macros = ", ".join(f"n{n}: 1" for n in range(20))

    assert mistakes_of(f"macros: {{{macros}, ctx: 1}}\nv: ${{cxt}}\n") == [
        'v: found ${cxt}, allowed is one of the 21 macros defined for this place, did you mean "ctx"?'
    ]


def test_a_huge_number_is_no_macro():
    """Python refuses to write it as text; only TOML can hold it."""
    mistakes = Mistakes()

    expand_macros(parse_toml(f"macros.a = 0x{'f' * 5000}\nb = '<${{a}}>'", "c.toml"), {}, mistakes)

    assert mistakes.lines() == ["macros.a: found a huge number, allowed are numbers of at most 64 bits"]


@pytest.mark.parametrize("text", ["models: 5\nmacros: 5", "models: {m: 5}", "models: {m: {macros: []}}", "macros: [x]"])
def test_wrong_shapes_are_left_to_others(text):
    """They are judged where the types of all keys are known."""
    document, mistakes = expand(text)

    assert (document.values, mistakes) == (parse_yaml(text, "c.yaml", Mistakes()).values, [])


# ---- numbers as text ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.7, "0.7"),
        (4096.0, "4096"),
        (123456.0, "123456"),
        (999999.0, "999999"),
        (1e6, "1e+06"),
        (1234567.5, "1.2345675e+06"),
        (-2.5e10, "-2.5e+10"),
        (1e100, "1e+100"),
        (0.0001, "0.0001"),
        (0.00001, "1e-05"),
        (-0.000012345, "-1.2345e-05"),
        (100000.0, "100000"),
        (0.1 + 0.2, "0.30000000000000004"),
        (5e-324, "5e-324"),
        (0.0, "0"),
        (-0.0, "-0"),
        (float("inf"), "+Inf"),
        (float("-inf"), "-Inf"),
        (float("nan"), "NaN"),
    ],
)
def test_floats_are_written_as_go_writes_them(value, text):
    """By `%v`: the fewest digits, exponents below -4 and from 6 up (core reference 1.4, run there)."""
    assert float_text(value) == text


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_no_digit_of_a_float_is_lost(value):
    """Its text is the same number."""
    assert float(float_text(value)) == value


# ---- bombs ----------------------------------------------------------------------------------------------


def doubling(steps: int) -> str:
    """Macros each of which is twice the one before: the last has 2^steps characters."""
    lines = ["macros:", "  m0: x", *(f"  m{n}: ${{m{n - 1}}}${{m{n - 1}}}" for n in range(1, steps + 1))]
    return "\n".join([*lines, f"v: ${{m{steps}}}", ""])


def test_a_value_is_bounded():
    """At a million characters; it is not made before that is known."""
    bound = "found what becomes more than 1,048,576 characters, allowed are fewer"

    assert len(values(doubling(20))["v"]) == 2**20
    assert mistakes_of(doubling(21)) == [f"v: {bound}"]
    assert mistakes_of(doubling(80)) == [f"v: {bound}"]


def test_all_values_together_are_bounded(monkeypatch):
    """It is told once."""
    monkeypatch.setattr(environment, "MAX_IN_ALL", 10_000)
    text = f"macros: {{a: {'x' * 1000}}}\nv: [{', '.join(['<${a}>'] * 50)}]\n"

    assert mistakes_of(text) == [
        "v[9]: found more than 10,000 characters in what is filled in so far, allowed are fewer"
    ]


@pytest.mark.parametrize(("steps", "count"), [(100, 0), (102, 1)])
def test_chains_are_bounded(steps, count):
    """Each macro uses the one before; Python's stack has its end."""
    lines = ["macros:", "  m0: x", *(f"  m{n}: '<${{m{n - 1}}}>'" for n in range(1, steps + 1)), f"v: ${{m{steps}}}"]

    assert len(mistakes_of("\n".join(lines))) == count


def test_a_large_environment_variable_is_bounded():
    """In values as in keys."""
    environ = {"X": "x" * 2**20}

    assert len(expand("a: ${env.X}", environ)[1]) == 0
    assert len(expand("a: ${env.X}y", environ)[1]) == 1
    assert len(expand("'${env.X}y': 1", environ)[1]) == 1
