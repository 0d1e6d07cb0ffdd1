"""task=batch: answers every row of files on the replicas of a Ray cluster, with Ray Data.

Ray Data restarts replicas, serves lost rows again, and keeps a checkpoint of the rows whose results are written
(`ray.data.checkpoint`), which a later run into the same folder skips.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Ray reads this when it starts, and sends no usage statistics.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from mllama_graph.compose import run_again
from mllama_graph.core.config import Run
from mllama_graph.core.errors import RankFailed, UserError, message_of
from mllama_graph.core.report import Progress, write_json, write_result
from mllama_graph.plan.resolve import ResolvedRun
from mllama_graph.scale.answers import ROW, Answers
from mllama_graph.scale.attempts import STARTS
from mllama_graph.scale.rows import Rows
from mllama_graph.tasks.batch_options import BatchOptions, files_of
from mllama_graph.tasks.generate import settings_of

# The folder in output= that later runs read. Readers of Parquet ignore names that begin with _.
KEPT = "_batch"
ATTEMPTS = Path(KEPT) / "attempts"
# Tables that a replica serves at a time: while one table ends, rows of the next fill the batch.
TABLES = 2
LEAST_ROWS = 16


def main(run: ResolvedRun) -> None:
    """Serve the rows of input= that have no result in output= yet.

    Raises UserError if output= belongs to another run, or if no row could be served.
    """
    options, progress = run.options, Progress()
    assert isinstance(options, BatchOptions)
    base, paths = files_of(str(options.input))
    output = Path(str(options.output)).expanduser().absolute()
    claim(output, settings_of(run) | {"prompt": run.question.prompt, "format": options.format})
    # Of an earlier run, whose end says nothing about its rows.
    shutil.rmtree(output / ATTEMPTS, ignore_errors=True)
    before = counted(output, options.format)
    with cluster(options):
        answer(run, options, base, paths, output)
    done, errors, first = counted(output, options.format)
    progress.say(
        f"{done - before[0]} rows served, {errors - before[1]} of them with an error; {before[0]} were there before; "
        f"results are in {output}"
    )
    if first is not None and errors > before[1]:
        progress.say(f"the first error: {first}", private=True)
    write_result(run.output_dir, run.asked, metrics={"rows": done, "errors": errors, "rows_before": before[0]})
    if errors == done:
        raise UserError(f"no row of input={options.input} could be served. {first or ''}".rstrip())


def answer(run: ResolvedRun, options: BatchOptions, base: Path, paths: list[Path], output: Path) -> None:
    """Serve rows in the cluster and write their results. Raises RankFailed if Ray gives up."""
    rows = options.rows or max(4 * run.limits.batch, LEAST_ROWS)
    # An error is raised, and written to our log; Ray Data would print its stack trace, too.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig(
        ROW, str(output / KEPT / "rows"), delete_checkpoint_on_success=False, write_num_threads=1
    )
    data = ray.data.read_datasource(Rows(paths, base, rows)).repartition(target_num_rows_per_block=rows)
    results = data.map_batches(
        Answers,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=[worker_run(run, options)],
        fn_constructor_kwargs={
            "prompt": run.question.prompt,
            "keep": (ROW,),
            "base": str(base),
            "attempts": str(output / ATTEMPTS),
            "starts": STARTS * options.replicas,
        },
        compute=ActorPoolStrategy(
            size=options.replicas, max_concurrent_calls_per_actor=TABLES, enable_true_multi_threading=True
        ),
        **taken(run, options),
    )
    try:
        if options.format == "parquet":
            results.write_parquet(str(output), mode="append")
        else:
            results.write_json(str(output), mode="append")
    except (ray.exceptions.RayError, SystemError) as error:
        logging.getLogger(__name__).exception("Ray ended the run")
        cause = cause_of(error)
        if isinstance(cause, UserError):
            raise cause from error
        raise RankFailed(
            f"Ray ended the run: {message_of(UserError(str(cause)))} Finished rows are in {output}; the same command "
            "goes on."
        ) from error
    finally:
        context.checkpoint_config = None


def cause_of(error: Exception) -> BaseException:
    """What made Ray raise `error`, as the exception that a replica has raised if that is known."""
    found = getattr(error, "cause", None) or error.__cause__ or error
    # Ray Data's own cause is empty, and what ended a replica's start is only told as the text of a stack trace.
    lines = (str(found).strip() or str(error)).strip().splitlines()
    name, _, said = lines[-1].partition(": ") if lines else ("", "", "")
    for kind in (UserError, RankFailed):
        if name.endswith(f".{kind.__name__}"):
            return kind(said)
    return found if str(found).strip() else error


def worker_run(run: ResolvedRun, options: BatchOptions) -> Run:
    """A replica's run: the command line's, with paths that don't depend on the working directory."""
    asked = dict(run.asked) | {"prompt": None}
    if run.checkpoint and asked["weights"]:
        asked["weights"] = str(run.checkpoint.folder.absolute())
    if asked["graph_cache"]:
        asked["graph_cache"] = str(Path(asked["graph_cache"]).expanduser().absolute())
    if asked["threads"] is None and run.device.on_host:
        nodes = [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]]
        on_one = -(-options.replicas // len(nodes))
        asked["threads"] = max(1, int(min(nodes)) // (on_one * run.tp))
    asked["kv"] = run.kv
    asked["max_images"] = run.limits.max_images
    return run_again(asked)


def taken(run: ResolvedRun, options: BatchOptions) -> dict[str, Any]:
    """The resources that a replica reserves, as Ray's arguments. None on a CPU: Ray's reading tasks need CPUs."""
    amounts = dict(options.resources) or ({} if run.device.on_host else {run.device.ray_resource: float(run.tp)})
    return {"num_cpus": amounts.pop("CPU", 0), "num_gpus": amounts.pop("GPU", 0), "resources": amounts}


@contextmanager
def cluster(options: BatchOptions) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine that ends with the run.

    Raises UserError if there is none at the address, or none can be started.
    """
    try:
        ray.init(
            options.address,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=False,
        )
    # Ray raises a plain Exception if its processes don't start in time.
    except Exception as error:
        where = f"reach a cluster at task.address={options.address}" if options.address else "start or be reached"
        raise UserError(f"Ray can't {where}: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        ray.shutdown()


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Make the folder of results. Raises UserError if it holds anything but results of the same settings."""
    path = output / KEPT / "settings.json"
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf8"))
        for key, value in settings.items():
            if earlier.get(key) != value:
                raise UserError(
                    f"output={output} has results of a run with {key}={earlier.get(key)}, not {value}. Use that, or "
                    "another folder."
                )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output} holds something else than results of task=batch. Give another folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} can't be written: {error.strerror}. Give another folder.") from error
    write_json(path, settings)


def counted(output: Path, format: str) -> tuple[int, int, str | None]:
    """The number of results in a folder, how many of them are errors, and the first error."""
    count, errors = 0, []
    for path in sorted(output.glob("*")):
        if path.name[0] not in "._" and path.stat().st_size:
            if format == "parquet":
                column = pq.read_table(path, columns=["error"])["error"].to_pylist()
            else:
                column = [json.loads(line)["error"] for line in path.read_text(encoding="utf8").splitlines()]
            count += len(column)
            errors += [text for text in column if text is not None]
    return count, len(errors), errors[0] if errors else None
