"""The inputs of one conversation's steps, and two ways to run them: plain.py eagerly, npu.py through torchair.

An image is encoded, its prompt is prefilled in two chunks, the second of them together with the first chunk of a second
sequence, and both are decoded together. Before, a mixed step decodes the first beside a chunk of the second.
Steps share their pages, so that a wrong write of one step shows in the next.
"""

import copy
from itertools import accumulate

import torch
from lowered import lower, to_host, to_npu

from mllama_graph.graphs.step import Step
from mllama_graph.model.inputs import ImageInput, MixedInput, PromptInput, TileInput, TokenInput, mixed_input
from mllama_graph.model.ops import fast_head, padded_head
from mllama_graph.ops.npu import npu_ops
from mllama_graph.ops.npu_inputs import causal_mask, prepare, prepare_rows, with_places
from mllama_graph.ops.npu_layout import lay_out
from mllama_graph.ops.pages import gather
from mllama_graph.ops.plain import PLAIN
from mllama_graph.plan.blocks import pages_for, slots

P = 128
# Pages of the sequence with the image and of the other one; page 0 is scratch.
TABLES = [[3, 1], [4, 2]]
NUM_PAGES = 5
# Tokens of the two chunks, and the number of rows that each is padded to.
FIRST, SECOND, BUCKET = 20, 9, 32


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def pools(shape, dtype, padded):
    """Pages of all layers, and image pages for two sequences with one image each; int8 ones with scales."""
    text = shape.text
    width = padded_head(text.head_width, dtype.itemsize) if padded else text.head_width
    per_image = pages_for(shape.vision.max_tiles * shape.vision.tokens, P)

    def pool(count, layers):
        parts = [((count, P, text.kv_heads, width), dtype)] * 2
        parts += [((count, text.kv_heads, P), torch.float32)] * (2 * (dtype == torch.int8))
        return tuple(tuple(torch.zeros(size, dtype=dtype) for size, dtype in parts) for _ in range(layers))

    return pool(NUM_PAGES, len(text.self_layers)), pool(1 + 2 * per_image, len(text.cross_layers))


def rounded(weights, dtype, back=None):
    """A copy of a weight tree with its Parameters rounded to a dtype, then converted to `back`; buffers keep theirs."""
    weights = copy.deepcopy(weights)
    for parameter in weights.parameters():
        parameter.data = parameter.data.to(dtype).to(back or dtype)
    return weights


class Eager:
    """Runs the steps with plain.py, uncompiled."""

    def __init__(self, model, stored, dtype, kv=None):
        self.shape, self.dtype = model.shape, dtype
        self.weights = rounded(model.weights, stored, dtype)
        self.pages, self.image_pages = pools(model.shape, kv or dtype, padded=False)

    def __call__(self, phase, given):
        step = Step(phase, self.weights, self.shape, self.dtype, PLAIN)
        with torch.inference_mode():
            return step(given, () if phase == "vision" else self.pages, self._image_pages(given))

    def _image_pages(self, given):
        return () if getattr(getattr(given, "tokens", given), "image", given) is None else self.image_pages

    def contents(self):
        """The values in pages on the CPU, without the padding of heads and without page 0, which padding rows write."""
        width = self.shape.text.head_width
        layers = [layer for pool in to_host((self.pages, self.image_pages)) for layer in pool]
        return [
            x[..., :width] for layer in layers for x in gather(layer, torch.arange(1, len(layer[0])), torch.float32)
        ]


class Compiled(Eager):
    """Runs the steps with npu.py through torchair: one graph for each combination of phase and shapes."""

    def __init__(self, model, dtype, parts=(1, 1), nz=False, padded=False, kv=None):
        self.shape, self.dtype, self.parts, self.ops = model.shape, dtype, parts, npu_ops(1, nz=nz)
        weights, width = rounded(model.weights, dtype), model.shape.vision.width // model.shape.vision.heads
        lay_out(weights, dtype, nz, (width, fast_head(width)) if padded else None)
        self.weights = weights.to("npu")
        self.pages, self.image_pages = to_npu(pools(model.shape, kv or dtype, padded=True))
        self.int8 = kv == torch.int8
        self.lowered = {}

    def __call__(self, phase, given):
        flat = (*given, *given.prompts) if isinstance(given, MixedInput) else given
        shapes = (None if x is None else x.shape for x in flat if not isinstance(x, tuple))
        key = (phase, *shapes, not self._image_pages(given))
        if key not in self.lowered:
            step = Step(phase, self.weights, self.shape, self.dtype, self.ops)
            self.lowered[key] = lower(step.forward, wide=self.dtype == torch.float32)
        if self.int8:
            given = with_places(given, P, self.shape.text.kv_heads)
        if phase == "vision":
            # A graph for this number of real tiles.
            given = given._replace(tiles_C3hw=given.tiles_C3hw[: int(given.real_1)].clone(), real_1=None)
        elif phase == "mixed":
            parts = {name: self._prepared(getattr(given, name)) for name in ("tokens", "prompts")}
            given = prepare_rows(given, None)._replace(**parts)
        else:
            given = self._prepared(given)
        return self.lowered[key](to_npu(given), () if phase == "vision" else self.pages, self._image_pages(given))

    def _prepared(self, given):
        return prepare(given, P, causal_mask(torch.device("cpu")), None, parts=self.parts)


class Conversation:
    """The inputs of the steps, in order. The ids are fixed in advance, so that they do not depend on the logits."""

    def __init__(self, shape, text_alone=True, seed=0):
        self.shape, self.text_alone = shape, text_alone
        generator = torch.Generator().manual_seed(seed)
        vision = shape.vision
        self.ids = torch.randint(0, shape.text.vocab, (2, 400), generator=generator).int()
        self.ids[0, 2] = shape.image_token
        # All tiles but one are real, so that there is a padding tile where an image can have several tiles.
        self.tiles = torch.randint(
            0,
            256,
            (vision.max_tiles, vision.channels, vision.tile, vision.tile),
            generator=generator,
            dtype=torch.uint8,
        )
        self.real = max(1, vision.max_tiles - 1)
        self.image_table = list(range(1, 1 + pages_for(vision.max_tiles * vision.tokens, P)))
        tokens = self.real * vision.tokens
        self.fill = [min(P, max(0, tokens - P * page)) for page in range(len(self.image_table))]
        self.seen = sum(fill > 0 for fill in self.fill)

    def vision(self):
        vision = self.shape.vision
        tokens = vision.max_tiles * vision.tokens
        return TileInput(
            self.tiles,
            int32([len(vision.aspect_ratios)]),
            int32([self.real]),
            int32(slots(self.image_table, 0, tokens, P)),
        )

    def _image(self, see, sequences):
        J = len(self.image_table)
        rows = [([self.image_table, self.fill], [[0] * J, [0] * J])[sequence] for sequence in sequences]
        return ImageInput(int32([row[0] for row in rows]), int32([row[1] for row in rows]), int32(see))

    def prompt(self, chunks, with_image):
        """Chunks (sequence, start, count) of `count` tokens from `start`, padded to BUCKET rows."""
        new = [(sequence, start + row) for sequence, start, count in chunks for row in range(count)]
        padding = BUCKET - len(new)
        see = [(0, self.seen) if sequence == 0 and at >= 2 else (0, 0) for sequence, at in new] + [(0, 0)] * padding
        sequences, starts, counts = zip(*chunks)
        return PromptInput(
            int32([*(int(self.ids[place]) for place in new), *[0] * padding]),
            int32([*(at for _, at in new), *[0] * padding]),
            int32([slot for sequence, at in new for slot in slots(TABLES[sequence], at, 1, P)] + [*range(padding)]),
            last_B=int32([end - 1 for end in accumulate(counts)]),
            real_1=int32([len(new)]),
            outputs_1=int32([len(chunks)]),
            decoding_1=int32([0]),
            rows_B=int32(counts),
            past_B=int32(starts),
            table_BJ=int32([TABLES[sequence] for sequence in sequences]) if any(starts) else None,
            image=self._image(see, sequences) if with_image else None,
        )

    def mixed(self, length, chunks, with_image):
        """One new token of the first sequence and a padded one, and beside them chunks of prompts."""
        tokens, prompts, real_B = self.tokens([length, 1], with_image), self.prompt(chunks, with_image), int32([1, 0])
        tokens = tokens._replace(
            **{name: getattr(tokens, name) * real_B for name in ("ids_T", "position_T", "slot_T")},
            table_BJ=tokens.table_BJ * real_B[:, None],
        )
        # Padding rows of prompts write to other slots than those of the sequences.
        own = torch.where(prompts.slot_T < P, prompts.slot_T + len(real_B), prompts.slot_T)
        return mixed_input(tokens, prompts._replace(slot_T=own))

    def tokens(self, lengths, with_image):
        """One new token of each sequence; `lengths` include it."""
        at = [length - 1 for length in lengths]
        return TokenInput(
            torch.stack([self.ids[sequence, position] for sequence, position in enumerate(at)]),
            int32(at),
            int32([slots(table, position, 1, P)[0] for table, position in zip(TABLES, at, strict=True)]),
            int32([2]),
            int32(TABLES),
            int32(lengths),
            self._image([(0, self.seen), (0, 0)], (0, 1)) if with_image else None,
        )


def play(run, talk):
    """Logits of every step of the conversation. With text_alone, the second sequence uses graphs without images."""
    run("vision", talk.vision())
    logits = [run("prefill", talk.prompt([(0, 0, FIRST)], True))]
    logits.append(run("prefill", talk.prompt([(0, FIRST, SECOND), (1, 0, SECOND)], True)))
    logits.append(run("prefill", talk.prompt([(1, SECOND, FIRST)], not talk.text_alone)))
    logits.append(run("mixed", talk.mixed(FIRST + SECOND + 1, [(1, FIRST + SECOND, 3)], True)))
    for step in range(1, 4):
        logits.append(run("decode", talk.tokens([FIRST + SECOND + step] * 2, True)))
    logits.append(run("decode", talk.tokens([FIRST + SECOND + 4] * 2, not talk.text_alone)))
    return [x.float() for x in logits]
