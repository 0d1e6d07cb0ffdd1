"""The keys of task=serve. No torch, and nothing of the extra `serve`."""

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from mllama_graph.core.config import Run, TaskOptions, at_least
from mllama_graph.core.errors import UserError
from mllama_graph.core.machine import CORES

# What the extra `serve` installs.
SERVER_PACKAGES = ("starlette", "uvicorn", "uvloop", "httptools", "prometheus_client")


@dataclass
class ServeOptions(TaskOptions):
    """task=serve: OpenAI's API. conf/task/serve.yaml explains each key."""

    ENDS_AT_ONCE: ClassVar[bool] = True

    name: str = "serve"
    port: int = 8000
    host: str = "127.0.0.1"
    api_key: str | None = None
    model_name: str | None = None
    fetch_hosts: list[str] = field(default_factory=list)
    files_below: str | None = None
    drain_seconds: float = 30.0
    log_prompts: bool = False
    access_log: str = "access.jsonl"
    cors_origins: list[str] = field(default_factory=list)
    vllm_names: bool = False
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    max_body_mib: float = 64.0
    body_seconds: float = 60.0
    max_requests: int = 256
    max_tokens: int | None = None
    max_megapixels: float = 1000.0
    picture_megapixels: float = 64.0
    request_seconds: float = 600.0

    @property
    def end_seconds(self) -> float:
        return self.drain_seconds + 20.0

    def check(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"port={self.port} must be at least 0 and at most 65535; 0 is a free port.")
        at_least("drain_seconds", self.drain_seconds, 0)
        at_least("task.max_requests", self.max_requests, 1)
        for key in ("max_body_mib", "body_seconds", "max_megapixels", "picture_megapixels", "request_seconds"):
            if not (value := getattr(self, key)) > 0:
                raise UserError(f"task.{key}={value:g} must be above 0.")
        if self.api_key == "":
            raise UserError("api_key= is empty. Give a key, or leave api_key= out to serve everybody.")
        if not all("!" <= letter <= "~" for letter in self.api_key or ""):
            raise UserError(
                "api_key= must be of printable ASCII characters without spaces: HTTP headers hold no others."
            )
        if self.ssl_keyfile and not self.ssl_certfile:
            raise UserError("task.ssl_keyfile needs task.ssl_certfile, the certificate of the key.")
        for key in ("ssl_certfile", "ssl_keyfile"):
            if (path := getattr(self, key)) and not Path(path).expanduser().is_file():
                raise UserError(f"task.{key}={path} is no file.")
        if self.files_below is not None and not Path(self.files_below).expanduser().is_dir():
            raise UserError(f"files_below={self.files_below} is no folder.")
        if missing := [name for name in SERVER_PACKAGES if find_spec(name) is None]:
            raise UserError(f"task=serve needs {', '.join(missing)}. Install with: pip install 'mllama_graph[serve]'")

    def prepared(self, run: Run) -> Run:
        """Leave a core to HTTP: OpenMP's threads spin while they wait, and would take it."""
        if any(value is not None for value in (run.prompt, run.image, run.system, run.requests)):
            raise UserError("task=serve answers requests over HTTP. Leave prompt=, image=, system= and requests= out.")
        if run.threads is None and run.tp == 1:
            run = replace(run, threads=max(1, len(CORES) - 1))
        return run
