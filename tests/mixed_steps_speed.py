"""Times decoding beside a long prompt: `python tests/mixed_steps_speed.py --model mid --length 32768`.

For each number of earlier tokens of the prompt, some sequences decode alone and then beside it. The earlier tokens are
not computed: the prefix cache finds them in pages of random numbers. Times are those between two tokens of a sequence.

With --whole, the whole prompt and --new tokens of each decoding sequence are computed, with the chunks that measured
times allow and with chunks of the largest bucket, which stop the others, in turns.
"""

import argparse
import statistics
import time
from dataclasses import replace

from engines import resolved, start_run
from speculation_speed import CONF

from mllama_graph.core.config import BackendChoice, ModelChoice, PlanChoice, Run
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.workload import fill_pages, requests_of
from mllama_graph.measure.timing import Case


def figures(gaps: list[float]) -> tuple[float, float, float]:
    """Mean, median and 99th percentile."""
    gaps = sorted(gaps)
    return statistics.mean(gaps), statistics.median(gaps), gaps[int(0.99 * (len(gaps) - 1) + 0.5)]


def told(gaps: list[float], alone: list[float]) -> str:
    """Mean, median and 99th percentile in ms, and as multiples of the same figures without the prompt."""
    pairs = zip(figures(gaps), figures(alone), strict=True)
    return " | ".join(f"{one * 1e3:.2f} ms ({one / other:.2f}x)" for one, other in pairs)


def whole(engine: Engine, decoding: int, length: int, new: int, seed: int) -> str:
    """Seconds until a prompt and the tokens of sequences that decode beside it are computed, and until the prompt is.

    Also the mean time and the longest between two tokens of the sequences until then.
    """
    short, _ = requests_of(engine, Case(decoding, 64, 0, new), seed, 1)
    (prompt,), _ = requests_of(engine, Case(1, length, 0, 1), seed + 1, 1)
    for request in short:
        engine.submit(replace(request, max_new=new))
    waiting = {request.id for request in short}
    while waiting:
        waiting -= {delta.id for delta in engine.step()}
    engine.submit(replace(prompt, id=decoding, max_new=1))
    start = now = time.perf_counter()
    first, gaps = 0.0, []
    while not engine.idle:
        others, begun = len(engine._running) > 1, now
        deltas = engine.step()
        now = time.perf_counter()
        if others and not first:
            gaps.append(now - begun)
        if any(delta.id == decoding for delta in deltas):
            first = now - start
    mean, _, _ = figures(gaps)
    return f"{now - start:.2f} s | {first:.2f} s | {mean * 1e3:.1f} ms | {max(gaps) * 1e3:.0f} ms"


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
    parser.add_argument("--whole", type=int, default=0, metavar="ROUNDS")
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
        prefix_cache=not given.whole,
    )
    if given.whole:
        largest = resolved(run).plan.prefill_tokens[-1]
        fixed = replace(run, max_step_tokens=largest + given.decoding)
        engines = {"measured times": start_run(resolved(run)), f"{largest} tokens": start_run(resolved(fixed))}
        print("chunks | all done after | the prompt after | mean time between tokens beside it | longest")
        for turn in range(given.whole):
            for name, one in engines.items():
                found = whole(one, given.decoding, given.length, given.new, 2 * turn)
                print(f"{name} | {found}", flush=True)
        return
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
        alone = " | ".join(f"{one * 1e3:.2f} ms" for one in figures(before))
        print(f"{earlier} | {alone} | {told(beside, before)} | {rate:.1f} tokens/s", flush=True)
        assert len(engine._running) == len(numbers), "--new is too small for so many seconds"


if __name__ == "__main__":
    main()
