"""Which proxy the environment names for an address: HTTP_PROXY, HTTPS_PROXY and NO_PROXY.

There is no standard.  This follows Go's rules (package golang.org/x/net/http/httpproxy),
as users of llama-swap know them, and curl's where those agree; httpx's lack address ranges
in NO_PROXY and send what is for this machine through the proxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network


def proxy_for(scheme: str, host: str, port: int, environ: Mapping[str, str]) -> str | None:
    """The URL of the proxy for what is at *host* and *port*; None: ask directly.

    Never one for this machine, by whatever name of the loopback interface it is called.
    """
    host = host.strip("[]").rstrip(".").lower()
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return None
    proxy = _variable(f"{scheme}_proxy", environ)
    excepted = _variable("no_proxy", environ).split(",")
    if not proxy or any(_covers(rule.strip().lower(), host, port, address) for rule in excepted):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _variable(name: str, environ: Mapping[str, str]) -> str:
    return (environ.get(name) or environ.get(name.upper()) or "").strip()


def _address(host: str) -> IPv4Address | IPv6Address | None:
    with suppress(ValueError):
        return ip_address(host)
    return None


def _covers(rule: str, host: str, port: int, address: IPv4Address | IPv6Address | None) -> bool:
    """Whether *rule* of NO_PROXY is about this host: `*`, a range, or an address or domain, perhaps with a port."""
    if not rule or rule == "*":
        return rule == "*"
    if "/" in rule:
        with suppress(ValueError):
            return address is not None and address in ip_network(rule, strict=False)
    name, _, wanted = rule.rpartition(":")
    if not name or not wanted.isdigit() or _address(rule) is not None:  # the colons of an IPv6 address
        name, wanted = rule, str(port)
    name = name.strip("[]").removeprefix("*")
    if wanted != str(port) or not name:
        return False
    if address is not None:
        return _address(name) == address
    return host == name or host.endswith(name if name.startswith(".") else f".{name}")
