"""Durations and sizes: what is read, to what, and what is refused with which words."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trioswap.config.values import parse_duration, parse_size


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
