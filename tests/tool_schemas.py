"""Varied JSON schemas of tools, for the tests of constrained calls. Every text and list in them is bounded, so that a
model of random weights gets through."""

from __future__ import annotations

import random

SHORT = {"type": "string", "maxLength": 6}
LEAVES = [
    SHORT,
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[a-z]{2,4}$"},
    {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "time"},
    {"type": "string", "maxLength": 4, "format": "phone number"},  # no format of JSON schema
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 7},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    {"enum": ["celsius", "fahrenheit", "größer", 3, None, {"a": [1]}]},
    {"const": 'only " this \\ one\n'},
    {"anyOf": [{"type": "boolean"}, SHORT]},
    {"oneOf": [{"type": "integer", "minimum": 1, "maximum": 3}, {"type": "null"}]},
    {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 30}]},
    {"$ref": "#/$defs/point"},
]
DEFS = {
    "point": {
        "type": "object",
        "properties": {
            "x": {"type": "integer", "minimum": 0, "maximum": 9},
            "y": {"type": "integer", "minimum": 0, "maximum": 9},
        },
        "required": ["x", "y"],
        "additionalProperties": False,
    }
}
NAMES = ["a", "city", "größe", "two words", "x-y", "q.r", "$money", 'quo"te']


def _schema(rng: random.Random, depth: int) -> dict:
    kind = rng.random()
    if depth == 0 or kind < 0.6:
        return rng.choice(LEAVES)
    if kind < 0.75:
        few = {"minItems": rng.randint(0, 1), "maxItems": rng.randint(1, 3)}
        return {"type": "array", "items": _schema(rng, depth - 1)} | few
    if kind < 0.8:
        items = [_schema(rng, depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": 2}
    return _object(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> dict:
    names = rng.sample(NAMES, rng.randint(0, 4))
    properties = {name: _schema(rng, depth) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def varied_schemas(count: int, seed: int = 0) -> list[dict]:
    """Schemas of objects; every one of LEAVES occurs within the first of them."""
    rng = random.Random(seed)
    found = []
    for n in range(count):
        schema = _object(rng, 2) | {"$defs": DEFS}
        schema["properties"]["leaf"] = LEAVES[n % len(LEAVES)]
        schema["required"] = [*schema["required"], "leaf"]
        found.append(schema)
    return found
