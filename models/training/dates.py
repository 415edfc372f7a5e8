"""Dates as people write them, each with its ISO form and the places of its fields: generated, whole years held out."""

import calendar
import random
import re
from dataclasses import dataclass
from datetime import date, timedelta

FIRST_YEAR, LAST_YEAR = 1900, 2049
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_HELD_OUT_YEARS = 15  # for validation, and as many for the test
FORMATS = (
    "{day} {month} {year}",
    "{day} {mon} {year}",
    "{day}. {month} {year}",
    "{ordinal} of {month} {year}",
    "{day}-{mon}-{year}",
    "{month} {day}, {year}",
    "{month} {ordinal}, {year}",
    "{mon} {day} {year}",
    "{weekday}, {day} {month} {year}",
    "{weekday}, {month} {day}, {year}",
    "{wday} {day} {mon} {year}",
    "{dd}.{mm}.{year}",
    "{m}/{day}/{year}",
)
"""With dots between numbers the day is first, with slashes the month."""
_FIELDS = {"year": "year", "month": "month", "mon": "month", "mm": "month", "m": "month"} | dict.fromkeys(
    ("day", "dd", "ordinal"), "day"
)
ISO_FIELDS = ("year",) * 4 + (None,) + ("month",) * 2 + (None,) + ("day",) * 2
"""Which field each character of an ISO date belongs to; hyphens to none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenDate:
    """A date as written, in ISO 8601, and the half-open span of "year", "month" and "day" in the characters written."""

    text: str
    iso: str
    spans: dict[str, tuple[int, int]]


def years(part: str) -> list[int]:
    """Return the years of a part: "training", "validation" or "test"; no year is in two."""
    shuffled = list(range(FIRST_YEAR, LAST_YEAR + 1))
    random.Random(0).shuffle(shuffled)
    return {
        "test": shuffled[:_HELD_OUT_YEARS],
        "validation": shuffled[_HELD_OUT_YEARS : 2 * _HELD_OUT_YEARS],
        "training": shuffled[2 * _HELD_OUT_YEARS :],
    }[part]


def written_dates(part: str, count: int) -> list[WrittenDate]:
    """Return `count` random dates of a part, in random formats; always the same ones, and repeats are possible."""
    chosen, draw = years(part), random.Random(f"{part} {count}")
    return [write(_random_day(draw, chosen), draw.choice(FORMATS)) for _ in range(count)]


def write(day: date, template: str) -> WrittenDate:
    """Write a day by a template of `FORMATS`."""
    values = {
        "day": str(day.day),
        "dd": f"{day.day:02}",
        "ordinal": f"{day.day}{_suffix(day.day)}",
        "month": MONTHS[day.month - 1],
        "mon": MONTHS[day.month - 1][:3],
        "m": str(day.month),
        "mm": f"{day.month:02}",
        "weekday": WEEKDAYS[day.weekday()],
        "wday": WEEKDAYS[day.weekday()][:3],
        "year": str(day.year),
    }
    text, spans = "", {}
    for separator, name in re.findall(r"([^{]*)\{(\w+)\}", template):
        text += separator
        if name in _FIELDS:
            spans[_FIELDS[name]] = (len(text), len(text) + len(values[name]))
        text += values[name]
    return WrittenDate(text=text, iso=day.isoformat(), spans=spans)


def _random_day(draw: random.Random, chosen: list[int]) -> date:
    year = draw.choice(chosen)
    return date(year, 1, 1) + timedelta(days=draw.randrange(366 if calendar.isleap(year) else 365))


def _suffix(number: int) -> str:
    if number in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
