"""Chat templates in the forms that checkpoints have, and messages in the shapes that clients send."""

HEADER = "<|start_header_id|>{{ %s }}<|end_header_id|>\n\n"

# As Llama 3.2 Vision: a system turn with date and tools, tool calls as JSON, images as parts of user messages. The
# content of the system message must be a string; that of others may be parts.
VISION = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not tools_in_user_message is defined %}{%- set tools_in_user_message = true %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set ns = namespace(images=false) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if message['content'] is not string %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}{%- set ns.images = true %}{%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if ns.images and system == 'no pictures' %}{{- raise_exception('No pictures, please.') }}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: ' + date_string + '\\n\\n' }}
{%- if tools is not none and not tools_in_user_message %}
    {{- 'Functions:\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
{%- endif %}
{{- system }}{{- '<|eot_id|>' }}
{%- if tools_in_user_message and tools is not none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content'] | trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception('Tools need a first user message.') }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\nUse JSON.\\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
    {{- first + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if message['content'] is string %}
            {{- message['content'] }}
        {%- else %}
            {%- for part in message['content'] %}
                {%- if part['type'] == 'image' %}{{- '<|image|>' }}
                {%- elif part['type'] == 'text' %}{{- part['text'] }}{%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('One tool call at a time.') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# As Llama Guard 3 Vision: a task with categories, the conversation as text, alternating roles, content as parts only.
GUARD = """{%- if messages | length % 2 == 0 %}{%- set role = 'Agent' %}{%- else %}{%- set role = 'User' %}{%- endif %}
{{- '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\nTask: find unsafe content in ' + role }}
{{- ' messages.\\n<CATEGORIES>\\n' }}
{%- if categories is defined and categories %}
    {%- for key, text in categories.items() %}
        {%- if excluded_category_keys is defined and key in excluded_category_keys %}{%- continue %}{%- endif %}
        {{- key + ': ' + text + '\\n' }}
    {%- endfor %}
{%- else %}
    {{- 'S1: Violent Crimes.\\nS2: Fraud.\\n' }}
{%- endif %}
{{- '</CATEGORIES>\\n' }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant.') }}
    {%- endif %}
    {{- 'User: ' if message['role'] == 'user' else 'Agent: ' }}
    {%- for part in message['content'] %}
        {%- if part['type'] == 'image' %}{{- '<|image|>' }}
        {%- elif part['type'] == 'text' %}{{- part['text'] | trim }}{%- endif %}
    {%- endfor %}
    {{- '\\n\\n' }}
{%- endfor %}
{{- 'Is the last ' + role + ' message safe?<|eot_id|>' }}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

# As text fine-tunes: content is a string and nothing else.
STRINGS = (
    "{{ bos_token }}{% for m in messages %}" + HEADER % "m['role']" + "{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}" + HEADER % "'assistant'" + "{% endif %}"
)

# Strings, trimmed; `generation` marks the assistant's words, and a loop ends early at a message "stop".
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['content'] == 'stop' %}{% break %}{% endif %}"
    "[{{ m['role'] }}]{% if m['role'] == 'assistant' %}{% generation %}{% set words = m['content'] | trim %}"
    "{{ words }}{% endgeneration %}{% else %}{{ m['content'] | trim }}{% endif %}{{ words }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

# Parts and nothing else; a string is lost in it letter by letter.
PARTS = (
    "{{ bos_token }}{% for m in messages %}" + HEADER % "m['role']" + "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|image|>{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}" + HEADER % "'assistant'" + "{% endif %}"
)

# Prints all that a template can see.
ALL = (
    "{% for name in ['a'] %}{{ tools is none }} {{ documents is none }} {{ extra is defined }} {{ bos_token }} "
    "{{ eos_token }} {{ unk_token }} {{ pad_token }} {{ image_token }} {{ add_generation_prompt }}\n{% endfor %}"
    "{{ tools | tojson }}{{ documents | tojson(sort_keys=true, separators=(',', ':')) }}{{ extra | default('-') }}\n"
    "{% for m in messages %}{{ m | tojson(ensure_ascii=true) }}\n{{ m.reasoning_content }}|{{ m.thinking }}\n"
    "{% endfor %}{{ strftime_now('%Y') }}"
)

TEMPLATES = {"vision": VISION, "guard": GUARD, "strings": STRINGS, "marked": MARKED, "parts": PARTS, "all": ALL}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "météo",
            "description": "Weather <of> a city & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
DOCUMENTS = [{"title": "Über", "text": "图"}]


def text(*words: str) -> list[dict]:
    """Text parts."""
    return [{"type": "text", "text": word} for word in words]


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content, **fields) -> dict:
    return {"role": "assistant", "content": content, **fields}


IMAGE = {"type": "image"}
CALL = {"type": "function", "id": "c1", "function": {"name": "météo", "arguments": {"city": "Zürich", "n": 1.5}}}
# Messages as transformers takes them; strings and parts as a client may choose.
SHAPES: dict[str, list[dict]] = {
    "string": [user("What is 图?")],
    "parts": [user(text("What is 图?"))],
    "image, text": [user([IMAGE, *text(" What is it? ")])],
    "text, image": [user([*text("This: "), IMAGE])],
    "image alone": [user([IMAGE])],
    "system": [{"role": "system", "content": " Be brief. "}, user("hi")],
    "two systems": [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, user("hi")],
    "refused": [{"role": "system", "content": "no pictures"}, user([IMAGE, *text("hi")])],
    "earlier image": [user([IMAGE, *text("one")]), assistant("A cat."), user([IMAGE, *text("two")])],
    "assistant last": [user("Count."), assistant("One, two ")],
    "two users": [user("a"), user("b")],
    "stop": [user("a"), user("stop"), user("b")],
    "null content": [user("hi"), assistant(None, tool_calls=[CALL]), {"role": "tool", "name": "m", "content": "5 °C"}],
    "absent content": [user("hi"), {"role": "assistant", "tool_calls": [CALL]}, user("and?")],
    "null fields": [user("hi"), assistant("yes", tool_calls=None, refusal=None, name=None), user("and?")],
    "two calls": [user("hi"), assistant("", tool_calls=[CALL, CALL]), user("and?")],
    "reasoning": [user("hi"), assistant("yes", reasoning="because"), user("and?")],
}
