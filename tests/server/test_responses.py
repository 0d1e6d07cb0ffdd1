"""POST /v1/responses: its form, which fields are refused, and how errors name them."""

import json

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from test_api import KEYS_OF_THE_SERVER

TOOL = {"type": "function", "name": "now"}
FIELDS = ("frequency_penalty", "top_logprobs")


@pytest.mark.parametrize(
    "fields, status",
    [
        ({}, "completed"),
        ({"max_output_tokens": 2, "user": "me", "text": {"verbosity": "low"}}, "incomplete"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, "completed"),
        ({"tools": [TOOL], "tool_choice": "required", "frequency_penalty": 1}, "completed"),
    ],
    ids=str,
)
def test_a_response_and_its_events_have_all_fields_of_openais_own_types(fields, status, server):
    """Checked by the types themselves: OpenAI's client takes what it gets."""
    body = {"input": "What can you do?"} | fields
    shown = server.post(body, "/v1/responses").json()
    found = Response.model_validate(shown)
    assert (found.status, found.completed_at is None, found.user) == (status, status != "completed", fields.get("user"))
    assert (shown["frequency_penalty"], found.top_logprobs) == tuple(map(fields.get, FIELDS, (0, 0)))
    assert found.text.format.type == "text" and not found.background
    events = server.post(body | {"stream": True}, "/v1/responses").text.splitlines()
    for line in events:
        if line.startswith("data: "):
            TypeAdapter(ResponseStreamEvent).validate_python(json.loads(line.removeprefix("data: ")))
    assert f"event: response.{status}" in events


@pytest.mark.parametrize(
    "change, param, message",
    [
        ({"input": []}, "input", "input must be a text or a list of items."),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///x"}]}]}, "input", ""),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "Lower max_output_tokens, or shorten the prompt."),
        ({"metadata": "x"}, "metadata", "metadata is 'x'; it must be an object of texts."),
        ({"metadata": {"a": 1}}, "metadata", "metadata.a is 1; it must be a text."),
        ({"metadata": {"a": "x" * 513}}, "metadata", "texts of at most 512."),
        ({"metadata": {f"{n}": "x" for n in range(17)}}, "metadata", "at most 16 are taken."),
        ({"include": "x"}, "include", "include is 'x'; it must be a list of texts."),
        ({"include": [1]}, "include", "include is [1]; it must be a list of texts."),
        ({"stream_options": 5}, "stream_options", "stream_options is 5; it must be an object."),
        ({"stream_options": {"include_obfuscation": 1}}, "include_obfuscation", "it must be true or false."),
        ({"text": "x"}, "text", "text is 'x'; it must be an object."),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "text.format.type is 'xml'; it must be text, json_obj"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "text.format.schema is missing"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"items": {"not": {}}}}}},
            "text.format",
            "text.format can't be used: the schema's keyword \"not\" is not supported.",
        ),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_response_is_refused_with_its_name(change, param, message, server):
    answer = server.post({"input": "What can you do?", "max_output_tokens": 2} | change, "/v1/responses")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and message in error["message"], error
    assert not KEYS_OF_THE_SERVER.search(error["message"]), error


def test_a_response_takes_its_stream_options_and_ignores_fields_of_other_endpoints(server):
    body = {"input": "What can you do?", "max_output_tokens": 2, "n": 0, "best_of": 3, "prompt_logprobs": "x"}
    body |= {"response_format": {"type": "xml"}, "stream_options": {"include_obfuscation": False}}
    assert server.post(body, "/v1/responses").json()["status"] == "incomplete"
    assert "response.incomplete" in server.post(body | {"stream": True}, "/v1/responses").text
