"""Pictures of clients: nothing is read or fetched that the operator has not allowed, and nothing large is decoded."""

import base64
import http.server
import io
import threading
import zlib

import pytest
from conftest import BOUNDS
from PIL import Image

from mllama_graph.core.errors import UserError
from mllama_graph.server.errors import ApiError
from mllama_graph.server.fetch import Fetcher, is_public
from mllama_graph.server.pictures import Pictures


def png(width=8, height=8):
    data = io.BytesIO()
    Image.new("RGB", (width, height)).save(data, "PNG")
    return data.getvalue()


def messages(*urls, **fields):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url} | fields} for url in urls]}]


def data_uri(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def bomb():
    """A PNG of 40,000 x 40,000 pixels in 2 KB: a single row of data."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (40000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(120001))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    "url, code",
    [
        ("/etc/passwd", "invalid_image_url"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("http://127.0.0.1/a.png", "invalid_image_url"),
        ("https://example.com/a.png", "invalid_image_url"),
        ("~/a.png", "invalid_image_url"),
        ("ftp://example.com/a.png", "invalid_image_url"),
        (base64.b64encode(png()).decode(), "invalid_image_url"),
        ("data:image/png;base64,!!!", "invalid_image"),
        ("data:image/png;base64", "invalid_image"),
        (data_uri(b"no picture"), "invalid_image"),
        (data_uri(bomb()), "image_too_large"),
        (data_uri(png(1200, 900)), "image_too_large"),
        ("", "invalid_image"),
        (7, "invalid_image"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_picture_that_may_not_or_can_not_be_read_is_refused(url, code, server):
    answer = server.post({"messages": messages(url), "max_tokens": 1})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "messages", code), error
    assert "root:" not in answer.text


def test_more_pictures_than_the_plan_holds_and_unknown_details_are_refused(server):
    assert server.post({"messages": messages(*[data_uri(png())] * 5)}).json()["error"]["code"] == "too_many_images"
    assert server.post({"messages": messages(data_uri(png()), detail="huge")}).status_code == 400


def test_files_are_read_below_the_operators_folder_alone(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a b.png").write_bytes(png())
    (tmp_path / "secret").write_text("secret")
    (folder / "out").symlink_to(tmp_path / "secret")
    pictures = Pictures(BOUNDS, below=folder)
    [message] = pictures.resolved(messages(f"file://{folder}/a%20b.png"))
    assert message["content"] == [{"type": "image", "image": png()}]
    for path in (f"{folder}/../secret", f"{folder}/out", f"{folder}/none", str(folder), f"{folder}/%2e%2e/secret"):
        with pytest.raises(ApiError, match="no file below") as error:
            pictures.resolved(messages(f"file://{path}"))
        assert error.value.status == 400
    with pytest.raises(ApiError):
        pictures.resolved(messages(f"file://elsewhere{folder}/a%20b.png"))


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
    ],
)
def test_only_addresses_of_the_public_internet_are_connected_to(address, public):
    assert is_public(address) == public


class Host(http.server.BaseHTTPRequestHandler):
    """A host of pictures, with redirects and misbehaviour by path."""

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        kind = "text/html" if self.path == "/page" else "image/png"
        data = b"x" * 3000 if self.path == "/large" else png()
        self.send_response(404 if self.path == "/none" else 200)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def host():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found.server_address[1]
        found.shutdown()


def test_pictures_are_fetched_from_allowed_hosts_and_checked_at_every_hop(host):
    here = f"http://localhost:{host}"
    allowed = Fetcher([f"localhost:{host}"], 2000, public=lambda address: True)
    assert allowed.fetch(f"{here}/a.png") == png() == allowed.fetch(f"{here}/to//a.png")
    for path, why in (
        ("/none", "answered 404"),
        ("/page", "sends text/html"),
        ("/large", "more than"),
        (f"/to/http://127.0.0.1:{host}/a.png", "not one of the server's fetch_hosts"),
        ("/to/file:///etc/passwd", "only http"),
        ("/to/" * 5 + "/a.png", "redirected more than"),
    ):
        with pytest.raises(UserError, match=why):
            allowed.fetch(here + path)
    for url in (
        "http://localhost/a.png",
        "http://other.example/a",
        f"http://u:p@localhost:{host}/a.png",
        "http://[::1",
    ):
        with pytest.raises(UserError):
            allowed.fetch(url)
    with pytest.raises(UserError, match="not of the public internet"):
        Fetcher([f"localhost:{host}"], 2000).fetch(f"{here}/a.png")


def test_names_are_matched_as_a_whole():
    fetcher = Fetcher(["example.com", "*.cdn.example"], 1, public=lambda address: False)
    for url in ("http://example.com/a", "https://a.cdn.example/b", "https://EXAMPLE.com./a"):
        with pytest.raises(UserError, match="public internet|can't be fetched"):
            fetcher.fetch(url)
    for url in (
        "http://evilexample.com/",
        "http://example.com.evil/",
        "http://cdn.example/",
        "http://example.com:8080/",
    ):
        with pytest.raises(UserError, match="fetch_hosts"):
            fetcher.fetch(url)
