"""Filters: the name is replaced, then fields are stripped, then set, then set by the name that was asked for."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config.parts import FilterConfig
from trioswap.errors import BadRequest
from trioswap.filters import apply

BODY = b'{ "model": "alias", "seed": 1.0, "top_k": 40, "messages": [] }'


def test_without_rules_the_same_bytes_come_back():
    """Even of what is no JSON: nobody looked."""
    body = b"not JSON"

    assert apply(body, FilterConfig(), asked="alias", rename=None) is body
    assert apply(body, FilterConfig(set_params_by_id={"other": {"seed": 2}}), asked="alias", rename=None) is body


def test_the_name_is_replaced():
    """In each place where an upstream may read it, and nothing else with it."""
    twice = b'{"model": "x", "n": 1.0, "model": "alias"}'

    assert apply(BODY, FilterConfig(), asked="alias", rename="real") == BODY.replace(b"alias", b"real")
    assert apply(twice, FilterConfig(), asked="alias", rename="r") == b'{"model": "r", "n": 1.0, "model": "r"}'


def test_fields_are_stripped():
    """Those that are there, duplicates included."""
    filters = FilterConfig(strip_params=("seed", "top_k", "top_p"))

    assert apply(BODY, filters, asked="alias", rename=None) == b'{ "model": "alias", "messages": [] }'
    assert apply(b'{"seed":1,"a":2,"seed":3}', filters, asked="alias", rename=None) == b'{"a":2}'


def test_fields_are_set():
    """Replaced where they are, duplicates included, and added where they are not."""
    filters = FilterConfig(set_params={"options.mirostat": 2, "seed": 5})

    assert apply(b'{"seed":1,"a":2,"seed":3}', filters, asked="alias", rename=None) == (
        b'{"seed":5,"a":2,"seed":5,"options":{"mirostat":2}}'
    )


def test_fields_are_set_by_the_name_that_was_asked_for():
    """Not by the one that it is replaced with."""
    filters = FilterConfig(set_params_by_id={"alias": {"seed": 5}, "real": {"seed": 6}})

    assert apply(BODY, filters, asked="alias", rename="real") == BODY.replace(b"alias", b"real").replace(b"1.0", b"5")


def test_the_order():
    """What is stripped may be set again, and the settings of a name have the last word."""
    filters = FilterConfig(
        strip_params=("a", "b", "c"), set_params={"b": 1, "c": 1}, set_params_by_id={"alias": {"c": 2}}
    )

    assert apply(b'{"a":0,"b":{"x":1},"c":0}', filters, asked="alias", rename=None) == b'{"b":1,"c":2}'


@pytest.mark.parametrize("path", ["model", ":model", "\\model", "model.x", "model.0"])
def test_no_filter_touches_the_model(path):
    """In whatever spelling its path comes: only the renaming may."""
    filters = FilterConfig(strip_params=(path,), set_params={path: 1}, set_params_by_id={"alias": {path: 2}})

    assert apply(BODY, filters, asked="alias", rename=None) is BODY
    assert apply(BODY, filters, asked="alias", rename="real") == BODY.replace(b"alias", b"real")


def test_a_field_named_model_elsewhere_is_no_model():
    """Only the top level leads a request."""
    filters = FilterConfig(set_params={"draft.model": "small"})

    assert apply(b'{"draft":{"model":"big"}}', filters, asked="a", rename=None) == b'{"draft":{"model":"small"}}'


def test_what_cannot_be_filtered():
    """A body that is no JSON object, and an array where an object must be."""
    filters = FilterConfig(set_params={"options.seed": 1})
    for body, why in [(b"[]", "must be a JSON object"), (b"{", "not JSON"), (b'{"options":[1]}', "has an array")]:
        with pytest.raises(BadRequest, match=why):
            apply(body, filters, asked="a", rename=None)


FIELDS = st.sampled_from(["a", "b", "c", "é"])
SETTINGS = st.dictionaries(FIELDS, st.integers(0, 3) | st.text("é\"'", max_size=2), max_size=3)


@settings(derandomize=True, deadline=None, max_examples=10)
@given(SETTINGS, st.lists(FIELDS), SETTINGS, SETTINGS, st.none() | st.just("réal"))
def test_filters_are_what_they_say(fields, stripped, given_all, given_one, rename):
    """Parsed, the filtered body is the parsed body, filtered by the dictionary methods of Python."""
    body = json.dumps({"model": "x", **fields}, ensure_ascii=False, indent=1).encode()
    expected = {"model": rename or "x"} | {field: fields[field] for field in fields if field not in stripped}

    result = apply(
        body, FilterConfig(tuple(stripped), given_all, {"x": given_one, "y": {"a": 9}}), asked="x", rename=rename
    )

    assert json.loads(result) == expected | given_all | given_one
