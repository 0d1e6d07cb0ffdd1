"""Sweeps: the results and failures of all jobs are collected by every launcher, and all experiments compose."""

import csv
import re

import pytest
from commands import ROOT, run
from engines import GRAPH_PLAN, GRAPH_SPEC, arguments
from hydra import compose, initialize_config_dir

from mllama_graph.compose import register_schemas


def test_a_sweep_with_a_failing_job_finishes_the_others_and_fails(checkpoint, tmp_path):
    done = run(
        tmp_path / "out",
        "-m",
        "backend=eager",
        "dtype=fp8,fp32",
        "max_output_length=4",
        f"weights={checkpoint('base')}",
        "prompt=one, two",
    )
    assert done.code != 0
    assert "dtype=fp8" in done.one_line_error()
    jobs = sorted(path.name for path in done.folder.iterdir() if path.is_dir())
    assert [name.split("_")[0] for name in jobs] == ["0", "1"] and "dtype=fp32" in jobs[1]
    assert not any("prompt" in name for name in jobs)
    assert done.result(jobs[0])["status"] == "error"
    good = done.result(jobs[1])
    assert good["status"] == "ok" and good["token_ids"] and good["config"]["prompt"] == "one, two"
    said = (done.folder / "summary.md").read_text()
    assert "| 0 | fp8 | error | - | - | - | - |" in said and "- job 0: dtype=fp8 is not one of" in said
    assert re.search(r"\| 1 \| fp32 \| ok \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", said)
    with (done.folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["dtype"], row["status"]) for row in rows] == [("0", "fp8", "error"), ("1", "fp32", "ok")]
    assert rows[1]["tokens_per_second"] and (done.folder / "first_token_ms.png").is_file()
    assert "job 2 of 2, about" in done.err


@pytest.mark.parametrize("launcher", ["parallel", "submitit_local"])
def test_jobs_run_elsewhere_and_a_failing_one_is_counted(launcher, checkpoint, tmp_path):
    done = run(
        tmp_path / "out",
        "-m",
        f"hydra/launcher={launcher}",
        "backend=eager",
        "dtype=fp8,fp32",
        "max_output_length=4",
        f"weights={checkpoint('base')}",
        "prompt=one",
    )
    assert done.code == 2, done.err
    with (done.folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["dtype"], row["status"]) for row in rows] == [("0", "fp8", "error"), ("1", "fp32", "ok")]
    assert "Traceback" not in done.out + done.err


def jobs_of(*given):
    """The configuration of a sweep as Hydra composes it, without running a job."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(given), return_hydra_config=True)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_composes(name):
    register_schemas()
    composed = jobs_of(f"experiment={name}")
    swept = composed.hydra.sweeper.get("params") or {}
    assert bool(swept) == (name != "performance")
    if name == "performance":
        assert list(composed.task.batch_sizes) == list(range(1, 11)) and composed.task.name == "bench"


def test_a_cold_start_compiles_graphs_and_a_warm_one_loads_them(checkpoint, tmp_path):
    # One token needs the prefill graph alone. Without native kernels, which a new graph store would compile too.
    plan = GRAPH_PLAN | {"max_output_length": 1, "kernels": "plain"}
    done = run(
        tmp_path / "out",
        "-m",
        "experiment=cold_vs_warm",
        f"weights={checkpoint(GRAPH_SPEC)}",
        "prompt=one",
        *arguments(plan),
    )
    assert done.code == 0, done.err
    with (done.folder / "summary.csv").open() as file:
        cold, warm = csv.DictReader(file)
    assert (cold["plan.compile"], warm["plan.compile"]) == ("wait", "never")
    assert float(cold["start_to_first_token_s"]) > float(warm["start_to_first_token_s"]) > 0
