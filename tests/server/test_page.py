"""The page at `/`: its policy, and what it does in a real browser against a server whose answers are given here."""

import asyncio
import json
import re
import shutil
import subprocess
import threading
from base64 import b64decode, b64encode
from hashlib import sha256
from io import BytesIO

import httpx
import pytest
import uvicorn
from browser import browser, program
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from mllama_graph.server.page import FILE, page

KEY = "schlüssel"
# What a model might say to a page that took it for HTML.
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
PAGE = FILE.read_text(encoding="utf8")


class Scripted:
    """A server that records what it is asked. `answer`: the texts of its chunks; None waits until the client leaves."""

    def __init__(self):
        self.asked, self.left, self.answer, self.error, self.paths = [], 0, ["Hello"], None, set()

    def app(self):
        """The application, which asks for KEY."""
        gets = {"/": page(), "/health": self.health, "/v1/models": self.models}
        return Starlette(
            routes=[
                *(Route(path, self.seen(endpoint)) for path, endpoint in gets.items()),
                Route("/v1/chat/completions", self.seen(self.chat), methods=["POST"]),
            ]
        )

    def seen(self, endpoint):
        async def inner(request):
            self.paths.add(request.url.path)
            return await endpoint(request)

        return inner

    async def health(self, request):
        return JSONResponse({"status": "ready"})

    async def models(self, request):
        if request.headers.get("authorization", "").encode("latin-1") != f"Bearer {KEY}".encode():
            return JSONResponse({"error": {"message": "no key"}}, 401)
        return JSONResponse({"data": [{"id": "tiny"}]})

    async def chat(self, request):
        self.asked.append(await request.json())
        if self.error:
            return JSONResponse({"error": {"message": self.error}}, 400)
        return StreamingResponse(self.chunks(), media_type="text/event-stream")

    async def chunks(self):
        try:
            for count, text in enumerate(self.answer, start=1):
                if text is None:
                    await asyncio.sleep(60)
                yield event([{"index": 0, "delta": {"content": text}, "finish_reason": None}], count)
            yield event([{"index": 0, "delta": {}, "finish_reason": "stop"}], len(self.answer))
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += 1
            raise


def event(choices, tokens):
    """A chunk of a chat completion."""
    usage = {"prompt_tokens": 7, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 3}}
    return f"data: {json.dumps({'choices': choices, 'usage': usage})}\n\n"


@pytest.fixture(scope="module")
def scripted():
    server = Scripted()
    config = uvicorn.Config(server.app(), port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    opened, running = config.bind_socket(), uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [opened]})
    thread.start()
    server.url = f"http://127.0.0.1:{opened.getsockname()[1]}/"
    yield server
    running.should_exit = True
    thread.join()


def test_the_policy_allows_this_pages_script_and_style_and_its_own_origin_only(scripted):
    answer = httpx.get(scripted.url)
    assert answer.status_code == 200 and answer.text == PAGE
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff" and "set-cookie" not in answer.headers
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    for kind in ("script", "style"):
        [part] = re.findall(rf"<{kind}>(.*?)</{kind}>", PAGE, re.DOTALL)
        assert rules[f"{kind}-src"] == f"'sha256-{b64encode(sha256(part.encode()).digest()).decode()}'"
    assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'" and "unsafe" not in answer.headers["content-security-policy"]


def test_the_server_gives_the_page_to_browsers_without_a_key(server):
    answer = httpx.get(server.url)
    assert answer.status_code == 200 and answer.text == PAGE and "content-security-policy" in answer.headers
    assert httpx.get(f"{server.url}/v1/models").status_code == 401


def test_the_page_names_no_other_host_and_parses_no_html():
    assert not re.findall(r"https?://|//[a-z]+\.|\bimport\b", PAGE)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|DOMParser", PAGE)
    # The policy would refuse attributes with scripts or styles.
    assert not re.findall(r"<[^>]*\s(?:on\w+|style)=", PAGE)


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_script_is_valid(tmp_path):
    (tmp_path / "page.js").write_text(re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)[0])
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True)


def text_of(found, selector):
    return found.run(f"document.querySelector('{selector}').innerText")


def ask(found, text):
    found.run("document.getElementById('prompt').focus()")
    found.type(text)
    found.press("Enter")


ENDED = "document.getElementById('send').hidden === false && document.querySelectorAll('.assistant').length === {}"


@pytest.mark.skipif(not program(), reason="needs Chromium on the path, or at MLLAMA_GRAPH_BROWSER")
def test_a_conversation_in_a_browser(scripted, tmp_path):
    with browser(tmp_path / "profile") as found:
        # A phone.
        found.size(360, 640)
        found.open(scripted.url)
        found.wait("document.activeElement.id === 'key'")
        found.type(KEY)
        found.press("Enter")
        found.wait("document.getElementById('state').textContent === 'ready'")
        assert found.run("document.documentElement.scrollWidth") <= 360, "the page is wider than the phone"
        # The one refused request, before the key was there.
        assert len(found.faults) == 1 and "401" in found.faults.pop()

        # A picture larger than a model sees is scaled down in the browser; the conversation is sent with each turn.
        Image.effect_noise((3000, 1500), 50).save(tmp_path / "large.png")
        found.choose("#files", tmp_path / "large.png")
        found.wait(
            "document.querySelectorAll('#pending img').length === 1 && !document.getElementById('send').disabled"
        )
        found.run("document.getElementById('system').value = 'Be brief.'")
        found.run("document.getElementById('temperature').value = '0.5'")
        scripted.answer = [HOSTILE[:9], HOSTILE[9:]]
        ask(found, "What is it?")
        found.wait(ENDED.format(1))
        request = scripted.asked.pop()
        assert request["temperature"] == 0.5 and request["stream"] and request["model"] == "tiny"
        system, mine = request["messages"]
        assert system == {"role": "system", "content": "Be brief."}
        assert mine["content"][1] == {"type": "text", "text": "What is it?"}
        kind, _, data = mine["content"][0]["image_url"]["url"].partition(",")
        assert kind == "data:image/jpeg;base64" and Image.open(BytesIO(b64decode(data))).size == (2240, 1120)

        # What a model says is text.
        assert text_of(found, ".assistant .text") == HOSTILE
        assert found.run("document.title") == "tiny" and not found.run("document.querySelector('.assistant img')")
        assert "2 tokens" in text_of(found, ".figures") and "prompt 7 (3 cached)" in text_of(found, ".figures")

        # A stopped answer ends at the server, and what it said stays.
        scripted.answer = ["Once", None]
        ask(found, "Tell me more.")
        found.wait("document.querySelectorAll('.assistant .text')[1]?.innerText === 'Once'")
        found.press("Escape")
        found.wait(ENDED.format(2))
        assert "stopped" in found.run("document.querySelectorAll('.figures')[1].innerText")
        roles = [message["role"] for message in scripted.asked.pop()["messages"]]
        assert roles == ["system", "user", "assistant", "user"]

        # Pictures are dropped and pasted, too; what this browser can't decode goes to the server as it is.
        for kind, name, field in (("DragEvent", "drop", "dataTransfer"), ("ClipboardEvent", "paste", "clipboardData")):
            found.run(
                "(() => { const given = new DataTransfer();"
                "given.items.add(new File(['II*'], 'a.tiff', { type: 'image/tiff' }));"
                f"document.dispatchEvent(new {kind}('{name}', {{ {field}: given }})); }})()"
            )
        found.wait("document.querySelectorAll('#pending .named').length === 2")
        found.run("document.querySelector('#pending button').click()")
        assert found.run("document.getElementById('pending').children.length") == 1

        # Everything that can be operated has a name for readers of the screen.
        nodes = found("Accessibility.getFullAXTree")["nodes"]
        operated = [node for node in nodes if node.get("role", {}).get("value") in ("button", "textbox", "Disclosure")]
        assert len(operated) >= 5 and all(node["name"]["value"] for node in operated)

        # A refused message goes back to where it was written.
        scripted.error = "the prompt is too long."
        ask(found, "One")
        found.wait("!document.getElementById('fault').hidden")
        assert text_of(found, "#fault") == scripted.error
        assert found.run("document.getElementById('prompt').value") == "One"
        sent = scripted.asked.pop()["messages"][-1]["content"][0]["image_url"]["url"]
        assert sent == "data:image/tiff;base64," + b64encode(b"II*").decode()
        found.run("document.querySelector('#pending button').click()")
        assert found.run(ENDED.format(2))
        scripted.error, scripted.answer = None, ["Two"]

        # Shift+Enter is a new line. A new conversation forgets the old one.
        found.run("document.getElementById('anew').click()")
        found.press("Enter", shift=True)
        found.type("Two")
        found.press("Enter")
        found.wait(ENDED.format(1))
        assert scripted.asked.pop()["messages"][1:] == [{"role": "user", "content": "One\nTwo"}]

        assert len(found.faults) == 1 and "400" in found.faults.pop()
    assert scripted.paths == {"/", "/health", "/v1/models", "/v1/chat/completions"}
    assert scripted.left == 1
