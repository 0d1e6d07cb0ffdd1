"""task=evaluate beside another model: KL divergence and top-1 agreement at the tokens that the other generated."""

import json

import numpy as np
import pytest
import torch
from engines import resolved, run_of, serve, start

from mllama_graph.core.errors import UserError
from mllama_graph.engine.forced import _all
from mllama_graph.measure.agreement import Agreement
from mllama_graph.tasks import evaluate
from mllama_graph.tasks.options import EvaluateOptions


def test_divergence_is_torchs_kl_and_agreement_counts_the_likeliest_ids():
    p, q = (torch.randn(6, 50, generator=torch.Generator().manual_seed(n)).log_softmax(-1) for n in (0, 1))
    q[:3] = p[:3]
    agreement = Agreement()
    agreement.add(p.numpy(), q.numpy())
    metrics = agreement.metrics()
    expected = torch.nn.functional.kl_div(q.double(), p.double(), log_target=True, reduction="none").sum(-1)
    assert metrics["kl_mean"] == pytest.approx(expected.mean().item(), rel=1e-9)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert metrics["top1_agreement_percent"] == pytest.approx(100 * same, abs=1e-3) and 0.5 <= same < 1
    assert metrics["positions"] == 6 and Agreement().metrics() == {}


def test_an_id_without_probability_adds_nothing():
    agreement, p = Agreement(), np.log(np.array([[0.5, 0.5, 1e-300]], np.float64)).astype(np.float32)
    p[0, 2] = -np.inf
    agreement.add(p, np.log(np.array([[0.25, 0.25, 0.5]], np.float32)))
    assert agreement.metrics()["kl_mean"] == pytest.approx(np.log(2), rel=1e-6)


def test_forced_ids_are_what_a_prompt_with_them_continues_from(checkpoint):
    engine, vocab = start(checkpoint("base"), batch=3), 10**6
    prompt, ids = [5, 9, 2], [11, 3, 17, 8]
    line = {"id": 0, "input_ids": prompt, "logprobs": vocab, "ignore_eos": True}
    request = engine.processor.request(line | {"max_new_tokens": len(ids)})
    engine.submit(type(request)(**{**vars(request), "forced": tuple(ids)}))
    (found,) = [delta.result for _ in range(9) for delta in engine.step() if delta.result]
    assert found.token_ids == ids
    # Oracle: each position of its own, as the first new token of a prompt.
    lines = [line | {"id": n, "input_ids": prompt + ids[:n], "max_new_tokens": 1} for n in range(len(ids))]
    alone = serve(engine, lines)
    expected = np.concatenate([_all(alone[n], engine.executor.run.shape.text.vocab) for n in range(len(ids))])
    # fp32 sums in another order.
    np.testing.assert_allclose(_all(found, expected.shape[1]), expected, atol=1e-5)
    assert [step["logprob"] for step in found.logprobs] == pytest.approx(expected[range(4), ids], abs=1e-5)


@pytest.fixture
def answered(tmp_path):
    lines = [{"id": n, "input_ids": [n + 1] * 5, "max_new_tokens": 6, "answer": "x"} for n in range(4)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "requests.jsonl"


def evaluated(folder, weights, requests, against="unquantised", quant="none"):
    """The metrics of task=evaluate, run in this process."""
    folder.mkdir()
    options = EvaluateOptions(controls=False, against=against)
    run = run_of(weights, requests=str(requests), task=options, quant=quant, batch=3, output_dir=str(folder))
    evaluate.main(resolved(run))
    assert not list(folder.glob(".against*"))
    return json.loads((folder / "result.json").read_text())["metrics"]


def test_a_quantised_run_is_compared_with_the_same_weights_unquantised(checkpoint, answered, tmp_path, capsys):
    found = {}
    for quant in ("none", "w8a16", "fp8"):
        found[quant] = evaluated(tmp_path / quant, checkpoint("base"), answered, quant=quant)
        assert ("against unquantised: KL divergence" in capsys.readouterr().out) == (quant != "none")
    assert "kl_mean" not in found["none"]
    assert found["w8a16"]["positions"] == found["fp8"]["positions"] > 4
    # Codes of 8 bits: 127 steps on each side are finer than E4M3's 8 steps between powers of two.
    assert 0 < found["w8a16"]["kl_mean"] < found["fp8"]["kl_mean"] < 0.1


def test_another_checkpoint_may_be_compared_with(checkpoint, answered, tmp_path):
    base = checkpoint("base")
    metrics = evaluated(tmp_path / "itself", base, answered, against=str(base))
    assert metrics["kl_mean"] == 0 and metrics["top1_agreement_percent"] == 100
    assert "kl_mean" not in evaluated(tmp_path / "none", base, answered, against="none", quant="w8a16")
    with pytest.raises(UserError, match="has other shapes"):
        evaluated(tmp_path / "other", base, answered, against=str(checkpoint("no_template")))
