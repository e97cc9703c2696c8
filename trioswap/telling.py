"""What the daemon answers about queues, plans and memory, as text for people."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from trioswap.forecast import amounts, enumerated

# Decisions that fit on a screen along with the line.
_SHOWN_DECISIONS: Final = 10
_SOURCES: Final = {
    "declared": "as configured",
    "learned": "learned from earlier runs",
    "estimated": "guessed from its file",
}


def table(rows: Sequence[Sequence[str]]) -> str:
    """*rows* with their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def about(seconds: float | None) -> str:
    """How long it takes, as far as can be told."""
    if seconds is None:
        return "nobody can tell"
    if seconds >= 120:
        return f"about {seconds / 60:.0f} min"
    return f"about {max(1, round(seconds))} s" if seconds else "at once"


# ---- the models -----------------------------------------------------------------------------


def models(names: Iterable[str], running: Iterable[Mapping[str, Any]], lent: Iterable[Mapping[str, Any]]) -> str:
    """All models with their state and what they have to do, and the memory that is lent."""
    rows = {row["model"]: row for row in running}
    with_memory = any("memory" in row for row in rows.values())
    stopped = {"state": "stopped", "serving": 0, "waiting": 0}
    columns = ("state", "serving", "waiting")
    head = ["MODEL", *(column.upper() for column in columns), *(["MEMORY"] if with_memory else [])]
    body = []
    for name in sorted({*names, *rows}):
        row = rows.get(name, stopped)
        memory = [amounts(row["memory"]) if row.get("memory") else ""] if with_memory else []
        body.append([name, *(str(row[column]) for column in columns), *memory])
    loans = [f"{amounts(loan['holding'])} lent to {loan['label']} since {_clock(loan['since'])}" for loan in lent]
    return "\n".join([table([head, *body]), *loans])


# ---- who waits ------------------------------------------------------------------------------


def queue(answer: Mapping[str, Any]) -> str:
    """The answer of GET /api/queue: who waits, and the last decisions."""
    head = ("REQUEST", "MODEL", "WAITED", "PLACE", "STAGE", "WAITS FOR", "SERVED IN")
    waiting = [
        (
            row["request"],
            row["model"],
            f"{row['waited']:.1f} s",
            str(row["place"]),
            row["stage"],
            ", ".join(row["waits_for"]) or "-",
            about(row["estimate"]),
        )
        for row in answer["waiting"]
    ]
    parts = [table([head, *waiting]) if waiting else "nobody waits"]
    if decisions := answer["decisions"][-_SHOWN_DECISIONS:]:
        rows = [(_clock(entry["at"]), entry["what"], entry["model"], entry["why"]) for entry in decisions]
        parts.append(table([("TIME", "DECISION", "MODEL", "WHY"), *rows]))
    return "\n\n".join(parts)


def place_in_line(row: Mapping[str, Any]) -> str:
    """One row of the queue, to go on with after a few words."""
    behind = f", waits for {enumerated(row['waits_for'])}" if row["waits_for"] else ""
    return f": {row['stage']}, place {row['place']}{behind}; {about(row['estimate'])}"


# ---- a plan ---------------------------------------------------------------------------------


def plan(found: Mapping[str, Any], *, live: bool) -> str:
    """The answer of GET /api/plan; *live* when a daemon gave it, which knows the time, too."""
    rows = [("model", found["model"])]
    if live:
        rows.append(("state", found["state"]))
    if found["need"] is not None:
        rows.append(("needs", _need(found["need"])))
    fits, retry_in = "yes" if found["fits"] else "no", found.get("retry_in")
    rows += [("fits", fits), ("refused", found["why"])] if retry_in else [("fits", f"{fits}: {found['why']}")]
    if found.get("failure"):
        rows.append(("last error", found["failure"]))
    victims = [_victim(victim, live=live) for victim in found["evicts"]]
    rows += zip(["evicts", *[""] * len(victims)], victims or ["nobody"], strict=False)
    if live and retry_in:
        rows.append(("served in", f"not before it is tried again, in {about(retry_in)}"))
    elif live:
        rows.append(("served in", "never as things are" if found["estimate"] is None else about(found["estimate"])))
    return table(rows)


def _need(need: Mapping[str, Any]) -> str:
    if not need["holdings"]:
        return "not known yet"
    what = " or ".join(amounts(holding) for holding in need["holdings"])
    return f"{what} ({_SOURCES[need['source']]}{'; ' * bool(need['note'])}{need['note']})"


def _victim(victim: Mapping[str, Any], *, live: bool) -> str:
    if not live:
        return str(victim["model"])
    does = f"serves {victim['serving']}" if victim["serving"] else f"idle for {victim['idle']:.0f} s"
    match victim["when"]:
        case None:
            when = "nobody can tell when"
        case 0:
            when = "now"
        case _:
            when = f"in {about(victim['when'])}"
    return f"{victim['model']} ({victim['state']}, {does}), {when}; to load it again takes {about(victim['reload'])}"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
