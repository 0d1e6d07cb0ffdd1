"""The API as OpenAI's own client sees it, against what the engine gives for the same request."""

import json
import re

import pytest

from mllama_graph.engine.stats import Stats

ASK = [{"role": "user", "content": "What can you do?"}]
ANSWER = "I can describe simple shapes, count them and read numbers."
SEEN = "I see a red circle, a green triangle and a blue star."
# What a client can't change, or knows under another name.
KEYS_OF_THE_SERVER = re.compile("max_input_length|max_output_length|max_new_tokens|extend_context|the plan")


def look(scene, text="What do you see?"):
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": scene, "detail": "low"}},
                {"type": "text", "text": text},
            ],
        }
    ]


def test_a_chat_completion_has_the_engines_text_and_usage(server):
    found = server.openai.chat.completions.create(model="tiny", messages=ASK)
    [choice] = found.choices
    assert (choice.message.content, choice.finish_reason, choice.message.role) == (ANSWER, "stop", "assistant")
    ids = server.service.processor.request({"messages": ASK}).ids
    assert found.usage.prompt_tokens == len(ids)
    assert found.usage.total_tokens == len(ids) + found.usage.completion_tokens
    assert found.usage.prompt_tokens_details.cached_tokens == 0
    assert found.id.startswith("chatcmpl-") and found.object == "chat.completion" and found.model == "tiny"


@pytest.mark.parametrize("choices", [1, 3])
def test_a_stream_has_role_text_finish_usage_and_done_in_this_order(choices, server):
    with server.openai.chat.completions.with_streaming_response.create(
        model="tiny", messages=ASK, stream=True, n=choices, stream_options={"include_usage": True}
    ) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert response.headers["content-type"].startswith("text/event-stream")
    assert events.pop() == "[DONE]"
    chunks = [*map(json.loads, events)]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    usage = chunks.pop()
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == choices * 16
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in range(choices):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == ANSWER
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
        assert own[-1]["delta"] == {}


def test_logprobs_have_the_exact_bytes_of_the_text(server):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "看到什么"}], "logprobs": True, "top_logprobs": 3}
    whole = server.openai.chat.completions.create(**ask, max_tokens=8).choices[0]
    content = whole.logprobs.content
    # An answer cut within a character ends in U+FFFD; the bytes before it are exact.
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == whole.message.content
    for token in content:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == token.logprob >= token.top_logprobs[1].logprob
    chunks = server.openai.chat.completions.create(**ask, max_tokens=8, stream=True)
    shown = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [t.model_dump() for logprobs in shown for t in logprobs.content] == [t.model_dump() for t in content]


def test_a_seed_repeats_choices_which_differ_from_each_other(server):
    ask = {"model": "tiny", "messages": ASK, "temperature": 3.0, "n": 3, "max_tokens": 12, "seed": 7}
    one, other = (server.openai.chat.completions.create(**ask) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in other.choices] and len(set(texts)) == 3
    unseeded = server.openai.chat.completions.create(**{**ask, "seed": None, "n": 1}).choices[0].message.content
    assert unseeded not in texts


def test_stop_strings_limits_and_ignored_ends_finish_as_they_say(server):
    create = server.openai.chat.completions.create
    stopped = create(model="tiny", messages=ASK, stop=[" shapes"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("I can describe simple", "stop")
    streamed = create(model="tiny", messages=ASK, stop=" shapes", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == "I can describe simple"
    for name in ("max_tokens", "max_completion_tokens"):
        short = create(model="tiny", messages=ASK, **{name: 3})
        assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    assert (
        create(model="tiny", messages=ASK, max_tokens=20, extra_body={"ignore_eos": True}).usage.completion_tokens == 20
    )


def test_the_final_message_can_be_continued(server):
    messages = [*ASK, {"role": "assistant", "content": "I can describe"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    found = server.openai.chat.completions.create(model="tiny", messages=messages, extra_body=extra)
    assert found.choices[0].message.content == ANSWER.removeprefix("I can describe")


def test_a_repeated_picture_costs_no_vision_step(server, scene):
    create = server.openai.chat.completions.create
    assert create(model="tiny", messages=look(scene)).choices[0].message.content == SEEN
    steps: Stats = server.service.engine_loop.engine.stats
    before = steps.vision_steps
    assert create(model="tiny", messages=look(scene)).choices[0].message.content == SEEN
    assert steps.vision_steps == before
    text = server.http.get("/metrics").text
    assert 'mllama_graph:mm_cache_hits_total{model_name="tiny"}' in text


def test_completions_take_texts_and_ids_and_echo_them(server):
    create = server.openai.completions.create
    ids = server.post({"prompt": "I see"}, "/tokenize").json()["tokens"]
    assert server.post({"tokens": ids[1:]}, "/detokenize").json() == {"prompt": "I see"}
    texts = create(model="tiny", prompt=["I see", "Hello"], max_tokens=5, n=2, echo=True)
    assert [c.index for c in texts.choices] == [0, 1, 2, 3] and texts.usage.completion_tokens == 20
    assert texts.choices[0].text == texts.choices[1].text and texts.choices[2].text.startswith("Hello")
    one = create(model="tiny", prompt=ids, max_tokens=5, logprobs=2).choices[0]
    assert "I see" + one.text == texts.choices[0].text
    assert "".join(one.logprobs.tokens) == one.text and one.logprobs.text_offset[0] == 0
    assert all(len(top) == 2 for top in one.logprobs.top_logprobs)
    assert create(model="tiny", prompt="I see", max_tokens=0, echo=True).choices[0].text == "I see"
    assert "".join(c.choices[0].text for c in create(model="tiny", prompt=ids, max_tokens=5, stream=True)) == one.text


def test_an_echoed_prompt_has_the_log_probabilities_its_tokens_had_when_they_were_generated(server):
    create = server.openai.completions.create
    ids = server.post({"prompt": "I see"}, "/tokenize").json()["tokens"]
    one = create(model="tiny", prompt=ids, max_tokens=6, logprobs=2).choices[0]
    again = ids + server.post({"prompt": one.text, "add_special_tokens": False}, "/tokenize").json()["tokens"]
    ask = {"model": "tiny", "prompt": again, "echo": True, "logprobs": 2}
    for count, fields in ((0, {"max_tokens": 0}), (1, {"max_tokens": 1})):
        choice = create(**ask, **fields, extra_body={"prompt_logprobs": 1}).choices[0]
        shown, new = choice.logprobs, slice(len(ids), len(again))
        assert len(shown.tokens) == len(shown.text_offset) == len(again) + count and shown.token_logprobs[0] is None
        assert shown.tokens[new] == one.logprobs.tokens
        # The two paths add up sums in another order.
        assert shown.token_logprobs[new] == pytest.approx(one.logprobs.token_logprobs, abs=1e-4)
        assert all(max(top, key=top.get) == token for token, top in zip(shown.tokens[new], shown.top_logprobs[new]))
        told = choice.prompt_logprobs
        assert len(told) == len(again) and told[0] is None
        assert [entry[str(id)]["rank"] for id, entry in zip(again[new], told[new])] == [1] * len(one.logprobs.tokens)
    # What begins and ends texts has a token, but no text.
    assert not hasattr(create(**ask, max_tokens=1).choices[0], "prompt_logprobs")
    assert "".join(shown.tokens[1:]).replace("<|eot_id|>", "") == choice.text and choice.text.startswith(
        "I see" + one.text
    )
    for max_tokens in (0, 3):
        parts = [chunk.choices[0] for chunk in create(**ask, max_tokens=max_tokens, stream=True)]
        whole = create(**ask, max_tokens=max_tokens).choices[0]
        assert "".join(part.text for part in parts) == whole.text
        for name in ("tokens", "token_logprobs", "text_offset"):
            streamed = [value for part in parts if part.logprobs for value in getattr(part.logprobs, name)]
            assert streamed == getattr(whole.logprobs, name)


def test_sampling_options_are_those_of_the_engine(server):
    from engines import serve

    options = {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": 0.5, "min_tokens": 20}
    options |= {"logit_bias": {"300": 5}, "min_p": 0.1, "temperature": 1.2, "seed": 3, "top_k": 30}
    found = server.post({"messages": ASK, "max_tokens": 30, "prompt_logprobs": 2} | options).json()
    assert found["usage"]["completion_tokens"] > 20
    line = {"id": 0, "messages": ASK, "max_new_tokens": 30, "prompt_logprobs": 2} | options
    want = server.service.engine_loop.call(lambda engine: serve(engine, [line])[0]).result(30)
    assert found["choices"][0]["message"]["content"] == want.text != ANSWER
    assert [None, *(entry["id"] for entry in want.prompt_logprobs[1:])] == [
        told and int(next(iter(told))) for told in found["prompt_logprobs"]
    ]


def test_a_template_gets_the_variables_and_the_start_that_a_request_names(server):
    shown = {}
    for name, fields in (
        ("plain", {}),
        ("without a start", {"add_generation_prompt": False}),
        ("with a variable", {"chat_template_kwargs": {"bos_token": ""}}),
    ):
        body = {"messages": ASK} | fields
        shown[name] = server.post(body, "/tokenize").json()["tokens"]
        assert server.post(body | {"max_tokens": 1}).json()["usage"]["prompt_tokens"] == len(shown[name])
    assert shown["with a variable"] == shown["plain"][1:] and shown["plain"] != shown["without a start"]
    assert shown["plain"][: len(shown["without a start"])] == shown["without a start"]


def test_a_response_is_the_chats_answer_whole_and_streamed(server, scene):
    create = server.openai.responses.create
    assert create(model="tiny", input="What can you do?").output_text == ANSWER
    parts = [
        {"type": "input_image", "image_url": scene, "detail": "auto"},
        {"type": "input_text", "text": "What do you see?"},
    ]
    events = list(create(model="tiny", input=[{"role": "user", "content": parts}], stream=True))
    assert [e.type for e in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [e.sequence_number for e in events] == [*range(len(events))]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == SEEN
    assert (events[-1].type, events[-1].response.output_text) == ("response.completed", SEEN)
    assert create(model="tiny", input="What can you do?", max_output_tokens=2).status == "incomplete"


def test_models_health_and_version_answer(server):
    client = server.openai
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    for path in ("/health", "/live", "/version", "/metrics"):
        assert server.http.get(path).status_code == 200


@pytest.mark.parametrize(
    "change, status, param",
    [
        ({"messages": None}, 400, "messages"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "x"}, 400, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}]}, 400, "messages"),
        ({"model": "gpt-5"}, 404, "model"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 1.5}, 400, "n"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"stop": "x" * 2000}, 400, "stop"),
        ({"priority": "high"}, 400, "priority"),
        ({"seed": "x"}, 400, "seed"),
        ({"stream": "yes"}, 400, "stream"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**6}, 400, "max_tokens"),
        ({"max_completion_tokens": 10**6, "max_tokens": None}, 400, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens"),
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"logit_bias": {"100000": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"1": -101}}, 400, "logit_bias"),
        ({"frequency_penalty": 3}, 400, "frequency_penalty"),
        ({"repetition_penalty": -1}, 400, "repetition_penalty"),
        ({"min_tokens": 3}, 400, "min_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, 400, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"add_generation_prompt": True, "continue_final_message": True}, 400, "add_generation_prompt"),
        ({"messages": [{"role": "user", "content": "x " * 400}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, 400, "messages"),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused_with_its_name(change, status, param, server):
    answer = server.post({"messages": ASK, "max_tokens": 2} | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert error.keys() == {"message", "type", "param", "code"} and error["message"] and error["type"]
    assert not KEYS_OF_THE_SERVER.search(error["message"]), error


def test_fields_of_other_clients_are_ignored_or_neutral(server):
    extra = {
        "user": "me",
        "store": False,
        "metadata": {},
        "skip_special_tokens": True,
        "separate_reasoning": True,
        "logprobs": False,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "stop": None,
        "seed": None,
        "top_k": -1,
    }
    assert server.post({"messages": ASK} | extra).json()["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    "data, code",
    [
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b"x" * (1 << 20) + b"x", "body_too_large"),
    ],
    ids=["empty", "a list", "NaN", "deep", "half a surrogate pair", "not UTF-8", "too large"],
)
def test_a_body_that_is_no_object_is_refused(data, code, server):
    answer = server.http.post("/v1/chat/completions", content=data)
    assert answer.json()["error"]["code"] == code
    assert answer.status_code == (413 if code == "body_too_large" else 400)


def test_unknown_paths_and_methods_have_errors_of_the_same_form(server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        answer = server.http.request(method, path)
        assert (answer.status_code, answer.json()["error"].keys()) == (status, {"message", "type", "param", "code"})


@pytest.mark.parametrize(
    "given", [None, b"Bearer wrong", "Bearer sëcret".encode(), b"Basic x", b"Bearer " + bytes([255])]
)
def test_a_wrong_api_key_is_refused_and_open_paths_need_none(given, server):
    import httpx

    headers = {} if given is None else {b"authorization": given}
    answer = httpx.get(f"{server.url}/v1/models", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{server.url}/health", headers=headers).status_code == 200


def test_the_access_log_has_a_line_per_request_and_no_prompt(server, scene):
    answer = server.http.post(
        "/v1/chat/completions", json={"messages": look(scene, "Secret?")}, headers={"x-request-id": "mine"}
    )
    assert answer.headers["x-request-id"] == "mine"
    lines = [json.loads(line) for line in server.log.getvalue().splitlines()]
    [line] = [line for line in lines if line["id"] == "mine"]
    assert (line["status"], line["path"], line["model"]) == (200, "/v1/chat/completions", "None") and line["tokens"] > 0
    assert "Secret" not in server.log.getvalue() and "base64" not in server.log.getvalue()
