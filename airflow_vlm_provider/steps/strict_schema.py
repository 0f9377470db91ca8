"""JSON schemas of pydantic models in the form that every engine takes.

OpenAI's strict mode wants every property required, no others allowed, and knows few of the other keywords; vLLM and
xgrammar know more. What is taken out here decides nothing, or is checked again by pydantic. What can't be said in that
form, such as objects with free keys, stays as it is: an endpoint that refuses it then answers freely.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NOTHING = frozenset({"title", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"})
_LENGTHS = frozenset({"minLength", "maxLength"})
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})
# A longer text may well hold quotes and line ends, which the pattern has to leave out.
_BOUNDED = 200

Schema = dict[str, Any]


def strict_schema(schema: Mapping[str, Any]) -> Schema:
    """What is asked for, from the JSON schema of what is accepted; ``$defs`` and references to them are kept."""
    definitions: Mapping[str, Any] = schema.get("$defs", {})
    root: Mapping[str, Any] = {name: each for name, each in schema.items() if name != "$defs"}
    if "$ref" in root:  # the root of a model that holds itself; strict mode wants an object there
        root = _definition(definitions, root["$ref"])
    strict = _strict(root, definitions, ())
    if used := _used(strict, {name: _strict(each, definitions, ()) for name, each in definitions.items()}):
        strict["$defs"] = used
    return strict


def column_schema(schema: Mapping[str, Any]) -> Schema:
    """What is written, from the JSON schema of what a model is dumped to: no references, and null goes without saying."""
    return _column(schema, schema.get("$defs", {}), ())


def _strict(schema: Mapping[str, Any], definitions: Mapping[str, Any], within: tuple[str, ...]) -> Schema:
    """:param within: References that were put in their place around this schema."""
    if "$ref" in schema:
        beside = {name: each for name, each in schema.items() if name not in _NOTHING and name != "$ref"}
        if not beside or schema["$ref"] in within:
            return {"$ref": schema["$ref"]}
        # Strict mode allows nothing beside a reference, and a description is worth a copy.
        copied = {**_definition(definitions, schema["$ref"]), **beside}
        return _strict(copied, definitions, (*within, schema["$ref"]))
    strict: Schema = {}
    for name, value in schema.items():
        if name in _NOTHING or name in _LENGTHS or (name == "format" and value not in _FORMATS):
            continue
        if name in ("properties", "patternProperties"):
            strict[name] = {key: _strict(each, definitions, within) for key, each in value.items()}
        elif name in ("items", "additionalProperties") and isinstance(value, Mapping):
            strict[name] = _strict(value, definitions, within)
        elif name in ("anyOf", "oneOf", "allOf", "prefixItems"):
            # Which one of several it is, pydantic finds out.
            strict["anyOf" if name == "oneOf" else name] = [
                _strict(each, definitions, within) for each in value
            ]
        else:
            strict[name] = value
    if "properties" in strict:
        strict["required"] = list(strict["properties"])
        strict["additionalProperties"] = False
    if (
        "pattern" not in schema
        and "format" not in strict
        and schema.get("maxLength", _BOUNDED + 1) <= _BOUNDED
    ):
        bounds = f"{{{schema.get('minLength', 0)},{schema['maxLength']}}}"
        # Strict mode knows no maxLength; and without a bound, an answer that goes astray is cut and lost.
        strict["pattern"] = rf'^[^"\\\x00-\x1f]{bounds}$'
    return strict


def _used(strict: Any, definitions: Mapping[str, Schema]) -> dict[str, Schema]:
    """The definitions that are referred to, also from one another."""
    used: dict[str, Schema] = {}
    left = [strict]
    while left:
        each = left.pop()
        if isinstance(each, Mapping):
            left.extend(each.values())
            reference = each.get("$ref")
            name = _name(reference) if isinstance(reference, str) else ""
            if name in definitions and name not in used:
                used[name] = definitions[name]
                left.append(definitions[name])
        elif isinstance(each, list):
            left.extend(each)
    return used


def _column(schema: Mapping[str, Any], definitions: Mapping[str, Any], within: tuple[str, ...]) -> Schema:
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in within:
            return {}
        return _column(_definition(definitions, reference), definitions, (*within, reference))
    if "anyOf" in schema or "oneOf" in schema:
        kinds = [each for each in schema.get("anyOf", schema.get("oneOf")) if each.get("type") != "null"]
        return _column(kinds[0], definitions, within) if len(kinds) == 1 else {}
    kept: Schema = {"type": schema["type"]} if "type" in schema else {}
    if isinstance(schema.get("items"), Mapping):
        kept["items"] = _column(schema["items"], definitions, within)
    if "properties" in schema:
        kept["properties"] = {
            name: _column(each, definitions, within) for name, each in schema["properties"].items()
        }
    return kept


def _definition(definitions: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = definitions[_name(reference)]
    return found


def _name(reference: str) -> str:
    return reference.removeprefix("#/$defs/")
