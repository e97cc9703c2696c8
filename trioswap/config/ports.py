"""Which port `${PORT}` is, for each model that uses it (core reference 1.5).

They follow each other in the order of the models' names; but where a configuration takes
the place of an earlier one, a model keeps the port its server may be listening on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import attrs

from trioswap.config.addresses import MAX_PORT, Address, UnixAddress, parse_listen, parse_proxy
from trioswap.config.mistakes import Mistakes, found
from trioswap.config.raw import RawConfig
from trioswap.config.schema import START_PORT, Config

_HERE: Final = "127.0.0.1"


def start_port(raw: RawConfig) -> int:
    """The lowest port that is given out."""
    return START_PORT if raw.start_port is None else raw.start_port


def give_ports(names: Sequence[str], raw: RawConfig, mistakes: Mistakes, keep: Config | None) -> dict[str, int]:
    """A port for each of *names*, which are sorted: no two the same, and none below `start_port`.

    Those that have one in *keep*, the configuration before, keep it.  The others get what
    nothing in *keep* has, for what is removed may still be listening there while it drains;
    only where all ports are in use do they get the port of a removed model.  Another
    `start_port` than before is a wish for other ports: nobody keeps any.
    """
    first = start_port(raw)
    last = first + max(len(names), 1) - 1
    if not 1 <= first <= MAX_PORT:
        mistakes.add(("start_port",), found(first, f"1 to {MAX_PORT}"))
    elif last > MAX_PORT:
        need = f"found {first}, from which {len(names)} models need the ports up to {last}"
        mistakes.add(("start_port",), f"{need}, allowed is 1 to {MAX_PORT}")
    if mistakes.about(("start_port",)):
        return {name: START_PORT + index for index, name in enumerate(names)}
    return (
        _beside(keep, names, raw, first) if keep is not None else dict(zip(names, range(first, last + 1), strict=False))
    )


def _beside(keep: Config, names: Sequence[str], raw: RawConfig, first: int) -> dict[str, int]:
    """The ports of *names* after those of *keep*.

    Nobody must be told of a clash that only comes from ports being kept: what the file says
    in figures is stepped aside for.  A port that such figures met before, too, is kept:
    models of a swap group may share one.
    """
    used = {name: model.port for name, model in keep.models.items() if model.port is not None}
    written = _written(raw.listen, ((model.proxy, None) for model in (raw.models or {}).values()))
    before = _written(keep.listen, ((model.proxy, model.port) for model in keep.models.values()))
    given = {
        name: used[name]
        for name in names
        if keep.start_port == first and name in used and used[name] not in written - before
    }
    kept, barred = frozenset(given.values()), written | before
    free = _once(
        port
        for avoided in (kept | barred | {*used.values()}, kept | barred, kept)
        for port in range(first, MAX_PORT + 1)
        if port not in avoided
    )
    return given | {name: next(free) for name in names if name not in given}


def _once(ports: Iterable[int]) -> Iterator[int]:
    """Each of *ports* where it first comes."""
    seen: set[int] = set()
    for port in ports:
        if port not in seen:
            seen.add(port)
            yield port


def _written(listen: str | None, proxies: Iterable[tuple[str | None, int | None]]) -> set[int]:
    """Ports of this machine that a file itself names: where it listens, and of *proxies* that are not at their port."""
    ports = set() if listen is None else _port_here(listen, parse_listen)
    for proxy, given in proxies:
        if proxy is not None:
            ports |= _port_here(proxy, parse_proxy) - {given}
    return ports


def _port_here(text: str, parse: Callable[[str], Address | UnixAddress]) -> set[int]:
    """The port of *text*, if a server on this machine would be in its way."""
    try:
        address = parse(text)
    except ValueError:  # it is told as a mistake elsewhere, or there is a placeholder in it
        return set()
    if isinstance(address, UnixAddress) or not address.overlaps(attrs.evolve(address, host=_HERE)):
        return set()
    return {address.port}
