"""Chat templates against transformers' own rendering, over forms of templates and shapes of messages."""

import copy
import json

import pytest
from chat_templates import (
    CALL,
    DOCUMENTS,
    IMAGE,
    PARTS,
    SHAPES,
    STRINGS,
    TEMPLATES,
    TOOLS,
    VISION,
    assistant,
    text,
    user,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.chat import read_chat_options, read_messages
from mllama_graph.inputs.template import ChatTemplate

TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"}
CALLS = [
    {},
    {"tools": TOOLS},
    {"tools": []},
    {"documents": DOCUMENTS},
    {"chat_template_kwargs": {"date_string": "1 Jan 2030", "extra": {"a": [None]}, "bos_token": "<s>"}},
    {"tools": TOOLS, "chat_template_kwargs": {"tools_in_user_message": False}},
    {"chat_template_kwargs": {"categories": {"S1": "Lies", "S2": "Noise"}, "excluded_category_keys": ["S2"]}},
    {"add_generation_prompt": False},
    {"continue_final_message": True},
]


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return PreTrainedTokenizerFast(tokenizer_file=str(checkpoint("base") / "tokenizer.json"), **TOKENS)


def theirs(oracle, source, messages, request) -> str | None:
    """transformers' rendering, or None where it raises."""
    request = {"add_generation_prompt": not request.get("continue_final_message")} | copy.deepcopy(request)
    request |= request.pop("chat_template_kwargs", {})
    try:
        return oracle.apply_chat_template(copy.deepcopy(messages), chat_template=source, tokenize=False, **request)
    except Exception:
        return None


def ours(source, messages, request, template=None) -> str | None:
    """The engine's rendering of the same chat as a client writes it, or None where it is refused."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for n, part in enumerate(message["content"] if isinstance(message.get("content"), list) else []):
            if part == IMAGE:
                message["content"][n] = {"type": "image_url", "image_url": {"url": "a.png"}}
    template = template or ChatTemplate(source, TOKENS)
    try:
        return template.prompt(read_messages(messages, []), read_chat_options(copy.deepcopy(request)))
    except UserError:
        return None


def in_form(name, messages, request):
    """The messages in the form that a template takes by its definition in chat_templates.py."""
    # With tools, `vision` joins the content of the first message to a string, which prints Python's form of a list.
    as_string = name in ("strings", "marked") or (name == "vision" and request.get("tools") is not None)
    if name == "vision" and request.get("chat_template_kwargs", {}).get("tools_in_user_message") is False:
        as_string = False
    changed = []
    for message in messages:
        content = message.get("content")
        if name in ("guard", "parts") and isinstance(content, str):
            content = text(content)
        elif as_string and isinstance(content, list):
            content = "".join(part.get("text", "<|image|>") for part in content)
        changed.append(message if content is None else {**message, "content": content})
    return changed


@pytest.mark.parametrize("request_", CALLS, ids=lambda request: ",".join(request) or "plain")
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_shape_renders_as_in_transformers(name, request_, oracle):
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    rendered = 0
    for shape, messages in SHAPES.items():
        wanted = theirs(oracle, TEMPLATES[name], in_form(name, messages, request_), request_)
        assert ours(TEMPLATES[name], messages, request_, template) == wanted, shape
        rendered += wanted is not None
    assert rendered >= (1 if "continue_final_message" in request_ else 5), "the oracle refused nearly every chat"


@given(
    texts=st.lists(st.text(max_size=20), min_size=1, max_size=4),
    as_parts=st.lists(st.booleans(), min_size=4, max_size=4),
    name=st.sampled_from(["vision", "strings", "marked", "parts"]),
    continued=st.booleans(),
)
def test_any_text_in_either_form_renders_as_in_transformers(texts, as_parts, name, continued, oracle):
    messages = [
        {"role": ("user", "assistant")[n % 2], "content": text(words) if as_parts[n] else words}
        for n, words in enumerate(texts)
    ]
    request = {"continue_final_message": continued}
    mine = ours(TEMPLATES[name], messages, request, RENDERERS[name])
    if any(words.strip() for words in texts):
        assert mine == theirs(oracle, TEMPLATES[name], in_form(name, messages, request), request)
    else:
        assert mine is None, "an empty request is refused before it is rendered"


RENDERERS = {name: ChatTemplate(source, TOKENS) for name, source in TEMPLATES.items()}


def test_the_date_is_todays_unless_it_is_given(oracle):
    assert ours(VISION, [user("hi")], {}) == theirs(oracle, VISION, [user("hi")], {})
    assert "Today Date: 5 May 2030" in ours(
        VISION, [user("hi")], {"chat_template_kwargs": {"date_string": "5 May 2030"}}
    )


def test_a_system_message_in_parts_is_given_as_the_string_that_its_template_takes(oracle):
    # Given as parts, transformers prints the list itself into the prompt.
    messages = [{"role": "system", "content": text("Be brief.")}, user(text("hi"))]
    wanted = theirs(oracle, VISION, [{"role": "system", "content": "Be brief."}, user(text("hi"))], {})
    assert ours(VISION, messages, {}) == wanted and "Be brief." in wanted


def test_texts_of_a_string_are_joined_by_new_lines_and_images_keep_their_places():
    content = [*text("a"), IMAGE, *text("b", "c"), IMAGE]
    assert "a<|image|>b\nc<|image|><|eot_id|>" in ours(STRINGS, [user(content)], {})


@pytest.mark.parametrize("source, role", [(VISION, "system"), (VISION + "{# developer #}", "developer")])
def test_a_developer_is_a_system_where_the_template_does_not_know_developers(source, role, oracle):
    messages = [{"role": "developer", "content": "Be brief."}, user("hi")]
    assert ours(source, messages, {}) == theirs(oracle, source, [{**messages[0], "role": role}, messages[1]], {})


def test_arguments_of_tool_calls_may_be_json_text_as_clients_send_them():
    written = json.dumps(CALL["function"]["arguments"])
    sent = {**CALL, "function": {**CALL["function"], "arguments": written}}
    chats = [[user("hi"), assistant(None, tool_calls=[call]), user("and?")] for call in (sent, CALL)]
    assert ours(VISION, chats[0], {}) == ours(VISION, chats[1], {})
    assert written.replace("\\u00fc", "ü") in ours(VISION, chats[0], {})


def test_a_template_that_fails_without_its_variables_is_probed_with_those_of_the_request(oracle):
    source = "{{ rules.first + '\n' }}" + STRINGS
    request = {"chat_template_kwargs": {"rules": {"first": "R1"}}}
    rendered = ours(source, [user(text("hi"))], request)
    assert rendered == theirs(oracle, source, [user("hi")], request) and rendered.startswith("R1\n")


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ messages[0].content.x.y }}", "has no attribute"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('one\nline,\nplease') }}", "one line, please"),
        ("{{ raise_exception(messages) }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ messages[0].content.encode }}{{ cycler | tojson }}", "not JSON serializable"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ strftime_now(5) }}", "refuses these messages"),
    ],
)
def test_whatever_a_template_raises_is_the_requests_error(source, reason):
    with pytest.raises(UserError, match=reason) as error:
        ChatTemplate(source, {}).prompt([user("hi")], read_chat_options({}))
    assert "\n" not in str(error.value) and " at 0x" not in str(error.value)


def test_arguments_nested_too_deep_are_the_requests_error():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UserError, match="refuses these messages: "):
        ChatTemplate(VISION, TOKENS).prompt([user("hi")], read_chat_options({"tools": [{"a": deep}]}))


@pytest.mark.parametrize("source", ["{% if %}", "{% generation %}", "{{ x", "{% endgeneration %}", "{{ " + "(" * 3000])
def test_a_template_that_is_not_valid_is_the_users_error(source):
    with pytest.raises(UserError, match="the checkpoint's chat template is not valid"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    "request_, message",
    [
        ({"tools": {}}, "tools must be a list of objects, not {}"),
        ({"tools": ["f"]}, "tools must be a list of objects"),
        ({"documents": "text"}, "documents must be a list of objects, not 'text'"),
        ({"chat_template_kwargs": [1]}, r"chat_template_kwargs must be an object, not \[1\]"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs can't set messages"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs can't set tools"),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt is 'yes'; it must be true or false"),
        ({"continue_final_message": 1}, "continue_final_message is 1"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message goes on"),
    ],
)
def test_a_field_of_a_wrong_type_is_refused_by_its_name(request_, message):
    with pytest.raises(UserError, match=message):
        read_chat_options(request_)


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"role": 5, "content": "x"}, r"messages\[0\]: role 5 is not one of system, developer, user"),
        ({"role": ["user"], "content": "x"}, r"messages\[0\]: role \['user'\]"),
        ({"content": "x"}, r"messages\[0\]: role null"),
        (user(5), r"messages\[0\]: content must be a string or a list of parts, not 5"),
        (user({"type": "text"}), "not {'type': 'text'}"),
        (user(None), "not null"),
        (user(["x"]), r"messages\[0\]\.content\[0\] is 'x'; it is neither a text nor an image part"),
        (user([{"type": "audio"}]), r"content\[0\] has type 'audio'; it is neither a text nor an image part"),
        (user([*text("a"), {"type": "text"}]), r"messages\[0\]\.content\[1\]\.text must be a string, not null"),
        (user([{"type": "text", "text": {}}]), "text must be a string, not {}"),
        (assistant(None, tool_calls=[]), "content must be"),
        (assistant(None, tool_calls="f"), r"messages\[0\]\.tool_calls must be a list of objects"),
        (assistant(None, tool_calls=[5]), r"tool_calls must be a list of objects"),
        (assistant(None, tool_calls=[{"function": 5}]), r"tool_calls\[0\]\.function must be an object, not 5"),
        (assistant(None, tool_calls=[{"function": {"arguments": "{"}}]), "arguments is not valid JSON"),
        (assistant(None, tool_calls=[{"function": {"name": 5}}]), r"tool_calls\[0\]\.function\.name must be a string"),
        (user([]), "empty"),
        (user(" \n"), "empty"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_message_of_a_wrong_shape_is_refused_by_its_place(message, reason):
    with pytest.raises(UserError, match=reason) as error:
        read_messages([message], [])
    assert len(str(error.value)) < 300


def test_parts_of_other_apis_are_read():
    parts = [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}]
    refused = [{"type": "refusal", "refusal": "I can't."}]
    read = read_messages([user(parts), assistant(refused)], [])
    assert [message["content"] for message in read] == [text("a", "b"), text("I can't.")]


@pytest.mark.parametrize("last", [assistant([IMAGE | {"image": "a.png"}]), assistant(None, tool_calls=[CALL])])
def test_only_a_message_with_text_can_be_continued(last):
    with pytest.raises(UserError, match="continue_final_message: the last message has no text in content"):
        options = read_chat_options({"continue_final_message": True})
        ChatTemplate(PARTS, TOKENS).prompt(read_messages([user("hi"), last], []), options)


def test_the_reasoning_of_the_last_message_can_be_continued(oracle):
    source = STRINGS.replace("m['content']", "(m['reasoning_content'] | default('')) + m['content']")
    chat = [user("hi"), assistant("", reasoning="First, ")]
    request = {"continue_final_message": "reasoning_content"}
    assert ours(source, chat, request) == theirs(oracle, source, chat, request)
    assert ours(source, chat, request).endswith("First, ")


def test_tools_beside_a_picture_keep_the_picture():
    # Parts would be printed as a list, without the picture's token: the template takes a string beside tools.
    rendered = ours(VISION, [user([IMAGE, *text("What is it?")])], {"tools": TOOLS})
    assert rendered.count("<|image|>What is it?") == 1 and "{'type'" not in rendered
