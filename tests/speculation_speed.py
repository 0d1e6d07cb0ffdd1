"""Times decoding with proposals of which a given share is right: `python tests/speculation_speed.py --model mid`.

Random weights accept nothing that could be guessed, so the tokens of a run without proposals are proposed again. Every
round serves the same requests without proposals and with each share, in turn, and checks that the tokens are the same.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

from engines import resolved, start_run
from proposals import Replay

from mllama_graph.core.config import BackendChoice, ModelChoice, PlanChoice, Run
from mllama_graph.engine.results import Result
from mllama_graph.engine.speculation import no_proposals
from mllama_graph.engine.workload import requests_of
from mllama_graph.measure.timing import Case

CONF = Path(__file__).parents[1] / "conf" / "model"


def main() -> None:
    """Print the time per token and the speed-up of each share, medians over rounds."""
    import yaml

    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("batch", 1), ("length", 64), ("images", 1), ("new", 64), ("tokens", 4), ("seconds", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="mid")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.8, 0.5, 0.0])
    parser.add_argument("--graph-cache")
    given = parser.parse_args()
    described = yaml.safe_load((CONF / f"{given.model}.yaml").read_text())
    run = Run(
        model=ModelChoice(given.model, described["config"]),
        weights="random",
        backend=BackendChoice(given.backend, "native"),
        plan=PlanChoice(compile="wait"),
        batch=given.batch,
        max_input_length=given.length,
        max_output_length=given.new,
        max_images=max(1, given.images),
        max_step_tokens=2048 + given.batch,
        speculate="ngram",
        speculate_tokens=given.tokens,
        graph_cache=given.graph_cache,
        output_dir=".",
    )
    engine = start_run(resolved(run))
    assert engine.speculation
    requests, _ = requests_of(engine, Case(given.batch, given.length, given.images, given.new), 1, 1)
    requests = [replace(request, max_new=given.new) for request in requests]

    def timed(share: float | None, turn: int = 0) -> tuple[float, int, list[Result]]:
        """Seconds per token of a request, decode steps, and the results."""
        engine.scheduler.propose = no_proposals if share is None else engine._propose
        if share is not None:
            engine.speculation.proposer = Replay(results, share, turn)
        engine._next, left, found = 0, set(range(given.batch)), {}
        for request in requests:
            engine.submit(request)
        while left:
            left -= {delta.id for delta in engine.step()}
        steps, start = engine.stats.decode_steps, time.perf_counter()
        tokens = sum(len(state.sequence.generated) for state in engine._running.values())
        while not engine.idle:
            found |= {delta.id: delta.result for delta in engine.step() if delta.result}
        seconds = time.perf_counter() - start
        each = seconds * given.batch / (given.batch * given.new - tokens)
        return each, engine.stats.decode_steps - steps, [found[n] for n in sorted(found)]

    results: list[Result] = []
    _, _, results = timed(None)
    times: dict[float | None, list[float]] = {share: [] for share in (None, *given.shares)}
    counts: dict[float | None, list[int]] = {share: [] for share in times}
    for share in given.shares:
        timed(share)
    end = time.perf_counter() + given.seconds
    while time.perf_counter() < end or not times[None]:
        for share, seconds in times.items():
            each, count, again = timed(share, len(seconds))
            seconds.append(each)
            counts[share].append(count)
            assert [one.token_ids for one in again] == [one.token_ids for one in results]
    plain = statistics.median(times[None])
    for share, seconds in times.items():
        each = statistics.median(seconds)
        print(
            f"share right {'-' if share is None else share}: {each * 1e3:.2f} ms per token, {plain / each:.2f} x, "
            f"{statistics.median(counts[share]):g} steps for {given.new - 1} tokens, {len(seconds)} rounds"
        )


if __name__ == "__main__":
    main()
