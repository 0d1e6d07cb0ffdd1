"""task=serve: OpenAI's API over HTTP, until SIGTERM."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TextIO

from mllama_graph.core.errors import PeerGone
from mllama_graph.core.report import Progress, write_result
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.plan.resolve import ResolvedRun
from mllama_graph.server.access import AccessLog
from mllama_graph.server.app import application
from mllama_graph.server.http import listening, serve
from mllama_graph.server.limits import Bounds
from mllama_graph.server.pictures import Pictures
from mllama_graph.server.service import Service
from mllama_graph.server.warm import warm_up
from mllama_graph.tasks.serve_options import ServeOptions

# Seconds between switches of Python's threads: the default of 5 ms would delay streams behind the step loop.
SWITCH_SECONDS = 0.0005
# Seconds in which the engine's current step may end.
STEP_SECONDS = 5.0
KEY = "MLLAMA_GRAPH_API_KEY"


def main(run: ResolvedRun) -> None:
    """Serve until a signal ends it. Raises UserError for an address that can't be used, or what ended the engine."""
    options = run.options
    assert isinstance(options, ServeOptions)
    sys.setswitchinterval(SWITCH_SECONDS)
    progress, bounds = Progress(), bounds_of(run, options)
    with ExitStack() as stack:
        opened = stack.enter_context(listening(options.host, options.port))
        processor = processor_of(run)
        engines: list[Engine] = []

        def build() -> Engine:
            engines.append(start_engine(run, processor, progress))
            warm_up(engines[0], run.limits.batch)
            return engines[0]

        names = names_of(run, options)
        below = Path(options.files_below).expanduser() if options.files_below else None
        pictures = Pictures(bounds, options.fetch_hosts, below)
        service = Service(run, processor, names, bounds, pictures, build, options.vllm_names)
        service.on_ready = partial(progress.say, "ready")
        access = AccessLog(stack.enter_context(access_log(run.output_dir, options)), options.log_prompts)
        key = options.api_key or os.environ.get(KEY) or None
        app = application(service, key, list(options.cors_origins), access)
        given = {"ssl_certfile": options.ssl_certfile, "ssl_keyfile": options.ssl_keyfile}
        tls = {name: path and Path(path).expanduser() for name, path in given.items() if options.ssl_certfile}
        host, port = opened.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host

        def begun() -> None:
            progress.say(f"serving {names[0]} at {'https' if tls else 'http'}://{shown}:{port}/v1")
            if host in ("127.0.0.1", "::1"):
                others = "those who have the key" if key else "everybody who reaches this machine"
                progress.say(f"only this machine reaches it; host=0.0.0.0 lets in {others}")
            elif key is None:
                progress.say("everybody who reaches this machine can use it; api_key= asks for a key")

        def watch() -> Exception | None:
            gone = engines[0].executor.lost_worker() if engines else None
            return None if gone is None else PeerGone(engines[0].executor.gone(gone))

        try:
            serve(app, service, opened, options.drain_seconds, tls, watch, progress.say, begun)
        finally:
            # Loading and compiling may take minutes, and a step that waits for a rank that is gone does not end.
            built = service.engine_loop.engine is not None
            ended = service.close(STEP_SECONDS if built and service.error is None else 0)
        if ended and engines:
            write_result(
                run.output_dir, run.asked, metrics=service.metrics.summary(), graphs=engines[0].graph_records()
            )
            engines[0].close()
        progress.say("ended")
        if not ended:
            if engines:
                # Ranks on other hosts would take the end of this process for a failure.
                engines[0].executor.close()
            # A thread in the middle of loading or of a long step would keep the process alive, or crash at its exit.
            sys.stdout.flush()
            os._exit(0)


def names_of(run: ResolvedRun, options: ServeOptions) -> list[str]:
    """The names of the model in the API: task.model_name, or conf/model/'s, or the checkpoint folder's."""
    if options.model_name:
        return [options.model_name]
    return [run.checkpoint.folder.name if run.model == "custom" and run.checkpoint else run.model]


def bounds_of(run: ResolvedRun, options: ServeOptions) -> Bounds:
    """The limits of a run."""
    return Bounds(
        body=int(options.max_body_mib * (1 << 20)),
        body_seconds=options.body_seconds,
        requests=options.max_requests,
        tokens=options.max_tokens or options.max_requests * run.plan.max_length,
        pixels=int(options.max_megapixels * 1e6),
        picture_pixels=int(options.picture_megapixels * 1e6),
        pictures=run.plan.max_images,
        seconds=options.request_seconds,
    )


@contextmanager
def access_log(folder: Path, options: ServeOptions) -> Iterator[TextIO]:
    """The stream that takes the lines of the access log."""
    if options.access_log == "-":
        log = os.fdopen(os.dup(1), "w", encoding="utf8")
    else:
        log = (folder / options.access_log).open("a", encoding="utf8")
    try:
        yield log
    finally:
        # What could not be written, to a full disk or a closed pipe, must not fail the run at its end.
        with suppress(OSError):
            log.close()
