"""Durations, sizes and numbers: what is read, to what, and what is refused with which words."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config.values import format_size, parse_count, parse_duration, parse_number, parse_size


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (0, 0.0),
        (90, 90.0),
        (0.25, 0.25),
        ("90s", 90.0),
        ("1h30m", 5_400.0),
        ("500ms", 0.5),
        ("700ms", 0.7),
        ("2d", 172_800.0),
        ("1d2h3m4s5ms", 93_784.005),
        ("5m", 300.0),
        ("1.5h", 5_400.0),
        ("0s", 0.0),
    ],
)
def test_durations_are_seconds(written, seconds):
    """A number is seconds; text adds up its units."""
    assert parse_duration(written) == seconds


@pytest.mark.parametrize(
    "written",
    [
        "",
        "90",
        "s",
        "1m1h",
        "1h 30m",
        "-5s",
        "5 s",
        "1w",
        "5S",
        "1e3s",
        "٣s",
        "9" * 400 + "s",
        -1,
        -0.1,
        math.nan,
        math.inf,
        10**400,
        True,
        None,
        [],
        {},
    ],
)
def test_other_durations_are_refused(written):
    """Whatever is no number from 0 up and no text of units is refused, with what is allowed."""
    with pytest.raises(ValueError, match=r'^found .*, allowed is a number of seconds from 0 up, or text such as "90s"'):
        parse_duration(written)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (0, 0),
        (17, 17),
        ("18GiB", 18 * 2**30),
        ("512MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        ("3KB", 3_000),
        ("1 TiB", 2**40),
        ("1TB", 10**12),
        ("7B", 7),
        ("1.5KiB", 1_536),
        ("0.0001KB", 0),
    ],
)
def test_sizes_are_bytes(written, size):
    """An integer is bytes; units with an i count in 1024, those without in 1000."""
    parsed = parse_size(written)

    assert parsed == size
    assert type(parsed) is int


@pytest.mark.parametrize(
    "written",
    ["", "18", "18G", "18gib", "GiB", "-1B", "1  B", "1KiB2B", "999999999999TiB", -1, 2**63, 1.5, True, None],
)
def test_other_sizes_are_refused(written):
    """Whatever is no integer from 0 up and no text with one unit is refused, with what is allowed."""
    with pytest.raises(
        ValueError, match=r'^found .*, allowed is a whole number of bytes from 0 up, or text such as "18'
    ):
        parse_size(written)


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_units_add_up(days, hours, minutes, seconds, milliseconds):
    """A text of all units is the sum of its parts, exact to the nearest float."""
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    parsed = parse_duration(f"{days}d{hours}h{minutes}m{seconds}s{milliseconds}ms")

    assert parsed == (total * 1_000 + milliseconds) / 1_000


@pytest.mark.parametrize(("written", "number"), [(0, 0.0), (4, 4.0), (0.5, 0.5), (1e12, 1e12)])
def test_numbers_are_floats(written, number):
    """A number from 0 up is itself, whole or not."""
    parsed = parse_number(written)

    assert parsed == number
    assert type(parsed) is float


@pytest.mark.parametrize("written", [-1, -0.1, math.nan, math.inf, -math.inf, 1e300, 10**400, True, "4", None, []])
def test_other_numbers_are_refused(written):
    """Neither true nor a text is a number here, and neither is what is not finite."""
    with pytest.raises(ValueError, match=r"^found .*, allowed is a number from 0 up$"):
        parse_number(written)


def test_counts_are_whole_numbers_from_1_up():
    """Any integer that counts something that is there."""
    assert [parse_count(1), parse_count(10)] == [1, 10]


@pytest.mark.parametrize("written", [0, -1, 1.0, math.nan, True, "1", None])
def test_other_counts_are_refused(written):
    """A fraction counts nothing, even where it is none."""
    with pytest.raises(ValueError, match=r"^found .*, allowed is a whole number from 1 up$"):
        parse_count(written)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (17, "17B"),
        (1_024, "1KiB"),
        (10**12, "1TB"),
        (512 * 2**20, "512MiB"),
        (24 * 2**30 - 512 * 2**20, "23.5GiB"),
        (24 * 10**9, "24GB"),
        (24 * 10**9 - 512 * 2**20, "23463129088B"),
        (2**63 - 1, "9223372036854775807B"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit_that_is_exact(size, text):
    """People see what they may have written; where no unit is exact, bytes."""
    assert format_size(size) == text


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 2**63 - 1) | st.integers(0, 10**6).map(lambda size: size * 2**20 // 8))
def test_a_size_that_is_shown_reads_as_itself(size):
    """Nothing is rounded away, and what has a unit may be written like that."""
    text = format_size(size)

    assert size == (int(text[:-1]) if text[:-1].isdecimal() and text.endswith("B") else parse_size(text))
