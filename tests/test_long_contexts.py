"""Long contexts: rope far from the start, chunks and page sizes that change nothing, and the model's positions."""

import json

import pytest
import torch
from engines import resolved, run_of, start
from needles import haystack, write
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding

from mllama_graph.compose import run_from
from mllama_graph.core.errors import UserError
from mllama_graph.inputs.request import Request, Sampling
from mllama_graph.model.shape import shape_of
from mllama_graph.model.tree import inverse_frequencies
from mllama_graph.ops.plain import PLAIN

LENGTH = 3000


def test_the_released_models_rope_is_hugging_faces_up_to_its_last_position():
    config = run_from(["model=11b"], {}).model.config
    text = shape_of({"model_type": "mllama", **config}).text
    given = dict(config["text_config"])
    assert text.rope.type == "llama3" and (text.rope.factor, text.rope.original_positions) == (8.0, 8192)
    theirs = MllamaRotaryEmbedding(
        MllamaTextConfig(
            hidden_size=text.width,
            num_attention_heads=text.heads,
            max_position_embeddings=text.positions,
            rope_parameters={"rope_theta": text.rope.theta, **given["rope_scaling"]},
        )
    )
    positions = torch.tensor([0, 1, 8191, 8192, 65535, text.positions - 1])
    ours = PLAIN.rope_angles(positions.int(), inverse_frequencies(text.rope, text.head_width))
    for one, other in zip(ours, theirs(torch.zeros(1), positions[None]), strict=True):
        # The same fp32 product of position and frequency; cosine and sine of it differ by rounding.
        torch.testing.assert_close(one.squeeze(), other[0], rtol=0, atol=1e-6)


def tokens(checkpoint, **plan) -> tuple[list[int], list]:
    """Ids and log-probabilities of a prompt of LENGTH ids."""
    engine = start(checkpoint, max_input_length=LENGTH, kernels="native", **plan)
    ids = tuple(torch.randint(1, 300, (LENGTH,), generator=torch.Generator().manual_seed(7)).tolist())
    engine.submit(Request(0, ids, (), (), 8, Sampling(logprobs=2), ignore_eos=True))
    (result,) = [delta.result for _ in iter(lambda: engine.idle, True) for delta in engine.step() if delta.result]
    return result.token_ids, result.logprobs


def test_neither_the_chunks_nor_the_page_size_of_a_long_prompt_change_a_bit(checkpoint):
    one = tokens(checkpoint("base"), prefill_tokens=[2048], page_size=128)
    assert one == tokens(checkpoint("base"), prefill_tokens=[100], page_size=128)
    # Decode steps add up pages in other groups.
    ids, logprobs = tokens(checkpoint("base"), prefill_tokens=[700], page_size=16)
    assert ids == one[0]
    for ours, theirs in zip(logprobs, one[1], strict=True):
        assert ours["top_logprobs"] == pytest.approx(theirs["top_logprobs"], abs=1e-4)


def test_a_request_beyond_the_models_positions_is_refused_unless_asked_for(checkpoint):
    # This checkpoint has 2048 positions.
    engine = start(checkpoint("cross_last"), max_input_length=3000)
    assert engine.scheduler.plan.max_length == 2048
    request = Request(0, (1,) * 2040, (), (), 9)
    with pytest.raises(UserError, match="2049 tokens; the model has 2048 positions .* or set extend_context=true"):
        engine.submit(request)
    assert (
        resolved(run_of(checkpoint("cross_last"), max_input_length=3000, extend_context=True)).plan.max_length == 3100
    )
    engine.submit(Request(0, (1,) * 2040, (), (), 8))


@pytest.mark.parametrize("scaled", [True, False])
def test_needles_are_found_anywhere_in_a_haystack_if_rope_is_scaled_as_configured(scaled, tmp_path):
    hidden = haystack(9000)
    folder = write(tmp_path / "needles", len(hidden.ids))
    if not scaled:
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["rope_scaling"] = None
        (folder / "config.json").write_text(json.dumps(config))
    questions = hidden.keys if scaled else hidden.keys[:1]
    engine = start(folder, max_input_length=9001, kernels="native", batch=len(questions), prefill_tokens=[2048])
    for key in questions:
        engine.submit(Request(key, (*hidden.ids, key), (), (), 2, ignore_eos=True))
    results = [delta.result for _ in iter(lambda: engine.idle, True) for delta in engine.step() if delta.result]
    found = {result.id: tuple(result.token_ids) for result in results}
    assert (found == dict(zip(hidden.keys, hidden.answers, strict=True))) == scaled
