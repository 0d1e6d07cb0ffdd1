"""A rank on a simulated NPU uses the operations of ops/npu.py and executes every order of the driver."""

import inspect
from dataclasses import replace

import pytest
import torch
from engines import resolved, run_of, start
from graphs import CLASSES, DECODE, LEAN
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mllama_graph.ascend.capture import capture
from mllama_graph.ascend.structure import structure
from mllama_graph.core.place import Place, Rendezvous
from mllama_graph.engine import executor
from mllama_graph.engine.device import BACKENDS
from mllama_graph.engine.messages import Compile, Load, Start
from mllama_graph.engine.start import pixels_of, processor_of
from mllama_graph.graphs.aot import ops_of
from mllama_graph.graphs.loaded import LoadedGraphs
from mllama_graph.graphs.step import Step, arguments
from mllama_graph.ops import npu, npu_captured

PLAN = {
    "backend": "torchair",
    "device": "npu-sim",
    "dtype": "bf16",
    "batch": 2,
    "page_size": 128,
    "prefill_tokens": [32],
    "decode_batch": [2],
    "pages": [4],
    "images": [4],
    "threads": 1,
}


@pytest.fixture(scope="module")
def rank(checkpoint, tmp_path_factory):
    store = str(tmp_path_factory.mktemp("store"))
    return start(checkpoint("base"), graph_cache=store, **PLAN).executor.rank


# ---- operations


def test_the_operations_of_a_rank_are_those_of_an_npu(rank):
    assert rank.ops == npu.npu_ops(1)
    assert rank.graphs.ops is rank.ops


class Recorded(TorchDispatchMode):
    """Records the names of the operations that are called, as "namespace::name"."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().partition(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bucket", CLASSES, ids=str)
def test_a_step_that_is_not_compiled_runs_npu_operations(bucket, rank):
    """The step runs on fake tensors, since the stubs have no kernels."""
    spec = rank.spec
    given = spec.prepared(spec.example(bucket))
    with FakeTensorMode(), torch.no_grad(), Recorded() as recorded:
        step = Step(bucket.phase, spec.unfilled_weights(spec.shard), spec.shape, spec.compute, rank.ops)
        fake = tree_map_only(torch.Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device), given)
        step(*arguments(bucket, fake, *spec.unfilled_pages()))
    fused = {"npu_linear", "npu_scatter_pa_kv_cache", "npu_fused_infer_attention_score"}
    fused |= {"npu_gelu"} if bucket.phase == "vision" else {"npu_add_rms_norm", "npu_rotary_mul", "npu_swiglu"}
    assert {name.partition("::")[2] for name in recorded.names} >= fused


@pytest.mark.parametrize("bucket", [LEAN, DECODE], ids=str)
def test_the_operations_of_a_rank_trace_the_graph_that_a_device_gets(bucket, rank):
    assert structure(capture(rank.spec, bucket, rank.ops)) == structure(capture(rank.spec, bucket))


def test_operations_follow_the_mode_that_graphs_are_compiled_in(rank):
    captured = replace(rank.spec, options=tuple((dict(rank.spec.options) | {"mode": "npugraph_ex"}).items()))
    assert ops_of(rank.spec).attend_pages is npu.attend_pages
    assert ops_of(captured).attend_pages is npu_captured.attend_pages


# ---- graphs


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_the_graphs_of_every_device_have_the_whole_interface(backend):
    assert issubclass(backend.loaded, LoadedGraphs)
    assert not inspect.isabstract(backend.loaded)


@pytest.mark.parametrize("loaded", LoadedGraphs.__subclasses__())
@pytest.mark.parametrize("method", sorted(LoadedGraphs.__abstractmethods__))
def test_every_kind_of_loaded_graphs_has_the_declared_signatures(loaded, method):
    assert method in vars(loaded)
    own, declared = (inspect.signature(getattr(kind, method)) for kind in (loaded, LoadedGraphs))
    assert own == declared


def test_compiling_ahead_leaves_the_store_of_an_npu_rank_alone(rank, tmp_path_factory):
    before = sorted(rank.graphs.store.written.rglob("*"))
    rank.graphs.compile(rank.plan.decode(1, 1, 0))
    assert sorted(rank.graphs.store.written.rglob("*")) == before
    assert not rank.graphs.ready


class Orders:
    """A driver that sends a fixed list of orders."""

    def __init__(self, start, *orders):
        self.start, self.orders, self.confirmations = start, list(orders), 0

    def first(self):
        return self.start

    def next(self, timeout):
        return (self.orders.pop(0), False) if self.orders else (None, True)

    def confirm(self):
        self.confirmations += 1


def test_a_worker_rank_compiles_and_loads_what_the_driver_orders(checkpoint, tmp_path, monkeypatch):
    run = resolved(run_of(checkpoint("base"), graph_cache=str(tmp_path), **PLAN))
    bucket = run.plan.decode(1, 1, 0)
    driver = Orders(Start(run, pixels_of(processor_of(run))), Compile(bucket), Load(bucket))
    ranks = []

    class Rank(executor.Rank):
        def __init__(self, *given):
            super().__init__(*given)
            ranks.append(self)

    monkeypatch.setattr(executor, "meet", lambda place, rendezvous: None)
    monkeypatch.setattr(executor, "Driver", lambda place, store: driver)
    monkeypatch.setattr(executor, "Rank", Rank)
    executor.work(Place(), Rendezvous("", 0), lambda run: None)
    [rank] = ranks
    assert not driver.orders
    assert driver.confirmations == 2
    assert list(rank.graphs.ready) == [bucket]
