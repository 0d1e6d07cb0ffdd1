"""task=generate: a chat on the command line, or a file of requests, to text."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from mllama_graph.model.checkpoint import model_of
from mllama_graph.core.config import Run
from mllama_graph.engine.engine import Delta, Engine, Result
from mllama_graph.inputs.images import list_images, shorten
from mllama_graph.engine.offline import Results, most_images, read_lines, serve_lines
from mllama_graph.plan.resolve import packaged, plan_of
from mllama_graph.inputs.processor import Request
from mllama_graph.core.report import Progress, table, write_result
from mllama_graph.engine.scheduler import Scheduler
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.engine.executor import Ranks

DEFAULT_PROMPT = {True: "Describe this image.", False: "What can you do?"}


def main(run: Run) -> None:
    """Generate for `requests=` or for `prompt=` and `image=`; writes results.jsonl and result.json."""
    shape, checkpoint = model_of(run)
    processor = processor_of(run, shape, checkpoint)
    progress, folder = Progress(), Path(run.output_dir)
    if run.requests is None:
        prompt, images = asked(run)
        plan = plan_of(run, shape, len(images))
        request = processor.chat(0, prompt, images, run.system)
        Scheduler(plan, run.batch).check(len(request.ids), request.max_new, len(request.images))
        engine = start_engine(run, plan, shape, checkpoint, processor, progress)
        progress.say(" ".join([*map(shorten, images), prompt]))
        results = Results(folder / "results.jsonl", 1)
        result = answer(engine, request, results)
        _finish(run, folder, engine, results, [result], result, progress)
        return
    lines = list(read_lines(Path(run.requests)))
    engine = start_engine(run, plan_of(run, shape, most_images(lines)), shape, checkpoint, processor, progress)
    results = Results(folder / "results.jsonl", len(lines))
    serve_lines(engine, lines, Path(run.requests).parent, results, run.batch)
    progress.say(f"{len(results.finished)} of {len(lines)} requests finished, {results.errors} refused"
                 + (f"; see {results.path}" if results.errors else ""))
    if results.ignored:
        progress.say(f"fields without a meaning were ignored: {', '.join(sorted(results.ignored))}")
    _finish(run, folder, engine, results, results.finished, None, progress)


def asked(run: Run) -> tuple[str, list[str]]:
    """The prompt and images of a chat; a run that gives neither asks what its model ships with."""
    if run.prompt is None and run.image is None and run.model.prompt is not None:
        return run.model.prompt, list_images(packaged(run.model.image))
    images = list_images(run.image)
    return DEFAULT_PROMPT[bool(images)] if run.prompt is None else run.prompt, images


def answer(engine: Engine, request: Request, results: "Results") -> Result:
    """One request, its text streamed to the terminal."""

    def show(delta: Delta) -> None:
        print(delta.text, end="", flush=True)
        if delta.result:
            results.add(0, delta.result.line())
            results.finished.append(delta.result)

    engine.expect(request)
    engine.submit(request)
    engine.run(show)
    print(flush=True)
    return results.finished[0]


def metrics_of(engine: Engine, finished: list[Result]) -> dict[str, Any]:
    """The figures of a run: sums over requests, means over steps. Bytes are modelled from shapes; times measured."""
    stats = engine.stats
    steps = stats.decode_steps
    first = [result.time_to_first_token_ms for result in finished]
    per_token = [r.time_per_output_token_ms for r in finished if r.time_per_output_token_ms is not None]
    mean = lambda values: round(sum(values) / len(values), 3) if values else None  # noqa: E731
    step_bytes = stats.decode_bytes / steps if steps else None
    return {
        "requests": len(finished), "prompt_tokens": sum(r.prompt_tokens for r in finished),
        "image_tokens": sum(r.image_tokens for r in finished), "new_tokens": sum(len(r.token_ids) for r in finished),
        "start_to_first_token_s": stats.start_to_first_token and round(stats.start_to_first_token, 2),
        "time_to_first_token_ms": mean(first), "time_per_output_token_ms": mean(per_token),
        "tokens_per_second": round(stats.decode_rows / stats.decode_seconds, 3) if steps else None,
        "bytes_per_step": round(step_bytes) if steps else None,
        "gb_per_second": round(stats.decode_bytes / stats.decode_seconds / 1e9, 3) if steps else None,
        "vision_steps": stats.vision_steps, "prefill_steps": stats.prefill_steps, "decode_steps": steps,
        "vision_seconds": round(stats.vision_seconds, 4), "prefill_seconds": round(stats.prefill_seconds, 4),
        "decode_seconds": round(stats.decode_seconds, 4), "preemptions": engine.scheduler.preemptions,
    }


def _finish(run: Run, folder: Path, engine: Engine, results: Results, finished: list[Result],
            single: Optional[Result], progress: Progress) -> None:
    """The table, and result.json; written again once the graphs that still compile are in the store."""
    results.close()
    metrics, graphs = metrics_of(engine, finished), engine.ranks.graphs

    def write() -> None:
        write_result(folder, asdict(run), metrics=metrics | {"memory_bytes": engine.ranks.memory.total},
                     graphs=[asdict(record) for record in graphs.records],
                     text=single.text if single else None, token_ids=single.token_ids if single else None)

    write()
    if finished:
        print("\n" + table(_figures(metrics)), flush=True)
    finish_compiling(engine.ranks, progress)
    write()
    progress.say(f"\n{folder / 'result.json'}")


def finish_compiling(ranks: Ranks, progress: Progress) -> None:
    """Let the ranks go, and what still compiles reach the store, so that the next start compiles nothing; Ctrl-C stops it."""
    ranks.close()
    graphs, pending = ranks.graphs, ranks.graphs.compiler.pending
    if pending and not graphs.store.warning:
        progress.say(f"\nfor the next start {pending} more graph{'s' * (pending > 1)} will be compiled; Ctrl-C to stop here")
        try:
            graphs.drain(progress.graphs)
        except KeyboardInterrupt:
            progress.say(f"stopped; {graphs.compiler.pending} left for another time (task=warmup compiles them all)")
    graphs.compiler.close()


def _figures(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    def unit(name: str, unit: str = "", scale: float = 1.0) -> str:
        value = metrics[name]
        return "-" if value is None else f"{value * scale:.2f} {unit}".rstrip()

    return [("prompt tokens", str(metrics["prompt_tokens"])), ("image tokens", str(metrics["image_tokens"])),
            ("new tokens", str(metrics["new_tokens"])), ("time to first token", unit("time_to_first_token_ms", "ms")),
            ("time per token", unit("time_per_output_token_ms", "ms")), ("tokens/s", unit("tokens_per_second")),
            ("bytes read a step", unit("bytes_per_step", "MB (modelled)", 1e-6)), ("GB/s", unit("gb_per_second"))]
