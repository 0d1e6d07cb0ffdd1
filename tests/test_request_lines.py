"""Requests files: odd lines touch no other line, streams, and batches that go on where they stopped."""

import io
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import FUZZ_SECONDS, QUICK, interrupted, run
from engines import holds_nothing, start
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from mllama_graph.core.errors import UserError, message_of
from mllama_graph.engine.offline import serve_lines
from mllama_graph.engine.result_file import Results
from mllama_graph.inputs.image_sources import list_images
from mllama_graph.inputs.request_file import is_stream, most_images, read_lines, spool

SOUND = {"input_ids": [3, 4, 5], "max_new_tokens": 3}


@pytest.fixture(scope="module")
def engine(checkpoint):
    return start(checkpoint("base"), batch=3, max_output_length=4)


def refuse(name):
    raise AssertionError(f"{name} in results.jsonl")


def batch(engine, content: bytes, folder, resume=False):
    """The lines of results.jsonl after serving a file of requests, and its Results."""
    (folder / "requests.jsonl").write_bytes(content)
    results = Results(folder / "results.jsonl", resume).open()
    serve_lines(engine, read_lines(folder / "requests.jsonl"), folder, results, 3)
    results.close()
    written = results.path.read_bytes()
    assert written.endswith(b"\n")
    return [json.loads(line, parse_constant=refuse) for line in written.decode().splitlines()], results


# ---- odd lines

ODD = {
    "deep lists": b'{"prompt":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep objects": b'{"prompt":' + b'{"a":' * 900 + b"1" + b"}" * 901,
    "deep id": b'{"prompt":"hi","id":' + b"[" * 500 + b"]" * 500 + b"}",
    "deep content": b'{"messages":[{"role":"user","content":' + b"[" * 90 + b"]" * 90 + b"}]}",
    "content is a number": b'{"messages":[{"role":"user","content":5}]}',
    "messages of numbers": b'{"messages":[1,2]}',
    "float too large": b'{"prompt":"hi","temperature":1e999}',
    "id too large": b'{"id":-1e999,"prompt":"hi"}',
    "NaN": b'{"id":NaN,"prompt":"hi"}',
    "integer of many digits": b'{"prompt":"hi","seed":' + b"9" * 100_000 + b"}",
    "integer of 4000 digits": b'{"prompt":"hi","max_new_tokens":' + b"9" * 4000 + b"}",
    "lone surrogate": b'{"prompt":"\\ud800"}',
    "lone surrogate in a key": b'{"prompt":"hi","\\udfff":1}',
    "not UTF-8": b'{"prompt":"\xff\xfe"}',
    "UTF-16": '{"prompt":"hi"}'.encode("utf-16"),
    "raw NUL": b'{"prompt":"a\0b"}',
    "NUL in a path": b'{"prompt":"hi","images":["a\\u0000b"]}',
    "mapping as path": b'{"prompt":"hi","images":[{"url":[]}]}',
    "wrong type of image part": b'{"messages":[{"role":"user","content":[{"type":"image","image":[1]}]}]}',
    "stop of numbers": b'{"prompt":"hi","stop":[1]}',
    "truncated": b'{"prompt":"hi"',
    "no object": b'"text"',
    "object as ids": b'{"input_ids":{"1":2}}',
    "huge id": b'{"input_ids":[1e300]}',
    "negative id": b'{"input_ids":[-1]}',
    "true": b"true",
}


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
def test_each_odd_line_gets_an_error_of_its_own(end, engine, tmp_path):
    sound = json.dumps(SOUND).encode()
    content = sound + end + b"".join(odd + end + sound + end for odd in ODD.values())
    # The last line has no newline.
    lines, results = batch(engine, content.removesuffix(end), tmp_path)
    assert [line["id"] for line in lines] == list(range(1, 2 * len(ODD) + 2))
    assert len({tuple(line["token_ids"]) for line in lines[::2]}) == 1 and all(
        "error" not in line for line in lines[::2]
    )
    for name, line in zip(ODD, lines[1::2], strict=True):
        assert line["finish_reason"] == "error" and line["token_ids"] == [], name
        assert 5 < len(line["error"]) <= 400 and line["error"].isprintable() and " at 0x" not in line["error"], name
    assert (results.totals.requests, results.errors) == (len(ODD) + 1, len(ODD))
    assert holds_nothing(engine)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_files_with_a_byte_order_mark_are_read(encoding, engine, tmp_path):
    text = '{"id": "Ċ图", "input_ids": [3, 4, 5]}\r\n\r\n{"id": "b", "input_ids": [3]}'
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    lines, _ = batch(engine, (mark + text).encode(encoding), tmp_path)
    assert [line["id"] for line in lines] == ["Ċ图", "b"] and all(line["token_ids"] for line in lines)


def test_ids_are_any_json_and_an_id_that_is_used_again_is_an_error(engine, tmp_path):
    ids = ["a", 0, 0.0, False, [1, {"x": 2}], "", "\x85\u2028\u2029", "a", 12]
    given = [SOUND | {"id": id} for id in ids] + [SOUND] * 3
    lines, _ = batch(engine, "\n".join(map(json.dumps, given)).encode(), tmp_path)
    # A line without an id is served although an earlier line's id is its number.
    assert [line["id"] for line in lines] == [*ids, 10, 11, 12]
    assert [n for n, line in enumerate(lines) if "error" in line] == [7]


def test_a_line_with_a_lone_surrogate_keeps_its_id_unless_the_id_holds_one(engine, tmp_path):
    odd = b'{"prompt":"hi \\ud800","id":"a"}', b'{"prompt":"\xed\xa0\x80","id":"b"}', b'{"prompt":"hi","id":"\\uDFFF"}'
    pair = b'{"input_ids":[3],"id":"\\ud83d\\ude00"}'
    lines, _ = batch(engine, b"\n".join((*odd, pair)), tmp_path)
    assert [line["id"] for line in lines] == ["a", "b", 3, "\U0001f600"]
    assert all("holds a lone surrogate" in line["error"] for line in lines[:3]) and "error" not in lines[3]


def test_one_line_with_many_images_does_not_enlarge_the_plan():
    def line(count):
        return (1, json.dumps({"prompt": "x", "images": ["a.png"] * count}).encode())

    assert most_images([line(3), line(10_000), (2, b"\xff image"), (3, "reason")], Path(".")) == 4
    assert most_images([line(33)], Path(".")) == 1


def test_the_images_of_a_string_are_counted_as_they_are_read(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    (tmp_path / "empty").mkdir()

    def most(images):
        return most_images([(1, json.dumps({"prompt": "x", "images": images}).encode())], tmp_path)

    counts = [most(images) for images in ("a.png", "a.png,b.png", "data:image/png;base64,AA,b.png", ".", "empty")]
    assert counts == [1, 2, 2, 4, 1] and [len(list_images(".", tmp_path)), most([])] == [3, 1]


def test_a_request_error_is_one_short_line_without_addresses():
    assert message_of(ValueError(f"can't read {io.BytesIO()!r}\n\x1b[31m\ud800")) == (
        "the request can't be prepared: ValueError: can't read <_io.BytesIO> [31m?."
    )
    assert len(message_of(UserError("x" * 10_000))) <= 400
    assert "nested" in message_of(RecursionError()) and "memory" in message_of(MemoryError())


def test_whatever_a_request_raises_is_its_own_error(engine, tmp_path, monkeypatch):
    class Panic(BaseException):
        """Like the panics of tokenizers, no Exception."""

    raised = iter([Panic("panicked"), MemoryError(), ZeroDivisionError("0")])
    request = engine.processor.request
    monkeypatch.setattr(
        engine.processor, "request", lambda line, base: throw(next(raised)) if "odd" in line else request(line, base)
    )
    given = [SOUND, SOUND | {"odd": 1}, SOUND | {"odd": 2}, SOUND, SOUND | {"odd": 3}]
    lines, _ = batch(engine, "\n".join(map(json.dumps, given)).encode(), tmp_path)
    assert ["error" in line for line in lines] == [False, True, True, False, True]
    assert "Panic: panicked" in lines[1]["error"]


def throw(error):
    raise error


# ---- the fuzz test

NUMBERS = st.one_of(st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.just(float("inf")), st.just(2**63))
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["", "\0", "\ud800", "<|image|>", "data:,", "~", "/dev/null"]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)
PARTS = st.fixed_dictionaries(
    {}, optional={name: VALUES for name in ("text", "image_url", "image", "path")} | {"type": st.one_of(VALUES, TEXTS)}
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.one_of(st.sampled_from(["user", "system", "assistant", "tool"]), VALUES),
            "content": st.one_of(TEXTS, st.lists(PARTS, max_size=3), VALUES),
            "tool_calls": VALUES,
        },
    ),
    max_size=3,
)
FIELDS = {
    name: VALUES
    for name in ("id", "images", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
}
FIELDS |= {name: VALUES for name in ("ignore_eos", "logprobs", "answer", "kind", "tools")}
REQUESTS = st.fixed_dictionaries(
    {},
    optional=FIELDS
    | {
        "prompt": st.one_of(TEXTS, VALUES),
        "messages": st.one_of(MESSAGES, VALUES),
        "input_ids": st.one_of(st.lists(NUMBERS, max_size=4), VALUES),
    },
)
ENCODINGS = st.sampled_from(["utf-8", "utf-16", "latin-1", "utf-8-sig"])


@st.composite
def fuzzed(draw):
    """The bytes of one line: an odd request, possibly damaged, or noise."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=60)).replace(b"\n", b"")
    text = json.dumps(draw(REQUESTS), ensure_ascii=draw(st.booleans()))
    encoding = draw(ENCODINGS)
    line = text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass").replace(b"\n", b"")
    if line and draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(line) - 1))
        line = line[:at] + draw(st.binary(max_size=3)).replace(b"\n", b"") + line[at + draw(st.integers(0, 3)) :]
    return line


def test_fuzzed_lines_leave_the_other_lines_alone(engine, tmp_path):
    """Serves batches of odd lines between sound ones."""
    [[alone], _] = batch(engine, json.dumps(SOUND).encode(), tmp_path)
    expected, count = alone["token_ids"], 0

    @settings(max_examples=40)
    @given(st.lists(fuzzed(), min_size=1, max_size=12))
    def check(odd):
        nonlocal count
        sound = [json.dumps(SOUND | {"id": f"sound {n} {len(odd)}"}).encode() for n in range(len(odd) + 1)]
        content = sound[0] + b"".join(b"\n" + line + b"\n" + own for line, own in zip(odd, sound[1:]))
        lines, _ = batch(engine, content, tmp_path)
        ours = [line for line in lines if str(line["id"]).startswith("sound ")]
        assert [line["token_ids"] for line in ours] == [expected] * len(sound)
        assert len(lines) == len(sound) + sum(bool(line.strip()) for line in odd)
        assert all(line["error"].isprintable() and line["error"] for line in lines if "error" in line)
        assert holds_nothing(engine)
        count += len(odd)

    until, rounds = time.monotonic() + FUZZ_SECONDS, 0
    while not rounds or time.monotonic() < until:
        seed(rounds)(check)()
        rounds += 1
    print(f"{count} odd lines", file=sys.stderr)


# ---- a batch that goes on


def numbered(lines: list[dict]) -> bytes:
    return "\n".join(map(json.dumps, lines)).encode()


def test_a_batch_goes_on_where_it_stopped(engine, tmp_path):
    """The earlier results are in the order in which they finished, and the last one is half written."""
    given = [SOUND | ({"id": f"r{n}"} if n % 3 else {}) for n in range(12)] + [{"id": "bad", "prompt": ""}]
    whole, _ = batch(engine, numbered(given), tmp_path)
    path = tmp_path / "results.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)
    random.Random(1).shuffle(kept)
    half = kept[7]
    mark = [json.loads(line) | {"text": "kept"} for line in kept[:7]]
    path.write_text("".join(json.dumps(line) + "\n" for line in mark))
    with path.open("ab") as file:
        file.write(half[: len(half) // 2])
    lines, results = batch(engine, numbered(given), tmp_path, resume=True)
    assert [(line["id"], line["token_ids"]) for line in lines] == [(line["id"], line["token_ids"]) for line in whole]
    finished = {json.dumps(line["id"]) for line in mark if "error" not in line}
    assert {json.dumps(line["id"]) for line in lines if line["text"] == "kept"} == finished
    assert results.kept == len(finished) and results.totals.requests == 12 - len(finished)
    # Everything is finished, so that nothing but the error is tried again.
    again, results = batch(engine, numbered(given), tmp_path, resume=True)
    assert again == lines and (results.totals.requests, results.errors, results.kept) == (0, 1, 12)


def test_a_changed_file_keeps_the_results_of_unchanged_lines_alone(engine, tmp_path):
    batch(engine, numbered([SOUND | {"id": "a"}, SOUND | {"id": "b"}, SOUND]), tmp_path)
    changed = [SOUND | {"id": "new"}, SOUND | {"id": "b"}, {"id": "a", "input_ids": [9]}, SOUND]
    lines, results = batch(engine, numbered(changed), tmp_path, resume=True)
    assert [line["id"] for line in lines] == ["new", "b", "a", 4]
    assert results.kept == 1 and results.totals.requests == 3


def test_an_interrupted_run_is_completed_by_the_same_command(checkpoint, tmp_path):
    where = [*QUICK, f"weights={checkpoint('base')}"]
    stopped = interrupted(tmp_path, 30, *where)
    before = {line["id"]: line for line in stopped.lines()}
    given = ["resume=true", f"requests={tmp_path / 'requests.jsonl'}", "batch=4"]
    done = run(tmp_path / "out", *where, *given)
    assert done.code == 0 and f"{len(before)} results were kept" in done.err, done.err
    lines = done.lines()
    assert [line["id"] for line in lines] == list(range(30))
    assert all(line == before[line["id"]] for line in lines if line["id"] in before)
    refused = run(tmp_path / "other", *where, "resume=true", "prompt=hi")
    assert refused.code == 2 and "requests=" in refused.one_line_error()


# ---- streams


def test_a_named_pipe_is_copied_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert is_stream(str(pipe)) and is_stream("-") and is_stream("/dev/stdin") and not is_stream(str(tmp_path))
    writer = threading.Thread(target=pipe.write_bytes, args=(b'{"prompt":"hi"}\n',))
    writer.start()
    copy = spool(str(pipe), tmp_path / "out")
    writer.join()
    assert list(read_lines(copy)) == [(1, b'{"prompt":"hi"}\n')]
    with pytest.raises(UserError, match="requests=/dev/null is empty"):
        spool("/dev/null", tmp_path / "out")


def test_lines_are_read_as_they_are_needed(engine, tmp_path):
    taken = 0

    def lines():
        nonlocal taken
        for number in range(1, 200):
            taken = number
            yield number, json.dumps(SOUND).encode()

    results = Results(tmp_path / "results.jsonl").open()
    add, ahead = results.add, []

    def count(place, result, digest):
        add(place, result, digest)
        ahead.append(taken - len(ahead))

    results.add = count
    assert serve_lines(engine, lines(), tmp_path, results, 3) == 199
    assert max(ahead) <= 2 * 3
