"""The truth while you wait: who waits for what, what a load would put out, and memory for other programs.

The three GETs only look: they load nothing and count as no use (I12).
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Container, Iterable, Mapping
from typing import Any, Final

import attrs

from trioswap.api import Services
from trioswap.asgi import Exchange
from trioswap.config.mistakes import Mistakes, did_you_mean, found, quoted
from trioswap.config.schema import AUTO
from trioswap.config.values import SIZES, format_size, parse_size
from trioswap.errors import BadRequest, MemoryLent, MemoryTaken, ModelStuck, NoBudget, NotToBeHad, NotWaiting
from trioswap.fleet import Fleet
from trioswap.footprints import Footprints, Wish
from trioswap.forecast import amounts, as_document, seconds
from trioswap.memory import Memory, usable_sizes
from trioswap.messages import WaitView
from trioswap.request import Headers
from trioswap.routing import NAME_LIMIT

# One line of JSON, then nothing until the end: nobody on the way may wait for more.
_LINES: Final[Headers] = [
    (b"content-type", b"application/x-ndjson"),
    (b"x-accel-buffering", b"no"),
    (b"cache-control", b"no-cache"),
]
_KEYS: Final = ("memory", "device", "label")
# It goes into log lines, errors and tables.
_LONGEST_LABEL: Final = 100


# ---- who waits ------------------------------------------------------------------------------


async def queue(exchange: Exchange, services: Services) -> None:
    """GET /api/queue: every waiting request, memory that is lent, and the last decisions."""
    now = time.time()
    await exchange.json(
        200,
        {
            "waiting": [waiting_row(view) for view in services.fleet.waiting()],
            "lent": [
                {"label": loan.name, "holding": dict(loan.holding), "since": round(now - loan.age, 3)}
                for loan in services.fleet.loans()
            ],
            "decisions": [
                {"at": round(entry.at, 3), "model": entry.model, "what": entry.what, "why": entry.why}
                for entry in services.fleet.journal()
            ],
        },
    )


async def queue_of_one(exchange: Exchange, services: Services) -> None:
    """GET /api/queue/{request}: the row of one waiting request.

    Raises:
        NotWaiting: none of that id waits, or not any more.
    """
    wanted = exchange.name
    row = next((row for row in map(waiting_row, services.fleet.waiting()) if row["request"] == wanted), None)
    if row is None:
        raise NotWaiting(wanted if len(wanted) <= NAME_LIMIT else f"{wanted[:NAME_LIMIT]}...")
    await exchange.json(200, row)


def waiting_row(view: WaitView) -> dict[str, Any]:
    """One waiting request as others may see it."""
    return {
        "request": view.label or view.model,  # who waits for memory of its own is called by its own name
        "model": view.model,
        "weight": view.weight,
        "waited": seconds(view.waited),
        "place": view.place,
        "stage": view.stage,
        "waits_for": list(view.waits_for),
        "estimate": seconds(view.estimate),
    }


async def plan(exchange: Exchange, services: Services) -> None:
    """GET /api/plan/{model}: what one more request for the model would meet now."""
    name = services.routing.model(exchange.name)
    await exchange.json(200, as_document(services.fleet.forecast(name), services.fleet.need(name)))


# ---- memory for other programs --------------------------------------------------------------


async def hold(exchange: Exchange, services: Services) -> None:
    """POST /api/hold: lend memory; one line when it is there, and it is held until the client or the daemon goes.

    Raises:
        NoBudget: memory is not counted here.
        BadRequest: the body asks for something else than memory that there is.
        NotToBeHad: others hold it who do not give it back when asked.
    """
    memory = services.fleet.memory
    if memory is None:
        raise NoBudget
    asked = _read(await exchange.body(services.config.max_request_body), services, memory)
    await exchange.while_connected(lambda: _lend(exchange, services.fleet, memory, asked))


@attrs.frozen
class _Asked:
    name: str
    wish: Wish


async def _lend(exchange: Exchange, fleet: Fleet, memory: Memory, asked: _Asked) -> None:
    try:
        async with fleet.hold(asked.name, asked.wish) as holding:
            terms = {"label": asked.name, "holding": dict(holding), "environment": memory.environment(holding)}
            await exchange.start(200, _LINES)
            await exchange.write(json.dumps(terms).encode() + b"\n")
            await fleet.closing.wait()
        await exchange.finish()
    except (MemoryLent, MemoryTaken, ModelStuck) as exc:
        why = exc.message.removeprefix(f'model "{asked.name}" cannot start: ')
        raise NotToBeHad(asked.name, why) from None


def _read(body: bytes, services: Services, memory: Memory) -> _Asked:
    document = _object(body)
    sizes = usable_sizes(memory.config, memory.machine)
    mistakes = Mistakes()
    for key in document.keys() - _KEYS:
        mistakes.add((key,), f"unknown key{did_you_mean(key, _KEYS) or ', allowed are ' + ', '.join(_KEYS)}")
    label = _label(document.get("label"), services, mistakes)
    wish = Wish(_declared(document.get("memory"), sizes, mistakes), _device(document, sizes, mistakes))
    if not mistakes.lines():
        _check_size(wish, sizes, mistakes)
    if lines := mistakes.lines():
        raise BadRequest("; ".join(lines))
    return _Asked(_free_name(label, {*services.config.models, *(view.name for view in services.fleet.views())}), wish)


def _object(body: bytes) -> dict[str, Any]:
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"the body is not JSON: {exc}") from None
    if not isinstance(document, dict):
        raise BadRequest('the body must be a JSON object such as {"memory": "12GiB"}')
    return document


def _declared(value: Any, sizes: Mapping[str, int], mistakes: Mistakes) -> int | dict[str, int] | None:
    """Bytes on one device, or on each of several."""
    if value is None or value == {}:
        mistakes.add(("memory",), f"found nothing, allowed is {SIZES}, or an object of such sizes by device")
    elif isinstance(value, dict):
        for device in value:
            _check_device(("memory", device), device, sizes, mistakes)
        return {device: _size(("memory", device), size, mistakes) for device, size in value.items()}
    else:
        return _size(("memory",), value, mistakes)
    return None


def _size(path: tuple[str, ...], value: Any, mistakes: Mistakes) -> int:
    if value is None:
        mistakes.add(path, f"found null, allowed is {SIZES}")
        return 0
    try:
        return parse_size(value)
    except ValueError as exc:
        mistakes.add(path, str(exc))
        return 0


def _device(document: Mapping[str, Any], sizes: Mapping[str, int], mistakes: Mistakes) -> str | None:
    device = document.get("device")
    if device is None:
        return None
    if isinstance(document.get("memory"), dict):
        mistakes.add(("device",), "found beside an object of memory by device, allowed is one of them")
    elif isinstance(device, str):
        _check_device(("device",), device, (AUTO, *sizes), mistakes)
        return device
    else:
        mistakes.add(("device",), found(device, _one_of((AUTO, *sizes))))
    return None


def _check_device(path: tuple[str, ...], device: str, known: Iterable[str], mistakes: Mistakes) -> None:
    known = list(known)
    if device not in known:
        mistakes.add(path, found(device, _one_of(known)) + did_you_mean(device, known))


def _one_of(words: Iterable[str]) -> str:
    return " or ".join(map(quoted, words))


def _check_size(wish: Wish, sizes: Mapping[str, int], mistakes: Mistakes) -> None:
    """What is larger than the machine is a mistake, and no reason to wait."""
    ways = Footprints(tuple(sizes), {"": wish}).need("").holdings
    if not any(all(size <= sizes[device] for device, size in way.items()) for way in ways):
        most = {device: max(way.get(device, 0) for way in ways) for way in ways for device in way}
        allowed = " or ".join(f"at most {format_size(sizes[device])} on {device}" for device in most)
        mistakes.add(("memory",), f"found {amounts(ways[0])}, allowed is {allowed}")


def _label(value: Any, services: Services, mistakes: Mistakes) -> str | None:
    allowed = f"text of 1 to {_LONGEST_LABEL} printable characters, but no model's name"
    if value is None:
        return None
    right = isinstance(value, str) and 0 < len(value) <= _LONGEST_LABEL and value.isprintable()
    if not right or services.config.resolve(value) is not None:
        mistakes.add(("label",), found(value, allowed))
        return None
    return str(value)


def _free_name(label: str | None, taken: Container[str]) -> str:
    """*label*, with a number where that is needed to tell it from others."""
    numbered = (f"{label or 'hold'}-{number}" for number in itertools.count(2 if label else 1))
    return next(name for name in itertools.chain([label] if label else [], numbered) if name not in taken)
