"""Mixed steps on an NPU as the latency model sees them: what docs/ascend.md says of them."""

from functools import cache

import pytest
from latencies import ROOT, model, released
from test_latency import IMAGE, MS, RUNS, table_of

from mllama_graph.core.devices import MIXED_TOKENS
from mllama_graph.plan.latency import BEST


@cache
def row(name, ranks):
    """Milliseconds with 8 sequences after 2048 tokens.

    A decode step, a mixed step with 192 prompt tokens after 2048, the ten of a prompt of 1920 ids, and one prefill of
    these ids with ten decode steps.
    """
    of = model(released(name), ranks, form=BEST)
    decode, one = of.decode(8, 2048, 0).seconds, of.mixed(8, 2048, 192, 2048, 0).seconds
    ten = sum(of.mixed(8, 2048, 192, past, 0).seconds for past in range(0, 1920, 192))
    apart = of.prefill(1920, 0, 0).seconds + 10 * decode
    return (name, str(ranks), *(f"{MS * found:.1f}" for found in (decode, one, ten, apart)))


@pytest.mark.parametrize("page", ["docs/ascend.md", "docs/zh/ascend.md"])
def test_the_documented_mixed_steps_are_those_of_the_model(page):
    rows = [found[:-1] for found in table_of(ROOT / page, 7)]
    assert all(row(*run) in rows for run in RUNS)


@pytest.mark.parametrize("name, ranks", RUNS)
def test_a_mixed_step_takes_at_most_twice_a_decode_step_and_less_than_both_apart(name, ranks):
    of = model(released(name), ranks, form=BEST)
    for images in (0, IMAGE):
        decode, prefill = of.decode(8, 2048, images), of.prefill(MIXED_TOKENS, 2048, images)
        mixed = of.mixed(8, 2048, MIXED_TOKENS, 2048, images)
        assert mixed.seconds <= 2 * decode.seconds
        assert max(decode.seconds, prefill.seconds) < mixed.seconds < decode.seconds + prefill.seconds
