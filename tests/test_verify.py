"""task=verify: which graphs it lowers, how it reports findings, and the latencies that it models."""

import json
from dataclasses import replace

import pytest
import torch
from engines import resolved

from mllama_graph.core.config import ModelChoice, Run
from mllama_graph.core.devices import Device
from mllama_graph.core.errors import RankFailed, UserError
from mllama_graph.core.hardware import HardwareChoice
from mllama_graph.core.report import growing_columns
from mllama_graph.graphs.spec import GraphSpec
from mllama_graph.model.formats import Storage
from mllama_graph.model.shape import shape_of
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.cost import bucket_cost, work
from mllama_graph.tasks import verify
from mllama_graph.tasks.options import VerifyOptions
from mllama_graph.tasks.verify import Judged, all_findings, difference, jobs, kind, modelled, rows

RELEASED = shape_of({"model_type": "mllama"})
# Weights, activations and pages in bf16.
BF16 = Storage(2, 2, 2)
HARDWARE = HardwareChoice(
    "a device", flops=3e14, memory_bytes_per_second=1.6e12, memory_bytes=64e9, link_bytes_per_second=3e10
)


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """run_of(changes) -> a run of task=verify for the 11B model; torch_npu need not be installed."""
    monkeypatch.setattr(Device, "check_package", lambda device: None)

    def make(**changes):
        given = {
            "model": ModelChoice("11b", {"text_config": {}}),
            "weights": "meta",
            "batch": 4,
            "task": VerifyOptions(),
            "hardware": HARDWARE,
            "output_dir": str(tmp_path),
        }
        return resolved(Run(**given | changes))

    return make


def spec_of(ranks=1):
    bf16 = torch.bfloat16
    return GraphSpec(RELEASED, 128, 100, 200, bf16, bf16, bf16, "torchair", "npu-sim", 1, ranks, "distributed")


@pytest.fixture
def plan(run_of):
    return run_of(max_input_length=3000, max_images=2).plan


def judged(wanted, **broken):
    """The results of lowering every graph, made up; `broken` gives the findings of a bucket."""
    return [
        Judged(job, 1.0, broken.get(str(job.bucket), []), 100, 20, 3, 10**9, {str(kind(job.bucket)): "Add Add"})
        for job in wanted
    ]


def test_every_bucket_is_lowered_and_the_ends_of_each_class_are_lowered_whole(plan):
    def cost(bucket):
        return bucket_cost(RELEASED, 128, bucket)

    spec = spec_of()
    wanted = jobs(spec, plan)
    assert {job.bucket for job in wanted if not job.whole} == set(plan.buckets()) and len(set(wanted)) == len(wanted)
    whole = [job.bucket for job in wanted if job.whole]
    for one in {kind(bucket) for bucket in plan.buckets()}:
        costs = [cost(bucket) for bucket in plan.buckets() if kind(bucket) == one]
        assert {min(costs), max(costs)} == {cost(bucket) for bucket in whole if kind(bucket) == one}
    assert len({kind(bucket) for bucket in whole}) == 15


def test_the_last_of_several_ranks_is_lowered_too(plan):
    last = [job for job in jobs(spec_of(4), plan) if job.rank]
    assert {job.rank for job in last} == {3}
    assert {kind(job.bucket) for job in last} == {kind(bucket) for bucket in plan.buckets()}


def test_every_bucket_has_a_row_that_names_the_graph_lowered_whole(plan):
    spec = spec_of()
    table = list(rows(spec, judged(jobs(spec, plan)), HARDWARE))
    assert sorted(row[0] for row in table) == sorted(str(bucket) for bucket in plan.buckets())
    by_name = {str(bucket): bucket for bucket in plan.buckets()}
    standing = {row[0] for row in table if row[1] == "whole"}
    for name, lowered, *_ in table:
        like = lowered.removeprefix("as ")
        assert lowered == "whole" or like in standing and kind(by_name[like]) == kind(by_name[name])


def test_a_row_appears_as_soon_as_its_graph_is_judged(plan):
    found, taken = judged(jobs(spec_of(), plan)), []

    def coming():
        for one in found:
            taken.append(one)
            yield one

    table = rows(spec_of(), coming(), HARDWARE)
    assert next(table)[:2] == (str(found[0].job.bucket), "whole") and taken == found[:1]
    lines = growing_columns(verify.HEAD, table, verify.widths(jobs(spec_of(), plan)))
    assert next(lines).split()[:2] == ["graph", "lowered"] and taken == found[:1]
    assert next(lines).startswith(str(found[1].job.bucket)) and taken == found[:2]


def test_only_findings_give_the_short_form_of_a_whole_graph_and_another_rank_a_row(plan):
    found = judged(jobs(spec_of(4), plan))
    before = len(list(rows(spec_of(4), found, HARDWARE)))
    first, last = found[0].job.bucket, found[-1]
    for one in found:
        if one is last or (one.job.bucket == first and not one.job.whole and not one.job.rank):
            one.findings = [("moves", "TensorMove TensorMove: copies pages.0.0, at text.py:3")]
    table = list(rows(spec_of(4), found, HARDWARE))
    assert len(table) == before + 2
    assert [row[:2] for row in table if row[6] != "clean"] == [
        (str(first), "short, rank 0"),
        (str(last.job.bucket), "short, rank 3"),
    ]


def test_graphs_of_a_class_that_differ_are_found(plan):
    found = judged(jobs(spec_of(), plan))
    assert all_findings(found) == []
    odd = [one for one in found if not one.job.whole and one.job.bucket.phase == "decode"][-1]
    odd.structure |= {"another": "Mul Mul_3, at text.py:1"}
    assert all_findings(found) == [
        f"structure: {odd.job.bucket}: not in every graph of its class: Mul Mul_3, at text.py:1"
    ]


def test_a_finding_common_to_many_graphs_is_reported_once(plan):
    found = judged(jobs(spec_of(), plan))
    for number, one in enumerate(found):
        one.findings = [("moves", f"TensorMove TensorMove_{number}: copies pages.0.0, at text.py:3")]
    assert all_findings(found) == [
        f"moves: {found[0].job.bucket}: TensorMove TensorMove_0: copies pages.0.0, "
        f"at text.py:3 (and in {len(found) - 1} more graphs)"
    ]


def test_a_difference_of_structures_is_what_only_one_has():
    one, other = {"a": "A", "b": "B"}, {"a": "A", "c": "C", "d": "D"}
    assert difference(one, other) == ["B", "C"] and difference(one, dict(one)) == []


def test_findings_end_the_run_after_they_are_printed(run_of, tmp_path, monkeypatch, capsys):
    bucket = Bucket("decode", 1, 1, 1, 0)
    monkeypatch.setattr(
        verify,
        "lower",
        lambda run, spec, wanted, progress: judged(
            wanted, **{str(bucket): [("moves", "TensorMove TensorMove: copies pages.0.0, at text.py:3")]}
        ),
    )
    with pytest.raises(RankFailed, match="1 findings .* moves: decode batch=1 pages=1 image_pages=0: TensorMove"):
        verify.main(run_of())
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "result.json").read_text())
    # A row for the whole graph, and another for the shortened graph.
    assert (
        printed.count("1 findings") == 2 and result["metrics"]["findings"][0] in printed and result["status"] == "error"
    )


def test_clean_graphs_leave_a_result(run_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "lower", lambda run, spec, wanted, progress: judged(wanted))
    verify.main(run_of(tp=4))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "ok" and result["metrics"]["findings"] == []
    assert len(result["graphs"]) == result["metrics"]["graphs"]
    assert "clean" in capsys.readouterr().out


def test_graphs_of_fp32_are_refused(run_of):
    with pytest.raises(UserError, match="Use dtype=bf16"):
        verify.main(run_of(dtype="fp32"))


# ---- modelled latencies


def floor_of(spec, bucket):
    """The modelled seconds on hardware without figures for plan/latency.py."""
    seconds, cores = modelled(spec, bucket, HARDWARE)
    assert cores == "-"
    return seconds


def test_a_decode_step_takes_the_time_to_read_its_bytes():
    """15.0 GB of weights in bf16 (text layers and head of the 11B model), and 4 KiB of K/V per token and layer."""
    lean = Bucket("decode", 1, 1, 16, 0)
    assert floor_of(spec_of(), lean) == pytest.approx((15.0e9 + 2048 * 32 * 4096) / 1.6e12, rel=0.01)
    assert floor_of(spec_of(), replace(lean, image_pages=51)) > floor_of(spec_of(), lean)


def test_a_prefill_takes_the_time_of_its_matrix_products():
    bucket = Bucket("prefill", 1, 2048, 0, 0)
    assert floor_of(spec_of(), bucket) == pytest.approx(work(RELEASED, 128, bucket, BF16)[1] / 3e14)
    assert work(RELEASED, 128, bucket, BF16)[1] == pytest.approx(2 * 2048 * 6.98e9 + 2 * 2048**2 * 4096 * 32, rel=0.01)


def test_ranks_share_the_work_and_add_the_time_of_all_reduces():
    bucket = Bucket("prefill", 1, 2048, 0, 0)
    # 65 all-reduces of 2048 x 4096 bf16 values; a rank sends half of the bytes over each of its links.
    summed = 65 * 2048 * 4096 * 2 * 2 / 4 / 3e10
    assert floor_of(spec_of(4), bucket) == pytest.approx(floor_of(spec_of(), bucket) / 4 + summed)
