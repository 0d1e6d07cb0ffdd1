"""How many matrix cores of an NPU fused attention works on, in each of three forms. Integers only.

The rules are those of CANN's tiling code (ops-transformer 9.1.0, 9.0.0 and 8.5.0), run on x86 for a 910B3 with 20 cores
and never on a device. "Inferred" marks what was not among the shapes that were run.

    BSH     what ops/npu.py emits: a unit of work is a KV head of a sequence, whose keys are split only when there are
            many
    TND     rows packed without padding: another kernel, which splits keys further (flash decoding; CANN 9 only)
    SPLIT   BSH with several entries per sequence, each with a part of its block table, merged by their log-sum-exp in
            the graph; not built
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
# Parts in SPLIT have at least one page of this many keys.
PAGE = 128


@dataclass(frozen=True)
class Attention:
    """Attention to pages of one rank: sequences, query rows of each, heads of the rank, keys of each sequence.

    masked: with an explicit mask, as attention to images has.
    """

    batch: int
    rows: int
    heads: int
    kv_heads: int
    keys: int
    int8: bool = False
    masked: bool = False

    @property
    def units(self) -> int:
        """Pairs of a sequence and a KV head."""
        return self.batch * self.kv_heads


def busy(units: int, cores: int) -> int:
    """Cores that work on average while `units` equal units are distributed over `cores`."""
    rounds = -(-units // cores)
    return -(-units // rounds)


def parts(of: Attention, cores: int, form: str) -> int:
    """Parts into which the keys of each unit are split; 0 where a form does not serve this attention."""
    assert form in FORMS
    if form == TND:
        # No explicit mask was among the shapes that were run.
        if of.int8 or of.masked or of.rows > TND_ROWS:
            return 0
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
    split = min(cores // of.units, -(-of.keys // PAGE))
    # Several rows need the causal mode, which counts from a sequence's end: no part but the last could have it.
    return split if split > own and of.rows == 1 else 0


def _keys_of_a_part(of: Attention) -> int:
    if of.rows > 1:
        return CAUSAL_KEYS if of.rows <= CAUSAL_ROWS else CAUSAL_KEYS_BEYOND
    group = of.heads // of.kv_heads
    return next((keys for most, keys in SPLIT_BEYOND if group <= most), SPLIT_BEYOND_LARGER)


def cores_used(of: Attention, cores: int, form: str = BSH) -> int:
    """Cores that a form works on; 0 where it does not serve this attention."""
    return busy(of.units * parts(of, cores, form), cores) if parts(of, cores, form) else 0


def choices(of: Attention, cores: int) -> Iterator[tuple[str, int]]:
    """(form, cores) of each form that serves this attention, in the order of FORMS."""
    for form in FORMS:
        if used := cores_used(of, cores, form):
            yield form, used
