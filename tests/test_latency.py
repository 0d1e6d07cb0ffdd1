"""The latency model of an NPU: held to published times, to CANN's tiling, and to the operators of lowered graphs."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
from latencies import ROOT, hardware, model, qwen, released

from mllama_graph.core.paths import PACKAGE
from mllama_graph.model.formats import Storage, page_bytes
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.cores import BSH, SPLIT, TND, Attention, cores_used, parts
from mllama_graph.plan.cost import floor_of
from mllama_graph.plan.latency import (
    BEST,
    CROSS_GATES,
    IMAGE_MASKS,
    MERGE,
    ONCE,
    VISION_GATES,
    Latency,
    Model,
    latency_of,
)

MS, US = 1e3, 1e6
# cann-recipes-infer, models/qwen/README.md, measured there on 2026-06-01: dies, format, prefill ms, decode ms.
PUBLISHED = [(1, "none", 41.12, 15.48), (2, "none", 51.56, 10.35), (1, "w8a8", 36.00, 10.46), (2, "w8a8", 58.95, 7.90)]
# The same page: a built-in prompt, of which the length is not given, and 256 new tokens.
PROMPT, KEYS = 128, 256
# What the model is asked to hold. Only decode steps are fitted closely.
TOLERANCE = 0.20
RUNS = [("11b", 1), ("11b", 2), ("11b", 4), ("11b", 8), ("90b", 4), ("90b", 8)]
QUANTS = ("none", "w8a8", "w8a16", "w4a16")
# Names in the tables of docs/ascend.md.
LABELS = {"none": "bf16", **{quant: quant for quant in QUANTS[1:]}}
IMAGE = 51 * 128


def recipe(ranks, quant):
    """Qwen3-8B as the recipe runs it: queries and keys are normalised, and each rank has its own scales."""
    return model(qwen(), ranks, quant, added=("RmsNorm", "RmsNorm"), shared_scales=False)


def percent(found, expected):
    return abs(found / expected - 1)


# ---- published times


@pytest.mark.parametrize("ranks, quant, prefill, decode", PUBLISHED)
def test_published_decode_steps_are_within_the_tolerance(ranks, quant, prefill, decode):
    assert percent(MS * recipe(ranks, quant).decode(1, KEYS, 0).seconds, decode) < TOLERANCE


@pytest.mark.parametrize("ranks, quant, prefill, decode", PUBLISHED)
def test_published_eager_prefills_are_within_the_tolerance(ranks, quant, prefill, decode):
    found = recipe(ranks, quant).prefill(PROMPT, 0, 0)
    assert percent(MS * found.eager(hardware().calibration), prefill) < TOLERANCE
    # Eager time is the host's, so that the prompt's length hardly matters.
    assert found.eager(hardware().calibration) > 2 * found.seconds


@pytest.mark.parametrize("ranks, quant, prefill, decode", PUBLISHED)
def test_a_floor_is_far_below_what_was_published(ranks, quant, prefill, decode):
    of = recipe(ranks, quant)
    floor = floor_of(of.shape, 128, Bucket("decode", 1, 1, 2, 0), of.storage, ranks, hardware())
    assert MS * floor.seconds < 0.65 * decode


def test_small_all_reduces_of_sixteen_ranks_take_what_others_measured():
    """16 rows of 5120 bf16 values: 19.8 us in captured decode graphs."""
    to = Latency()
    Model(released("90b"), Storage(2, 2, 2), 16, hardware()).all_reduce(to, 0)
    assert US * to.all_reduces == pytest.approx(19.8, rel=0.05)


# ---- cores


@pytest.mark.parametrize(
    "of, form, cores",
    [
        (Attention(1, 1, 4, 1, 8192), BSH, 1),
        (Attention(1, 1, 4, 1, 16384), BSH, 2),
        (Attention(1, 1, 4, 1, IMAGE, masked=True), BSH, 1),
        (Attention(1, 1, 32, 8, 8192), BSH, 8),
        (Attention(4, 1, 32, 8, 2048), BSH, 16),
        (Attention(8, 1, 32, 8, 2048), BSH, 16),
        (Attention(1, 1, 8, 1, 4096), BSH, 1),
        (Attention(1, 1, 8, 1, 4097), BSH, 2),
        (Attention(1, 1, 10, 1, 2049), BSH, 2),
        (Attention(1, 2, 4, 1, 8192), BSH, 8),
        (Attention(1, 17, 4, 1, 8192), BSH, 16),
        (Attention(1, 1, 4, 1, 2048), TND, 4),
        (Attention(1, 1, 4, 1, 8192), TND, 16),
        (Attention(1, 1, 4, 1, 1000), TND, 0),
        (Attention(2, 1, 32, 8, 8192), TND, 0),
        (Attention(2, 1, 32, 8, 10240), TND, 16),
        (Attention(1, 1, 4, 1, 2048, int8=True), BSH, 20),
        (Attention(1, 1, 4, 1, 8192), SPLIT, 20),
    ],
)
def test_cores_are_those_of_canns_tiling(of, form, cores):
    """For a 910B3 with 20 cores; SPLIT is BSH with more entries."""
    assert cores_used(of, 20, form) == cores


def test_no_form_uses_more_cores_than_there_are():
    for batch in (1, 3, 4, 17, 64):
        for kv_heads in (1, 2, 4, 8):
            for keys in (1, 128, 2048, 8193, 131072):
                of = Attention(batch, 1, 4 * kv_heads, kv_heads, keys)
                for form in (BSH, TND, SPLIT):
                    assert cores_used(of, 20, form) <= 20
                assert parts(of, 20, BSH) >= 1


def test_the_best_form_is_the_fastest_and_split_pays_for_its_merge_only_with_many_keys():
    of = model(released("11b"), 8)
    for keys in (256, 2048, 8192):
        forms = of.forms(of.pages(1, keys, False))
        best = model(released("11b"), 8, form=BEST).choice(of.pages(1, keys, False))
        assert forms[best.name][1] == min(seconds for _, seconds in forms.values())
    image = of.forms(of.pages(1, IMAGE, True))
    assert TND not in image and image[SPLIT][1] < image[BSH][1]
    few = of.forms(of.pages(1, 2048, False))
    assert few[TND][1] < few[BSH][1] < few[SPLIT][1]


def test_eight_short_prompts_in_one_step_take_less_than_eight_steps():
    of = model(released("11b"), 4)
    together = of.prefill(8 * 64, 0, 0, sequences=8)
    assert together.seconds < 8 * of.prefill(64, 0, 0).seconds / 2
    assert together.attention <= of.prefill(8 * 64, 0, 0).attention


# ---- operators


# Operators whose number decides a step's time, as golden.json names them.
KERNELS = ("FusedInferAttentionScore", "MatMul", "AddRmsNorm", "RotaryMul", "SwiGlu", "ScatterPaKvCache", "LayerNormV4")


def test_layers_have_the_operators_of_lowered_graphs():
    """The difference of two shapes is a layer, whose operators golden.json counts."""
    golden = json.loads((PACKAGE / "ascend" / "golden.json").read_text())
    of = model(released("11b"), 2)
    for phase, found in (
        ("decode", of.decode(1, 128, IMAGE)),
        ("prefill", of.prefill(32, 0, IMAGE)),
        ("mixed", of.mixed(1, 128, 32, 96, IMAGE)),
    ):
        expected = Counter[str]()
        for part, times in (
            *(("once", 1), ("ranks", 1), ("self layer", 32), ("cross layer", 8)),
            ("layer of ranks", 40),
        ):
            for name, count in golden[phase].get(part, {}).items():
                expected[name] += times * count
        for name in (*KERNELS, "HcomAllReduce", *(["SplitV", "ConcatV2"] if phase == "mixed" else [])):
            expected[name] -= name == "ConcatV2"  # that of the angles, among ONCE
            assert found.operators[name] == expected[name], (phase, name)
    expected = Counter[str]()
    for part, times in (("once", 1), ("local layer", 32), ("global layer", 8), ("cross layer", 8)):
        for name, count in golden["vision"].get(part, {}).items():
            expected[name] += times * count
    vision = of.vision().operators
    for name in ("FusedInferAttentionScore", "SplitV"):
        assert vision[name] == expected[name] - (name == "SplitV"), name
    # The convolution of patches is a product, too.
    assert vision["MatMul"] == expected["MatMul"] + 1 and vision["HcomAllReduce"] == 2 * 40


def test_small_operators_are_as_many_as_in_lowered_graphs():
    """Those that the model does not name. Reshapes and Identity move nothing."""
    golden = json.loads((PACKAGE / "ascend" / "golden.json").read_text())
    others = {*KERNELS, "RmsNorm", "HcomAllReduce", "Unsqueeze", "Identity"}

    def small(phase, part):
        return sum(count for name, count in golden[phase].get(part, {}).items() if name not in others)

    assert small("decode", "once") == ONCE and small("decode", "images") == 0
    assert small("prefill", "images") == IMAGE_MASKS
    assert small("decode", "cross layer") == small("prefill", "cross layer") == CROSS_GATES
    assert small("decode", "split self layer") == small("decode", "split cross layer") == MERGE
    assert small("vision", "global layer") - small("vision", "local layer") == VISION_GATES


def test_int8_pages_add_the_operators_of_lowered_graphs():
    golden = json.loads((PACKAGE / "ascend" / "golden.json").read_text())
    bf16, shape = model(released("11b"), 2), released("11b")
    int8 = replace(bf16, storage=replace(bf16.storage, page=page_bytes(1, 128)))
    added = {}
    for phase, steps in {
        "decode": [of.decode(1, 128, IMAGE) for of in (int8, bf16)],
        "prefill": [of.prefill(32, 96, IMAGE) for of in (int8, bf16)],
        "vision": [of.vision() for of in (int8, bf16)],
    }.items():
        added[phase] = steps[0].operators - steps[1].operators
        expected = Counter[str]()
        for part, layers in (
            ("int8 self layer", shape.text.self_layers),
            ("int8 self layer after earlier pages", shape.text.self_layers if phase == "prefill" else ()),
            ("int8 cross layer", shape.text.cross_layers),
        ):
            for name, count in golden[phase].get(part, {}).items():
                expected[name] += count * len(layers)
        expected.pop("Unsqueeze", None)
        assert added[phase] == +expected, phase
    # They move half of the bytes, which pays with many keys of many sequences.
    assert int8.decode(8, 8192, 0).seconds < bf16.decode(8, 8192, 0).seconds


def test_more_of_anything_takes_longer():
    of = model(released("11b"), 2)
    buckets = [
        Bucket("decode", 1, 1, 1, 0),
        Bucket("decode", 1, 1, 16, 0),
        Bucket("decode", 8, 8, 16, 0),
        Bucket("decode", 8, 8, 16, 51),
        Bucket("prefill", 1, 2048, 0, 51),
        Bucket("prefill", 1, 2048, 64, 51),
    ]
    times = [latency_of(of, 128, bucket).seconds for bucket in buckets]
    assert times == sorted(set(times))


@pytest.mark.parametrize("name, ranks", RUNS)
def test_a_latency_is_above_its_floor(name, ranks):
    for quant in QUANTS:
        of = model(released(name), ranks, quant)
        prompts = Bucket("prefill", 1, 192, 16, 51)
        for bucket in (
            Bucket("vision", 1, 1, 0, 51),
            Bucket("prefill", 1, 512, 0, 51),
            Bucket("decode", 4, 4, 16, 51),
            Bucket("mixed", 4, 196, 16, 51, prompts=prompts),
        ):
            floor = floor_of(of.shape, 128, bucket, of.storage, ranks, of.hardware)
            assert latency_of(of, 128, bucket).seconds > floor.seconds


# ---- docs


@cache
def modelled_row(name, ranks, quant):
    """Milliseconds: decode of text, and with an image; first token of 2048 ids, and of an image and 128 ids."""
    of = model(released(name), ranks, quant, form=BEST)
    image = of.vision().seconds + of.prefill(128, 0, IMAGE).seconds
    seconds = of.decode(1, 2048, 0), of.decode(1, 2048, IMAGE), of.prefill(2048, 0, 0)
    return tuple(f"{MS * found:.1f}" for found in (*(one.seconds for one in seconds), image))


def gain_row(name, ranks):
    """Milliseconds of a decode step in BSH alone and in the chosen forms: 8192 text keys; 2048 and an image."""
    cells = []
    for keys, image in ((8192, 0), (2048, IMAGE)):
        steps = (model(released(name), ranks, form=form).decode(1, keys, image).seconds for form in (BSH, BEST))
        cells += [f"{MS * seconds:.1f}" for seconds in steps]
    return (name, str(ranks), *cells)


def vision_row(name, ranks):
    """Milliseconds of the vision graph of 4, 2 and 1 real tiles, and of 4 with heads padded to 128."""
    own, padded = (model(released(name), ranks, vision_head=head) for head in (None, 128))
    found = [*(own.vision(tiles) for tiles in (4, 2, 1)), padded.vision(4)]
    return (name, str(ranks), *(f"{MS * one.seconds:.1f}" for one in found))


def int8_row(name, ranks):
    """Milliseconds with 16-bit and with int8 pages: decode steps, and a prompt after earlier tokens."""
    pairs = []
    for page in (2, page_bytes(1, 128)):
        of = Model(released(name), Storage(2, 2, page), ranks, hardware(), form=BEST)
        steps = [of.decode(*given) for given in ((1, 2048, 0), (1, 8192, 0), (8, 8192, 0), (1, 2048, IMAGE))]
        pairs.append([f"{MS * step.seconds:.1f}" for step in (*steps, of.prefill(512, 7680, 0))])
    return (name, str(ranks), *(" / ".join(pair) for pair in zip(*pairs, strict=True)))


def cores_row(name, ranks, keys, masked):
    """Cores and microseconds of a layer's attention at batch 1, in each form."""
    of = model(released(name), ranks)
    forms = of.forms(of.pages(1, keys, masked))
    cells = (f"{forms[form][0]}: {US * forms[form][1]:.0f}" if form in forms else "-" for form in (BSH, TND, SPLIT))
    return (name, str(ranks), str(keys), *cells)


def table_of(page, columns):
    """The rows of a page's tables with this many columns, as cells."""
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    return [tuple(cell.strip() for cell in line) for line in lines if len(line) == columns]


def published_row(ranks, quant, prefill, decode):
    """Milliseconds, published beside modelled: of a decode step, and of a prefill without a graph."""
    of = recipe(ranks, quant)
    step = MS * of.decode(1, KEYS, 0).seconds
    first = MS * of.prefill(PROMPT, 0, 0).eager(hardware().calibration)
    return (str(ranks), LABELS[quant], f"{decode:.2f}", f"{step:.2f}", f"{prefill:.2f}", f"{first:.1f}")


@pytest.mark.parametrize("page", ["docs/ascend.md", "docs/zh/ascend.md"])
def test_the_documented_latencies_are_those_of_the_model(page):
    rows = table_of(ROOT / page, 8)
    for (name, ranks), quant in product(RUNS, QUANTS):
        cells = (name, str(ranks), LABELS[quant], *modelled_row(name, ranks, quant))
        assert any(found[:-1] == cells and found[-1] in ("*modelled*", "*推算*") for found in rows), cells
    assert all(int8_row(*run) in [found[:-1] for found in rows] for run in RUNS)
    rows = [found[:-1] for found in table_of(ROOT / page, 7)]
    assert all(vision_row(*run) in rows for run in RUNS)
    rows = table_of(ROOT / page, 6)
    for case in PUBLISHED:
        assert published_row(*case) in rows
    gains = [found[:-1] for found in table_of(ROOT / page, 7)]
    for name, ranks in RUNS:
        assert gain_row(name, ranks) in gains
        assert cores_row(name, ranks, 8192, False) in rows and cores_row(name, ranks, IMAGE, True) in rows


def test_the_figures_in_the_text_are_those_of_the_model():
    shape = released("11b")
    times = [MS * model(shape, 8, form=form).decode(1, 8192, 0).seconds for form in (BSH, BEST)]
    assert [f"{found:.1f}" for found in times] == ["7.3", "5.3"]
    one, two, four = (model(shape, ranks) for ranks in (1, 2, 4))
    vision = two.vision().all_reduces, two.vision().seconds, one.vision().seconds
    assert [f"{MS * found:.0f}" for found in vision] == ["79", "158", "136"]
    # The bytes of the mask that the vision graphs do without, 6432 x 6432 for each head and layer.
    assert f"{MS * 6432**2 * 16 * 40 / one.bandwidth:.0f}" == "21"
    # How much faster attention with padded heads must be per product, to take as long as without.
    for of, factor in ((one, "2.5"), (model(shape, 8), "2.1")):
        padded = replace(of, vision_head=128).vision()
        spared = of.vision().seconds - (padded.seconds - padded.attention)
        assert f"{padded.attention / spared:.1f}" == factor
    prompts = four.prefill(8 * 64, 0, 0, sequences=8).seconds, 8 * four.prefill(64, 0, 0).seconds
    assert [f"{MS * found:.0f}" for found in prompts] == ["23", "60"]
    # The weights of text layers and head, 15.0 GB in bf16.
    eight = model(shape, 8, form=BEST)
    assert 15.0e9 / 8 / eight.bandwidth / eight.decode(1, 2048, 0).seconds == pytest.approx(0.25, abs=0.03)
