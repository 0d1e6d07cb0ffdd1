"""Tensor-parallel ranks, as real processes, give the tokens of one rank."""

import json
from functools import cache
from pathlib import Path

import pytest
from commands import served
from engines import GRAPH_PLAN, arguments, resolved, run_of, serve, start
from test_engine import LOGPROB, few

from mllama_graph.launch import processes, supervisor


def written(path: Path, lines: list[dict]) -> Path:
    """A requests file of these lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory, requests):
    """file(spec, changes as JSON) -> a requests file: the requests of FEW, with these changes."""

    @cache
    def write(name: str, changes: str = "{}") -> Path:
        lines = [line | json.loads(changes) for line in few(requests, name)]
        return written(tmp_path_factory.mktemp("requests") / f"{name}.jsonl", lines)

    return write


def wrong(lines: list[dict], results: dict) -> list:
    """Requests whose tokens or log-probabilities differ from those of one rank."""
    faults = []
    for line in lines:
        one = results[line["id"]]
        if line["token_ids"] != one.token_ids:
            faults.append(line["id"])
        scored = [entry for entry in line.get("prompt_logprobs") or [] if entry["logprob"] is not None]
        prompt = [entry for entry in one.prompt_logprobs or [] if entry["logprob"] is not None]
        reported = zip(scored + (line.get("logprobs") or []), prompt + (one.logprobs or []), strict=True)
        for ours, theirs in reported:
            if (
                max(
                    abs(a - b)
                    for a, b in zip(
                        [ours["logprob"], *ours["top_logprobs"]], [theirs["logprob"], *theirs["top_logprobs"]]
                    )
                )
                > LOGPROB
            ):
                faults.append((line["id"], "log-probabilities"))
    return faults


@pytest.mark.parametrize("name, tp", [("wide", 4), ("cross_first", 8)])
def test_every_request_gives_the_tokens_of_one_rank(name, tp, checkpoint, requests, file, tmp_path):
    # test_engine.py compares one rank with the oracle; no request of these specs has a near tie.
    lines = few(requests, name)
    one = serve(start(checkpoint(name), batch=8, page_size=16), lines)
    given = [f"weights={checkpoint(name)}", f"requests={file(name)}", "backend=eager", "batch=8", f"tp={tp}"]
    done = served(tmp_path / "out", *given)
    assert len(done["lines"]) == len(lines) and not wrong(done["lines"], one)
    assert len(list((tmp_path / "out" / "ranks").glob("*.log"))) == tp


def test_two_ranks_give_all_tokens_of_one_sampled_and_constrained_ones_too(checkpoint, requests, tmp_path):
    changes = [
        {"temperature": 0.9, "top_p": 0.9, "seed": 7},
        {"temperature": 0.8, "top_k": 20, "seed": 8, "logprobs": 3},
        {"repetition_penalty": 1.3, "logit_bias": {"5": 3, "300": 2}, "min_tokens": 4, "logprobs": 3},
    ]
    sampled = [
        line | change | {"id": f"{line['id']} {n}"}
        for line in few(requests, "half")
        for n, change in enumerate(changes)
    ]
    sampled[-1] |= {"prompt_logprobs": 2, "frequency_penalty": 0.5}
    sampled[0] |= {"temperature": 0, "structured_outputs": {"regex": "[0-9a-f]{3}-(yes|no)"}}
    sampled[3] |= {"structured_outputs": {"json": {"type": "object"}}, "max_new_tokens": 20}
    lines = requests("half") + sampled
    path = written(tmp_path / "requests.jsonl", lines)
    one = serve(start(checkpoint("half"), batch=8, page_size=16), lines)
    given = [f"weights={checkpoint('half')}", f"requests={path}", "backend=eager", "batch=8", "tp=2"]
    # As on accelerators: steps are launched one ahead; top_k takes what the graph finds, top_p of these flat
    # distributions all logits.
    done = served(tmp_path / "out", *given, "overlap=true", "plan.candidates=24")
    assert len(done["lines"]) == len(lines) and not wrong(done["lines"], one)


def test_compiled_graphs_are_shared_by_the_ranks_and_found_again(checkpoint, requests, file, empty_store, tmp_path):
    name, plan = (
        "cross_first",
        arguments(GRAPH_PLAN | {"pages": [25], "max_input_length": 300, "max_output_length": 100}),
    )
    lines = [line for line in few(requests, name) if line["id"] in ("chain_of_three_48", "same_image_twice_49")]
    path = written(tmp_path / "requests.jsonl", lines)
    plan = [part for part in plan if not part.startswith(("plan.images", "max_images"))] + [
        "plan.images=[4]",
        "max_images=4",
    ]
    one = serve(start(checkpoint(name), batch=8), lines)
    given = [f"weights={checkpoint(name)}", f"requests={path}", "tp=2", f"graph_cache={empty_store}", *plan]
    for compile, source in (("wait", "compiled"), ("never", "hit")):
        done = served(tmp_path / compile, *given, f"plan.compile={compile}")
        assert not wrong(done["lines"], one)
        assert done["graphs"] and {graph["source"] for graph in done["graphs"]} == {source}
    entries = list(empty_store.glob("*/graph.pt2"))
    assert len(entries) == len(done["graphs"]), "ranks compile graphs of their own"


def test_deterministic_runs_in_half_precision_are_equal_to_the_last_bit(checkpoint, requests, file, tmp_path):
    given = [
        f"weights={checkpoint('half')}",
        f"requests={file('half', json.dumps({'logprobs': 3}))}",
        "backend=eager",
        "batch=4",
        "tp=2",
        "dtype=fp16",
        "deterministic=true",
    ]
    first, second = (served(tmp_path / name, *given)["lines"] for name in ("a", "b"))
    for one, other in zip(first, second, strict=True):
        assert one["token_ids"] == other["token_ids"] and one["logprobs"] == other["logprobs"]
    plain = serve(start(checkpoint("half"), batch=8), few(requests, "half"))
    # At most one first token differs from fp32 on one rank; rounding may change later tokens.
    assert sum(line["token_ids"][0] == plain[line["id"]].token_ids[0] for line in first) >= len(first) - 1


@pytest.mark.parametrize(
    "kernels, given, expected", [("native", None, "PASSIVE"), ("native", "ACTIVE", None), ("plain", None, None)]
)
def test_worker_ranks_learn_how_torchs_threads_wait_before_they_import_torch(
    kernels, given, expected, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    started = {}
    for module in (processes, supervisor):
        monkeypatch.setattr(module, "spawn", lambda place, variables, *given: started.update({place.rank: variables}))
    supervisor.Supervisor(resolved(run_of(checkpoint("half"), kernels=kernels, tp=2, output_dir=str(tmp_path))), "", 2)
    assert started[1].get("OMP_WAIT_POLICY") == expected and started[1]["RANK"] == "1"


def test_a_run_without_weights_traces_every_rank(tmp_path):
    done = served(
        tmp_path / "out",
        "model=mid",
        "model.config.text_config.num_hidden_layers=3",
        "model.config.text_config.cross_attention_layers=[1]",
        "model.config.vision_config.num_hidden_layers=3",
        "model.config.vision_config.intermediate_layers_indices=[1]",
        "weights=meta",
        "tp=4",
        "plan.prefill_tokens=[32]",
        "plan.pages=[25]",
        "plan.images=[4]",
        "dtype=bf16",
    )
    metrics = done["metrics"]
    assert len(done["graphs"]) == metrics["graphs"] and {graph["source"] for graph in done["graphs"]} == {"traced"}
    held, replicated = metrics["rank_weight_bytes"], sum(metrics["replicated_bytes"].values())
    assert len(held) == 4 and sum(held) == metrics["model_weight_bytes"] + 3 * replicated
