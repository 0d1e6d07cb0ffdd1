"""Structured output and tools, as OpenAI's client sees them."""

import json

import pytest
from json_schemas import satisfies
from pydantic import BaseModel, Field

ASK = [{"role": "user", "content": "What do you see?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}
NEVER = {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}
UNUSABLE = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}


class Shape(BaseModel):
    color: str = Field(max_length=10)
    corners: int = Field(ge=0, le=12)


def create(server, **fields):
    return server.openai.chat.completions.create(**({"model": "tiny", "messages": ASK, "seed": 1} | fields))


def fits(call):
    """Whether the call is one of TOOLS with valid arguments."""
    arguments = json.loads(call.function.arguments)
    return satisfies(arguments, WEATHER) if call.function.name == "weather" else arguments == {}


def test_pydantic_models_are_parsed_from_a_strict_schema(server):
    found = server.openai.chat.completions.parse(model="tiny", messages=ASK, response_format=Shape, temperature=1)
    assert isinstance(found.choices[0].message.parsed, Shape)


@pytest.mark.parametrize("temperature", [0, 1, 3])
def test_a_response_format_and_structured_outputs_hold_at_any_temperature(temperature, server):
    common = {"temperature": temperature, "max_tokens": 200}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": WEATHER}}
    assert satisfies(json.loads(create(server, response_format=schema, **common).choices[0].message.content), WEATHER)
    choice = create(server, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, **common).choices[0]
    assert (choice.message.content in ("yes", "no"), choice.finish_reason) == (True, "stop")
    found = server.openai.completions.create(
        model="tiny", prompt="x", extra_body={"structured_outputs": {"regex": "[0-9]{3}/[a-c]"}}, **common
    )
    digits, letter = found.choices[0].text.split("/")
    assert len(digits) == 3 and digits.isdigit() and letter in "abc"
    shown = {"format": {"type": "json_schema", "name": "s", "schema": WEATHER}}
    response = server.openai.responses.create(model="tiny", input="hi", text=shown, temperature=temperature)
    assert satisfies(json.loads(response.output_text), WEATHER)


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: start"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: <|image|>"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"enum": ["x" * 70000]}}}, "structured_outputs"),
        (
            {"structured_outputs": {"json": {"allOf": [{"pattern": f".*a.{{{n}}}b"} for n in range(30)]}}},
            "structured_outputs",
        ),
        ({"structured_outputs": {"json": {"properties": {f"k{n}": {} for n in range(3000)}}}}, "structured_outputs"),
        # Found out when the answer has begun.
        ({"structured_outputs": {"regex": "(a|aa)+" * 500}}, "structured_outputs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [*TOOLS, *TOOLS]}, "tools"),
        ({"tools": {}}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "x"}}]}, "tools"),
        ({"tools": [TOOLS[1], UNUSABLE], "tool_choice": "required"}, "tools"),
        ({"tools": [TOOLS[1], {**UNUSABLE, "function": UNUSABLE["function"] | {"strict": True}}]}, "tools"),
        ({"tools": TOOLS, "response_format": NEVER}, "response_format"),
    ],
)
def test_what_cant_be_used_is_refused_with_its_field_and_a_reason(fields, param, server):
    answer = server.post({"messages": ASK, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert error["message"].endswith(".") and "\n" not in error["message"] and "start: call" not in error["message"]


@pytest.mark.parametrize(
    "function, message",
    [
        ({"name": "a b"}, "tools[1]: name 'a b' must be 1 to 64 letters, digits, dots, _ or -."),
        ({"name": "f", "strict": "x"}, "tools[1]: strict is 'x'; it must be true or false."),
        ({"name": "f", "parameters": []}, "tools[1]: parameters is []; it must be a JSON schema."),
        (
            {"name": "f", "parameters": {"not": {}}},
            "tools[1]: parameters can't be used: the schema's keyword \"not\" is not supported.",
        ),
        ({"name": "f", "parameters": {"type": "text"}}, "tools[1]: parameters can't be used: Invalid type: text."),
    ],
)
def test_an_error_of_a_tool_has_its_index_in_chats_and_responses(function, message, server):
    tools = [TOOLS[1], {"type": "function", "function": function}]
    chat = server.post({"messages": ASK, "tools": tools, "tool_choice": "required"})
    flat = [{"type": "function", **tool["function"]} for tool in tools]
    response = server.post({"input": "Hi", "tools": flat, "tool_choice": "required"}, "/v1/responses")
    for answer in (chat, response):
        assert (answer.json()["error"]["message"], answer.json()["error"]["param"]) == (message, "tools")


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("temperature", [0, 2])
def test_enforced_calls_are_valid_and_streamed_as_they_are_whole(choice, temperature, server):
    ask = {"tools": TOOLS, "tool_choice": choice, "temperature": temperature, "max_tokens": 300}
    [whole] = create(server, **ask).choices
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    assert all(map(fits, whole.message.tool_calls))
    assert choice != NAMED or [call.function.name for call in whole.message.tool_calls] == ["weather"]
    streamed, reasons = {}, []
    for chunk in create(server, stream=True, **ask):
        for call in chunk.choices[0].delta.tool_calls or []:
            name, arguments = streamed.setdefault(call.index, [call.function.name, []])
            assert call.id or arguments is not None
            arguments.append(call.function.arguments)
        reasons.append(chunk.choices[0].finish_reason)
    assert reasons[-1] == "tool_calls"
    found = [(name, "".join(pieces)) for name, pieces in streamed.values()]
    assert found == [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert "weather" not in streamed or len(streamed[0][1]) > 2


def test_one_call_only_without_parallel_calls(server):
    for seed in range(5):
        ask = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "temperature": 5}
        [choice] = create(server, seed=seed, max_tokens=200, **ask).choices
        assert len(choice.message.tool_calls) == 1


def test_with_a_response_format_an_answer_is_a_call_or_fits_the_schema(server):
    for seed in range(4):
        kind = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer", "minimum": 100}}}
        ask = {"tools": TOOLS, "response_format": kind, "temperature": 3, "max_tokens": 150}
        message = create(server, seed=seed, **ask).choices[0].message
        assert all(map(fits, message.tool_calls)) if message.tool_calls else int(message.content) >= 100


def test_answers_without_calls_stay_content_with_tools_at_hand(server):
    plain = create(server).choices[0].message.content
    for choice in ("auto", "none"):
        [found] = create(server, tools=STRICT if choice == "auto" else TOOLS, tool_choice=choice).choices
        assert (found.message.content, found.message.tool_calls, found.finish_reason) == (plain, None, "stop")
        chunks = create(server, tools=TOOLS, tool_choice=choice, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain


STRICT = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
HEADS = [
    '{"name": "weather", "parameters": ',
    '{"name":"weather","arguments":{"city":"',
    '<|python_tag|>{"name": "weather", "parameters": {"',
]


def test_strict_arguments_are_valid_once_a_call_has_begun_and_other_texts_stay_free(server):
    """The tiny model begins no calls: their beginnings are given to it."""
    from dataclasses import replace

    from mllama_graph.server import tools

    # A call that the limit cuts off is content.
    def run(given, count, ends=("stop",), **fields):
        use = tools.read(fields | {"tools": STRICT})
        line = {"messages": ASK, "temperature": 3.0, "max_new_tokens": 90} | fields | use.fields({"tools": STRICT})

        def served(engine):
            results = []
            for seed in range(count):
                request = engine.processor.request(line | {"seed": seed})
                engine.submit(replace(request, forced=tuple(engine.processor.codec.encode(given))))
            engine.run(lambda delta: delta.result and results.append(delta.result))
            return results

        results = server.service.engine_loop.call(served).result(60)
        return [use.speaker().message(result.text) for result in results if result.finish_reason in ends]

    for head in HEADS:
        complete = run(head, 5)
        assert complete
        for message in complete:
            assert message["content"] is None and message["tool_calls"][0]["function"]["name"] == "weather"
            for call in message["tool_calls"]:
                valid = WEATHER if call["function"]["name"] == "weather" else tools.NO_PARAMETERS
                assert satisfies(json.loads(call["function"]["arguments"]), valid)
    assert all(len(m["tool_calls"]) == 1 for m in run(HEADS[0], 4, parallel_tool_calls=False))
    free = run('{"name": "Bob", "x": ', 4, ("stop", "length"))
    assert all(message["content"].startswith('{"name": "Bob"') and "tool_calls" not in message for message in free)


FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_response_calls_tools_whole_and_streamed_and_takes_their_results(choice, server):
    make = server.openai.responses.create
    ask = {"model": "tiny", "input": "Hi", "tools": FLAT, "tool_choice": choice, "temperature": 2}
    ask["extra_body"] = {"seed": 3}
    whole = make(**ask)
    assert whole.status == "completed" and whole.output and whole.tools[0].name == "weather"
    for item in whole.output:
        arguments = json.loads(item.arguments)
        assert (item.type, item.status) == ("function_call", "completed")
        assert satisfies(arguments, WEATHER) if item.name == "weather" else arguments == {}
    events = [*make(**ask, stream=True)]
    assert [e.sequence_number for e in events] == [*range(len(events))] and events[-1].type == "response.completed"
    assert [(i.name, i.arguments) for i in events[-1].response.output] == [(i.name, i.arguments) for i in whole.output]
    for index, item in enumerate(whole.output):
        own = [e for e in events if getattr(e, "output_index", None) == index]
        pieces = [e.delta for e in own if e.type == "response.function_call_arguments.delta"]
        assert "".join(pieces) == item.arguments and own[0].type == "response.output_item.added"
        assert own[-2].type == "response.function_call_arguments.done" and own[-2].arguments == item.arguments
        assert own[-1].item.status == "completed" and own[-1].item.call_id.startswith("call_")
    results = [{"type": "function_call_output", "call_id": i.call_id, "output": "sunny"} for i in whole.output]
    calls = [item.model_dump(exclude_none=True) for item in whole.output]
    again = make(model="tiny", input=[{"role": "user", "content": "Hi"}, *calls, *results], tools=FLAT)
    assert again.output[0].type == "message" and again.output_text
    plain = make(model="tiny", input="Hi", include=["message.output_text.logprobs"], top_logprobs=2)
    shown = plain.output[0].content[0]
    assert bytes(b for token in shown.logprobs for b in token.bytes).decode() == shown.text
    assert len(shown.logprobs[0].top_logprobs) == 2


def test_only_allowed_tools_are_called(server):
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    found = create(server, tools=TOOLS, tool_choice=choice, temperature=3).choices[0].message.tool_calls
    assert {call.function.name for call in found} == {"now"}


def test_calls_after_the_first_are_dropped_where_calls_are_not_parallel():
    from mllama_graph.server import tools

    texts = ['{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}', "[now(), weather(city='x')]"]
    for text in texts:
        for parallel, count in ((True, 2), (False, 1)):
            use = tools.read({"tools": TOOLS, "parallel_tool_calls": parallel})
            whole, speaker = use.speaker().message(text), use.speaker()
            assert len(whole["tool_calls"]) == count and whole["content"] is None
            parts = [part for n, letter in enumerate(text) for part in speaker.add(letter, n == len(text) - 1)]
            assert {call["index"] for part in parts for call in part.get("tool_calls", ())} == set(range(count))
            assert speaker.finish("stop") == "tool_calls"


def test_results_of_tools_return_into_the_prompt(server):
    [choice] = create(server, tools=TOOLS, tool_choice=NAMED).choices
    call = choice.message.tool_calls[0]
    calls = [call.model_dump(), call.model_dump() | {"id": "other"}]
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "sunny"} for one in reversed(calls)]
    again = [*ASK, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    assert create(server, messages=again, tools=TOOLS).choices[0].message.content
    from mllama_graph.server.tools import one_call_each

    split = one_call_each(again)
    assert [message["role"] for message in split] == ["user", "assistant", "tool", "assistant", "tool"]
    assert all(result["tool_call_id"] == call["tool_calls"][0]["id"] for call, result in zip(split[1::2], split[2::2]))


def test_rows_of_one_batch_do_not_touch_each_other(server):
    import threading

    alone, found = create(server).choices[0].message.content, []
    schema = {"type": "json_object"}
    threads = [
        threading.Thread(target=lambda: found.append(create(server).choices[0].message.content)),
        threading.Thread(target=lambda: create(server, response_format=schema, max_tokens=60)),
        threading.Thread(target=lambda: create(server, tools=TOOLS, tool_choice="required", temperature=1)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone]
