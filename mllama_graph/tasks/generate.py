"""task=generate: a chat on the command line, or a file of requests, to text."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

from mllama_graph.buckets import Plan, make_plan
from mllama_graph.checkpoint import Checkpoint, Pixels
from mllama_graph.config import Run, UserError
from mllama_graph.engine import Delta, Engine, Result
from mllama_graph.images import list_images
from mllama_graph.processor import CLIP_MEAN, CLIP_STD, Defaults, Processor, Request
from mllama_graph.rank import Rank
from mllama_graph.report import Progress, table, write_result
from mllama_graph.scheduler import Sampling, Scheduler
from mllama_graph.shape import ModelShape, differences, shape_of

log = logging.getLogger(__name__)

# Images of one request that a plan holds unless max_images says otherwise.
DEFAULT_MAX_IMAGES = 4
DEFAULT_PROMPT = {True: "Describe this image.", False: "What can you do?"}


def model_of(run: Run) -> tuple[ModelShape, Optional[Checkpoint]]:
    """The model's shape, and its checkpoint unless the weights are random.

    Raises UserError where weights= and model= don't fit each other.
    """
    expected = shape_of({"model_type": "mllama", **run.model.config}) if run.model.config else None
    if run.weights is None:
        raise UserError("weights= is not given. Use weights=/path/to/checkpoint, or model=11b weights=random.")
    if run.weights == "meta":
        raise UserError("weights=meta has shapes but no values, so nothing can be generated. Use weights=random.")
    if run.weights == "random":
        if expected is None:
            raise UserError("model=custom takes its shapes from a checkpoint, which weights=random lacks. "
                            "Use model=11b or model=90b.")
        return expected, None
    checkpoint = Checkpoint(Path(run.weights).expanduser())
    if expected and (differing := differences(expected, checkpoint.shape)):
        raise UserError(f"{run.weights} is not model={run.model.name}: {'; '.join(differing[:4])}"
                        f"{' ...' if len(differing) > 4 else ''}. Use model=custom.")
    return checkpoint.shape, checkpoint


def processor_of(run: Run, shape: ModelShape, checkpoint: Optional[Checkpoint]) -> Processor:
    """The processor with the run's defaults."""
    sampling = Sampling(run.temperature, run.top_p, run.top_k, run.seed)
    return Processor(checkpoint.folder if checkpoint else None, shape,
                     Defaults(run.max_output_length, run.max_input_length, sampling))


def pixels_of(processor: Processor) -> Pixels:
    """The normalisation that the checkpoint's image processor states."""
    config = processor.image_config
    if config.get("do_normalize") is False:
        return Pixels(float(config.get("rescale_factor", 1 / 255)), (0.0,) * 3, (1.0,) * 3)
    return Pixels(float(config.get("rescale_factor", 1 / 255)), tuple(config.get("image_mean", CLIP_MEAN)),
                  tuple(config.get("image_std", CLIP_STD)))


def start_engine(run: Run, plan: Plan, shape: ModelShape, checkpoint: Optional[Checkpoint], processor: Processor,
                 progress: Progress) -> Engine:
    """Weights in memory, pages allocated, graphs found on first use."""
    progress.say(f"plan: {plan.describe()}")
    rank = Rank(run, shape, plan, pixels_of(processor), checkpoint, progress.working, progress.weights)
    log.info("memory: %s", rank.memory.describe())
    return Engine(processor, Scheduler(plan, run.batch), rank)


def main(run: Run) -> None:
    """Generate for `requests=` or for `prompt=` and `image=`; writes results.jsonl and result.json."""
    shape, checkpoint = model_of(run)
    processor = processor_of(run, shape, checkpoint)
    progress, folder = Progress(), Path(run.output_dir)
    if run.requests is None:
        images = list_images(run.image)
        max_images = run.max_images or max(DEFAULT_MAX_IMAGES, len(images))
        plan = make_plan(run, shape, max_images)
        prompt = DEFAULT_PROMPT[bool(images)] if run.prompt is None else run.prompt
        request = processor.chat(0, prompt, images, run.system)
        Scheduler(plan, run.batch).check(len(request.ids), request.max_new, len(request.images))
        engine = start_engine(run, plan, shape, checkpoint, processor, progress)
        results = Results(folder / "results.jsonl", 1)
        result = answer(engine, request, results)
        _finish(run, folder, engine, results, [result], single=result)
        return
    lines = list(read_lines(Path(run.requests)))
    max_images = run.max_images or max(DEFAULT_MAX_IMAGES, most_images(lines))
    engine = start_engine(run, make_plan(run, shape, max_images), shape, checkpoint, processor, progress)
    results = Results(folder / "results.jsonl", len(lines))
    serve_lines(engine, lines, Path(run.requests).parent, results, run.batch, progress)
    _finish(run, folder, engine, results, results.finished, single=None)


def answer(engine: Engine, request: Request, results: "Results") -> Result:
    """One request, its text streamed to the terminal."""

    def show(delta: Delta) -> None:
        print(delta.text, end="", flush=True)
        if delta.result:
            results.add(0, delta.result.line())
            results.finished.append(delta.result)

    engine.prepare(request)
    engine.rank.graphs.sealed = True
    engine.submit(request)
    engine.run(show)
    print(flush=True)
    return results.finished[0]


# One line of a requests file: its number from 1, and its object or what is wrong with it.
Line = tuple[int, dict[str, Any] | str]


def read_lines(path: Path) -> Iterator[Line]:
    """The requests of a JSON-lines file; blank lines are passed over.

    Raises UserError where the file can't be read.
    """
    try:
        content = path.expanduser().read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"requests={path} can't be read: {error}.") from error
    if not content.strip():
        raise UserError(f"requests={path} is empty. Put one JSON object on each line.")
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except ValueError as error:
            yield number, f"line {number} is not valid JSON: {error}."
            continue
        yield number, given if isinstance(given, dict) else f"line {number} is not a JSON object."


def most_images(lines: list[Line]) -> int:
    """A power of two that holds the images of every line, as far as they can be counted before they are read."""

    def count(given: dict[str, Any] | str) -> int:
        if isinstance(given, str):
            return 0
        images, messages = given.get("images"), given.get("messages")
        parts = [part for message in messages or () if isinstance(message, dict)
                 for part in (message.get("content") or ()) if isinstance(part, dict) and part.get("type") != "text"
                 ] if isinstance(messages, list) else []
        return (len(images) if isinstance(images, list) else 0) + len(parts)

    most = max((count(given) for _, given in lines), default=0)
    return 1 << max(most - 1, 0).bit_length()


class Results:
    """results.jsonl: a line as each request finishes, so that an interrupt loses none; in input order at the end."""

    def __init__(self, path: Path, expected: int):
        self.path, self.expected = path, expected
        self.finished: list[Result] = []
        self.errors = 0
        self._lines: dict[int, str] = {}
        self._file = path.open("w", encoding="utf8")

    def add(self, place: int, line: dict[str, Any]) -> None:
        """The result of the request at `place` of the input."""
        text = json.dumps(line, ensure_ascii=False)
        self._lines[place] = text
        self._file.write(text + "\n")
        self._file.flush()

    def fail(self, place: int, id: Any, error: str) -> None:
        """The error of the request at `place`."""
        self.errors += 1
        self.add(place, {"id": id, "token_ids": [], "text": "", "finish_reason": "error", "error": error})

    def close(self) -> None:
        """Put the lines in the order of the input."""
        self._file.close()
        aside = self.path.with_name(".results.jsonl")
        aside.write_text("".join(self._lines[place] + "\n" for place in sorted(self._lines)), encoding="utf8")
        aside.replace(self.path)


def serve_lines(engine: Engine, lines: list[Line], base: Path, results: Results, batch: int, progress: Progress) -> None:
    """Every line to its result or its error. Requests are prepared a batch ahead, so that images don't pile up."""
    places: dict[int, int] = {}
    seen: set[str] = set()
    coming = iter(enumerate(lines))

    def submit_next() -> bool:
        place, (number, given) = next(coming, (None, (None, None)))
        if place is None:
            return False
        id = given.get("id") if isinstance(given, dict) else None
        id = number if id is None else id
        try:
            if isinstance(given, str):
                raise UserError(given)
            name = json.dumps(id, sort_keys=True)
            if name in seen:
                raise UserError(f"id {name} is used by an earlier line; ids must differ.")
            seen.add(name)
            request = engine.processor.request({**given, "id": place}, base)
            engine.submit(request)
            places[place] = id
        except UserError as error:
            log.info("request %s: %s", id, error)
            results.fail(place, id, str(error))
        return True

    def keep(delta: Delta) -> None:
        if delta.result:
            place = delta.result.id
            delta.result.id = places.pop(place)
            results.finished.append(delta.result)
            results.add(place, delta.result.line())

    more = True
    while more or not engine.idle:
        while more and engine.load < 2 * batch:
            more = submit_next()
        for delta in engine.step():
            keep(delta)
    progress.say(f"{len(results.finished)} of {len(lines)} requests finished, {results.errors} refused"
                 + (f"; see {results.path}" if results.errors else ""))


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
        "time_to_first_token_ms": mean(first), "time_per_output_token_ms": mean(per_token),
        "tokens_per_second": round(stats.decode_rows / stats.decode_seconds, 3) if steps else None,
        "bytes_per_step": round(step_bytes) if steps else None,
        "gb_per_second": round(stats.decode_bytes / stats.decode_seconds / 1e9, 3) if steps else None,
        "vision_steps": stats.vision_steps, "prefill_steps": stats.prefill_steps, "decode_steps": steps,
        "vision_seconds": round(stats.vision_seconds, 4), "prefill_seconds": round(stats.prefill_seconds, 4),
        "decode_seconds": round(stats.decode_seconds, 4), "preemptions": engine.scheduler.preemptions,
    }


def _finish(run: Run, folder: Path, engine: Engine, results: Results, finished: list[Result],
            single: Optional[Result]) -> None:
    results.close()
    metrics = metrics_of(engine, finished)
    graphs = [asdict(record) for record in engine.rank.graphs.records]
    write_result(folder, asdict(run), metrics=metrics | {"memory_bytes": engine.rank.memory.total}, graphs=graphs,
                 text=single.text if single else None, token_ids=single.token_ids if single else None)
    if not finished:
        return
    shown = [("prompt tokens", metrics["prompt_tokens"]), ("image tokens", metrics["image_tokens"]),
             ("new tokens", metrics["new_tokens"]), ("time to first token", _unit(metrics["time_to_first_token_ms"], "ms")),
             ("time per token", _unit(metrics["time_per_output_token_ms"], "ms")),
             ("tokens/s", _unit(metrics["tokens_per_second"], "")),
             ("bytes read a step", _unit((metrics["bytes_per_step"] or 0) / 1e6 or None, "MB (modelled)")),
             ("GB/s", _unit(metrics["gb_per_second"], ""))]
    print("\n" + table([(name, str(value)) for name, value in shown]), flush=True)
    print(f"\n{folder / 'result.json'}", file=sys.stderr)


def _unit(value: Optional[float], unit: str) -> str:
    return "-" if value is None else f"{value:.2f} {unit}".rstrip()
