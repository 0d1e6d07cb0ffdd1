"""kv=: the storage of K/V pages, from the configuration to tokens."""

import pytest
from commands import served
from engines import GRAPH_PLAN, resolved, run_of, serve, start
from test_engine import few
from test_ranks import written

from mllama_graph.core.devices import Device
from mllama_graph.core.errors import UserError
from mllama_graph.plan.cost import kv_bytes

# A key near the middle of two codes is rounded either way by engines whose fp32 sums have another order. Each such key
# moves by 1/127 of its head's largest: the best two logits of random checkpoints by up to this much (measured).
NEAR_TIE = 0.05


def with_margins(lines: list[dict]) -> list[dict]:
    return [line | {"logprobs": 2} for line in lines]


def differences(ours: dict, theirs: dict) -> dict:
    """id -> the margin of the first id that differs, where that is no near tie."""
    found = {}
    for id, result in theirs.items():
        for step, (a, b) in enumerate(zip(ours[id].token_ids, result.token_ids)):
            best, second = result.logprobs[step]["top_logprobs"][:2]
            if a != b:
                if best - second > NEAR_TIE:
                    found[id] = (step, best - second)
                break
    return found


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["base", "cross_first"])
def test_kernels_give_the_tokens_of_plain(name, kv, checkpoint, requests):
    lines = with_margins(few(requests, name))
    plain, native = (
        serve(start(checkpoint(name), batch=8, page_size=16, kernels=kernels, kv=kv), lines)
        for kernels in ("plain", "native")
    )
    assert not differences(native, plain)
    same = [native[id].token_ids == result.token_ids for id, result in plain.items()]
    assert sum(same) >= len(same) * 2 / 3


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_neither_chunks_nor_the_batch_change_a_bit(kv, checkpoint, requests):
    lines = with_margins(few(requests, "base"))
    plans = {"batch": 8, "prefill_tokens": [300]}, {"batch": 3, "prefill_tokens": [16]}
    one, other = (serve(start(checkpoint("base"), kernels="native", page_size=16, kv=kv, **p), lines) for p in plans)
    for id, result in one.items():
        assert result.token_ids == other[id].token_ids and result.logprobs == other[id].logprobs


def test_two_ranks_give_the_tokens_of_one(checkpoint, requests, tmp_path):
    lines = with_margins(few(requests, "half"))
    one = serve(start(checkpoint("half"), batch=8, page_size=16, kv="int8"), lines)
    path = written(tmp_path / "requests.jsonl", lines)
    keys = ("backend=eager", "backend.kernels=plain", "batch=8", "tp=2", "kv=int8")
    done = served(tmp_path / "out", f"weights={checkpoint('half')}", f"requests={path}", *keys)
    wrong = {line["id"] for line in done["lines"] if line["token_ids"] != one[line["id"]].token_ids}
    by_id = {line["id"]: line for line in done["lines"]}
    for id in wrong:
        step = next(n for n, (a, b) in enumerate(zip(by_id[id]["token_ids"], one[id].token_ids)) if a != b)
        best, second = one[id].logprobs[step]["top_logprobs"][:2]
        assert best - second <= NEAR_TIE
    assert len(wrong) <= len(lines) / 3


def test_a_compiled_graph_takes_int8_pages(checkpoint, requests, empty_store):
    lines = [line for line in with_margins(few(requests, "no_template")) if line["id"] == "text_64"]
    plan = GRAPH_PLAN | {"max_input_length": 300, "max_output_length": 100, "pages": [25], "kv": "int8"}
    eager = serve(start(checkpoint("no_template"), **plan), lines)
    compiled = start(
        checkpoint("no_template"), **plan, backend="inductor", compile="wait", graph_cache=str(empty_store)
    )
    for id, result in serve(compiled, lines).items():
        assert result.token_ids == eager[id].token_ids and result.logprobs == eager[id].logprobs


@pytest.mark.parametrize("kv, bytes_of_a_head", [("auto", 4 * 32), ("bf16", 2 * 32), ("int8", 32 + 4)])
def test_the_plan_has_the_bytes_that_are_allocated(kv, bytes_of_a_head, checkpoint):
    engine = start(checkpoint("base"), batch=2, page_size=16, kv=kv)
    rank, run = engine.executor.rank, engine.executor.run
    for pages, planned in ((rank.pages, run.memory.self_pages), (rank.image_pages, run.memory.image_pages)):
        tensors = [data for layer in pages for data in layer]
        assert sum(data.numel() * data.element_size() for data in tensors) == planned
    text = run.shape.text
    wanted = 2 * len(text.self_layers) * text.kv_heads * bytes_of_a_head
    assert text.head_width == 32 and kv_bytes(run.shape, 1, 0, run.storage)[0] == wanted
    assert run.asked["kv"] == {"auto": "fp32"}.get(kv, kv)


def test_cleared_pages_have_no_scales(checkpoint):
    rank = start(checkpoint("base"), kv="int8").executor.rank
    for layer in rank.pages:
        for data in layer:
            data.fill_(1)
    rank.backend.clear(rank.pages, [1, 2])
    for data in (data for layer in rank.pages for data in layer):
        assert not data[1:3].any() and data[3:].all() and data[0].all()


def test_an_npu_has_pages_in_the_dtype_of_activations_or_in_int8(checkpoint, monkeypatch):
    monkeypatch.setattr(Device, "check_package", lambda device: None)
    with pytest.raises(UserError, match="kv=bf16 on an NPU .*its pages have the dtype of activations, here fp16"):
        resolved(run_of(checkpoint("base"), kv="bf16", device="npu-sim", backend="torchair", dtype="fp16"))
    for kv in ("bf16", "int8"):
        run = resolved(run_of(checkpoint("base"), kv=kv, device="npu-sim", backend="torchair", dtype="bf16"))
        assert run.precision.kv == kv
