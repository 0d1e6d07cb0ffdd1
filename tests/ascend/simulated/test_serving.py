"""The engine with interpreted GE graphs for all steps, against the same engine on plain.py.

tests/test_engine.py compares the eager engine with the corrected Hugging Face model.
"""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from engines import holds_nothing, serve, start
from proposals import Replay
from test_engine import LOGPROB, few
from torch.utils._python_dispatch import TorchDispatchMode

from mllama_graph.ascend.simulation import SimulatedGraph
from mllama_graph.graphs.aot import ops_of
from mllama_graph.graphs.key import key, key_fields
from mllama_graph.graphs.loaded import LoadedNpuGraphs
from mllama_graph.graphs.torchair import compiler_config

# Long prompts are prefilled in chunks of 32; eight requests share a decode step, with and without images. On an NPU,
# prompts are prefilled beside decoding sequences in mixed steps, which the oracle, plain.py, does not have.
PLAN = {
    "batch": 8,
    "page_size": 128,
    "prefill_tokens": [32],
    "decode_batch": [8],
    "pages": [4],
    "images": [4],
    "threads": 1,
}
NPU_SIM = PLAN | {"backend": "torchair", "device": "npu-sim", "mixed_tokens": [32]}
# From 8 to 16, bf16 values are 1/16 apart: logits closer than two such steps count as a tie.
BF16_TIE = 2 / 16


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """store(spec, dtype) -> the graph store of `answers`."""
    return cache(lambda name, dtype: str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def answers(checkpoint, requests, store):
    """answers(spec, backend, dtype) -> id -> result."""

    @cache
    def answer(name, backend, dtype):
        given = NPU_SIM | {"graph_cache": store(name, dtype)} if backend == "torchair" else PLAN | {"backend": backend}
        engine = start(checkpoint(name), dtype=dtype, **given)
        assert bool(engine.executor.plan.mixed_tokens) == (backend == "torchair")
        lines = [line | {"logprobs": 3} for line in few(requests, name)]
        # Of one model, requests are sampled too, from the candidates of the graphs.
        drawn = [{"temperature": 0.8, "top_k": 20}, {"temperature": 0.6, "top_p": 0.9}] if name == "base" else []
        found = serve(engine, [line | dict(*drawn[n % 3 : n % 3 + 1], seed=n) for n, line in enumerate(lines)])
        phases = {record.phase for record in engine.executor.graphs.records}
        assert backend == "eager" or phases == {"vision", "prefill", "mixed", "decode"}
        return found

    return answer


def same_tokens(ours, theirs) -> bool:
    return all(ours[id].token_ids == theirs[id].token_ids for id in theirs)


def shared_steps(ours, theirs):
    """Pairs of steps of both, up to and including the first at which they choose differently."""
    for id in theirs:
        for a, b in zip(ours[id].logprobs, theirs[id].logprobs, strict=False):
            yield a, b
            if a["id"] != b["id"]:
                break


# test_steps.py compares every model with plain.py step by step; these two models differ most in their schedules.
@pytest.mark.parametrize("name", ["base", "cross_first"])
def test_in_fp32_the_tokens_and_log_probabilities_are_those_of_plain(name, answers):
    ours, theirs = answers(name, "torchair", "fp32"), answers(name, "eager", "fp32")
    assert same_tokens(ours, theirs)
    assert max(abs(a["logprob"] - b["logprob"]) for a, b in shared_steps(ours, theirs)) < LOGPROB


class Blocking(TorchDispatchMode):
    """Notes the operations that wait for the device: reads of a value, and copies that are not asynchronous."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(function)
        places = {x.device.type for x in args if isinstance(x, torch.Tensor)}
        to = kwargs.get("device")
        copied = name.startswith("aten._to_copy") and to is not None and torch.device(to).type not in places
        crossing = name.startswith("aten.copy_") and len(places) > 1
        waits = (copied or crossing) and not (kwargs.get("non_blocking") or True in args[2:])
        if waits or name.startswith("aten._local_scalar_dense") and places != {"cpu"}:
            self.found.append(name)
        return function(*args, **kwargs)


def test_greedy_steps_overlap_and_give_the_tokens_of_steps_in_turns(checkpoint, requests, answers, store, monkeypatch):
    wanted = ("bos_only", "text_64")
    lines = [line | {"logprobs": None, "max_new_tokens": 8} for line in few(requests, "base") if line["id"] in wanted]
    # With the graphs of the test above.
    answers("base", "torchair", "fp32")
    plan = NPU_SIM | {"dtype": "fp32", "graph_cache": store("base", "fp32")}
    expected = serve(start(checkpoint("base"), overlap=False, **plan), lines)
    engine = start(checkpoint("base"), **plan)
    assert engine.executor.run.overlap, "the default of an NPU"
    rank, ahead, blocking = engine.executor.rank, [], Blocking()
    launch, finish = rank.launch, rank.finish

    def watched(*given):
        ahead.append(ahead[-1] + 1 if ahead else 1)
        with blocking:
            return launch(*given)

    def taken(launched):
        ahead.append(ahead[-1] - 1)
        return finish(launched)

    serve(engine, lines)
    monkeypatch.setattr(rank, "launch", watched)
    monkeypatch.setattr(rank, "finish", taken)
    found = serve(engine, [line | {"id": f"{line['id']} again"} for line in lines])
    assert all(found[f"{id} again"].token_ids == result.token_ids for id, result in expected.items())
    assert max(ahead) == 2 and holds_nothing(engine)
    assert blocking.found == []


def error(answers, name, backend) -> torch.Tensor:
    """Log-probabilities in bf16 minus those in fp32, as long as both choose the same ids."""
    pairs = shared_steps(answers(name, backend, "bf16"), answers(name, "eager", "fp32"))
    return torch.tensor([a["logprob"] - b["logprob"] for a, b in pairs if a["id"] == b["id"]])


@pytest.mark.parametrize("name", ["cross_first"])
def test_bf16_graphs_are_as_close_to_fp32_as_plain_and_differ_only_at_near_ties(name, answers):
    # The checkpoint is in bf16, so that all three runs compute with the same weights.
    ours, plain = error(answers, name, "torchair"), error(answers, name, "eager")
    assert len(ours) > 100
    # Both round equally often but in other places, so that their errors over a hundred steps are of similar size.
    assert ours.pow(2).mean() <= 1.5 * plain.pow(2).mean()
    assert ours.abs().max() < 0.15
    for a, b in shared_steps(answers(name, "torchair", "bf16"), answers(name, "eager", "fp32")):
        if a["id"] != b["id"]:
            assert b["top_logprobs"][0] - b["top_logprobs"][1] <= 2 * BF16_TIE


def test_a_loaded_graph_is_not_traced_and_an_altered_one_is_compiled_again(checkpoint, requests, tmp_path, monkeypatch):
    line = few(requests, "base")[:1]
    given = NPU_SIM | {"dtype": "fp32", "graph_cache": str(tmp_path)}

    def tokens(engine):
        return {id: result.token_ids for id, result in serve(engine, line).items()}

    expected = tokens(start(checkpoint("base"), **given))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda *a, **k: pytest.fail("a stored graph was traced"))
        again = start(checkpoint("base"), **given)
        assert tokens(again) == expected
    assert {record.source for record in again.executor.graphs.records} == {"hit"}
    record = again.executor.graphs.records[0]
    [kept] = (tmp_path / record.key).rglob("compiled_module")
    kept.write_bytes(kept.read_bytes()[:-100])
    third = start(checkpoint("base"), **given)
    assert tokens(third) == expected
    assert {r.key: r.source for r in third.executor.graphs.records}[record.key] == "compiled"


def test_the_key_names_rank_options_and_compilers(checkpoint, tmp_path):
    engine = start(checkpoint("base"), graph_cache=str(tmp_path), **NPU_SIM)
    spec, bucket = engine.executor.rank.spec, engine.executor.plan.decode(1, 1, 0)

    def key_with(**changes):
        return key(replace(spec, **changes), bucket)

    own = key_with()
    assert len({own, key_with(compute=torch.float16), key_with(num_pages=500), key_with(page_size=256)}) == 4
    fields = key_fields(spec, bucket)
    assert fields["torch_npu"]
    # The simulation states a version; without one, torchair lowers some operations as for an old CANN.
    assert fields["cann"] == "9.1.0"
    assert fields["device"].startswith("npu-sim Ascend")
    for changes in ({"rank": 1}, {"world_size": 2}, {"device": "npu"}):
        assert key_with(**changes) != own
    for name, value in (
        ("mode", "npugraph_ex"),
        ("frozen_parameter", False),
        ("topology_sorting_strategy", "DFS"),
        ("ge_cache", False),
        ("weight_format", "nz"),
    ):
        assert key_with(options=tuple(sorted((dict(spec.options) | {name: value}).items()))) != own, name


def test_options_of_the_configuration_reach_the_graph_engine(checkpoint, requests, tmp_path):
    SimulatedGraph.loaded.clear()
    engine = start(checkpoint("base"), graph_cache=str(tmp_path), **NPU_SIM)
    serve(engine, few(requests, "base")[:1])
    options = SimulatedGraph.loaded[-1].options
    assert options["ge.tiling_schedule_optimize"] == "1"
    assert options["ge.topoSortingMode"] == "3"
    assert options["ge.graph_compiler_cache_dir"]
    assert options["frozenInput"].split(",").count("1") > 20


def test_captured_graphs_are_lowered_up_to_the_capture_and_write_pages_in_place(checkpoint, tmp_path, monkeypatch):
    """npugraph_ex: torchair does all work before the capture itself, which fails here since there are no kernels."""
    from torchair._acl_concrete_graph.fx2acl_converter import AclConcreteGraph

    executor = start(checkpoint("base"), dtype="bf16", graph_cache=str(tmp_path), **NPU_SIM).executor
    rank, codes, generate = executor.rank, [], AclConcreteGraph.codegen
    monkeypatch.setattr(AclConcreteGraph, "codegen", lambda *a, **k: codes.append(generate(*a, **k)) or codes[-1])
    captured = replace(rank.spec, options=tuple(sorted((dict(rank.spec.options) | {"mode": "npugraph_ex"}).items())))
    loaded = LoadedNpuGraphs(
        captured, rank.weights, (rank.pages, rank.image_pages), ops_of(captured), rank.graphs.store, print
    )
    for bucket in (executor.plan.decode(8, 4, 1), executor.plan.prefill(32, 0, 1), executor.plan.mixed(32, 4, 1, 1)):
        codes.clear()
        with pytest.raises(RuntimeError, match="CAPTURE"):
            loaded.load(bucket)
        [code] = codes
        layers = len(rank.shape.text.self_layers)
        assert len(re.findall(r"= torch\.ops\.npu\.npu_scatter_pa_kv_cache\.default\(", code)) == layers
        # No functional write, which would copy the pool, no copy back, and no copy of the inputs before a replay.
        assert not re.search(r"torch\.ops\.npu\.\w+_functional", code)
        assert "aten.copy_" not in code
        assert 'compile_configs["clone_input"] = "0"' in code
        attentions = rank.shape.text.layers * (2 if bucket.prompts else 1)
        assert code.count("npu_fused_infer_attention_score.out(") == attentions


def test_each_mode_gets_only_its_own_options():
    captured = compiler_config(mode="npugraph_ex", static_kernel_compile=True)
    assert captured.experimental_config.aclgraph._aclnn_static_shape_kernel.value == "1"
    assert compiler_config().experimental_config.topology_sorting_strategy.value == "StableRDFS"


def test_decode_steps_of_several_tokens_of_each_sequence_give_the_same_tokens(checkpoint, requests, tmp_path):
    """Attention with sparse_mode 3 over pages, several rows of each sequence, of which padded ones are hidden."""
    lines = [line | {"max_new_tokens": 12} for line in few(requests, "base")]
    wanted = serve(start(checkpoint("base"), dtype="fp32", backend="eager", **PLAN), lines)
    plan = NPU_SIM | {"speculate": "ngram", "speculate_tokens": 3, "graph_cache": str(tmp_path)}
    engine = start(checkpoint("base"), dtype="fp32", **plan)
    engine.speculation.proposer = Replay([wanted[line["id"]] for line in lines], 0.6)
    found = serve(engine, lines)
    assert same_tokens(found, wanted)
    accepted, proposed = (
        sum(getattr(result, name) for result in found.values()) for name in ("accepted_tokens", "proposed_tokens")
    )
    assert 0 < accepted < proposed
    assert any(" each=4 " in record.bucket for record in engine.executor.graphs.records)
