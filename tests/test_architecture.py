"""The shape of the package: a module imports only what stands above it, and who may import what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import trioswap

PACKAGE = Path(trioswap.__file__).parent

# From the pure core to the command line.  A new module gets its place here first.
ORDER = [
    # pure: no trio, no clock, no I/O (but reading the configuration file)
    "errors.base",
    "errors.people",
    "errors.clients",
    "errors.servers",
    "errors",
    "config.mistakes",
    "config.matrix",
    "config.values",
    "config.command",
    "config.addresses",
    "config.parts",
    "config.schema",
    "config.keys",
    "config.kinds",
    "config.strict",
    "config.raw_access",
    "config.raw_hooks",
    "config.raw_model",
    "config.raw",
    "config.later",
    "config.rules",
    "config.traffic",
    "config.peers",
    "config.coexist",
    "config.routes",
    "config.settings",
    "config.patterns",
    "config.access",
    "config.model",
    "config.ports",
    "config.resolve",
    "config.checks",
    "config.scalars",
    "config.document",
    "config.yaml_errors",
    "config.toml_places",
    "config.merge",
    "config.environment",
    "config.yaml_source",
    "config.macros",
    "config.yaml_shapes",
    "config.asked",
    "config.describe",
    "config.jsonschema",
    "config.pipeline",
    "config.toml",
    "config.llamaswap_values",
    "config.llamaswap",
    "config.loading",
    "config.changes",
    "config",
    "lifecycle",
    "residency",
    "residency.groups",
    "residency.matrix",
    "gguf",
    "footprints",
    "residency.budget",
    "residency.both",
    "residency.leaving",
    "circuit",
    "messages",
    "learning",
    "turns",
    "planning",
    "outlook",
    "forecast",
    "bounds",
    "books",
    "scheduler",
    "comeback",
    "multipart",
    "request",
    "cors",
    "names",
    "jsonview",
    "jsontext",
    "filters",
    "origin",
    "access",
    "quotas",
    "sse",
    "listing",
    "symptoms",
    "logtimes",
    "openapi.schemas",
    "openapi.contracts",
    "openapi",
    # one resource each
    "guard",
    "proctree",
    "guardian",
    "spool",
    "reads",
    "devices.base",
    "devices.fdinfo",
    "devices.host",
    "devices.drm",
    "devices.nvidia",
    "devices",
    "memory",
    "logs",
    "logwriter",
    "logfiles",
    "logsetup",
    "keepalive",
    "connection",
    "upstream",
    "handshake",
    "websocket",
    "remote.probe",
    "remote.daemon",
    "remote.proxies",
    "remote.wire",
    "remote.exchange",
    "remote.health",
    "remote.peer",
    "remote",
    "inflight",
    "limits",
    "spawning",
    "output",
    "stopping",
    "hooks",
    "readiness",
    "process",
    "journal",
    "runs",
    "measuring",
    "mending",
    "group",
    "arrangement",
    "lent",
    "leftover",
    "fleet",
    "selfcheck",
    "routing",
    # the HTTP edge
    "incoming",
    "asgi",
    "asgi_websocket",
    "asked",
    "tracker",
    "events",
    "tunnel",
    "api",
    "way",
    "proxy",
    "inference",
    "sockets",
    "api.models",
    "api.logs",
    "api.admin",
    "api.scheduling",
    "api.profiles",
    "api.requests",
    "api.events",
    "routes",
    "app",
    "bounded",
    "tls",
    "listening",
    "server.applications",
    "server.http2",
    "server.secure",
    "server.websockets",
    "server.connection",
    "server",
    # top
    "notify",
    "watching",
    "state",
    "instance",
    "returning",
    "reloading",
    "daemon",
    "tinymodels",
    "engine",
    "demo",
    "init.discover",
    "init.models",
    "init.projectors",
    "init.names",
    "init.fitting",
    "init.write",
    "init.save",
    "init",
    "convert.comments",
    "convert.limits",
    "convert.spelling",
    "convert.writing",
    "convert.toml_text",
    "convert.yaml_text",
    "convert",
    "simulation",
    "simulation.workload",
    "simulation.traces",
    "simulation.records",
    "simulation.box",
    "simulation.machine",
    "simulation.figures",
    "simulation.contenders",
    "simulation.configured",
    "simulation.compare",
    "simulation.report",
    "simulation.plot",
    "whatif",
    "telling",
    "borrow",
    "firstprocess",
    "cli.base",
    "cli.offline",
    "cli.serving",
    "cli.talking",
    "cli",
    "__main__",
]
PURE = ORDER[: ORDER.index("guard")]
ONLY_IMPORTER = {
    "httpx": "remote",
    "httpcore": "remote",
    "hypercorn": "server",
    "click": "cli",
    "xllamacpp": "engine",
    "gguf": "tinymodels",
    "matplotlib": "simulation.plot",
}


def path_of(name: str) -> Path:
    parts = name.split(".")
    package = PACKAGE.joinpath(*parts) / "__init__.py"
    return package if package.exists() else PACKAGE.joinpath(*parts).with_suffix(".py")


def imports(name: str) -> set[str]:
    """Full names of what a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path_of(name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(name: str) -> set[str]:
    """Modules of this package that a module imports."""
    wanted = {full.removeprefix("trioswap.") for full in imports(name) if full.startswith("trioswap.")}
    parents = {full.rpartition(".")[0] for full in wanted}
    return {full for full in wanted | parents if full in ORDER}


def test_every_module_has_a_place():
    """The list above is complete and names nothing that is gone."""
    names = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    } - {"__init__"}

    assert names == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_up(name):
    """A module imports only modules that stand above it."""
    below = {other for other in ours(name) if ORDER.index(other) >= ORDER.index(name)}

    assert not below - ({name} if path_of(name).name == "__init__.py" else set())


@pytest.mark.parametrize("name", PURE)
def test_decisions_are_pure(name):
    """The brain knows neither Trio nor a clock nor a socket."""
    forbidden = ("trio.", "time.", "socket.", "subprocess.", "os.", "logging.", "random.")

    assert not {full for full in imports(name) if f"{full}.".startswith(forbidden)}


@pytest.mark.parametrize("library", ONLY_IMPORTER)
def test_a_library_has_one_importer(library):
    """What may change under our feet is behind one module, or one package."""
    importers = {name for name in ORDER if any(full.split(".")[0] == library for full in imports(name))}

    assert {name for name in importers if f"{name}.".startswith(f"{ONLY_IMPORTER[library]}.")} == importers


def test_modules_stay_small():
    """A module of more than 400 lines is two ideas."""
    long = {name: lines for name in ORDER if (lines := path_of(name).read_text().count("\n")) > 400}

    assert not long
