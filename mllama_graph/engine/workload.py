"""Synthetic requests of given sizes, served together and timed, for task=bench and task=profile."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllama_graph.core.errors import UserError
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.results import Delta
from mllama_graph.engine.sequence import Sequence
from mllama_graph.inputs.images import TiledImage, tile_image
from mllama_graph.inputs.request import Request
from mllama_graph.measure.timing import Case, Timing


def cases_of(options: Any) -> list[Case]:
    """Every case of a task's options (tasks/options.py, WorkloadOptions)."""
    return [
        Case(batch, length, options.images, options.new_tokens, int(options.cached * length))
        for batch in options.batch_sizes
        for length in options.lengths
    ]


def requests_of(engine: Engine, case: Case, seed: int, pictures: int) -> tuple[list[Request], float]:
    """Random requests, and the seconds spent preparing their images. Equal seeds `pictures` give equal images."""
    shape, random = engine.executor.run.shape, np.random.default_rng(seed)
    side = shape.vision.tile * int(shape.vision.max_tiles**0.5)
    painter, spent = np.random.default_rng(pictures), 0.0
    requests = []
    for number in range(case.batch):
        images: list[TiledImage] = []
        for _ in range(case.images):
            picture = Image.fromarray(painter.integers(0, 256, (side, side, 3), dtype=np.uint8))
            start = time.perf_counter()
            images.append(tile_image(picture, shape.vision))
            spent += time.perf_counter() - start
        text = random.integers(0, shape.text.vocab, case.length - len(images)).tolist()
        ids = (*[shape.image_token] * len(images), *text)
        # `serve` aborts requests before they end: they decode while others are still prefilled.
        most = engine.executor.run.limits.max_new
        requests.append(Request(number, ids, tuple(images), tuple(range(len(images))), most, ignore_eos=True))
    if case.cached:
        for request in requests:
            place_pages(engine, request, case.cached)
    return requests, spent


def fill_pages(engine: Engine) -> None:
    """Fill all pages with random K/V: memory that was never written would be read from the cache."""
    for layer in engine.executor.rank.pages:
        for part in layer:
            first = (
                torch.randn(part[:1].shape) if part.is_floating_point() else torch.randint(-127, 128, part[:1].shape)
            )
            part.copy_(first.abs() / 127 if len(layer) == 4 and part.dim() == 3 else first)


def place_pages(engine: Engine, request: Request, tokens: int) -> None:
    """Have the prefix cache find the first full pages of a request that hold at most `tokens` tokens, as they are."""
    scheduler = engine.scheduler
    size = scheduler.plan.page_size
    sequence = Sequence(-1, request.ids, request.images, request.positions, 1, request.sampling)
    digests = sequence.digests_of(min(tokens, len(request.ids) - 1) // size, size)
    pages = scheduler.pool.allocate(len(digests))
    for page, digest in zip(pages, digests, strict=True):
        scheduler.pool.keep(page, digest)
    scheduler.pool.release(pages)


def serve(
    engine: Engine, requests: list[Request], new: int, timing: Timing, before_decode: Callable[[], None] = lambda: None
) -> None:
    """Serve requests together until all have a first token, then run `new` - 1 decode steps of the whole batch.

    The time to the first token is that of the last request to get one.
    """
    start, stats, rank = time.perf_counter(), engine.stats, engine.executor.rank
    vision, prefill, sample = stats.vision_seconds, stats.prefill_seconds, rank.host.sample
    numbers, without = [engine.submit(request) for request in requests], {request.id for request in requests}
    while without:
        without -= {delta.id for delta in _step(engine)}
    timing.first.append(time.perf_counter() - start)
    timing.vision.append(stats.vision_seconds - vision)
    timing.prefill.append(stats.prefill_seconds - prefill)
    timing.sample.append(rank.host.sample - sample)
    before_decode()
    steps = []
    for _ in range(new - 1):
        start = time.perf_counter()
        _step(engine)
        steps.append(time.perf_counter() - start)
    timing.steps += steps
    timing.whole.append(timing.first[-1] + sum(steps))
    for number in numbers:
        engine.abort(number)
    while not engine.idle:
        engine.step()


def _step(engine: Engine) -> list[Delta]:
    """Run one step. Raises UserError where a request failed, since the others alone would be timed from then on."""
    deltas = engine.step()
    for delta in deltas:
        if delta.result and delta.result.error:
            raise UserError(delta.result.error)
    return deltas
