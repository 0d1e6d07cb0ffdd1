"""task=evaluate: exact match against reference answers, per kind of question, and agreement with another model.

It accepts any requests file whose lines have an `answer`: a string, or a list of accepted strings. `kind` groups the
lines. Without a file, the tiny model is asked about held-out scenes, which are written to the run's folder as a file.

The other model is what `task.against` names: the same weights without quantisation, or another checkpoint. It answers
every line; the run's model is then given its tokens, and log-probabilities are compared at each of them.
"""

import contextlib
import gc
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress, columns, write_result
from mllama_graph.engine import forced
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.offline import serve_lines
from mllama_graph.engine.result_file import Results
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.engine.stats import Totals
from mllama_graph.inputs.request import Request
from mllama_graph.inputs.request_file import Line, parsed, read_lines
from mllama_graph.model.meta_files import open_checkpoint
from mllama_graph.model.shape import differences
from mllama_graph.plan.checkpoint import checkpoint_folder
from mllama_graph.plan.resolve import ResolvedRun, on_other_weights
from mllama_graph.tasks.options import NOTHING, UNQUANTISED, EvaluateOptions

ALL = "all"
# For each kind of question, whether each line was answered correctly.
ByKind = dict[str, list[bool]]


def main(run: ResolvedRun) -> None:
    """Score every line that has an answer, and write predictions.jsonl, results.jsonl and result.json.

    Raises UserError where no line has an answer, or the model of task.against has other shapes.
    """
    options, folder, progress = run.options, run.output_dir, Progress()
    assert isinstance(options, EvaluateOptions)
    path = run.question.requests or held_out_file(run, options.each, progress)
    lines = list(map(parsed, read_lines(path)))
    if not any(isinstance(given, dict) and "answer" in given for _, given in lines):
        raise UserError(f"requests={path} has no line with an answer: a string, or a list of accepted ones.")
    with contextlib.ExitStack() as stack:
        reference = None
        if other := compared_with(run, options, progress):
            aside = stack.enter_context(tempfile.TemporaryDirectory(prefix=".against-", dir=folder))
            progress.say(f"serving the model to compare with: {options.against}")
            reference = reference_of(other, lines, path.parent, Path(aside))
        engine = start_engine(run, processor_of(run), progress)
        agreement = {}
        if reference:
            agreement = forced.compare(engine, lines, path.parent, reference).metrics()

    def scored(
        control: str, asked: list[Line], alter: Callable[[Request], Request] = lambda request: request
    ) -> ByKind:
        return score(engine, lines, asked, path, folder, control, alter, progress)

    scores = {"right %": scored("", lines)}
    metrics = engine.metrics(Totals())
    if options.controls:
        scores["images exchanged"] = scored("images exchanged", exchanged(lines))
        scores["images unseen"] = scored("images unseen", lines, unseen)
    print(columns(("kind", "scenes", *scores), _rows(scores)))
    if agreement:
        print(
            f"\nagainst {options.against}: KL divergence {agreement['kl_mean']:.3g} nats per token "
            f"(99th percentile {agreement['kl_99th']:.3g}), top-1 agreement "
            f"{agreement['top1_agreement_percent']:.2f} % of {agreement['positions']} tokens"
        )
    engine.close(progress)
    write_result(
        folder,
        run.asked,
        graphs=engine.graph_records(),
        metrics=metrics
        | agreement
        | {"exact_match_percent": _percentages(scores["right %"])[ALL]}
        | {"exact_match": {name: _percentages(by_kind) for name, by_kind in scores.items()}},
    )


def compared_with(run: ResolvedRun, options: EvaluateOptions, progress: Progress) -> ResolvedRun | None:
    """The run of the model to compare log-probabilities with, or None.

    Raises UserError where task.against names a checkpoint that has other shapes or can't be read.
    """
    quantised = run.storage.formats or run.precision.kv != run.precision.compute
    if options.against == NOTHING or (options.against == UNQUANTISED and not quantised):
        return None
    if run.tp > 1:
        progress.say("log-probabilities are compared at tp=1 only, since ranks can load one model")
        return None
    if options.against == UNQUANTISED:
        return on_other_weights(run, run.checkpoint)
    checkpoint = open_checkpoint(checkpoint_folder(options.against, "task.against"))
    if differing := differences(run.shape, checkpoint.shape):
        raise UserError(f"task.against={options.against} has other shapes: {'; '.join(differing[:4])}.")
    checkpoint.verify()
    return on_other_weights(run, checkpoint)


def reference_of(run: ResolvedRun, lines: list[Line], base: Path, folder: Path) -> forced.Reference:
    """The tokens and log-probabilities of a model that is unloaded afterwards."""
    engine = start_engine(run, processor_of(run), Progress())
    reference = forced.record(engine, lines, base, folder)
    engine.close()
    # Its weights must be gone before the next model's are loaded.
    del engine
    gc.collect()
    return reference


def held_out_file(run: ResolvedRun, each: int, progress: Progress) -> Path:
    """Write a requests file about scenes that are not in the training data."""
    if run.model != "tiny":
        raise UserError(
            f"task=evaluate with model={run.model} needs requests=FILE.jsonl with an answer on each line; "
            "held-out scenes are for model=tiny."
        )
    from mllama_graph.tiny.heldout import write_requests

    progress.say(f"drawing {each} held-out scenes per kind of question")
    return write_requests(run.output_dir / "scenes", each)


def score(
    engine: Engine,
    lines: list[Line],
    asked: list[Line],
    path: Path,
    folder: Path,
    control: str,
    alter: Callable[[Request], Request],
    progress: Progress,
) -> ByKind:
    """Serve `asked` (`lines`, possibly changed by a control) and compare the results with the answers in `lines`."""
    name = f"-{control.replace(' ', '-')}" if control else ""
    results = Results(folder / f"results{name}.jsonl").open(progress.say)
    count = serve_lines(engine, asked, path.parent, results, engine.executor.run.limits.batch, alter)
    results.close()
    results.check_served(path, count)
    by_kind: ByKind = defaultdict(list)
    with (
        results.path.open(encoding="utf8") as served,
        (folder / f"predictions{name}.jsonl").open("w", encoding="utf8") as file,
    ):
        for (number, given), line in zip(lines, served, strict=True):
            if not isinstance(given, dict) or "answer" not in given:
                continue
            result = json.loads(line)
            prediction = None if "error" in result else result["text"]
            accepted = given["answer"] if isinstance(given["answer"], list) else [given["answer"]]
            right = prediction is not None and prediction.strip() in [str(answer).strip() for answer in accepted]
            by_kind[str(given.get("kind", "-"))].append(right)
            by_kind[ALL].append(right)
            file.write(
                json.dumps(
                    {
                        "id": given.get("id", number),
                        "kind": given.get("kind"),
                        "answer": accepted,
                        "prediction": prediction,
                        "right": right,
                    },
                    ensure_ascii=False,
                )
                + "\n"
            )
    progress.say(
        f"{control or 'as asked'}: {sum(by_kind[ALL])} of {len(by_kind[ALL])} right, "
        f"{results.errors} could not be asked"
    )
    return by_kind


def exchanged(lines: list[Line]) -> list[Line]:
    """Each line with the images of another line that has as many images: a model that uses its images must fail."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, (_, given) in enumerate(lines):
        images = given.get("images") if isinstance(given, dict) else None
        if isinstance(images, list) and images:
            groups[len(images)].append(place)
    changed: list[Line] = list(lines)
    for places in groups.values():
        # Shifted by half the group, since neighbouring lines may be of the same kind.
        shift = max(1, len(places) // 2)
        for at, place in enumerate(places):
            number, given = lines[place]
            other: Any = lines[places[(at + shift) % len(places)]][1]
            assert isinstance(given, dict)
            changed[place] = (number, {**given, "images": other["images"]})
    return changed


def unseen(request: Request) -> Request:
    """The same ids, image tokens included, without images to attend to."""
    return replace(request, images=(), positions=())


def _percentages(by_kind: ByKind) -> dict[str, float]:
    return {kind: round(100 * sum(right) / len(right), 2) for kind, right in by_kind.items()}


def _rows(scores: dict[str, ByKind]) -> list[tuple[str, ...]]:
    first = next(iter(scores.values()))
    kinds = [kind for kind in first if kind != ALL] + [ALL]
    return [
        (kind, str(len(first[kind])), *(f"{100 * sum(by[kind]) / len(by[kind]):.1f}" for by in scores.values()))
        for kind in kinds
    ]
