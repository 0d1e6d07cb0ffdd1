"""Warms an engine up, so that no stream waits for a compiler: before /health says 200."""

import logging

import numpy as np

from mllama_graph.engine.engine import Engine
from mllama_graph.graphs.dispatch import Graphs
from mllama_graph.inputs.images import TiledImage
from mllama_graph.inputs.request import Request, Sampling
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.buckets import Plan

log = logging.getLogger(__name__)


def first_buckets(plan: Plan, batch: int) -> list[Bucket]:
    """What a plan serves first: an image, a short prompt and a full batch, with an image and without."""
    tiles = plan.pages_per_image * plan.page_size // plan.tokens_per_tile
    alone = [bucket for images in ([], [1], [tiles]) for bucket in plan.alone(len(images) + 1, 2, images)]
    full = [plan.decode(batch, plan.pages[-1], pages) for pages in (0, plan.pages_per_image)]
    return list(dict.fromkeys(alone + full))


def warm_up(engine: Engine, batch: int) -> None:
    """Have what the plan serves first compiled, load every stored graph, and serve a request with an image.

    Graphs that ranks compile themselves are all compiled here. Where steps wait for missing graphs
    (plan.compile=wait), every graph of the plan is compiled here, too.
    """
    graphs, plan = engine.executor.graphs, engine.scheduler.plan
    if graphs.compiled_by_ranks:
        for bucket in plan.buckets():
            graphs.load_exactly(bucket)
    elif graphs.spec.compiles:
        for bucket in plan.buckets() if graphs.mode == "wait" else first_buckets(plan, batch):
            graphs.prefetch(bucket)
        graphs.drain(lambda done, total: None)
        graphs.load_stored()
    _serve_once(engine, graphs)
    engine.processor.grammars.warm()
    engine.reset_stats()


def _serve_once(engine: Engine, graphs: Graphs) -> None:
    """Serve a request with an image and one without, whose pages and allocations are then in place."""
    vision, token = engine.processor.shape.vision, engine.processor.shape.image_token
    tiles = np.zeros((1, 3, vision.tile, vision.tile), dtype=np.uint8)
    image = TiledImage(tiles, 1, "warm-up")
    for request in (
        Request("warm-up", (0,), (), (), 2, Sampling(), ignore_eos=True),
        Request("warm-up", (token, 0), (image,), (0,), 2, Sampling(), ignore_eos=True),
    ):
        engine.submit(request)
        while not engine.idle:
            engine.step()
    log.info("warm: %d graphs", len(graphs.records))
