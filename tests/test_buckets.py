"""The bucket plan: which sizes exist, and which bucket a step gets."""

from collections import Counter
from dataclasses import asdict

import pytest
from checkpoints import SPECS, model_config
from engines import resolved, run_of
from hypothesis import given
from hypothesis import strategies as st

from mllama_graph.core.config import PlanChoice
from mllama_graph.core.devices import CPU, CUDA, NPU
from mllama_graph.core.errors import UserError
from mllama_graph.model.shape import shape_of
from mllama_graph.plan.blocks import pages_for
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.buckets import choose, pick
from mllama_graph.plan.cost import bucket_cost
from mllama_graph.plan.make import Limits, ladder, make_plan

SHAPE = shape_of(model_config(SPECS["base"]))
SIZES = st.lists(st.integers(1, 500), min_size=1, max_size=6, unique=True).map(sorted)
LIMITS = {
    "batch": st.integers(1, 40),
    "max_input_length": st.integers(1, 3000),
    "max_output_length": st.integers(1, 900),
}


def plan_of(max_images=4, plan=None, batch=1, max_input_length=2048, max_output_length=128, free=False, device=CPU):
    """A plan; `free`: for kernels that take lengths as data."""
    limits = Limits(batch, max_input_length, max_output_length, max_images)
    return make_plan(plan or PlanChoice(), limits, SHAPE, device.paging, free)


@given(need=st.integers(0, 600), sizes=SIZES)
def test_pick_returns_the_smallest_sufficient_size_or_raises(need, sizes):
    if need > sizes[-1]:
        with pytest.raises(ValueError, match="beyond the largest bucket"):
            pick(need, sizes)
    else:
        assert pick(need, sizes) == min(size for size in sizes if size >= need)


@given(low=st.integers(1, 64), high=st.integers(1, 5000), factor=st.integers(2, 8))
def test_ladder_grows_by_at_most_the_factor_and_ends_at_high(low, high, factor):
    sizes = ladder(low, high, factor)
    assert sizes[0] == min(low, high) and sizes[-1] == high
    assert all(a < b <= a * factor for a, b in zip(sizes, sizes[1:]))


@given(page=st.integers(1, 200), images=st.integers(1, 9), limits=st.fixed_dictionaries(LIMITS))
def test_a_plan_serves_everything_its_limits_allow(page, images, limits):
    plan = plan_of(images, PlanChoice(page_size=page), **limits)
    longest = limits["max_input_length"] + limits["max_output_length"]
    assert plan.max_length == longest and plan.max_images == images
    a_sequence = pages_for(longest, page)
    assert plan.decode(limits["batch"], a_sequence, images * plan.pages_per_image).holds(
        Bucket("decode", limits["batch"], limits["batch"], a_sequence, images * plan.pages_per_image)
    )
    chunk = min(plan.prefill_tokens[-1], limits["max_input_length"])
    plan.prefill(chunk, a_sequence, images * plan.pages_per_image)
    # A full batch of the longest sequences never waits, and padded rows have slots of their own.
    assert plan.num_pages - plan.scratch_pages == limits["batch"] * a_sequence
    assert plan.scratch_pages * page >= max(plan.prefill_tokens[-1], plan.decode_batch[-1])
    assert plan.num_image_pages >= images * plan.pages_per_image
    assert plan.pages_per_image * page >= SHAPE.vision.max_tiles * SHAPE.vision.tokens


@given(limits=st.fixed_dictionaries(LIMITS), left=st.integers(1, 9000))
def test_all_chunks_of_a_prompt_but_the_last_have_the_largest_size(limits, left):
    plan, chunks = plan_of(2, **limits), []
    while left > sum(chunks):
        chunks.append(plan.chunk(left - sum(chunks)))
    assert sum(chunks) == left and all(chunk == plan.prefill_tokens[-1] for chunk in chunks[:-1])


def test_kernels_that_take_lengths_need_one_bucket_of_pages():
    plan = plan_of(4, batch=9, free=True)
    assert plan.pages == (pages_for(plan.max_length, plan.page_size),) and plan.images == (4,)
    assert (plan.step_tokens, plan_of(batch=2, free=True).step_tokens, plan_of().step_tokens) == (18, 12, 2048)
    # Absent sequences are free as well, so that packing adds no bucket.
    assert plan.decode_batch == (1, 4, 9) and plan.prefill_rows == (9,)
    assert plan.prefill(5, 0, 0) == plan.prefill(5, 3, 0)


@given(limits=st.fixed_dictionaries(LIMITS), data=st.data())
def test_a_step_gets_a_bucket_of_the_plan_that_holds_it(limits, data):
    plan = plan_of(3, device=data.draw(st.sampled_from([CPU, CUDA])), **limits)
    pages, images = data.draw(st.integers(1, plan.pages[-1])), data.draw(st.integers(0, 3 * plan.pages_per_image))
    rows, tokens = data.draw(st.integers(1, limits["batch"])), data.draw(st.integers(1, plan.prefill_tokens[-1]))
    past = data.draw(st.just(0) | st.integers(1, plan.pages[-1]))
    found = [
        (plan.decode(rows, pages, images), Bucket("decode", rows, rows, pages, images)),
        (plan.prefill(tokens, past, images), Bucket("prefill", 1, tokens, past, images)),
    ]
    if rows > 1 and plan.packs(rows, tokens, pages * plan.page_size):
        found.append((plan.prefill(tokens, pages, images, rows), Bucket("prefill", rows, tokens, pages, images)))
    for size in plan.mixed_tokens:
        new, most = min(size, tokens), 1 if pages > plan.packed_pages else min(rows, plan.prefill_rows[-1])
        need = Bucket("mixed", rows, rows + new, pages, images, prompts=Bucket("prefill", most, new, pages, images))
        found.append((plan.mixed(new, pages, images, most), need))
    for bucket, need in found:
        assert bucket in plan.buckets()
        assert bucket.holds(need)
        assert not any(other.holds(need) and bucket.holds(other) and other != bucket for other in plan.buckets())


def test_mixed_graphs_are_few_and_exist_where_a_step_can_need_them():
    count = [
        Counter(bucket.phase for bucket in plan_of(device=NPU, **given).buckets())["mixed"]
        for given in ({"batch": 8}, {"batch": 8, "plan": PlanChoice(mixed_tokens=[])}, {"batch": 1})
    ]
    # One or eight prompts; with no image, one and four. Half of the single prompts have less than a full chunk before.
    assert count == [2 * 3 + 3, 0, 0]
    assert not plan_of(batch=8).mixed_tokens and not plan_of(batch=8, free=True, device=CUDA).mixed_tokens
    plan = plan_of(batch=8, device=NPU)
    assert plan.mixed_tokens == (192,) and plan.mixed(5, 1, 0, 1).tokens == 8 + 192
    assert "mixed_tokens=192" in plan.describe() and "mixed_tokens=none" in plan_of().describe()
    assert Bucket.of(asdict(plan.mixed(5, 1, 0, 1))) == plan.mixed(5, 1, 0, 1)


def test_a_long_prompt_is_prefilled_by_itself_whatever_prefill_rows_are_given():
    plan = plan_of(plan=PlanChoice(prefill_rows=[4]), batch=4)
    assert plan.prefill_rows == (1, 4) and plan.prefill(2048, 0, 0).rows == 1


def test_the_vision_bucket_comes_first_and_buckets_are_unique():
    buckets = plan_of(2, batch=5).buckets()
    assert buckets[0].phase == "vision" and len(set(buckets)) == len(buckets)


def bucket_of(phase, rows, tokens, pages, image):
    if phase == "mixed":
        prompts = Bucket("prefill", rows, tokens, 4, image)
        return Bucket(phase, 8, 8 + tokens, max(pages, 1), image, prompts=prompts)
    return Bucket(phase, rows if phase == "decode" else 1, rows if phase == "decode" else tokens, pages, image)


BUCKETS = st.builds(
    bucket_of,
    st.sampled_from(["prefill", "decode", "mixed"]),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([16, 64, 256]),
    st.sampled_from([0, 1, 4, 16]),
    st.sampled_from([0, 5, 20]),
)


@given(need=BUCKETS, existing=st.sets(BUCKETS), reuse=st.floats(1, 10))
def test_choose_reuses_a_graph_that_holds_the_step_and_costs_little_more(need, existing, reuse):
    def cost(bucket):
        return bucket_cost(SHAPE, 16, bucket)

    chosen = choose(need, existing, cost, reuse)
    assert chosen.holds(need)
    assert (chosen.image_pages == 0) == (need.image_pages == 0), "a lean step must stay lean"
    assert chosen == need or (chosen in existing and cost(chosen) <= reuse * cost(need))
    affordable = [b for b in existing if b.holds(need) and cost(b) <= reuse * cost(need)]
    assert (chosen == need and not affordable) or cost(chosen) == min(map(cost, affordable))


def test_a_bucket_never_serves_another_phase_a_lean_step_or_a_first_chunk_with_past():
    large = Bucket("decode", 8, 8, 16, 20)
    assert large.holds(Bucket("decode", 1, 1, 1, 5))
    assert not large.holds(Bucket("decode", 1, 1, 1, 0))
    assert not large.holds(Bucket("prefill", 1, 1, 1, 5))
    assert not Bucket("prefill", 1, 64, 4, 0).holds(Bucket("prefill", 1, 64, 0, 0))
    for smaller in (Bucket("decode", 9, 9, 16, 20), Bucket("decode", 8, 8, 17, 20), Bucket("decode", 8, 8, 16, 21)):
        assert not large.holds(smaller)


@given(a=BUCKETS, b=BUCKETS)
def test_a_bucket_that_holds_another_never_costs_less(a, b):
    if a.holds(b):
        assert bucket_cost(SHAPE, 16, a) >= bucket_cost(SHAPE, 16, b)


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"page_size": 0}, "plan.page_size=0"),
        ({"prefill_tokens": []}, r"plan.prefill_tokens=\[\]"),
        ({"prefill_tokens": [0, 16]}, r"plan.prefill_tokens=\[0, 16\]"),
        ({"decode_batch": [1, 2]}, r"plan.decode_batch=\[1, 2\] must reach 4"),
        ({"pages": [1]}, r"plan.pages=\[1\] must reach 2"),
        ({"images": [1, 2]}, r"plan.images=\[1, 2\] must reach 3"),
        ({"num_pages": 1}, "plan.num_pages=1 can't hold one sequence of 250 tokens: that takes 2 pages of 128"),
        ({"num_images": 2}, "plan.num_images=2 must be at least the 3 images"),
    ],
)
def test_a_size_that_cant_hold_the_limits_is_refused_with_its_rule(choice, message):
    with pytest.raises(UserError, match=message):
        plan_of(3, PlanChoice(**choice), batch=4, max_input_length=200, max_output_length=50)


def test_given_sizes_are_sorted_and_kept_and_printed():
    plan = plan_of(
        2,
        PlanChoice(page_size=16, prefill_tokens=[64, 16, 64], num_pages=40, num_images=5),
        batch=2,
        max_input_length=100,
        max_output_length=20,
    )
    assert plan.prefill_tokens == (16, 64)
    assert plan.num_pages == plan.scratch_pages + 40
    assert plan.num_image_pages == 5 * plan.pages_per_image
    line = plan.describe()
    assert "prefill_tokens=16,64" in line and "page_size=16" in line and f"num_pages={plan.num_pages}" in line


def test_the_plan_does_not_depend_on_the_machine(checkpoint):
    # The number of pages is part of a graph's shape: runs with other free memory must find the same graphs.
    folder = checkpoint("base")
    assert resolved(run_of(folder, batch=3)).plan == resolved(run_of(folder, batch=3, memory_gib=1.0, threads=1)).plan
