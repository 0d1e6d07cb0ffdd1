"""Random JSON schemas, and a validator of theirs that is independent of what generates the answers."""

import random
import re
from typing import Any

WORDS = ("red", "blue", "circle", "a b", "é", "图", 'q"q', "back\\slash", "x/y", "", "null", "1")
PATTERNS = ("^[a-z]+$", "^[0-9]{2,4}$", "^(on|off)$", "^[A-Z][a-z]{0,8}$", "^\\d{3}-\\d{4}$")
KEYS = ("name", "count", "color", "x", "is ok", "größe", "a_long_key_name", "id")


def schema(draw: random.Random, depth: int = 3, bounded: bool = False) -> dict[str, Any]:
    """A random schema. `bounded`: strings and arrays have a greatest length."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kinds += ["object", "object", "array", "anyOf", "types"] if depth else []
    kind = draw.choice(kinds)
    if kind == "enum":
        return {"enum": draw.sample([*WORDS, 1, 2.5, True, None], draw.randint(1, 5))}
    if kind == "const":
        return {"const": draw.choice([*WORDS, 0, -3, False, None, {"a": [1, "b"]}])}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice(PATTERNS)} | ({"maxLength": 12} if bounded else {})
    if kind == "string":
        least = draw.choice([0, 0, 1, 5])
        given = {"minLength": least} if least else {}
        return {"type": "string", **given} | ({"maxLength": least + 12} if bounded or draw.random() < 0.5 else {})
    if kind in ("integer", "number"):
        low = draw.randint(-50, 50)
        return {"type": kind} | draw.choice([{}, {"minimum": low}, {"minimum": low, "maximum": low + 30}])
    if kind == "types":
        return {"type": draw.sample(["string", "integer", "null", "boolean"], 2)} | (
            {"maxLength": 9} if bounded else {}
        )
    if kind == "anyOf":
        return {"anyOf": [schema(draw, depth - 1, bounded) for _ in range(draw.randint(1, 3))]}
    if kind == "array":
        least = draw.choice([0, 0, 1, 2])
        most = {"maxItems": least + draw.randint(0, 3)} if bounded or draw.random() < 0.7 else {}
        return {"type": "array", "items": schema(draw, depth - 1, bounded), "minItems": least, **most}
    if kind == "object":
        keys = draw.sample(KEYS, draw.randint(0, 5))
        return {
            "type": "object",
            "properties": {key: schema(draw, depth - 1, bounded) for key in keys},
            "required": [key for key in keys if draw.random() < 0.7],
            "additionalProperties": False,
        }
    return {"type": kind}


def satisfies(value: Any, given: dict[str, Any]) -> bool:
    """Whether a JSON value satisfies a schema of `schema`."""
    if "anyOf" in given and not any(satisfies(value, one) for one in given["anyOf"]):
        return False
    if "enum" in given and not any(same(value, one) for one in given["enum"]):
        return False
    if "const" in given and not same(value, given["const"]):
        return False
    kinds = given.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return False
    if isinstance(value, str):
        long_enough = given.get("minLength", 0) <= len(value) <= given.get("maxLength", len(value))
        return long_enough and bool(re.search(given.get("pattern", ""), value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return given.get("minimum", value) <= value <= given.get("maximum", value)
    if isinstance(value, list):
        fits = given.get("minItems", 0) <= len(value) <= given.get("maxItems", len(value))
        return fits and all(satisfies(one, given.get("items", {})) for one in value)
    if isinstance(value, dict):
        known = given.get("properties", {})
        closed = given.get("additionalProperties", True) is False
        return (
            all(key in value for key in given.get("required", []))
            and not (closed and value.keys() - known.keys())
            and all(satisfies(one, known.get(key, {})) for key, one in value.items())
        )
    return True


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal; true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def _is(value: Any, kind: str) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {
        "string": isinstance(value, str),
        "integer": number and float(value).is_integer(),
        "number": number,
        "boolean": isinstance(value, bool),
        "null": value is None,
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
    }[kind]
