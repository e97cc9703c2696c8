"""The OpenAPI document: valid, complete, and made from the table of routes alone."""

from __future__ import annotations

import inspect
import json
import re

import attrs
import jsonschema
import pytest
from daemons import daemon, fetch, scripted
from openapi_spec_validator import OpenAPIV31SpecValidator
from referencing.exceptions import PointerToNowhere

from trioswap import __version__, errors
from trioswap.access import Scope
from trioswap.errors import TrioswapError
from trioswap.openapi import ANY, document, methods, statuses
from trioswap.openapi.contracts import FLAGS, TAGS, Contract
from trioswap.openapi.schemas import SCHEMAS
from trioswap.routes import ROUTES, Route, find

DOCUMENT = document(ROUTES, __version__)
OPERATIONS = {
    (method.upper(), path): operation for path, item in DOCUMENT["paths"].items() for method, operation in item.items()
}
SHOWN = [(method, route) for route in ROUTES for method in methods(route)]


def shown(method: str, route: Route) -> dict:
    return OPERATIONS[method, route.path]


def names(rows) -> list[str]:
    return [f"{method} {route.path}" for method, route in rows]


each = pytest.mark.parametrize(("method", "route"), SHOWN, ids=names(SHOWN))


def responses(operation: dict) -> dict[str, dict]:
    """By status, references followed."""
    found = {}
    for status, response in operation["responses"].items():
        name = response.get("$ref", "").removeprefix("#/components/responses/")
        found[status] = DOCUMENT["components"]["responses"][name] if name else response
    return found


# ---- the whole ---------------------------------------------------------------------------------


def test_it_is_valid():
    """By the meta schema of OpenAPI 3.1, with every reference found, and every name of an operation only once."""
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_it_is_json():
    """Plain values, which survive the way through JSON unchanged."""
    assert json.loads(json.dumps(DOCUMENT)) == DOCUMENT


def test_every_route_is_in_it_and_nothing_else():
    """One operation for a method; for a route of all methods the usual five."""
    assert names(SHOWN) == list(dict.fromkeys(names(SHOWN)))
    assert set(OPERATIONS) == {(method, route.path) for method, route in SHOWN}
    assert {method for method, route in SHOWN if route.method == ANY} == {"GET", "POST", "PUT", "PATCH", "DELETE"}


def test_what_it_lists_is_dispatched_so():
    """Each operation's path, with something in the place of its parameter, leads to its own row."""
    for method, route in SHOWN:
        path = re.sub(r"\{.+?\}", "x", route.path).encode()
        assert find(method, path)[0] is route


def test_every_schema_is_used():
    """One that nothing refers to is left over."""
    used = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(DOCUMENT)))

    assert used == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_schemas(name):
    """Of JSON Schema 2020-12, and no field is demanded that is not described."""
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    assert set(SCHEMAS[name].get("required", ())) <= set(SCHEMAS[name].get("properties", ()))


def test_every_way_to_show_a_key_is_in_it():
    """As `access` reads them, and none where no key is configured."""
    schemes = DOCUMENT["components"]["securitySchemes"]

    assert {name for way in DOCUMENT["security"] for name in way} == set(schemes)
    assert DOCUMENT["security"][-1] == {}
    assert {scheme.get("name", scheme.get("scheme")) for scheme in schemes.values()} == {
        "bearer",
        "basic",
        "x-api-key",
        "api-key",
    }


def test_every_error_that_clients_can_meet_is_in_it():
    """Each status of our classes, in both shapes; all but bugs of ours."""
    classes = [error for _, error in inspect.getmembers(errors, inspect.isclass) if issubclass(error, TrioswapError)]
    clients = [error for error in classes if "people" not in error.__module__]
    met = {error.status for error in clients} - {500}
    named = DOCUMENT["components"]["responses"]
    used = {int(status) for operation in OPERATIONS.values() for status in operation["responses"] if status.isdigit()}

    assert used - {200, 301, 308} == met - {405}  # which is for methods that are not listed
    assert len(named) == 2 * len(met)
    for name, response in named.items():
        schema = response["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert schema == ("AnthropicError" if name.startswith("Anthropic") else "Error")


# ---- each operation ----------------------------------------------------------------------------


@each
def test_every_operation_says_what_it_is(method, route):
    """A sentence and a family."""
    operation = shown(method, route)

    assert re.fullmatch(r"[A-Z].*\.", operation["summary"])
    assert operation["tags"] == [route.contract.tag]
    assert route.contract.tag in TAGS
    assert re.fullmatch(r"[a-z]+([A-Z][A-Za-z0-9]*)*", operation["operationId"])


@each
def test_who_may_ask_is_told(method, route):
    """Where a key can be asked for, 401 and 403 are listed; where not, neither is, and no key."""
    operation = shown(method, route)
    found = responses(operation)

    assert operation["x-trioswap-scope"] == route.scope.value
    assert {"401", "403"} & set(found) == (set() if route.scope is Scope.OPEN else {"401", "403"})
    assert operation.get("security") == ([] if route.scope is Scope.OPEN else None)
    if "401" in found:
        assert "WWW-Authenticate" in found["401"]["headers"]


@each
def test_answers_are_told(method, route):
    """A success, every error in JSON with its shape, the id in every header, and when to come again."""
    found = responses(shown(method, route))
    anthropic = "/messages" in route.path

    assert {"200", "301", "308"} & set(found)
    assert {int(status) for status in found if status.isdigit()} - {200, 301, 308} == set(statuses(route))
    for status in map(str, statuses(route)):
        schema = found[status]["content"]["application/json"]["schema"]["$ref"]
        assert schema.endswith("/AnthropicError" if anthropic else "/Error")
        assert "X-Request-Id" in found[status]["headers"]
        assert ("Retry-After" in found[status]["headers"]) == (status in ("429", "503"))
    if "200" in found:
        assert found["200"]["content"]
        assert "X-Request-Id" in found["200"]["headers"]


@each
def test_parameters_are_told(method, route):
    """The one of the path, with whether it takes slashes, and those of the query: flags need no value."""
    parameters = shown(method, route).get("parameters", [])
    in_path = [about for about in parameters if about["in"] == "path"]
    in_query = {about["name"]: about for about in parameters if about["in"] == "query"}

    assert [about["name"] for about in in_path] == re.findall(r"\{(.+?)\}", route.path)
    for about in in_path:
        assert ("slashes" in about["description"]) == route.path.endswith("}")
    assert set(in_query) == set(route.contract.query)
    for name, about in in_query.items():
        assert about["required"] == (name not in FLAGS)
        assert about.get("allowEmptyValue", False) == (name in FLAGS)


@each
def test_models_are_named_where_a_model_is_asked(method, route):
    """In the query of a GET, else in the body, in which whatever else there is may stand, too."""
    operation = shown(method, route)
    if operation["tags"] != ["inference"]:
        return
    if method == "GET":
        assert [about["name"] for about in operation["parameters"]] == ["model"]
        assert "requestBody" not in operation
        return
    [(media, content)] = operation["requestBody"]["content"].items()
    schema = SCHEMAS[content["schema"]["$ref"].rpartition("/")[2]]
    is_upload = route.path in (
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/images/edits",
        "/v1/images/variations",
    )
    assert media == ("multipart/form-data" if is_upload else "application/json")
    assert schema["required"] == ["model"]
    jsonschema.validate({"model": "m", "messages": [], "new": 1}, schema)
    for wrong in ({}, {"model": ""}, {"model": 1}, []):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


# ---- new rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [field.name for field in attrs.fields(Route)])
def test_a_row_without_a_field_is_no_row(field):
    """A new route cannot forget what the document needs."""
    row = attrs.asdict(ROUTES[0], recurse=False)
    del row[field]

    with pytest.raises(TypeError, match=field):
        Route(**row)


def test_a_new_row_is_in_it():
    """The document knows of no route by itself."""
    new = attrs.evolve(
        ROUTES[0], method="DELETE", path="/new/{id}/thing", contract=Contract("about", {"text/plain": ""}, fails=(409,))
    )
    [(path, item)] = document([new], "1")["paths"].items()

    assert (path, list(item)) == ("/new/{id}/thing", ["delete"])
    assert list(item["delete"]["responses"]) == ["200", "400", "401", "403", "409"]
    assert item["delete"]["operationId"] == "deleteNewByIdThing"


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"path": "/new/{thing}"}, KeyError),
        ({"contract": Contract("about", {}, fails=(418,))}, PointerToNowhere),
        ({"contract": Contract("about", {"application/json": "Nothing"})}, PointerToNowhere),
    ],
)
def test_what_nobody_explains_is_a_mistake(change, missing):
    """A parameter without a text, a status without a meaning, a schema that is not there."""
    with pytest.raises(missing):
        OpenAPIV31SpecValidator(document([attrs.evolve(ROUTES[0], **change)], "1")).validate()


# ---- over HTTP ---------------------------------------------------------------------------------


async def test_it_is_served_to_anybody():
    """Without a key, as JSON, and HEAD tells its length; it loads nothing."""
    async with daemon({"a": scripted()}, api_keys=["secret-key"]) as served:
        got = await fetch(served.port, "GET", "/api/openapi.json")
        head = await fetch(served.port, "HEAD", "/api/openapi.json")
        assert (got.status, got["content-type"]) == (200, "application/json")
        assert got.json() == DOCUMENT
        assert head["content-length"] == got["content-length"]
        assert "secret-key" not in got.text
        assert (await fetch(served.port, "GET", "/running", b"", ("x-api-key", "secret-key"))).json() == {"running": []}
