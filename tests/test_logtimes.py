"""Go's layouts: what `time.Now().Format` of Go gives for two moments, by name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from trioswap.config.schema import TIME_FORMATS
from trioswap.logtimes import timestamp

# In the afternoon of a day with one digit, west of Greenwich, and in a zone of half an hour.
MST = datetime(2006, 1, 2, 15, 4, 5, 120_000, timezone(timedelta(hours=-7), "MST"))
IST = datetime(2026, 11, 30, 0, 9, 8, 7, timezone(timedelta(hours=5, minutes=30), "IST"))

EXPECTED = {
    "": ("", ""),
    "ansic": ("Mon Jan  2 15:04:05 2006", "Mon Nov 30 00:09:08 2026"),
    "unixdate": ("Mon Jan  2 15:04:05 MST 2006", "Mon Nov 30 00:09:08 IST 2026"),
    "rubydate": ("Mon Jan 02 15:04:05 -0700 2006", "Mon Nov 30 00:09:08 +0530 2026"),
    "rfc822": ("02 Jan 06 15:04 MST", "30 Nov 26 00:09 IST"),
    "rfc822z": ("02 Jan 06 15:04 -0700", "30 Nov 26 00:09 +0530"),
    "rfc850": ("Monday, 02-Jan-06 15:04:05 MST", "Monday, 30-Nov-26 00:09:08 IST"),
    "rfc1123": ("Mon, 02 Jan 2006 15:04:05 MST", "Mon, 30 Nov 2026 00:09:08 IST"),
    "rfc1123z": ("Mon, 02 Jan 2006 15:04:05 -0700", "Mon, 30 Nov 2026 00:09:08 +0530"),
    "rfc3339": ("2006-01-02T15:04:05-07:00", "2026-11-30T00:09:08+05:30"),
    "rfc3339nano": ("2006-01-02T15:04:05.12-07:00", "2026-11-30T00:09:08.000007+05:30"),
    "kitchen": ("3:04PM", "12:09AM"),
    "stamp": ("Jan  2 15:04:05", "Nov 30 00:09:08"),
    "stampmilli": ("Jan  2 15:04:05.120", "Nov 30 00:09:08.000"),
    "stampmicro": ("Jan  2 15:04:05.120000", "Nov 30 00:09:08.000007"),
    "stampnano": ("Jan  2 15:04:05.120000000", "Nov 30 00:09:08.000007000"),
}


@pytest.mark.parametrize("name", TIME_FORMATS)
def test_every_name_that_may_be_written_is_known(name):
    """The layouts of Go's package time, and a space behind what is not empty."""
    assert tuple(timestamp(name, moment).removesuffix(" ") for moment in (MST, IST)) == EXPECTED[name]
    assert timestamp(name, MST).endswith(" ") is bool(name)


def test_whole_seconds_have_no_fraction_and_noon_is_pm():
    """As Go leaves the fraction out, and UTC is a Z."""
    noon = datetime(2026, 1, 31, 12, 0, 0, 0, UTC)
    assert timestamp("rfc3339nano", noon) == "2026-01-31T12:00:00Z "
    assert timestamp("kitchen", noon) == "12:00PM "


def test_without_a_name_it_is_utc():
    """Whatever the zone of the moment is."""
    assert timestamp(None, MST) == "2006-01-02T22:04:05Z "
    assert timestamp(None, IST) == "2026-11-29T18:39:08Z "
