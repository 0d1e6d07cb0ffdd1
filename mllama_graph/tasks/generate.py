"""task=generate: answers a prompt from the command line, or a file of requests."""

from typing import Any

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress, table, write_result
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.offline import line_hash, serve_lines
from mllama_graph.engine.result_file import Results, check_settings, write_settings
from mllama_graph.engine.results import Delta, Result
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.inputs.image_sources import list_images, shorten
from mllama_graph.inputs.request import Request
from mllama_graph.inputs.request_file import read_lines
from mllama_graph.plan.resolve import Question, ResolvedRun

DEFAULT_PROMPT = {True: "Describe the picture.", False: "What can you do?"}


def main(run: ResolvedRun) -> None:
    """Generate for requests=, or for prompt= and image=, and write results.jsonl and result.json.

    Raises UserError for a prompt that can't be answered, a requests file of which no line can be served, and results of
    an earlier run that resume=true can't continue.
    """
    processor, progress, question = processor_of(run), Progress(), run.question
    path = run.output_dir / "results.jsonl"
    if question.requests is None:
        prompt, images = asked(question)
        request = processor.chat(0, prompt, images, question.system)
        run.plan.check(len(request.ids), request.max_new, len(request.images))
        first = run.plan.alone(len(request.ids), request.max_new, [image.count for image in request.images])
        engine = start_engine(run, processor, progress, first)
        progress.say(" ".join([*map(shorten, images), prompt]), private=True)
        results = Results(path).open(progress.say)
        result = answer(engine, request, results)
        _finish(run, engine, results, result, progress)
        if result.error:
            raise UserError(result.error)
        return
    results, settings = Results(path, question.resume), settings_of(run)
    if question.resume and not path.exists():
        progress.say(f"resume=true: there is no {path}, so every line is served. hydra.run.dir= chooses the folder.")
    if results.has_earlier:
        check_settings(run.output_dir, settings)
        if not results.fits(map(line_hash, read_lines(question.requests))):
            raise UserError(
                f"resume=true: {path} has results of no line of requests={question.requests}. Give the requests file "
                "of the earlier run, or another folder (hydra.run.dir=)."
            )
    engine = start_engine(run, processor, progress)
    write_settings(run.output_dir, settings)
    results.open(progress.say)
    lines = read_lines(question.requests)
    count = serve_lines(engine, lines, question.requests.parent, results, run.limits.batch)
    progress.say(
        f"{results.totals.requests + results.kept} of {count} requests finished, {results.errors} refused"
        + (f"; see {results.path}" if results.errors else "")
        + (f"; {results.kept} results were kept from the run before" if results.kept else "")
    )
    if 0 < results.errors < count:
        progress.say(f"the first error: {results.first_error}", private=True)
    if results.ignored:
        progress.say(f"unknown fields were ignored: {', '.join(map(_shown, sorted(results.ignored)))}")
    _finish(run, engine, results, None, progress)
    results.check_served(question.requests, count)


def settings_of(run: ResolvedRun) -> dict[str, Any]:
    """The keys on which the results of a requests file depend, apart from rounding."""
    d, asked, checkpoint = run.defaults, run.asked, run.checkpoint
    adapters = [f"{part.folder.resolve()}:{part.weight:g}" for part in checkpoint.adapters] if checkpoint else []
    source = {"weights": str(checkpoint.folder.resolve())} if checkpoint else {"weights": "random", "model": run.model}
    return {
        **source,
        "adapter": ",".join(adapters) or None,
        "dtype": asked["dtype"],
        "quant": asked["quant"],
        "max_output_length": d.max_new,
        "temperature": d.temperature,
        "top_p": d.top_p,
        "top_k": d.top_k,
        "seed": d.seed,
    }


def asked(question: Question) -> tuple[str, list[str]]:
    """The prompt and images of a run; a run that gives neither uses its model's default question."""
    if question.prompt is None and question.image is None and question.default_prompt is not None:
        return question.default_prompt, list_images(question.default_image)
    images = list_images(question.image)
    return DEFAULT_PROMPT[bool(images)] if question.prompt is None else question.prompt, images


def answer(engine: Engine, request: Request, results: Results) -> Result:
    """Serve one request and stream its text to stdout."""

    found: list[Result] = []

    def show(delta: Delta) -> None:
        print(delta.text, end="", flush=True)
        if delta.result:
            results.add(0, delta.result)
            found.append(delta.result)

    engine.submit(request)
    engine.run(show)
    print(flush=True)
    return found[0]


def _shown(field: str) -> str:
    return field[:40] if field.isprintable() else repr(field[:40])


def _finish(run: ResolvedRun, engine: Engine, results: Results, single: Result | None, progress: Progress) -> None:
    """Print the metrics and write result.json; write it again once graphs that are still compiling are stored."""
    results.close()
    metrics = engine.metrics(results.totals)

    def write() -> None:
        write_result(
            run.output_dir,
            run.asked,
            metrics=metrics | {"memory_bytes": run.memory.total},
            graphs=engine.graph_records(),
            text=single.text if single else None,
            token_ids=single.token_ids if single else None,
        )

    write()
    if results.totals.requests:
        print("\n" + table(_figures(metrics)), flush=True)
    engine.close(progress)
    write()
    progress.say(f"\n{run.output_dir / 'result.json'}")


def _figures(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    def unit(name: str, unit: str = "", scale: float = 1.0) -> str:
        value = metrics[name]
        return "-" if value is None else f"{value * scale:.2f} {unit}".rstrip()

    return [
        ("prompt tokens", str(metrics["prompt_tokens"])),
        ("image tokens", str(metrics["image_tokens"])),
        ("new tokens", str(metrics["new_tokens"])),
        ("time to first token", unit("time_to_first_token_ms", "ms")),
        ("time per token", unit("time_per_output_token_ms", "ms")),
        ("tokens/s", unit("tokens_per_second")),
        ("bytes read per step", unit("bytes_per_step", "MB (modelled)", 1e-6)),
        ("GB/s", unit("gb_per_second")),
    ]
