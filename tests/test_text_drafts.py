"""A text-only Llama proposes tokens. Oracles: transformers' Llama, and the engine without proposals."""

import json
from pathlib import Path

import pytest
import torch
from commands import served
from engines import holds_nothing, resolved, run_of, said, serve, start
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mllama_graph.core.errors import UserError
from mllama_graph.core.place import Place
from mllama_graph.core.report import Progress
from mllama_graph.engine.executor import Executor
from mllama_graph.engine.scheduler import Scheduler
from mllama_graph.engine.sequence import Sequence
from mllama_graph.engine.speculation import Speculation
from mllama_graph.engine.start import pixels_of, processor_of
from mllama_graph.inputs.request import Sampling

TINY = Path(__file__).parents[1] / "mllama_graph" / "tiny" / "checkpoint"
SCENE = TINY.parent / "scene.png"
VOCAB, IMAGE = 648, 648
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TIED = {"tie_word_embeddings": True, "rope_parameters": LLAMA3}
TAKEN = ("accepted_tokens", "proposed_tokens")


def write_llama(folder: Path, vocab: int = VOCAB, **changes) -> LlamaForCausalLM:
    """A random Llama as transformers saves it."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=vocab, intermediate_size=96, **(sizes | changes))
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.2 if weight.dim() > 1 else 1.0))
    model.save_pretrained(folder)
    return model


def write_text_layers(folder: Path, images: bool) -> None:
    """The tiny model's layers that attend to text, as a Llama: without a picture, both give the same logits.

    images: whether it has the rows of the embedding beyond the vocabulary, of which the first is an image's.
    """
    given, stored = json.loads((TINY / "config.json").read_text())["text_config"], {}
    for path in TINY.glob("*.safetensors"):
        stored |= load_file(path)
    stored = {name.removeprefix("language_model."): value for name, value in stored.items()}
    kept = [n for n in range(given["num_hidden_layers"]) if n not in given["cross_attention_layers"]]
    embedding = stored["model.embed_tokens.weight"]
    rows = len(embedding) if images else VOCAB
    head = torch.zeros(rows, embedding.shape[1], dtype=embedding.dtype)
    # Ids beyond the vocabulary are never proposed: their logits are below all others.
    head[:VOCAB] = stored["lm_head.weight"]
    state = {"lm_head.weight": head, "model.embed_tokens.weight": embedding[:rows]}
    state["model.norm.weight"] = stored["model.norm.weight"]
    for n, layer in enumerate(kept):
        begin = f"model.layers.{layer}."
        state |= {f"model.layers.{n}.{k[len(begin) :]}": v for k, v in stored.items() if k.startswith(begin)}
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    config = LlamaConfig(
        vocab_size=rows,
        num_hidden_layers=len(kept),
        max_position_embeddings=given["max_position_embeddings"],
        rope_parameters={"rope_type": "default", "rope_theta": given["rope_theta"]},
        dtype="bfloat16",
        **{name: given[name] for name in names},
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(state)
    model.save_pretrained(folder)


def lines():
    """Requests of several kinds, the first three without a picture."""
    some = [
        {"prompt": "What can you do?"},
        {"prompt": "Hi", "temperature": 1.0, "logprobs": 2},
        {"prompt": "Hi", "structured_outputs": {"regex": "([0-9]-[a-c]){12}"}},
        {"prompt": "What do you see?", "images": [str(SCENE)]},
        {"prompt": "Describe the picture.", "images": [str(SCENE)], "temperature": 1.5, "top_p": 0.9},
        {"input_ids": [640, IMAGE, 70, IMAGE, 80, 90], "images": [str(SCENE)] * 2, "ignore_eos": True},
        {"input_ids": [IMAGE], "images": [str(SCENE)], "temperature": 1.0},
    ]
    return [{"max_new_tokens": 20, "seed": n, "id": n, **line} for n, line in enumerate(some)]


def told(result):
    return result.token_ids, result.text, result.finish_reason, result.logprobs


@pytest.fixture(scope="module")
def alone():
    engine = start(TINY, batch=8, kernels="native", prefix_cache=False)
    return [serve(engine, [line])[line["id"]] for line in lines()]


@pytest.fixture
def always(monkeypatch):
    """Propose in every step, whatever it costs."""

    def wanted(self, rooms):
        most = min(self.most, self._rows // len(rooms) - 1)
        return {one: count for one, room in rooms.items() if (count := min(room, most)) > 0}

    monkeypatch.setattr(Speculation, "_wanted", wanted)


def run_with(folder, **changes):
    return resolved(run_of(TINY, speculate="draft", draft=str(folder), **changes))


@pytest.mark.parametrize("kernels", ["plain", "native"])
@pytest.mark.parametrize("changes", [TIED, {"head_dim": 32, "rms_norm_eps": 1e-3}], ids=["tied", "untied"])
def test_logits_are_those_of_transformers(changes, kernels, tmp_path):
    model = write_llama(tmp_path, **changes)
    run = run_with(tmp_path, kernels=kernels, prefill_tokens=[32], page_size=16).draft
    executor = Executor(run, pixels_of(processor_of(run_with(tmp_path))), Progress(), place=Place())
    scheduler = Scheduler(run.plan, 1, prefix_cache=False)
    ids = torch.randint(VOCAB, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    scheduler.add(Sequence(0, tuple(ids), (), (), 5, Sampling(logprobs=VOCAB)))
    found = []
    while len(found) < 5:
        tokens = executor.execute(scheduler.next())
        scheduler.commit(tuple(token.id for token in tokens))
        found += tokens
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids + [token.id for token in found]])).logits[0]
    for wanted_V, token in zip(logits_TV[len(ids) - 1 :].log_softmax(-1), found):
        # fp32 sums in another order.
        torch.testing.assert_close(torch.tensor(token.top_logprobs), wanted_V[list(token.top_ids)], atol=1e-4, rtol=0)
    executor.close()


@pytest.mark.parametrize("images", [False, True])
def test_results_are_those_without_proposals_by_the_bit(images, alone, always, tmp_path):
    write_text_layers(tmp_path, images)
    engine = start(TINY, batch=8, page_size=4, kernels="native", speculate="draft", draft=str(tmp_path))
    found = serve(engine, lines())
    assert [told(found[n])[:3] for n in range(len(alone))] == [told(result)[:3] for result in alone]
    accepted, proposed = (sum(getattr(found[n], name) for n in range(2)) for name in TAKEN)
    # Without a picture it is the model itself, and draws with the same random numbers. The last proposals of a text may
    # lie beyond its end.
    assert accepted > 0.6 * proposed > 0
    seeing = [found[n] for n in range(3, len(alone))]
    assert any(result.accepted_tokens for result in seeing)
    assert holds_nothing(engine)
    draft = engine.speculation.proposer
    assert draft._scheduler.pool.free == draft._scheduler.pool.capacity and not draft._own
    engine.close()


def test_ids_without_an_embedding_are_left_out_and_draws_keep_their_positions(tmp_path):
    write_text_layers(tmp_path, images=False)
    engine = start(TINY, kernels="native", speculate="draft", draft=str(tmp_path))
    own = engine.speculation.proposer._counterpart(
        Sequence(5, (640, IMAGE, 7, IMAGE + 3, 8), (), (), 9, Sampling(), generated=[1])
    )
    assert own.prompt == (640, 7, 8) and own.skipped == 2 and not own.images
    # The model reads the same ids, but two positions later: it samples with the same random numbers.
    line = {"input_ids": [640, 7, 8], "temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True, "seed": 4}
    (own.sampling,) = [engine.processor.request({"id": 0, **line}).sampling]
    target = Sequence(6, (640, IMAGE, 7, IMAGE, 8), (), (), 9, own.sampling, generated=[1])
    (one,) = engine.speculation.proposer.propose({target: 6}).values()
    plain = start(TINY, kernels="native")
    sampler = plain.executor.rank.sampler.tokens
    plain.executor.rank.sampler.tokens = lambda logits, found, sampling, positions, *rest: sampler(
        logits, found, sampling, [position + 2 for position in positions], *rest
    )
    wanted = serve(plain, [line | {"id": 0, "input_ids": [640, 7, 8, 1]}])[0]
    assert list(one) == wanted.token_ids[:6]
    engine.close()


def test_a_sequence_longer_than_the_drafts_positions_gets_no_proposals(always, tmp_path):
    write_llama(tmp_path, max_position_embeddings=40)
    engine = start(TINY, batch=8, kernels="native", speculate="draft", draft=str(tmp_path))
    some = [line | {"max_new_tokens": 40, "ignore_eos": True} for line in lines()[:2]]
    found = serve(engine, [*some, {"id": 9, "input_ids": [5] * 60, "max_new_tokens": 4}])
    plain = serve(start(TINY, batch=8, kernels="native"), some)
    assert [found[n].token_ids for n in range(2)] == [plain[n].token_ids for n in range(2)]
    assert found[0].proposed_tokens and found[9].proposed_tokens == 0
    engine.close()


def test_a_draft_whose_logits_are_not_finite_changes_nothing_and_is_named_once(always, tmp_path):
    write_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.full((64,), torch.nan)}, path, {"format": "pt"})
    engine = start(TINY, batch=8, kernels="native", speculate="draft", draft=str(tmp_path))
    found, plain = (serve(one, lines()[:2]) for one in (engine, start(TINY, batch=8, kernels="native")))
    assert [told(found[n]) for n in range(2)] == [told(plain[n]) for n in range(2)]
    assert found[0].proposed_tokens == 0
    assert said(engine).count("Logits of the draft are not finite") == 1
    engine.close()


@pytest.mark.parametrize(
    "write, reason",
    [
        (lambda folder: write_llama(folder, vocab=640), "it has 640 ids, where the model needs 648 or 656"),
        (lambda folder: write_llama(folder, attention_bias=True), "8 tensors unexpected: .*q_proj.bias"),
        (lambda folder: write_llama(folder, hidden_act="gelu"), "hidden_act is 'gelu'; it must be 'silu'"),
        (lambda folder: write_type(folder, "qwen2"), "model_type='qwen2'. Use a draft of type 'llama' or 'mllama'"),
    ],
)
def test_another_draft_is_refused_in_one_line(write, reason, tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match=f"^draft={tmp_path}: .*{reason}") as error:
        run_with(tmp_path)
    assert "\n" not in str(error.value)


def test_a_text_only_model_is_no_model_of_its_own(tmp_path):
    write_llama(tmp_path)
    with pytest.raises(UserError, match="model_type='llama'; only 'mllama' is supported"):
        resolved(run_of(tmp_path))


def write_type(folder, kind):
    write_llama(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": kind}))


def test_two_ranks_give_the_text_of_one_without_proposals(alone, tmp_path):
    write_text_layers(tmp_path / "draft", images=False)
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines()))
    keys = ["tp=2", "batch=8", "speculate=draft", f"draft={tmp_path / 'draft'}", "backend=eager", "dtype=fp32"]
    found = {
        line["id"]: line for line in served(tmp_path / "out", f"requests={path}", f"weights={TINY}", *keys)["lines"]
    }
    assert [found[n]["token_ids"] for n in range(len(alone))] == [result.token_ids for result in alone]
    assert any(found[n]["accepted_tokens"] for n in range(len(alone)))
