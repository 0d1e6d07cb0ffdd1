"""Shape suffixes: in a traced run, each local variable such as `x_TD` must be a tensor with two dimensions."""

import re
import sys
from pathlib import Path

import torch
from engines import serve, start

import mllama_graph

FOLDERS = tuple(str(Path(mllama_graph.__file__).parent / name) for name in ("model", "ops"))
# One letter or digit per dimension; the first is a capital or a digit, except for a single h, half of a head's width.
SUFFIX = re.compile(r"_((?:[A-Z1-9][A-Za-z1-9]*)|h)$")


class SuffixTrace:
    """Records the tensors with a suffix in the traced functions' local variables, and those of a wrong shape."""

    def __init__(self, folders):
        self.folders, self.seen, self.wrong = folders, set(), set()

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.folders):
            return None
        for name, value in frame.f_locals.items():
            self.check(frame.f_code.co_name, name, value)
        return self

    def check(self, function, name, value):
        if hasattr(value, "_fields"):  # an input tree
            for field in value._fields:
                self.check(type(value).__name__, field, getattr(value, field))
        found = SUFFIX.search(name)
        if not found or not isinstance(value, torch.Tensor):
            return
        self.seen.add((function, name))
        fits = value.dim() == len(found[1]) and all(
            size == int(letter) for letter, size in zip(found[1], value.shape) if letter.isdigit()
        )
        if not fits:
            self.wrong.add(f"{function}: {name} is {list(value.shape)}")

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def test_every_suffix_has_one_letter_for_each_dimension(checkpoint, requests):
    lines = [line for line in requests("base") if line["id"] in ("text_16", "two_images_64", "large_22")]
    lines = [line | {"max_new_tokens": 3, "temperature": 0.5 * (n % 2), "logprobs": 2} for n, line in enumerate(lines)]
    engine = start(checkpoint("base"), batch=3, page_size=16, prefill_tokens=[32])
    with SuffixTrace(FOLDERS) as trace:
        serve(engine, lines)
    assert not trace.wrong
    functions = {function for function, _ in trace.seen}
    assert len(trace.seen) > 120, "the walk saw too little to prove anything"
    assert {
        "prefill",
        "decode",
        "cross_block",
        "encode_image",
        "draw",
        "attend_pages",
        "attend_image",
        "PromptInput",
        "TokenInput",
        "TileInput",
        "ImageInput",
    } <= functions


def test_a_wrong_suffix_is_found():
    def rotten():
        x_TD, y_1V, past_k = torch.zeros(3), torch.zeros(2, 4), torch.zeros(2, 2, 2)
        return x_TD, y_1V, past_k

    with SuffixTrace((__file__,)) as trace:
        rotten()
    assert trace.wrong == {"rotten: x_TD is [3]", "rotten: y_1V is [2, 4]"}
