"""Sampling: the distribution over a fine grid of noise values against a naive implementation."""

from itertools import accumulate

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from mllama_graph.engine.sampler import Sampler, noise
from mllama_graph.engine.steps import NOT_FINITE
from mllama_graph.inputs.request import Sampling
from mllama_graph.model import sample
from mllama_graph.model.table import Shard
from mllama_graph.ops.plain import PLAIN

V = 12
LOGITS = st.lists(st.floats(-6, 6, width=32), min_size=V, max_size=V)
KNOBS = {
    "temperature": st.floats(0.2, 3),
    "top_k": st.integers(0, V + 3),
    "top_p": st.floats(0.05, 1),
    "min_p": st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0]),
}
GRID = torch.arange(2000) / 2000


def candidates(logits_BV, k, world=1, vocab=V):
    """The candidates' values, ids and the total, as each of `world` ranks finds them with its shard of the logits."""
    size = -(-vocab // world)
    padded = torch.nn.functional.pad(logits_BV, (0, size * world - vocab), value=99.0)
    own = [sample.own_ids(part, rank * size, vocab) for rank, part in enumerate(padded.split(size, -1))]
    offers = [[] for _ in range(world)]
    for rank in range(world):

        def offer(x, rank=rank):
            offers[rank].append(x)
            return x[None]

        sample.candidates(own[rank], k, rank * size, offer)
        sample.total(own[rank], offer)
    found = []
    for rank in range(world):
        told = iter([torch.stack(same) for same in zip(*offers)])

        def gathered(x, told=told):
            return next(told)

        found.append((*sample.candidates(own[rank], k, rank * size, gathered), sample.total(own[rank], gathered)))
    return found


def draw(logits_BV, *columns):
    """The drawn ids; columns of temperature, top_k, top_p, noise and min_p."""
    [(value_Bk, id_Bk, _)] = candidates(logits_BV, V)
    return id_Bk.gather(-1, sample.draw(value_Bk, *columns)[:, None])[:, 0]


def greedy(logits_BV):
    """The ids of the first candidates."""
    return candidates(logits_BV, 1)[0][1][:, 0]


def draws(logits, noises, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The id for each noise value, as one batch."""
    rows = len(noises)
    return draw(
        torch.tensor(logits).expand(rows, -1),
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.as_tensor(noises),
        torch.full((rows,), min_p),
    )


def naive(logits, temperature, top_k, top_p, min_p) -> list[float]:
    """The distribution by its definition, in Python floats."""
    order = sorted(range(V), key=lambda id: (-logits[id], id))
    kept = order[:top_k] if top_k else order
    weight = {id: torch.tensor(logits[id] / temperature, dtype=torch.float64).exp().item() for id in kept}
    total = sum(weight.values())
    reached = list(accumulate(weight[id] / total for id in kept))
    # Where the cumulative probability is within rounding of top_p, the set may have one id more or less.
    assume(all(abs(reach - top_p) > 1e-5 for reach in reached))
    least = min_p * weight[kept[0]]
    assume(all(abs(weight[id] - least) > 1e-5 * least or not least or weight[id] == weight[kept[0]] for id in kept))
    nucleus = [id for id, before in zip(kept, [0.0, *reached]) if before < top_p and weight[id] >= least]
    total = sum(weight[id] for id in nucleus)
    return [weight[id] / total if id in nucleus else 0.0 for id in range(V)]


@given(logits=LOGITS, knobs=st.fixed_dictionaries(KNOBS))
@settings(max_examples=200)
def test_evenly_spaced_noise_gives_exactly_the_distribution(logits, knobs):
    wanted = naive(logits, **knobs)
    counts = torch.bincount(draws(logits, GRID, **knobs), minlength=V)
    for id in range(V):
        # Each id has an interval of noise values, whose two ends may each move by one grid point.
        assert abs(counts[id].item() - wanted[id] * len(GRID)) <= 2
        assert wanted[id] > 0 or counts[id] == 0, "an id outside the top-k or top-p set was drawn"


@pytest.mark.parametrize("min_p", [0.05, 0.3, 1.0])
def test_min_p_keeps_the_ids_that_transformers_keeps(min_p):
    generator = torch.Generator().manual_seed(0)
    for logits_V in 2 * torch.randn(20, V, generator=generator):
        warped_1V = hf.MinPLogitsWarper(min_p)(None, hf.TemperatureLogitsWarper(0.7)(None, logits_V[None]))
        drawn = set(draws(logits_V.tolist(), GRID, temperature=0.7, min_p=min_p).tolist())
        assert drawn == set(warped_1V[0].isfinite().nonzero()[:, 0].tolist())


def test_random_noise_passes_a_chi_square_test():
    logits = [0.3 * n for n in range(V)]
    p = torch.tensor(logits).softmax(-1)
    ids = draws(logits, [noise(seed, position) for seed in range(50) for position in range(100)])
    counts = torch.bincount(ids, minlength=V)
    chi = ((counts - 5000 * p) ** 2 / (5000 * p)).sum().item()
    assert chi < 31.3  # 11 degrees of freedom, 1 in 1000; the seeds are fixed


@given(logits=LOGITS, value=st.floats(0, 1, exclude_max=True, width=32), knobs=st.fixed_dictionaries(KNOBS))
def test_temperature_zero_is_greedy_whatever_the_other_settings(logits, value, knobs):
    id = draws(logits, [value], **knobs | {"temperature": 0.0})
    assert torch.equal(id, greedy(torch.tensor([logits])))


@given(logits=LOGITS)
def test_greedy_takes_the_lowest_id_among_the_largest(logits):
    assert greedy(torch.tensor([logits])).item() == logits.index(max(logits))


@given(
    rows=st.lists(
        st.tuples(LOGITS, st.floats(0, 2), st.integers(0, V), st.floats(0.1, 1), st.floats(0, 0.999), st.floats(0, 1)),
        min_size=2,
        max_size=6,
    )
)
def test_a_draw_does_not_depend_on_its_neighbours(rows):
    columns = [torch.tensor(column) for column in zip(*rows)]
    together = draw(*columns)
    alone = torch.cat([draw(*(column[n : n + 1] for column in columns)) for n in range(len(rows))])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("value", [0.0, 0.5, 0.99999994])
def test_noise_near_0_and_1_draws_an_id_of_nonzero_probability(value):
    # The last ids' probabilities round to zero, so that they must never be drawn.
    logits = [0.0, -1.0] + [-200.0] * (V - 2)
    assert draws(logits, [value]).item() in (0, 1)
    assert draws(logits, [value], top_k=1).item() == 0


@given(logits=LOGITS, temperature=st.floats(0.2, 3), k=st.integers(1, V))
def test_log_probabilities_are_of_the_raw_logits(logits, temperature, k):
    wide = torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
    [(value_Bk, id_Bk, total_B)] = candidates(torch.tensor([logits]), k)
    logp_k = (value_Bk - total_B[:, None])[0].double()
    # fp32 rounding of values of order ten.
    assert torch.allclose(logp_k, wide.topk(k).values, atol=1e-5)
    assert torch.allclose(logp_k, wide[id_Bk[0]], atol=1e-5)


def test_half_precision_logits_are_reported_in_fp32():
    [(value_Bk, _, total_B)] = candidates(torch.zeros(1, V, dtype=torch.bfloat16), 2)
    assert value_Bk.dtype == total_B.dtype == torch.float32


@given(
    rows=st.lists(st.lists(st.integers(-2, 2), min_size=V, max_size=V), min_size=1, max_size=3),
    k=st.integers(1, V),
    world=st.sampled_from([2, 3, 4, 5, 8]),
)
def test_all_ranks_have_the_candidates_of_one_rank_with_all_logits(rows, k, world):
    # Few distinct values make equal logits on different ranks common; of 5 and 8 ranks some have padding alone.
    logits_BV = torch.tensor(rows, dtype=torch.float32)
    [(value_Bk, id_Bk, total_B)] = candidates(logits_BV, k)
    for theirs in candidates(logits_BV, k, world):
        assert torch.equal(theirs[0], value_Bk) and torch.equal(theirs[1], id_Bk)
        # Sums of exponentials in another order.
        assert torch.allclose(theirs[2], total_B, atol=1e-6)


def test_noise_depends_only_on_seed_and_position():
    values = {(seed, position): noise(seed, position) for seed in range(-3, 40) for position in range(40)}
    assert all(0 <= value < 1 for value in values.values())
    assert len(set(values.values())) == len(values), "two positions or seeds share a draw"
    assert all(noise(*key) == value for key, value in values.items())
    assert noise(1, 23) != noise(12, 3)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 3, V])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_every_rank_sees_the_row_whose_logits_are_not_finite(value, k, world):
    sound = torch.arange(V, dtype=torch.float32).expand(V, V)
    spoilt = torch.where(torch.eye(V, dtype=torch.bool), value, sound)
    rows = torch.stack((sound, spoilt), dim=1).flatten(0, 1)
    want = candidates(sound.clone(), k, world)
    for (value_Bk, id_Bk, _), (value_Ck, id_Ck, _) in zip(candidates(rows, k, world), want):
        assert value_Bk[1::2, 0].isnan().all()
        assert torch.equal(value_Bk[::2], value_Ck) and torch.equal(id_Bk[::2], id_Ck)


# ---- candidates that graphs find


def found(logits_BV, k, world=1):
    """What the graphs of `world` ranks give: the largest logits of each."""
    size = -(-logits_BV.shape[-1] // world)
    parts = torch.nn.functional.pad(logits_BV, (0, size * world - logits_BV.shape[-1])).split(size, -1)
    padding = torch.zeros(world * size)
    padding[logits_BV.shape[-1] :] = torch.finfo(torch.float32).min
    return torch.cat([sample.best(part, k, pad, PLAIN) for part, pad in zip(parts, padding.split(size), strict=True)])


@given(
    rows=st.lists(st.lists(st.integers(-2, 2), min_size=V, max_size=V), min_size=1, max_size=3),
    k=st.integers(1, V),
    world=st.sampled_from([1, 2, 3, 5, 8]),
)
def test_graphs_find_the_candidates_of_all_logits(rows, k, world):
    logits_BV = torch.tensor(rows, dtype=torch.float32)
    [(value_Bk, id_Bk, total_B)] = candidates(logits_BV, k)
    of = sample.merged(found(logits_BV, V, world), k, -(-V // world), V)
    held = of.value_Bk.shape[-1]
    assert held == min(k, -(-V // world)) and not of.failed_B.any()
    assert torch.equal(of.value_Bk, value_Bk[:, :held]) and torch.equal(of.id_Bk, id_Bk[:, :held])
    assert torch.allclose(of.total_B, total_B, atol=1e-6)
    # With k from each rank, which of the ids with the k-th value are among them is left open.
    few = sample.merged(found(logits_BV, k, world), k, -(-V // world), V)
    assert torch.equal(few.value_Bk, value_Bk[:, :held])
    assert torch.equal(logits_BV.gather(-1, few.id_Bk), few.value_Bk)
    # On the device, the next step takes the same ids.
    few = found(logits_BV, k, world)
    of = sample.merged(few, 1, -(-V // world), V)
    assert sample.largest(few, -(-V // world), V).tolist() == of.id_Bk[:, 0].tolist()


def test_a_row_that_has_failed_feeds_an_id_that_the_model_has():
    logits_BV = torch.full((2, V), torch.nan)
    assert (sample.largest(found(logits_BV, 3), V, V) < V).all()


@given(logits=LOGITS, k=st.integers(1, V), knobs=st.fixed_dictionaries(KNOBS | {"top_k": st.just(0)}))
@settings(max_examples=200)
def test_a_draw_that_the_candidates_decide_is_that_of_the_whole_distribution(logits, k, knobs):
    logits_BV = torch.tensor(logits).expand(len(GRID), -1)
    of = sample.merged(found(logits_BV, k), k, V, V)
    temperature_B, top_p_B, min_p_B = (
        torch.full((len(GRID),), knobs[name]) for name in ("temperature", "top_p", "min_p")
    )
    at_B, decided_B = sample.draw_within(of, V, temperature_B, top_p_B, GRID, min_p_B)
    drawn_B = of.id_Bk.gather(-1, at_B[:, None])[:, 0]
    assert torch.equal(drawn_B[decided_B], draws(logits, GRID, **knobs)[decided_B])
    # With all ids as candidates, only draws at the edge of an interval are left; at temperature 1, only the tail.
    left = (~decided_B).float().mean().item()
    if k == V and not any(abs(b - knobs["top_p"]) < 1e-4 for b in torch.tensor(logits).softmax(-1).cumsum(-1)):
        assert left < 0.01 or knobs["top_p"] < 1
    if knobs["top_p"] == 1 and knobs["temperature"] == 1 and not knobs["min_p"]:
        assert abs(left - (1 - torch.tensor(logits).softmax(-1).topk(k).values.sum().item())) < 2 / len(GRID) + 1e-4


OPTIONS = [
    Sampling(),
    Sampling(logprobs=3),
    Sampling(temperature=0.7, top_k=5, seed=1, logprobs=2),
    Sampling(temperature=0.4, top_p=0.8, seed=2),
    Sampling(temperature=1.3, seed=3),
    Sampling(temperature=1.0, top_k=40, seed=4),
    Sampling(temperature=1.5, min_p=0.2, seed=5),
    Sampling(temperature=1.5, top_p=0.9, min_p=0.05, seed=6),
    Sampling(logprobs=30),
]


@pytest.mark.parametrize("searched", [5, 64])
def test_a_search_for_the_largest_logits_gives_the_tokens_that_a_sort_gives(searched, monkeypatch):
    monkeypatch.setattr("mllama_graph.engine.sampler.SEARCHED", searched)
    generator = torch.Generator().manual_seed(searched)
    sorting, searching = (Sampler(60, Shard(0, 1), lambda x: x[None], print) for _ in range(2))
    searching.small, undecided, search = 0, [], searching._searched
    searching._searched = lambda *given: undecided.append(search(*given)) or undecided[-1]
    for position in range(60):
        logits_BV = 4 * torch.randn(len(OPTIONS), 60, generator=generator)
        logits_BV[position % 10 % len(OPTIONS), 7] = (torch.nan, torch.inf, -torch.inf)[position % 3]
        # Half of the steps have many equal logits.
        logits_BV = logits_BV.round() if position % 2 else logits_BV
        at = [position] * len(OPTIONS)
        masks = [bytes([row + 1, 0, 255, 1]) * 2 if row % 3 == position % 3 else b"" for row in range(len(OPTIONS))]
        masks[4] = bytes([3, 1]) if position % 4 else masks[4]
        want, have = (
            one.tokens(lambda x=logits_BV: x.clone(), None, OPTIONS, at, masks) for one in (sorting, searching)
        )
        for one, other in zip(have, want, strict=True):
            assert (one.id, one.top_ids) == (other.id, other.top_ids)
            assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-5)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
    found = [token is not None for tokens in undecided for token in tokens]
    assert sum(found) > len(found) * (0.3 if searched == 5 else 0.95)


@pytest.mark.parametrize("held", [1, 8, 64])
def test_tokens_are_the_same_from_candidates_and_from_logits(held):
    generator, said = torch.Generator().manual_seed(held), []
    sampler = Sampler(60, Shard(0, 1), lambda x: x[None], said.append)
    for position in range(40):
        logits_BV = 4 * torch.randn(len(OPTIONS), 60, generator=generator)
        # One row in ten has a logit that is not finite, and one in five equal logits.
        logits_BV[position % 10 % len(OPTIONS), 7] = (torch.nan, torch.inf, -torch.inf)[position % 3]
        logits_BV = logits_BV.bfloat16().float() if position % 5 else logits_BV
        at = [position] * len(OPTIONS)
        # Some rows may sample only some ids.
        masks = [bytes([row + 1, 0, 255, 1]) * 2 if row % 3 == position % 3 else b"" for row in range(len(OPTIONS))]
        want = sampler.tokens(lambda x=logits_BV: x.clone(), None, OPTIONS, at, masks)
        have = sampler.tokens(lambda x=logits_BV: x.clone(), found(logits_BV, held), OPTIONS, at, masks)
        assert [token.id for token in have] == [token.id for token in want]
        assert sum(token.id == NOT_FINITE for token in have) == 1
        for one, other in zip(have, want, strict=True):
            assert one.top_ids == other.top_ids
            assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-5)
    assert len(said) == (held < 60), "what is slow is told once"
