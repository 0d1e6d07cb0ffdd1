"""task=chat: a conversation in the terminal, or with lines from a pipe."""

import glob
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress, write_result
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.results import Result
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.engine.stats import Totals
from mllama_graph.inputs.image_sources import list_images, read_source
from mllama_graph.inputs.images import prepare_images
from mllama_graph.plan.resolve import ResolvedRun
from mllama_graph.tasks.chat_options import ChatOptions

PROMPT = "> "
IMAGE, SYSTEM, RESET, HELP, QUIT = "/image", "/system", "/reset", "/help", "/quit"
HELP_TEXT = f"""\
{IMAGE} PATH    show a picture with the next message: a file, a list a.png,b.png, or a folder;
                without a path, take back those that wait
{SYSTEM} TEXT   set the system prompt; without a text, remove it
{RESET}         forget the conversation; the system prompt stays
{HELP}          this text
{QUIT}          end, like Ctrl-D
A \\ at the end of a line goes on with the next one. A message that begins with / needs a blank before it.
Ctrl-C stops an answer. Up and Down show earlier lines."""


class Pressed(Exception):
    """Ctrl-C while a line is read."""


class Interrupts:
    """Ctrl-C inside a `with` block: it ends a line that is being read, and is noted during an answer.

    A step of the engine is never broken off; a second Ctrl-C during one answer ends the run (KeyboardInterrupt).
    """

    def __init__(self) -> None:
        self.reading = self.noted = False

    def __enter__(self) -> "Interrupts":
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.reading:
            raise Pressed
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True


class Lines:
    """Reads lines from stdin: with a prompt and readline on a terminal, as they are from a pipe."""

    def __init__(self, interrupts: Interrupts, history: Path | None):
        self._interrupts, self._history = interrupts, history
        # The module, where lines are edited with it.
        self._readline: Any = None
        self.asks = sys.stdin is not None and sys.stdin.isatty()
        if sys.stdin is not None:
            # Bytes that are no text become an error of their line.
            sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        if self.asks:
            self._start_readline()

    def _start_readline(self) -> None:
        try:
            import readline
        except ImportError:
            return
        self._readline = readline
        readline.set_completer_delims("")
        readline.set_completer(completion)
        readline.parse_and_bind("tab: complete")
        if self._history is not None:
            with suppress(OSError):
                readline.read_history_file(self._history)

    def read(self) -> str | None:
        """The next message or command; None at the end. Raises Pressed, or UserError for a line that is no text."""
        parts = [self._line(PROMPT)]
        while (last := parts[-1]) is not None and last.endswith("\\"):
            parts[-1] = last[:-1]
            parts.append(self._line(" " * len(PROMPT)))
        text = "\n".join(part for part in parts if part is not None)
        if parts == [None]:
            return None
        try:
            text.encode()
        except UnicodeError:
            raise UserError("the line is no UTF-8 text. Write it in UTF-8.") from None
        return text

    def _line(self, prompt: str) -> str | None:
        if sys.stdin is None:
            return None
        self._interrupts.reading = True
        try:
            line = input(prompt) if self.asks else sys.stdin.readline()
        except EOFError:
            return None
        finally:
            self._interrupts.reading = False
        return line.removesuffix("\n").removesuffix("\r") if self.asks or line else None

    def close(self) -> None:
        """Write the history, if it has a file, which only its user may read."""
        if self._readline is not None and self._history is not None:
            try:
                self._history.touch(0o600)
                self._readline.write_history_file(self._history)
            except OSError as error:
                raise UserError(f"task.history={self._history} can't be written: {error.strerror}.") from error


def completion(line: str, number: int) -> str | None:
    """The completion of a line with this number: paths after /image, commands after a slash. For readline."""
    start, blank, path = line.partition(" ")
    if start == IMAGE and blank:
        found = sorted(glob.glob(glob.escape(path.lstrip()) + "*"))
        found = [f"{IMAGE} {name}" + "/" * Path(name).is_dir() for name in found]
    else:
        found = [f"{name} " for name in (IMAGE, SYSTEM, RESET, HELP, QUIT) if line and name.startswith(line)]
    return found[number] if number < len(found) else None


class Chat:
    """A conversation, and the engine that answers it. `said`: its messages without the system prompt."""

    def __init__(self, engine: Engine, interrupts: Interrupts, progress: Progress, system: str | None):
        self._engine, self._interrupts, self._progress, self._system = engine, interrupts, progress, system
        self.said: list[dict[str, Any]] = []
        self.totals = Totals()
        self._pictures: list[Any] = []

    def take(self, line: str) -> bool:
        """Carry out a command or answer a message. Returns whether the chat goes on. Raises UserError."""
        name, _, rest = line.partition(" ")
        if not line.startswith("/"):
            if line.strip():
                self.answer(line)
        elif name == IMAGE:
            self.show(rest.strip())
        elif name == SYSTEM:
            self._system = rest.strip() or None
            self._note("the system prompt is " + ("set" if self._system else "removed"))
        elif name == RESET:
            self.said, self._pictures = [], []
            self._note("a new conversation")
        elif name == HELP:
            self._note(HELP_TEXT)
        elif name == QUIT:
            return False
        else:
            raise UserError(f"there is no command {name[:40]!r}. {HELP} lists them; {IMAGE} PATH shows a picture.")
        return True

    def show(self, given: str) -> None:
        """Show pictures with the next message, or none of those so far if `given` is empty. Raises UserError.

        They are read here, so that later turns show the same pictures even where a file changes.
        """
        sources = list_images(given)
        prepare_images(sources, Path(), self._engine.processor.shape.vision)
        self._pictures = [*self._pictures, *map(read_source, sources)] if sources else []
        count = len(self._pictures)
        self._note(f"{count} picture{'s' * (count != 1)} for the next message")

    def answer(self, text: str) -> None:
        """Answer a message, and stream the answer to stdout.

        A message that can't be answered is forgotten, while its pictures stay for the next one. Raises UserError.
        """
        content = [*({"type": "image", "image": data} for data in self._pictures), {"type": "text", "text": text}]
        mine = {"role": "user", "content": content}
        system = [{"role": "system", "content": self._system}] if self._system else []
        request = self._engine.processor.request({"id": 0, "messages": [*system, *self.said, mine]})
        number = self._engine.submit(request)
        self._interrupts.noted, written, result = False, "", None
        while result is None and not self._interrupts.noted:
            for delta in self._engine.step():
                written, result = written + delta.text, delta.result
                print(shown(delta.text), end="", flush=True)
        print(flush=True)
        if result is None:
            self._engine.abort(number)
            self._note("[stopped]")
        elif result.error:
            raise UserError(result.error)
        else:
            self.totals.add(result)
            self._note(f"[{figures(result)}]")
        if result or written:
            self.said += [mine, {"role": "assistant", "content": written}]
            self._pictures = []

    def _note(self, text: str) -> None:
        self._progress.say(text, private=True)


def shown(text: str) -> str:
    """A text as a terminal may show it: a model's control characters could change the terminal's state."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def figures(result: Result) -> str:
    """Tokens and times of an answer."""
    per_token = result.time_per_output_token_ms
    return ", ".join(
        [
            f"{len(result.token_ids)} tokens",
            f"first after {(result.time_to_first_token_ms or 0) / 1e3:.2f} s",
            *([f"{1e3 / per_token:.1f} tokens/s"] if per_token else []),
            f"prompt {result.prompt_tokens}",
            *(["cut at max_output_length="] if result.finish_reason == "length" else []),
        ]
    )


def main(run: ResolvedRun) -> None:
    """Chat until the input ends. prompt= is the first message, image= its pictures.

    Raises UserError for a picture of image= or a prompt= that can't be answered.
    """
    options, question = run.options, run.question
    assert isinstance(options, ChatOptions)
    progress = Progress()
    engine = start_engine(run, processor_of(run), progress)
    history = None if options.history is None else Path(options.history).expanduser()
    with Interrupts() as interrupts:
        lines, chat = Lines(interrupts, history), Chat(engine, interrupts, progress, question.system)
        if lines.asks:
            progress.say(f"{HELP} lists the commands, Ctrl-D ends")
        if question.image:
            chat.show(question.image)
        if question.prompt:
            chat.answer(question.prompt)
        _converse(lines, chat, progress)
        lines.close()
    write_result(run.output_dir, run.asked, metrics=engine.metrics(chat.totals), graphs=engine.graph_records())
    engine.close(progress)


def _converse(lines: Lines, chat: Chat, progress: Progress) -> None:
    while True:
        try:
            line = lines.read()
            if line is None or not chat.take(line):
                if line is None and lines.asks:
                    print()
                return
        except Pressed:
            progress.say(f"\n(Ctrl-D or {QUIT} ends)")
        except UserError as error:
            progress.say(f"error: {error}", private=True)
