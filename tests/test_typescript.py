"""Tool declarations as TypeScript: every rule of the published encoder with its text, and what it cannot express."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kimi_native.chat.template import render_text
from kimi_native.chat.typescript import typescript_tools


def tool(parameters: Any = None, **function: Any) -> dict:
    function = {"name": "f", **function}
    return {
        "type": "function",
        "function": function if parameters is None else {**function, "parameters": parameters},
    }


def sorted_keys(value: Any) -> Any:
    return json.loads(json.dumps(value, sort_keys=True))


def body(*tools: dict) -> str | None:
    """What stands inside the namespace."""
    text = typescript_tools(sorted_keys(list(tools)))
    if text is None:
        return None
    begin, end = "# Tools\n\n## functions\nnamespace functions {\n", "\n}\n"
    assert text.startswith(begin)
    assert text.endswith(end)
    return text[len(begin) : -len(end)]


def properties(**schemas: Any) -> dict:
    return {"type": "object", "properties": schemas}


WEATHER = tool(
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "City name"},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
            "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
        },
        "required": ["city"],
    },
    name="get_weather",
    description="Get weather information.",
)
WEATHER_TEXT = (
    "# Tools\n\n## functions\nnamespace functions {\n// Get weather information.\ntype get_weather = (_: {\n"
    "  // City name\n  city: string,\n  // maximum: 7, minimum: 1\n  days?: number,\n"
    '  // Default: "c"\n  unit?: "c" | "f"\n}) => any;\n}\n'
)


def test_typescript_gives_the_published_example():
    assert typescript_tools(sorted_keys([WEATHER])) == WEATHER_TEXT
    prompt = render_text([{"role": "user", "content": "Hi"}], format="k2.5", tools=[WEATHER])
    assert prompt == (
        f"<|im_system|>tool_declare<|im_middle|>{WEATHER_TEXT}<|im_end|>"
        "<|im_user|>user<|im_middle|>Hi<|im_end|><|im_assistant|>assistant<|im_middle|><think>"
    )


# ---- one property --------------------------------------------------------------------------------------------------

ONE_PROPERTY = {
    "string": ({"type": "string"}, "x?: string"),
    "integer is number": ({"type": "integer"}, "x?: number"),
    "boolean": ({"type": "boolean"}, "x?: boolean"),
    "null": ({"type": "null"}, "x?: null"),
    "an unknown type stays": ({"type": "file"}, "x?: file"),
    "a type that is no name": ({"type": None, "maximum": 1}, "x?: None"),
    "empty schema": ({}, "x?: any"),
    "true": (True, "x?: any"),
    "false": (False, "x?: null"),
    "empty object": ({"type": "object"}, "x?: {}"),
    "object without properties": ({"type": "object", "properties": {}}, "x?: {}"),
    "const with a type": ({"type": "string", "const": "a"}, "x?: string"),
    # comments
    "description": ({"type": "string", "description": "d"}, "// d\n  x?: string"),
    "two lines, one empty": (
        {"type": "string", "description": "a\n\nb"},
        "// a\n\n  // b\n  x?: string",
    ),
    "empty description": ({"type": "string", "description": ""}, "x?: string"),
    "null description": ({"type": "string", "description": None}, "x?: string"),
    "string constraints": (
        {"type": "string", "pattern": "^a", "minLength": 1, "maxLength": 9, "format": "date"},
        "// maxLength: 9, minLength: 1, pattern: ^a\n  x?: string",
    ),
    "number constraints": (
        {"type": "number", "minimum": 0.5, "maximum": 1e16, "multipleOf": 2, "maxLength": 3},
        "// maximum: 1e+16, minimum: 0.5\n  x?: number",
    ),
    "array constraints": (
        {"type": "array", "minItems": 1, "maxItems": 2, "uniqueItems": True},
        "// maxItems: 2, minItems: 1\n  x?: Array<any>",
    ),
    "no constraints of an enum": ({"type": "string", "enum": ["a"], "minLength": 1}, 'x?: "a"'),
    "description, constraints, default": (
        {"type": "integer", "default": 3, "maximum": 9, "description": "d"},
        "// d\n  // maximum: 9\n  // Default: 3\n  x?: number",
    ),
    # defaults
    "text default": ({"type": "string", "default": 'é"\n'}, '// Default: "é\\"\\n"\n  x?: string'),
    "boolean default": ({"type": "boolean", "default": False}, "// Default: False\n  x?: boolean"),
    "float default": ({"type": "number", "default": 1e-7}, "// Default: 1e-07\n  x?: number"),
    "list default": (
        {"type": "array", "default": [1, True, None]},
        "// Default: [1, true, null]\n  x?: Array<any>",
    ),
    "null default": ({"type": "string", "default": None}, "x?: string"),
    # choices
    "enum without a type": ({"enum": ["a", 1, 2.5, True, None]}, 'x?: "a" | 1 | 2.5 | True | None'),
    "enum text is not escaped": ({"enum": ['a"\\b']}, 'x?: "a"\\b"'),
    "enum or null": ({"type": ["string", "null"], "enum": ["a", None]}, 'x?: "a" | None'),
    "enum of one type in a list": ({"type": ["integer"], "enum": [1]}, "x?: 1"),
    "true is an integer": ({"type": "integer", "enum": [True]}, "x?: True"),
    "empty enum": ({"enum": []}, "x?: "),
    "type list": (
        {"type": ["string", "integer", "null", "object", "array", "boolean"]},
        "x?: string | number | null | {} | Array<any> | boolean",
    ),
    "anyOf": (
        {"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["a"]}, {}, {"type": "null"}]},
        'x?: number | "a" | any | null',
    ),
    "anyOf with an object": (
        {"anyOf": [properties(a={"type": "string"}), {"type": "null"}], "description": "d"},
        "// d\n  x?: {\n    a?: string\n  } | null",
    ),
    "anyOf before enum and type": (
        {"type": "object", "enum": [1], "anyOf": [{"type": "string"}]},
        "x?: string",
    ),
    # arrays
    "array": ({"type": "array", "items": {"type": "string"}}, "x?: Array<string>"),
    "array of anything": ({"type": "array", "items": {}}, "x?: Array<any>"),
    "items false": ({"type": "array", "items": False}, "x?: Array<any>"),
    "array of arrays": (
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
        "x?: Array<Array<number>>",
    ),
    "array of commented items": (
        {"type": "array", "items": {"type": "string", "description": "d", "maxLength": 2}},
        "x?: Array<\n    // d\n    // maxLength: 2\n    string\n  >",
    ),
    "array of objects": (
        {"type": "array", "items": properties(a={"type": "string"})},
        "x?: Array<{\n    a?: string\n  }>",
    ),
    "array of commented objects": (
        {"type": "array", "items": {**properties(a={"type": "string"}), "description": "d"}},
        "x?: Array<\n    // d\n    {\n      a?: string\n    }\n  >",
    ),
    "array of commented arrays": (
        {"type": "array", "items": {"type": "array", "items": {"type": "null"}, "maxItems": 1}},
        "x?: Array<\n    // maxItems: 1\n    Array<null>\n  >",
    ),
    # further properties
    "any further": (
        {"type": "object", "additionalProperties": True},
        "x?: {\n    [k: string]: any\n  }",
    ),
    "none further": (
        {**properties(a={"type": "string"}), "additionalProperties": False},
        "x?: {\n    a?: string,\n    [k: string]: never\n  }",
    ),
    "further of a type": (
        {"type": "object", "additionalProperties": {"type": "integer", "description": "unseen"}},
        "x?: {\n    [k: string]: number\n  }",
    ),
    "further objects": (
        {"type": "object", "additionalProperties": properties(a={"type": "string"})},
        "x?: {\n    [k: string]: {\n      a?: string\n    }\n  }",
    ),
    "nothing said of further": ({"type": "object", "additionalProperties": None}, "x?: {}"),
    # strange, and taken as it is
    "required text": (
        {**properties(a={}, ab={}), "required": "a"},
        "x?: {\n    a: any,\n    ab?: any\n  }",
    ),
}


@pytest.mark.parametrize("name", ONE_PROPERTY)
def test_typescript_of_a_property(name):
    schema, text = ONE_PROPERTY[name]
    first = "" if text.startswith("\n") else "  "
    assert body(tool(properties(x=schema))) == f"type f = (_: {{\n{first}{text}\n}}) => any;"


INEXPRESSIBLE = {
    "oneOf": {"oneOf": [{"type": "string"}]},
    "allOf": {"allOf": [{"type": "string"}]},
    "const without a type": {"const": 1},
    "description alone": {"description": "d"},
    "definitions of an older draft": {"$ref": "#/definitions/A"},
    "unknown definition": {"$ref": "#/$defs/A"},
    "reference that is no text": {"$ref": 1},
    "reference by address": {"$ref": "https://example.com/schema"},
    "enum of another type": {"type": "string", "enum": [1]},
    "float among integers": {"type": "integer", "enum": [1.0]},
    "enum of two types": {"type": ["string", "integer"], "enum": [1]},
    "enum of three types": {"type": ["string", "integer", "null"], "enum": [1]},
    "enum that is a number": {"enum": 1},
    "unknown type in a list": {"type": ["string", "file"]},
    "number in a type list": {"type": [1]},
    "anyOf that is no list": {"anyOf": 1},
    "anyOf with a type that is no name": {"anyOf": [{"type": "string"}, {"type": None}]},
    "commented items of a type that is no name": {
        "type": "array",
        "items": {"type": None, "description": "d"},
    },
    "bad member of anyOf": {"anyOf": [{"type": "string"}, {"const": 1}]},
    "description that is no text": {"type": "string", "description": 1},
    "list of items": {"type": "array", "items": [{"type": "string"}]},
    "bad items": {"type": "array", "items": {"const": 1}},
    "schema that is text": "string",
    "schema that is null": None,
    "properties that are a list": {"type": "object", "properties": ["a"]},
    "required that is true": {**properties(a={}), "required": True},
    "required lists": {**properties(a={}), "required": [["a"]]},
    "further that is text": {"type": "object", "additionalProperties": "string"},
    "further that is bad": {"type": "object", "additionalProperties": {"const": 1}},
    "$defs that are a list": {"type": "object", "$defs": ["a"]},
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_typescript_falls_back_to_json(name):
    bad = tool(properties(x=INEXPRESSIBLE[name]))
    assert body(bad) is None
    assert body(WEATHER, bad) is None
    prompt = render_text([{"role": "user", "content": "Hi"}], format="k2.5", tools=[bad])
    expected = json.dumps([bad], sort_keys=True, separators=(",", ":"))
    assert prompt.startswith(f"<|im_system|>tool_declare<|im_middle|>{expected}<|im_end|>")


def test_typescript_falls_back_where_schemas_nest_too_deep():
    schema: dict = {"type": "string"}
    for _ in range(600):
        schema = {"type": "array", "items": schema}
    assert typescript_tools([tool(properties(x=schema))]) is None


# ---- functions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters", [None, {}, {"type": "object"}, {"type": "object", "properties": {}}]
)
def test_typescript_of_a_function_without_parameters(parameters):
    assert body(tool(parameters)) == "type f = (_: {}) => any;"


def test_typescript_orders_required_before_optional_by_name():
    schemas = {name: {"type": "string"} for name in ("b", "ä", "a", "Z", "c")}
    text = body(tool({**properties(**schemas), "required": ["c", "b", "missing"]}))
    assert text == (
        "type f = (_: {\n  b: string,\n  c: string,\n  Z?: string,\n  a?: string,\n  ä?: string\n}) => any;"
    )


def test_typescript_of_nested_objects():
    inner = {**properties(b={"type": "string", "description": "d"}), "required": ["b"]}
    outer = {**properties(a=inner), "description": "o"}
    assert body(tool(properties(x=outer))) == (
        "type f = (_: {\n  // o\n  x?: {\n    a?: {\n      // d\n      b: string\n    }\n  }\n}) => any;"
    )


def test_typescript_description_of_a_function():
    assert body(tool(description="a\n\nb")) == "// a\n\n// b\ntype f = (_: {}) => any;"
    assert body(tool(description="")) == body(tool(description=None)) == body(tool())
    assert body(tool({**properties(), "description": "unseen"})) == body(tool())
    assert body(tool(description=1)) is None
    assert body(tool([1])) is None


def test_typescript_leaves_out_tools_of_another_type():
    plugin = {"type": "_plugin", "name": "p"}
    assert body(plugin, tool(name="g"), {"function": {}}, {"type": "function"}, tool()) == (
        "type g = (_: {}) => any;\ntype f = (_: {}) => any;"
    )
    assert body(plugin) is None
    assert body({"type": "function", "function": {"description": "d"}}) == (
        "// d\ntype function = (_: {}) => any;"
    )


def test_typescript_takes_a_tool_that_is_text_for_no_function():
    assert body({"type": "function", "function": "f"}) is None


# ---- definitions ---------------------------------------------------------------------------------------------------


def test_typescript_definitions_become_interfaces():
    schema = {
        **properties(x={"$ref": "#/$defs/B", "description": "d", "default": {"a": 1}}),
        "$defs": {
            "B": {**properties(a={"$ref": "#/$defs/A"}), "description": "a\nb"},
            "A": {"type": "string", "enum": ["u"], "minLength": 1},
        },
    }
    assert body(tool(schema, description="text")) == (
        'interface A "u"\n// a\n// b\ninterface B {\n  a?: A\n}\n// text\n'
        'type f = (_: {\n  // d\n  // Default: {"a": 1}\n  x?: B\n}) => any;'
    )


def test_typescript_self_reference_names_the_parameters():
    schema = {
        **properties(
            b={"type": "string"}, c={"$ref": "#"}, a={"type": "array", "items": {"$ref": "#"}}
        ),
        "required": ["c"],
        "additionalProperties": False,
    }
    assert body(tool(schema, description="d")) == (
        "interface parameters {\n  a?: Array<parameters>,\n  b?: string,\n  c: parameters\n}\n// d\n"
        "type f = (_: parameters) => any;"
    )


def test_typescript_self_reference_writes_no_further_properties():
    schema = {"type": "object", "additionalProperties": {"$ref": "#"}}
    assert body(tool(schema)) == "interface parameters {}\ntype f = (_: parameters) => any;"


@pytest.mark.parametrize(
    "further", ["no schema", {"enum": 1}, properties(b={"type": "null", "description": 1})]
)
def test_typescript_unwritable_further_properties_harm_only_where_written(further):
    schema = {**properties(a={"$ref": "#"}), "additionalProperties": further}
    assert body(tool(schema)) == (
        "interface parameters {\n  a?: parameters\n}\ntype f = (_: parameters) => any;"
    )
    assert body(tool({**properties(a={}), "additionalProperties": further})) is None
    assert body(tool(properties(a={"$ref": "#"}, b=schema))) is None


def test_typescript_self_reference_of_a_definition_has_no_interface():
    schema = {**properties(x={"$ref": "#/$defs/A"}), "$defs": {"A": {"$ref": "#"}}}
    assert body(tool(schema)) == "interface A parameters\ntype f = (_: {\n  x?: A\n}) => any;"


def test_typescript_definitions_count_from_where_they_stand():
    local = {**properties(x={"$ref": "#/$defs/A"}), "$defs": {"A": {"type": "string"}}}
    user = {"$ref": "#/$defs/A"}
    assert body(tool(properties(a=local, b=user))) == (
        "interface A string\ntype f = (_: {\n  a?: {\n    x?: A\n  },\n  b?: A\n}) => any;"
    )
    assert body(tool(properties(b=local, a=user))) is None
    # The order of the properties is that of their names, required or not.
    assert body(tool({**properties(b=local, a=user), "required": ["b"]})) is None


def test_typescript_definitions_inside_definitions_have_no_interface():
    inner = {**properties(x={"$ref": "#/$defs/B"}), "$defs": {"B": {"type": "string"}}}
    schema = {**properties(x={"$ref": "#/$defs/A"}), "$defs": {"A": inner}}
    assert body(tool(schema)) == ("interface A {\n  x?: B\n}\ntype f = (_: {\n  x?: A\n}) => any;")


@pytest.mark.parametrize("definition", [True, "string", None, {"const": 1}, {"description": 1}])
def test_typescript_bad_definition_falls_back_even_if_unused(definition):
    assert body(tool({**properties(), "$defs": {"A": definition}})) is None
