"""OpenAI's API as a Ray Serve application: replicas of one model behind Ray Serve's proxies.

`serve run docs/deploy/ray-serve.yaml`, or `serve.run(application({"model": "tiny"}))`. Requests with the same
`x-session-id` go to the same replica while it lives, so that a picture meets its cached K/V there.
"""

import asyncio
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

# Ray asks for permission to send statistics unless this is set.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from starlette.types import ASGIApp

from mllama_graph.engine.engine import Engine
from mllama_graph.engine.start import processor_of
from mllama_graph.llm import LLM, composed, resolved
from mllama_graph.server.access import AccessLog
from mllama_graph.server.app import application as asgi
from mllama_graph.server.pictures import Pictures
from mllama_graph.server.service import FAILED, STARTING, Service
from mllama_graph.server.warm import warm_up
from mllama_graph.tasks.serve import SWITCH_SECONDS, bounds_of, names_of
from mllama_graph.tasks.serve_options import ServeOptions

ROUTER = RequestRouterConfig(request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter")
# Seconds in which the engine's current step may end.
STEP_SECONDS = 5.0


@serve.deployment(
    name="Replica",
    request_router_config=ROUTER,
    max_ongoing_requests=256,
    # Ray Serve stops sending requests to a replica that shall end, and waits this long for open ones.
    graceful_shutdown_timeout_s=60.0,
    graceful_shutdown_wait_loop_s=0.2,
    health_check_period_s=5.0,
)
@serve.ingress()
class Replica:
    """One engine behind the routes of task=serve. `keys` are those of `LLM`; `task` has those of task=serve."""

    async def __init__(self, model: str = "tiny", **keys: Any):  # type: ignore[misc]  # Ray Serve awaits it
        sys.setswitchinterval(SWITCH_SECONDS)
        self._folder = tempfile.TemporaryDirectory(prefix="mllama_graph-")
        run = replace(composed(model, keys, "serve"), output_dir=self._folder.name)
        found = resolved(run)
        options = found.options
        assert isinstance(options, ServeOptions)
        self._llm: LLM | None = None

        def build() -> Engine:
            # Runs in the engine's thread, which steps it.
            self._llm = LLM(run, quiet=True, output_dir=self._folder.name)
            warm_up(self._llm.engine, found.limits.batch)
            return self._llm.engine

        bounds = bounds_of(found, options)
        below = Path(options.files_below).expanduser() if options.files_below else None
        pictures = Pictures(bounds, options.fetch_hosts, below)
        names = names_of(found, options)
        self._service = Service(found, processor_of(found), names, bounds, pictures, build, options.vllm_names)
        log = AccessLog(sys.stdout if options.access_log == "-" else None, options.log_prompts)
        self._app = asgi(self._service, options.api_key, list(options.cors_origins), log)
        self._service.start()
        while self._service.state == STARTING:
            await asyncio.sleep(0.05)
        self.check_health()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    def check_health(self) -> None:
        """Ray Serve replaces a replica for which this raises."""
        if self._service.state == FAILED:
            raise RuntimeError(f"the engine has failed: {self._service.error}")

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.drain()
            if self._service.close(STEP_SECONDS) and self._llm is not None:
                self._llm.close(wait=False)


def application(args: dict[str, Any]) -> Application:
    """The application for `serve run` and for configuration files, whose `args` are those of `Replica`.

    Raises UserError for keys that can't run.
    """
    keys = dict(args)
    composed(keys.pop("model", "tiny"), keys, "serve").task.check()
    bound: Application = Replica.bind(**args)  # type: ignore[attr-defined]
    return bound
