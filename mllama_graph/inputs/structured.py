"""Structured output: reads `response_format` and `structured_outputs`, and compiles them to grammars with llguidance.

A grammar says which ids may come next. It is compiled where requests are prepared, so that a request with a grammar
that can't be used is refused before it runs. JSON is generated without optional whitespace: a small model might
otherwise fill its answer with it.
"""

import contextlib
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.tokenizer import ENDS, CheckpointTokenizer, TextCodec
from mllama_graph.model.fields import describe

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

FORMAT, STRUCTURED = "response_format", "structured_outputs"
KINDS = ("json", "json_object", "regex", "choice", "grammar")
JSON_OPTIONS = {"whitespace_flexible": False}
# Bounds on a client's grammar. Compiling then takes at most about 0.2 s, and a mask a few milliseconds.
MOST_CHARACTERS = 1 << 16
MOST_PROPERTIES = 1000
# The time to intersect patterns grows exponentially with their number: 12 take 1 s.
MOST_INTERSECTED = 8
LIMITS = {"max_grammar_size": 200_000, "verbose_errors": False}


class OwnGrammar(str):
    """A Lark grammar that this package has made, from parts that are checked already.

    begin: the grammar holds for texts that begin with this pattern, others are free; None: for all. A text that may
    still begin with it starts with whitespace or `first`, and is at most `most` characters long. parts: the JSON
    schemas in it, by where errors say that they stand.
    """

    begin: re.Pattern[str] | None = None
    first = "{"
    most = 256
    parts: Mapping[str, str] = {}


class Grammar:
    """A compiled grammar, from which each sequence gets a matcher of its own.

    vocab: the number of ids that have a logit. source: what was compiled. tokenizer: of the ids.
    """

    def __init__(self, matcher: "LLMatcher", vocab: int, closers: "Closers", source: str, tokenizer: "LLTokenizer"):
        self._matcher, self.vocab, self.closers, self._tokenizer = matcher, vocab, closers, tokenizer
        self._own = source if isinstance(source, OwnGrammar) else OwnGrammar()

    @property
    def waits(self) -> bool:
        """Whether texts are free before they begin in a certain way."""
        return self._own.begin is not None

    def begun(self, ids: Sequence[int]) -> bool | None:
        """Whether the text of `ids` begins as the grammar's texts do; None while that is open."""
        text = self._tokenizer.decode_str(self.plain(ids)).lstrip()
        if self._own.begin is None or self._own.begin.match(text):
            return True
        return None if (not text or text.startswith(self._own.first)) and len(text) <= self._own.most else False

    def plain(self, ids: Sequence[int]) -> list[int]:
        """The ids without those of special tokens, such as <|python_tag|>."""
        return [id for id in ids if not self._tokenizer.is_special_token(id)]

    def matcher(self) -> "LLMatcher":
        """A matcher at the beginning of an answer."""
        return self._matcher.deep_copy()


class Closers:
    """The ids that end what is open in JSON, as sets with a bit for each id. `end`: the id that ends an answer."""

    def __init__(self, vocabulary: Mapping[str, int], end: int):
        texts = vocabulary.items()
        # A string allows z, which begins no value of JSON; in a string, brackets close nothing.
        self._inside = _bits(id for text, id in texts if text.startswith("z"))
        self._quotes = _bits(id for text, id in texts if text.startswith('"') and not text.strip('"]}'))
        self._brackets = _bits({end, *(id for text, id in texts if not text.strip("]}"))})
        self._commas = _bits(id for text, id in texts if text.startswith(","))

    def among(self, allowed: int) -> int:
        """Those of the allowed ids that close a string, an object or a list, or else those that begin the next item.

        All of the allowed ids if it has none of these.
        """
        inside = allowed & self._inside and allowed & self._quotes
        return inside or allowed & self._brackets or allowed & self._commas or allowed


class Grammars:
    """Compiles grammars for one tokenizer. Threads may share it.

    eos: the ids that end a text; vocab: the number of ids that have a logit.
    """

    def __init__(self, codec: TextCodec, eos: frozenset[int], vocab: int):
        self._codec, self._eos, self._vocab = codec, eos, vocab
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def read(self, given: Mapping[str, Any]) -> Grammar | None:
        """The grammar of a request's fields; None where its text is free. Raises UserError with the field."""
        asked = read_structured(given)
        if asked is None:
            return None
        field = STRUCTURED if given.get(STRUCTURED) is not None else FORMAT
        guide, end = _guide(field), self._end(field)
        form, text = asked
        grammar_of = {"json": guide.LLMatcher.grammar_from_json_schema, "regex": guide.LLMatcher.grammar_from_regex}
        grammar = grammar_of[form](text) if form in grammar_of else guide.LLMatcher.grammar_from_lark(text)
        limits = guide.LLParserLimits(**LIMITS)
        tokenizer = self._of_codec(guide, end)

        def compiled_of(grammar: str) -> Any:
            return guide.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)

        matcher = compiled_of(grammar)
        if matcher.get_error() and isinstance(text, OwnGrammar):
            # Its errors would show our grammar: those of its parts show what the user has given.
            for where, schema in text.parts.items():
                refuse(where, compiled_of(guide.LLMatcher.grammar_from_json_schema(schema)))
        refuse(field, matcher)
        compiled = Grammar(matcher, self._vocab, self._closers, text, tokenizer)
        # The first mask shows what compiling does not, such as a grammar that no text satisfies.
        first = compiled.matcher()
        mask = first.compute_bitmask()
        refuse(field, first)
        if not any_allowed(mask, self._vocab):
            raise UserError(f"{field}: no token that the model generates can begin this.")
        return compiled

    def warm(self) -> None:
        """Prepare the tokenizer for grammars, which takes a second for 128k ids, where there is llguidance and one."""
        with contextlib.suppress(UserError):
            self._of_codec(_guide(STRUCTURED), self._end(STRUCTURED))

    def _end(self, field: str) -> int:
        """The one id that ends an answer: that of a turn, where the tokenizer has it."""
        if not self._eos:
            raise UserError(f"{field} needs a token that ends an answer; the checkpoint names none.")
        named = self._codec.token_to_id(ENDS[0])
        return named if named in self._eos else min(self._eos)

    def _of_codec(self, guide: Any, end: int) -> "LLTokenizer":
        if not isinstance(self._codec, CheckpointTokenizer):
            raise UserError("structured output needs a checkpoint's tokenizer; this run has none.")
        with self._lock:
            if self._tokenizer is None:
                tokenizer = self._codec.tokenizer
                # llguidance refuses a vocabulary without all of the tokenizer's ids, such as that of <|image|>, which
                # has no logit; masks are cut to the logits.
                ids = max(self._vocab, tokenizer.get_vocab_size(with_added_tokens=False), *(self._codec.added or {0}))
                self._tokenizer = guide.LLTokenizer(tokenizer.to_str(), n_vocab=ids + 1, eos_token=end)
                self._closers = Closers(tokenizer.get_vocab(with_added_tokens=False), end)
            return self._tokenizer


def _guide(field: str) -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UserError(f"{field} needs llguidance: pip install 'mllama_graph[serve]'.") from error
    return llguidance


def refuse(field: str, matcher: "LLMatcher") -> None:
    """Raises UserError, with the reason, where a matcher has failed."""
    if error := matcher.get_error():
        raise UserError(f"{field} can't be used: {reason(error)}.")


def reason(error: str) -> str:
    """An error of llguidance in one line."""
    if error.startswith("NoExtensionBias"):
        return "no text satisfies it"
    if found := re.search(r"Unimplemented keys: \[(.*?)\]", error):
        return f"the schema's keyword {found[1]} is not supported"
    return " ".join(error.replace("<non-verbose/>", "").split())[:300].rstrip(". ")


def _bits(ids: Iterable[int]) -> int:
    """A set of ids, a bit for each."""
    found = bytearray(1)
    for id in ids:
        found.extend(bytes(max(0, id // 8 + 1 - len(found))))
        found[id // 8] |= 1 << id % 8
    return int.from_bytes(found, "little")


def any_allowed(mask: bytes, vocab: int) -> bool:
    """Whether a mask allows one of the ids 0 .. vocab - 1."""
    whole, rest = divmod(vocab, 8)
    return bool(mask[:whole].strip(b"\0")) or any(mask[whole : whole + 1]) and bool(mask[whole] & ((1 << rest) - 1))


def read_structured(given: Mapping[str, Any]) -> tuple[str, str] | None:
    """What a request asks for: "json" and a schema, "regex" or "lark" and a text; None for free text.

    Raises UserError with the field.
    """
    kind, structured = given.get(FORMAT), given.get(STRUCTURED)
    asked = None if kind is None else format_schema(kind)
    if structured is None:
        return None if asked is None else ("json", schema_text(asked, FORMAT))
    if asked is not None:
        raise UserError(f"{FORMAT} and {STRUCTURED} contradict each other. Give one of them.")
    if not isinstance(structured, dict):
        raise UserError(f"{STRUCTURED} is {describe(structured)}; it must be an object.")
    found = {name: value for name in KINDS if (value := structured.get(name)) not in (None, False)}
    if len(found) != 1:
        raise UserError(f"{STRUCTURED} needs exactly one of {', '.join(KINDS)}; it has {', '.join(found) or 'none'}.")
    [(name, value)] = found.items()
    if name == "json":
        return "json", schema_text(value, f"{STRUCTURED}.json")
    if name == "json_object":
        return "json", schema_text({"type": "object"}, STRUCTURED)
    if name == "choice":
        return "regex", _choices(value)
    if not isinstance(value, str):
        raise UserError(f"{STRUCTURED}.{name} is {describe(value)}; it must be a text.")
    _bounded(value, f"{STRUCTURED}.{name}", MOST_CHARACTERS * (4 if isinstance(value, OwnGrammar) else 1))
    if name == "grammar" and not isinstance(value, OwnGrammar) and max(map(value.count, "&~")) > MOST_INTERSECTED:
        raise UserError(f"{STRUCTURED}.grammar has more than {MOST_INTERSECTED} & or ~.")
    return ("lark" if name == "grammar" else name), value


def format_schema(kind: Any) -> Any | None:
    """The JSON schema of a response_format; None for text."""
    if not isinstance(kind, dict):
        raise UserError(f"{FORMAT} is {describe(kind)}; it must be an object.")
    name = kind.get("type")
    if name == "text":
        return None
    if name == "json_object":
        return {"type": "object"}
    if name != "json_schema":
        raise UserError(f"{FORMAT}.type is {describe(name)}; it must be text, json_object or json_schema.")
    inner = kind.get("json_schema")
    if not isinstance(inner, dict) or inner.get("schema") is None:
        raise UserError(f"{FORMAT}.json_schema must be an object with the field schema.")
    return inner["schema"]


def checked_schema(schema: Any, field: str) -> dict[str, Any]:
    """A JSON schema as an object, within bounds. Raises UserError for another type, or beyond the bounds."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{field} is not valid JSON: {str(error)[:100]}.") from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise UserError(f"{field} is {describe(schema)}; it must be a JSON schema.")
    _bounded(json.dumps(schema), field)
    found = [*_objects(schema)]
    properties = sum(len(one["properties"]) for one in found if isinstance(one.get("properties"), dict))
    if properties > MOST_PROPERTIES:
        raise UserError(f"{field} has {properties} properties; at most {MOST_PROPERTIES} are taken.")
    patterns = sum(isinstance(one.get(name), str) for one in found for name in ("pattern", "format"))
    if patterns > MOST_INTERSECTED and any("allOf" in one for one in found):
        raise UserError(f"{field} has {patterns} patterns and allOf; at most {MOST_INTERSECTED} are taken.")
    return schema


def _objects(value: Any) -> list[dict[str, Any]]:
    """All objects within a value, itself included."""
    found, left = [], [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            found.append(one)
            left += one.values()
        elif isinstance(one, list):
            left += one
    return found


def schema_text(schema: Any, field: str, **options: Any) -> str:
    """A JSON schema with llguidance's options for it, as JSON. `options` override those of structured output."""
    return json.dumps({**checked_schema(schema, field), "x-guidance": JSON_OPTIONS | options})


def _choices(value: Any) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise UserError(f"{STRUCTURED}.choice must be a list of texts that are not empty.")
    pattern = "|".join(map(re.escape, value))
    _bounded(pattern, f"{STRUCTURED}.choice")
    return pattern


def _bounded(text: str, field: str, most: int = MOST_CHARACTERS) -> None:
    if len(text) > most:
        raise UserError(f"{field} has {len(text)} characters; at most {most} are taken.")
