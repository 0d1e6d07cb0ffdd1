"""task=evaluate: exact match against reference answers, by kind of question, through the engine as it serves.

Any requests file will do whose lines have an `answer`: a string, or a list of accepted ones; `kind` groups them. Without
one the tiny model is asked about held-out scenes, which are written to the run's folder as such a file.
"""

import json
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Optional

from mllama_graph.model.checkpoint import model_of
from mllama_graph.core.config import Run, UserError
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.offline import Line, Results, most_images, read_lines, serve_lines
from mllama_graph.plan.resolve import plan_of
from mllama_graph.inputs.processor import Request
from mllama_graph.core.report import Progress, columns, write_result
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.tasks.generate import finish_compiling, metrics_of

ALL = "all"


def main(run: Run) -> None:
    """Score every line that has an answer; writes predictions.jsonl, results.jsonl and result.json.

    Raises UserError where no line has one.
    """
    shape, checkpoint = model_of(run)
    folder, progress = Path(run.output_dir), Progress()
    path = Path(run.requests) if run.requests else held_out_file(run, folder, progress)
    lines = list(read_lines(path))
    if not any(isinstance(given, dict) and "answer" in given for _, given in lines):
        raise UserError(f"requests={path} has no line with an answer: a string, or a list of accepted ones.")
    processor = processor_of(run, shape, checkpoint)
    engine = start_engine(run, plan_of(run, shape, most_images(lines)), shape, checkpoint, processor, progress)
    scores = {"right %": score(engine, lines, path.parent, folder, run.batch, None, progress)}
    metrics = metrics_of(engine, [])
    if run.task.controls:
        for control in ("images exchanged", "images unseen"):
            scores[control] = score(engine, lines, path.parent, folder, run.batch, control, progress)
    print(columns(("kind", "scenes", *scores), _rows(scores)))
    finish_compiling(engine.ranks, progress)
    write_result(folder, asdict(run), graphs=[asdict(record) for record in engine.ranks.graphs.records],
                 metrics=metrics | {"exact_match": {name: _percentages(by_kind) for name, by_kind in scores.items()}})


def held_out_file(run: Run, folder: Path, progress: Progress) -> Path:
    """Scenes that training never saw, drawn anew, as a requests file."""
    if run.model.name != "tiny":
        raise UserError(f"task=evaluate with model={run.model.name} needs requests=FILE.jsonl with an answer a line; "
                        "held-out scenes are for model=tiny.")
    from mllama_graph.tiny.heldout import write_requests

    progress.say(f"drawing {run.task.each} held-out scenes a kind")
    return write_requests(folder / "scenes", run.task.each)


# Whether each line of a kind was right.
ByKind = dict[str, list[bool]]


def score(engine: Engine, lines: list[Line], base: Path, folder: Path, batch: int, control: Optional[str],
          progress: Progress) -> ByKind:
    """Serve every line, as it is or under a control, and compare."""
    name = "" if control is None else "-" + control.replace(" ", "-")
    asked = exchanged(lines) if control == "images exchanged" else lines
    results = Results(folder / f"results{name}.jsonl", len(asked))
    serve_lines(engine, asked, base, results, batch, unseen if control == "images unseen" else lambda request: request)
    results.close()
    by_kind: ByKind = defaultdict(list)
    with (folder / f"predictions{name}.jsonl").open("w", encoding="utf8") as file:
        for place, (number, given) in enumerate(lines):
            if not isinstance(given, dict) or "answer" not in given:
                continue
            result = results.by_place.get(place)
            accepted = given["answer"] if isinstance(given["answer"], list) else [given["answer"]]
            right = result is not None and result.text.strip() in [str(answer).strip() for answer in accepted]
            by_kind[str(given.get("kind", "-"))].append(right)
            by_kind[ALL].append(right)
            file.write(json.dumps({"id": given.get("id", number), "kind": given.get("kind"), "answer": accepted,
                                   "prediction": result.text if result else None, "right": right},
                                  ensure_ascii=False) + "\n")
    progress.say(f"{control or 'as asked'}: {sum(by_kind[ALL])} of {len(by_kind[ALL])} right, "
                 f"{results.errors} could not be asked")
    return by_kind


def exchanged(lines: list[Line]) -> list[Line]:
    """Each line with the images of the next one that has as many: a model that looks at them must fail."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, (_, given) in enumerate(lines):
        images = given.get("images") if isinstance(given, dict) else None
        if isinstance(images, list) and images:
            groups[len(images)].append(place)
    changed: list[Line] = list(lines)
    for places in groups.values():
        # Half a group on, so that neighbours of one kind don't just swap like for like.
        shift = max(1, len(places) // 2)
        for at, place in enumerate(places):
            other: Any = lines[places[(at + shift) % len(places)]][1]
            changed[place] = (lines[place][0], {**lines[place][1], "images": other["images"]})
    return changed


def unseen(request: Request) -> Request:
    """The same ids, image tokens included, with nothing to attend to."""
    return replace(request, images=(), positions=())


def _percentages(by_kind: ByKind) -> dict[str, float]:
    return {kind: round(100 * sum(right) / len(right), 2) for kind, right in by_kind.items()}


def _rows(scores: dict[str, ByKind]) -> list[tuple[str, ...]]:
    first = next(iter(scores.values()))
    kinds = [kind for kind in first if kind != ALL] + [ALL]
    return [(kind, str(len(first[kind])), *(f"{100 * sum(by[kind]) / len(by[kind]):.1f}" for by in scores.values()))
            for kind in kinds]
