"""Times decoding beside a long prompt: `python tests/mixed_steps_speed.py --model mid --length 32768`.

For each number of earlier tokens of the prompt, some sequences decode alone and then beside it. The earlier tokens are
not computed: the prefix cache finds them in pages of random numbers. Times are those between two tokens of a sequence.
"""

import argparse
import statistics
import time
from dataclasses import replace

from engines import resolved, start_run
from speculation_speed import CONF

from mllama_graph.core.config import BackendChoice, ModelChoice, PlanChoice, Run
from mllama_graph.engine.workload import fill_pages, requests_of
from mllama_graph.measure.timing import Case


def told(gaps: list[float], alone: float) -> str:
    """Mean, median and 99th percentile in ms, and as multiples of a time."""
    gaps = sorted(gaps)
    found = statistics.mean(gaps), statistics.median(gaps), gaps[int(0.99 * (len(gaps) - 1) + 0.5)]
    return " | ".join(f"{one * 1e3:.2f} ms ({one / alone:.2f}x)" for one in found)


def main() -> None:
    """Print, for each number of earlier tokens, the times between tokens and the tokens of the prompt per second."""
    import yaml

    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("decoding", 3), ("length", 32768), ("new", 2000), ("seconds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="mid")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--kv", default="auto")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--earlier", type=int, nargs="*", default=[0, 2048, 8192, 16384, 32000])
    parser.add_argument("--graph-cache")
    given = parser.parse_args()
    config = yaml.safe_load((CONF / f"{given.model}.yaml").read_text())["config"] if given.weights == "random" else None
    pages = (given.length + given.decoding * (given.new + 64)) // 128 + 2 * given.decoding + 2
    run = Run(
        model=ModelChoice(given.model, config) if config else ModelChoice(given.model),
        weights=given.weights,
        backend=BackendChoice(given.backend, "native"),
        plan=PlanChoice(compile="wait", num_pages=pages, page_size=128),
        batch=given.decoding + 1,
        max_input_length=given.length,
        max_output_length=given.new,
        extend_context=True,
        max_images=1,
        kv=given.kv,
        graph_cache=given.graph_cache,
        output_dir=".",
    )
    engine = start_run(resolved(run))
    fill_pages(engine)
    short, _ = requests_of(engine, Case(given.decoding, 64, 0, given.new), 1, 1)
    numbers = [engine.submit(replace(request, max_new=given.new)) for request in short]
    waiting = {request.id for request in short}
    while waiting:
        waiting -= {delta.id for delta in engine.step()}

    def timed(seconds: float) -> list[float]:
        """Times between tokens of the decoding sequences, over as many seconds."""
        gaps, end = [], time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            engine.step()
            gaps.append(time.perf_counter() - start)
        return gaps

    timed(2)
    print("earlier tokens | alone: mean | median | 99th percentile | beside: mean | median | 99th percentile | prompt")
    for earlier in given.earlier:
        before = timed(given.seconds / 5)
        (prompt,), _ = requests_of(engine, Case(1, given.length, 0, given.new, earlier), earlier, 1)
        number = engine.submit(prompt)
        sequence = engine._running[number].sequence
        # Until the pace has settled.
        timed(given.seconds / 10)
        computed, begun = sequence.computed, time.perf_counter()
        beside = timed(given.seconds)
        rate = (sequence.computed - computed) / (time.perf_counter() - begun)
        engine.abort(number)
        alone = statistics.median(before)
        print(f"{earlier} | {told(before, alone)} | {told(beside, alone)} | {rate:.1f} tokens/s", flush=True)
        assert len(engine._running) == len(numbers), "--new is too small for so many seconds"


if __name__ == "__main__":
    main()
