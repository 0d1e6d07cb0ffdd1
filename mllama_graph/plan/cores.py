"""How many matrix cores of an NPU fused attention works on, in each of three forms. Integers only.

The rules are those of CANN's tiling code (ops-transformer 9.1.0, 9.0.0 and 8.5.0), run on x86 for a 910B3 with 20 cores
and never on a device. "Inferred" marks what was not among the shapes that were run.

    BSH     a unit of work is a KV head of a sequence, whose keys are split only when there are many
    TND     rows packed without padding: another kernel, which splits keys further (flash decoding; CANN 9 only)
    SPLIT   BSH with several entries per sequence, each with a part of its block table, merged by their log-sum-exp in
            the graph (ops/npu_parts.py)
"""

from collections.abc import Iterator
from dataclasses import dataclass

BSH, TND, SPLIT = "BSH", "TND", "SPLIT"
FORMS = (BSH, TND, SPLIT)
# Keys of a unit beyond which a single query row's keys are split in BSH, by query heads per KV head: (up to, keys).
SPLIT_BEYOND = ((4, 8192), (9, 4096))
SPLIT_BEYOND_LARGER = 2048
# Keys of a part for several query rows with the causal mode, up to this many rows and beyond.
CAUSAL_KEYS, CAUSAL_ROWS, CAUSAL_KEYS_BEYOND = 1024, 16, 512
# TND: most rows, and (fewest keys, most units) for which keys are split, in parts of this many.
TND_ROWS, TND_LIMITS, TND_KEYS = 16, ((1024, 8), (10240, 16)), 512
# From this many int8 keys on, a single row uses every core. Fewer: in proportion (inferred).
INT8_KEYS = 2048
# TND: the page size of its kernel (ops-transformer, fused_infer_attention_score_tiling.cpp, CheckFAISinglePara), and
# the head width for which grouped heads are documented (op-plugin, docs of npu_fused_infer_attention_score, TND).
TND_PAGE, TND_WIDTH = 128, 128


@dataclass(frozen=True)
class Form:
    """How a decode step attends to a pool of pages: one of FORMS, and in SPLIT the parts of each sequence's keys."""

    name: str = BSH
    parts: int = 1


@dataclass(frozen=True)
class Forms:
    """The forms of a decode step's attention to text and to image pages."""

    text: Form = Form()
    image: Form = Form()


BSH_ALONE = Forms()


@dataclass(frozen=True)
class Attention:
    """Attention to pages of one rank: sequences, query rows of each, heads of the rank, keys of each sequence.

    masked: with an explicit mask, as attention to images has. page: keys of a page. width: of a head.
    """

    batch: int
    rows: int
    heads: int
    kv_heads: int
    keys: int
    int8: bool = False
    masked: bool = False
    page: int = 128
    width: int = 128

    @property
    def units(self) -> int:
        """Pairs of a sequence and a KV head."""
        return self.batch * self.kv_heads


def busy(units: int, cores: int) -> int:
    """Cores that work on average while `units` equal units are distributed over `cores`."""
    rounds = -(-units // cores)
    return -(-units // rounds)


def accepted(of: Attention, form: str) -> bool:
    """Whether a form can compute this attention, faster or not.

    TND: IsUsingFAI in ops-transformer's fused_infer_attention_score_tiling.cpp; it takes the causal mask alone.
    SPLIT: several rows need the causal mode, which counts from a sequence's end: no part but the last could have it.
    """
    if form == TND:
        fits = (of.page, of.width) == (TND_PAGE, TND_WIDTH) and of.heads > of.kv_heads
        return fits and not of.int8 and not of.masked and of.rows <= TND_ROWS
    return form == BSH or of.rows == 1 and not of.int8 and of.keys > of.page


def parts(of: Attention, cores: int, form: str) -> int:
    """Parts into which the keys of each unit are split; 0 where a form does not serve this attention."""
    assert form in FORMS
    if form != BSH and not accepted(of, form):
        return 0
    if form == TND:
        if not any(of.keys >= keys and of.units <= units for keys, units in TND_LIMITS):
            return 0
        # At most as many parts as there are cores for a unit (inferred).
        return max(1, min(-(-of.keys // TND_KEYS), cores // of.units))
    if of.int8 and of.rows == 1:
        own = max(1, min(cores, -(-of.keys * cores // INT8_KEYS)) // of.units)
    else:
        own = -(-of.keys // _keys_of_a_part(of))
    if form == BSH:
        return own
    split = min(cores // of.units, -(-of.keys // of.page))
    return split if split > own else 0


def _keys_of_a_part(of: Attention) -> int:
    if of.rows > 1:
        return CAUSAL_KEYS if of.rows <= CAUSAL_ROWS else CAUSAL_KEYS_BEYOND
    group = of.heads // of.kv_heads
    return next((keys for most, keys in SPLIT_BEYOND if group <= most), SPLIT_BEYOND_LARGER)


def cores_used(of: Attention, cores: int, form: str = BSH) -> int:
    """Cores that a form works on; 0 where it does not serve this attention."""
    return busy(of.units * parts(of, cores, form), cores) if parts(of, cores, form) else 0


def forced(of: Attention, cores: int, form: str) -> Form:
    """A form that is asked for where it can compute this attention, whether it serves it or not; BSH elsewhere."""
    if not accepted(of, form):
        return Form()
    return Form(SPLIT, parts(of, cores, SPLIT) or 2) if form == SPLIT else Form(form)


def cores_of(of: Attention, cores: int, form: Form) -> int:
    """Cores that a form works on. TND below its limits does not split keys (inferred)."""
    split = form.parts if form.name == SPLIT else max(1, parts(of, cores, form.name))
    return busy(of.units * split, cores)


def choices(of: Attention, cores: int) -> Iterator[tuple[str, int]]:
    """(form, cores) of each form that serves this attention, in the order of FORMS."""
    for form in FORMS:
        if used := cores_used(of, cores, form):
            yield form, used
