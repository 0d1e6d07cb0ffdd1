"""Tool calls in generated text: the oracle is Python's own evaluation of the text, and json.loads."""

import json
import random

import pytest

from mllama_graph.server.calls import Arguments, Call, CallParser

NAMES = ("get_weather", "add", "look.up")


def parsed(pieces):
    """(content, [[name, arguments]]) of pieces."""
    content, calls = "", []
    for piece in pieces:
        if isinstance(piece, Call):
            calls.append([piece.name, ""])
        elif isinstance(piece, Arguments):
            calls[-1][1] += piece.text
        else:
            content += piece
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


def in_pieces(text, draw, certain=False):
    """What the parser makes of a text that arrives in random pieces."""
    parser, at, pieces = CallParser(NAMES, certain), 0, []
    while at < len(text):
        size = draw.randint(1, 9)
        pieces += parser.add(text[at : at + size], False)
        at += size
    return parsed([*pieces, *parser.add("", True)])


def evaluated(text):
    """The calls of a pythonic text, by Python itself."""
    calls = []

    def tool(name):
        return lambda **given: calls.append((name, json.loads(json.dumps(given))))

    class Look:
        up = staticmethod(tool("look.up"))

    known = {"get_weather": tool("get_weather"), "add": tool("add"), "look": Look, "true": True, "null": None}
    eval(text, {"__builtins__": {}}, known)
    return calls


VALUES = (
    "1",
    "-2.5",
    "'a, b)'",
    '"it\'s"',
    "[1, [2, 'x]']]",
    "{'k': None, 'l': (True,)}",
    "true",
    "'\\n\\'q'",
    "'é图'",
)


@pytest.mark.parametrize("seed", range(40))
def test_pythonic_calls_are_what_python_evaluates_however_they_are_cut(seed):
    draw = random.Random(seed)
    one = (
        f"{draw.choice(NAMES)}({', '.join(f'a{n}={draw.choice(VALUES)}' for n in range(draw.randint(0, 3)))})"
        for _ in range(draw.randint(1, 3))
    )
    text = f"[{', '.join(one)}]"
    assert in_pieces(text, draw) == ("", evaluated(text))


@pytest.mark.parametrize("seed", range(40))
def test_json_calls_are_those_written_however_they_are_cut(seed):
    draw = random.Random(seed)
    arguments = {"city": draw.choice(["Rome", 'a "b"', "{[", "é图\n"]), "n": draw.choice([1, [{}], None, {"x": "}"}])}
    calls = [(draw.choice(NAMES), arguments) for _ in range(draw.randint(1, 3))]
    key = draw.choice(["parameters", "arguments"])
    shown = [json.dumps({"name": name, key: given}, ensure_ascii=draw.random() < 0.5) for name, given in calls]
    assert in_pieces("; ".join(shown), draw, certain=key == "parameters") == ("", calls)
    assert in_pieces(f"<|python_tag|>[{', '.join(shown)}]", draw) == ("", calls)
    other = [json.dumps({"type": "function", "function": name, "parameters": given}) for name, given in calls]
    assert in_pieces("\n".join(other), draw) == ("", calls)


@pytest.mark.parametrize(
    "text",
    [
        "I see a red circle.",
        "",
        '{"name": "unknown", "parameters": {}}',
        '{"name": "add", "parameters": {"x": 1}',
        '{"name": "add", "parameters": 5}',
        '{"color": "red"}',
        "{not json}",
        "[1, 2]",
        "[add(1)]",
        "[add(x=y)]",
        "[add(x=1), __import__('os')]",
        "[add(x=1e999)]",
        "[add(x={1: 2})]",
        "[add(**{})]",
        "[" * 300 + "]" * 300,
        "[add(x=" + "-" * 3000 + "1)]",
        "add(x=1)",
        "<|pyth",
    ],
)
def test_anything_else_is_content_without_a_change(text):
    assert in_pieces(text, random.Random(1)) == (text, [])


def test_content_is_not_held_back_where_it_can_be_no_call():
    assert CallParser(NAMES).add("I see", False) == ["I see"]
    assert CallParser(NAMES).add('{"color"', False) == ['{"color"']
    assert CallParser(NAMES).add('{"name": "Ann"', False) == ['{"name": "Ann"']
    assert CallParser(NAMES).add("[1", False) == ["[1"]
    assert CallParser(NAMES).add("[add", False) == []


def test_arguments_come_as_they_are_generated_where_a_grammar_guarantees_them():
    parser = CallParser(["add"], certain=True)
    assert parser.add('{"name": "add", "parameters": {"x"', False) == [Call("add"), Arguments('{"x"')]
    assert parser.add(": 1}", False) == [Arguments(": 1}")]
    assert parser.add("}", True) == []
