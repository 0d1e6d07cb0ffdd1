"""task=chat: commands, conversations, Ctrl-C, and lines from a pipe and from a terminal."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, command_line
from engines import holds_nothing, serve, start

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress
from mllama_graph.tasks.chat import Chat, Interrupts, Lines, completion, shown

SCENE = ROOT / "mllama_graph" / "tiny" / "scene.png"
TINY = ROOT / "mllama_graph" / "tiny" / "checkpoint"
# Makes a terminal on stdin that of its process's own session, as a shell's is: Ctrl-C then reaches its processes.
SESSION = """import fcntl, os, sys, termios
os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"""


@pytest.fixture(scope="module")
def engine():
    engine = start(TINY, max_images=2)
    yield engine
    engine.close()


@pytest.fixture
def chat(engine):
    with Interrupts() as interrupts:
        yield Chat(engine, interrupts, Progress(io.StringIO()), None)


def answer_of(engine, messages):
    return serve(engine, [{"id": 0, "messages": messages}])[0].text


def test_each_turn_is_answered_after_all_before_it(chat, engine, capsys):
    for line in ("/system You see shapes.", f"/image {SCENE}", "What do you see?", "How many circles?"):
        assert chat.take(line)
    system, picture = {"role": "system", "content": "You see shapes."}, {"type": "image", "image": SCENE.read_bytes()}
    said = [{"role": "user", "content": [picture, {"type": "text", "text": "What do you see?"}]}]
    said += [{"role": "assistant", "content": answer_of(engine, [system, *said])}]
    said += [{"role": "user", "content": [{"type": "text", "text": "How many circles?"}]}]
    said += [{"role": "assistant", "content": answer_of(engine, [system, *said])}]
    assert chat.said == said and chat.totals.requests == 2
    assert capsys.readouterr().out.splitlines() == [said[1]["content"], said[3]["content"]]
    chat.take("/reset")
    chat.take("/system")
    chat.take("What can you do?")
    assert chat.said[1:] == [{"role": "assistant", "content": answer_of(engine, chat.said[:1])}]
    assert not chat.take("/quit")


@pytest.mark.parametrize(
    "lines, reason",
    [
        (["/image nothing.png"], r"picture 1 \(nothing.png\) can't be read: the file does not exist."),
        (["/imagine"], "there is no command '/imagine'"),
        (["x " * 400], "max_input_length=300"),
        ([f"/image {SCENE},{SCENE},{SCENE}", "What do you see?"], "max_images"),
    ],
)
def test_what_can_not_be_done_is_said_in_one_line_and_forgotten(chat, engine, lines, reason):
    with pytest.raises(UserError, match=reason) as error:
        for line in lines:
            chat.take(line)
    assert "\n" not in str(error.value) and chat.said == [] and holds_nothing(engine)
    chat.take("/image")
    chat.take("What can you do?")
    assert chat.said[-1]["content"] == answer_of(engine, [{"role": "user", "content": "What can you do?"}])


def test_ctrl_c_stops_an_answer_between_two_steps_and_a_second_one_the_chat(chat, engine, monkeypatch):
    whole, steps, once = answer_of(engine, [{"role": "user", "content": "What can you do?"}]), [], engine.step

    def step(presses=1):
        steps.append(deltas := once())
        if len(steps) == 5:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
        return deltas

    monkeypatch.setattr(engine, "step", step)
    chat.take("What can you do?")
    kept = chat.said[-1]["content"]
    assert len(steps) == 5 and kept and kept != whole and whole.startswith(kept) and holds_nothing(engine)
    steps.clear()
    monkeypatch.setattr(engine, "step", lambda: step(presses=2))
    with pytest.raises(KeyboardInterrupt):
        chat.take("What can you do?")


def test_lines_of_a_pipe_are_read_to_its_end_and_bytes_that_are_no_text_refused(monkeypatch):
    data = "one\\\ntwo\r\n\n图里有什么？\n".encode() + b"\xff\nlast"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf8"))
    lines = Lines(Interrupts(), None)
    assert [lines.read() for _ in range(3)] == ["one\ntwo", "", "图里有什么？"]
    with pytest.raises(UserError, match="no UTF-8 text"):
        lines.read()
    assert [lines.read() for _ in range(2)] == ["last", None]


def test_a_terminal_gets_no_control_characters_of_a_model(monkeypatch):
    assert shown("\x1b[2J\ta\n") == "\x1b[2J\ta\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert shown("\x1b[2J\ta\n图\x9b") == "\ufffd[2J\ta\n图\ufffd"


def test_tab_completes_commands_and_paths(tmp_path):
    (tmp_path / "a b.png").touch()
    (tmp_path / "a").mkdir()
    found = [completion(f"/image {tmp_path}/a", number) for number in range(3)]
    assert found == [f"/image {tmp_path}/a/", f"/image {tmp_path}/a b.png", None]
    assert completion("/sy", 0) == "/system " and completion("sy", 0) is None and completion("", 0) is None


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *command, **variables):
        self.end, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SESSION, *command],
            stdin=other,
            stdout=other,
            stderr=other,
            env=os.environ | variables,
        )
        os.close(other)
        self.text = ""

    def wait_for(self, text, seconds=60):
        """Read up to a text, and return what was before it."""
        until = time.monotonic() + seconds
        while text not in self.text:
            ready, _, _ = select.select([self.end], [], [], max(0.0, until - time.monotonic()))
            assert ready, self.text
            self.text += os.read(self.end, 4096).decode()
        before, _, self.text = self.text.partition(text)
        return before

    def type(self, text):
        os.write(self.end, text.encode())

    def interrupt_until(self, text):
        """Press Ctrl-C until a text appears: readline notices one of the instant in which it begins at the next key."""
        for attempt in range(10):
            self.type("\x03")
            try:
                return self.wait_for(text, 6)
            except AssertionError:
                if attempt == 9:
                    raise


def test_a_terminal_reaches_the_first_of_two_ranks(tmp_path):
    history = tmp_path / "history"
    # Without native code, which would first be built.
    given = ["tp=2", "backend=eager", "backend.kernels=plain", "collectives=distributed", "max_input_length=300"]
    command = command_line(tmp_path / "out", "task=chat", f"task.history={history}", *given)
    terminal = Terminal(*command, TERM="dumb")
    try:
        terminal.wait_for("> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.interrupt_until("Ctrl-D or /quit ends")
        terminal.wait_for("> ")
        terminal.type("What can you do?\n")
        assert "I can describe simple shapes, count them and read numbers." in terminal.wait_for("16 tokens")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.end)
    assert history.read_text() == "What can you do?\n" and history.stat().st_mode & 0o077 == 0
