"""Removes the text of prompts and answers from logs and records, before they are given to others.

A log may quote a prompt as a whole, cut it, or break it into lines. Therefore every run of words that also occurs in a
private text is removed, not just the whole text.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LEFT_OUT = "(left out)"
# A word, or one character of a script that is written without spaces.
WORD = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]|[^\W\u3040-\u9fff\uac00-\ud7af]+")
# This many words in a row count as a quotation; a private text that is shorter is removed as a whole.
QUOTED_WORDS = 4
# Fields of requests and results whose strings are not written by users, or that only repeat single words of an answer.
PUBLIC_FIELDS = ("role", "type", "finish_reason", "line_hash", "logprobs")


class Private:
    """The private texts of a run."""

    def __init__(self, texts: Iterable[str]):
        # All runs of QUOTED_WORDS words, and the texts that are shorter.
        self._runs: set[tuple[str, ...]] = set()
        for text in texts:
            words = tuple(WORD.findall(text))
            starts = range(max(1, len(words) - QUOTED_WORDS + 1)) if words else ()
            self._runs.update(words[first : first + QUOTED_WORDS] for first in starts)

    def scrub(self, text: str) -> str:
        """The text, with every quotation of a private text replaced by LEFT_OUT."""
        found = list(WORD.finditer(text))
        words = tuple(match[0] for match in found)
        parts, begin, end, kept = [], 0, 0, 0
        for place in range(len(words)):
            most = min(QUOTED_WORDS, len(words) - place)
            lengths = [n for n in range(1, most + 1) if words[place : place + n] in self._runs]
            if not lengths:
                continue
            if found[place].start() > end:
                if end > begin:
                    parts += [text[kept:begin], LEFT_OUT]
                    kept = end
                begin = found[place].start()
            end = max(end, found[place + lengths[-1] - 1].end())
        if end > begin:
            parts += [text[kept:begin], LEFT_OUT]
            kept = end
        return "".join([*parts, text[kept:]])

    def scrubbed(self, value: Any) -> Any:
        """A value of JSON with all its strings scrubbed."""
        if isinstance(value, dict):
            return {key: self.scrubbed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.scrubbed(inner) for inner in value]
        return self.scrub(value) if isinstance(value, str) else value


def strings(value: Any) -> Iterator[str]:
    """Every string in a value of JSON, except those of PUBLIC_FIELDS."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in PUBLIC_FIELDS:
                yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def texts_of_lines(path: Path) -> Iterator[str]:
    """Every string in a file of JSON lines; a line that is not JSON as a whole. Nothing where it can't be read."""
    try:
        with path.open(encoding="utf8", errors="replace") as file:
            for line in file:
                try:
                    yield from strings(json.loads(line))
                except ValueError:
                    yield line
    except OSError:
        return
