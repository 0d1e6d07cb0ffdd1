"""The Python library: `LLM` loads a model, starts processes for ranks other than 0, and serves requests."""

import inspect
import os
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from mllama_graph import native
from mllama_graph.compose import CONF, run_from
from mllama_graph.core.config import Run, check, with_task_keys
from mllama_graph.core.errors import PeerGone, RankFailed, UserError
from mllama_graph.core.place import Place, Rendezvous, place_from
from mllama_graph.core.report import Progress
from mllama_graph.engine.engine import Engine
from mllama_graph.engine.offline import serve
from mllama_graph.engine.results import Delta, Result
from mllama_graph.engine.start import processor_of, start_engine
from mllama_graph.inputs.request import FIELDS, Request, Sampling
from mllama_graph.launch.environment import prepare_environment, thread_waits
from mllama_graph.launch.processes import (
    END_SECONDS,
    TELL_SECONDS,
    Meeting,
    RankProcess,
    collect,
    failure_of,
    spawn_workers,
)
from mllama_graph.plan.resolve import ResolvedRun, resolve

# Keys that choose a file of conf/; all other keys are values.
GROUPS = ("backend", "experiment", "hardware")

# The module name of the package.
PACKAGE = __name__.partition(".")[0]

# One request, as `generate` and `stream` accept it: a prompt, OpenAI messages, a requests file's fields, or a Request.
Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Request
# The same, or a function that returns it when the request is about to be served; what it raises becomes the result.
Given = Prompt | Callable[[], Prompt]


class LLM:
    """A loaded model that serves requests. Use it as a context manager, or call `close`, which ends all its processes.

    Threads may share it: their requests share the batch, and their calls take turns after each step.

    `model` is a checkpoint folder, or a name from conf/model/ such as "tiny". `keys` are keys of the command line, with
    nested keys as dicts: `LLM("11b", weights="random", tp=2, plan={"page_size": 64})`; a composed `Run` has them all.
    `quiet` suppresses progress output. Logs of the ranks go to `output_dir`, by default a temporary folder. Relative
    paths of pictures are looked up in `base` first. Raises UserError with the value, the rule and the remedy.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Run = "tiny",
        *,
        batch: int = 1,
        tp: int = 1,
        quiet: bool = False,
        output_dir: str | os.PathLike[str] | None = None,
        base: str | os.PathLike[str] = ".",
        **keys: Any,
    ):
        self._turns, self._base = _Turns(), Path(base)
        self._stack = ExitStack()
        self._close = weakref.finalize(self, self._stack.close)
        try:
            run = model if isinstance(model, Run) else composed(model, keys | {"batch": batch, "tp": tp})
            self._start(run, quiet, output_dir)
        except BaseException:
            self._close()
            raise

    def generate(
        self, requests: Given | Sequence[Given], sampling: Sampling | None = None, **fields: Any
    ) -> list[Result]:
        """Serve requests and return their results in the same order.

        `sampling` and `fields` (max_new_tokens, temperature, stop, ...) are defaults for requests that don't set them.
        In a list, a request that can't be served gets a result with `error`; a single request raises UserError.
        """
        deltas = self._begin(requests, sampling, fields)
        results = {delta.id: delta.result for delta in deltas if delta.result}
        return [results[place] for place in sorted(results)]

    def stream(
        self, requests: Given | Sequence[Given], sampling: Sampling | None = None, **fields: Any
    ) -> Iterator[Delta]:
        """Serve requests and yield their deltas: `id` is the request's index in the list, `text` its new text.

        The arguments are those of `generate`. Closing the iterator aborts unfinished requests.
        """
        return self._begin(requests, sampling, fields)

    def request(self, given: Given, id: Any = None, **fields: Any) -> Request:
        """Prepare a request: its ids and tiled images. Raises UserError for a request that is not valid."""
        if callable(given):
            given = given()
        if isinstance(given, Request):
            return replace(given, id=id)
        if isinstance(given, str):
            own: dict[str, Any] = {"prompt": given}
        elif isinstance(given, Mapping):
            own = dict(given)
        elif isinstance(given, Sequence) and not isinstance(given, bytes):
            own = {"messages": list(given)}
        else:
            raise _no_request(given)
        request = self._engine.processor.request(fields | own | {"id": id}, self._base)
        _check_fields(own)
        return request

    @property
    def engine(self) -> Engine:
        """The engine, for a server that steps it itself; then only `close` may be called beside."""
        return self._engine

    def close(self, wait: bool = True) -> None:
        """End all processes. Unless `wait` is false, graphs that are still compiling are finished and stored first."""
        with self._turns.now:
            if self._close.alive:
                try:
                    self._engine.close(self._progress if wait else None)
                finally:
                    self._close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: object, error: object, stack: object) -> None:
        self.close(wait=kind is None)

    def _start(self, asked: Run, quiet: bool, output_dir: str | os.PathLike[str] | None) -> None:
        if place_from(os.environ):
            raise UserError("LLM starts its ranks itself: start the script with python, without torchrun.")
        folder = Path(output_dir or self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mllama_graph-")))
        folder.mkdir(parents=True, exist_ok=True)
        run = resolved(replace(asked, output_dir=str(folder)))
        self._progress = Progress(self._stack.enter_context(open(os.devnull, "w")) if quiet else None)
        self._batch, place, rendezvous = run.limits.batch, Place(0, run.tp, 0, run.tp), None
        self._stack.callback(_restored_process())
        prepare_environment(run, place)
        self._workers: list[RankProcess] = []
        if run.tp > 1:
            rendezvous = self._start_workers(run)
        try:
            self._engine: Engine = start_engine(
                run,
                processor_of(run),
                self._progress,
                place=place,
                rendezvous=rendezvous,
                check=partial(_check, self._workers),
            )
        except PeerGone as error:
            raise self._cause(error) from error
        self._stack.callback(self._engine.close)

    def _start_workers(self, run: ResolvedRun) -> Rendezvous:
        meeting = Meeting.on_this_host()
        # `meeting` is not closed here: torch takes ownership of the listening socket and closes it.
        if meeting.note:
            self._progress.say(meeting.note)
        self._stack.callback(native.unlink, run.segment)
        self._stack.callback(_end, self._workers)
        places = [Place(rank, run.tp, rank, run.tp) for rank in range(1, run.tp)]
        self._workers += spawn_workers(places, meeting, run.output_dir, thread_waits(run))
        return meeting.rendezvous

    def _begin(self, requests: Any, sampling: Sampling | None, fields: Mapping[str, Any]) -> Iterator[Delta]:
        if not isinstance(sampling, Sampling | None):
            raise UserError(f"sampling={sampling!r} must be a Sampling.")
        defaults = (asdict(sampling) if sampling else {}) | dict(fields)
        _check_fields(defaults)
        single = _is_single(requests)
        if not single and (isinstance(requests, bytes) or not isinstance(requests, Iterable)):
            raise _no_request(requests)
        return self._in_turns(self._deltas([requests] if single else list(requests), defaults, single))

    def _in_turns(self, deltas: Generator[Delta]) -> Iterator[Delta]:
        """The same deltas. The engine is held while one is computed, and free while the caller reads it."""
        try:
            while True:
                with self._turns:
                    if not self._close.alive:
                        raise UserError("this LLM is closed. Make a new one.")
                    delta = next(deltas, None)
                if delta is None:
                    return
                yield delta
        finally:
            with self._turns.now:
                deltas.close()

    def _deltas(self, requests: Sequence[Any], defaults: Mapping[str, Any], single: bool) -> Generator[Delta]:
        coming: Iterable[tuple[int, Callable[[], Request]]] = (
            (place, partial(self.request, given, place, **defaults)) for place, given in enumerate(requests)
        )
        try:
            for _, delta in serve(self._engine, coming, 2 * self._batch):
                if single and delta.result and delta.result.error:
                    raise UserError(delta.result.error)
                yield delta
        except PeerGone as error:
            raise self._cause(error) from error
        # gloo's, NCCL's and HCCL's error where another rank has ended.
        except RuntimeError as error:
            if failure := failure_of(self._workers, TELL_SECONDS):
                raise failure from error
            raise

    def _cause(self, gone: PeerGone) -> Exception:
        """The error of the worker rank at fault; RankFailed where none has reported an error."""
        return failure_of(self._workers, TELL_SECONDS) or RankFailed(str(gone))


class _Turns:
    """A lock that threads get in turn: who releases it can't take it again before those that wait."""

    def __init__(self) -> None:
        # Takes the lock out of turn. Re-entrant: an abandoned stream may be collected, and so closed, inside a step.
        self.now = threading.RLock()
        self._next = threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self.now.acquire()

    def __exit__(self, *error: object) -> None:
        self.now.release()


def composed(model: str | os.PathLike[str], keys: Mapping[str, Any], task: str = "generate") -> Run:
    """The run of a model and keys, as `LLM` takes them. Raises UserError for an unknown key or model."""
    if isinstance(keys.get("task"), str):
        raise UserError(f"task={keys['task']!r}: LLM serves requests and runs no task. python -m mllama_graph does.")
    named = isinstance(model, str) and (CONF / "model" / f"{model}.yaml").is_file()
    if not named and not (isinstance(model, str | os.PathLike) and Path(model).expanduser().is_dir()):
        names = ", ".join(sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
        raise UserError(f"model={str(model)!r} is neither a folder nor one of {names}.")
    choices = [
        f"model={model if named else 'custom'}",
        f"task={task}",
        *(f"{name}={keys[name]}" for name in GROUPS if keys.get(name)),
    ]
    values = {name: value for name, value in keys.items() if name not in GROUPS}
    return with_task_keys(run_from(choices, ({} if named else {"weights": os.fspath(model)}) | values))


def resolved(run: Run) -> ResolvedRun:
    """The resolved run. Raises UserError where it can't run in this process."""
    check(run)
    resolved = resolve(run, None)
    if not isinstance(resolved, ResolvedRun) or resolved.only_shapes:
        raise UserError("weights=meta has no values to compute with. Use a checkpoint, or weights=random.")
    if resolved.device.simulated:
        raise UserError(f"device={resolved.device.name} needs a process of its own: use python -m mllama_graph.")
    return resolved


def _is_single(requests: Any) -> bool:
    if isinstance(requests, (str, Mapping, Request)) or callable(requests):
        return True
    return (
        isinstance(requests, Sequence)
        and bool(requests)
        and all(isinstance(message, Mapping) and "role" in message for message in requests)
    )


def _no_request(given: object) -> UserError:
    return UserError(f"a request is a string, a list of messages or a dict; this is of type {type(given).__name__}.")


def _check_fields(given: Mapping[str, Any]) -> None:
    """Warn of unknown fields, which may be misspelt, at the caller's line."""
    if unknown := given.keys() - FIELDS:
        frame, level = inspect.currentframe(), 1
        while frame and str(frame.f_globals.get("__name__")).partition(".")[0] == PACKAGE:
            frame, level = frame.f_back, level + 1
        warnings.warn(f"unknown fields are ignored: {', '.join(sorted(map(str, unknown)))}", stacklevel=level)


def _check(workers: Sequence[RankProcess]) -> None:
    """Raise the error of a worker rank, if one has failed."""
    collect(workers, 0)
    if any(worker.failure for worker in workers) and (failure := failure_of(workers, TELL_SECONDS)):
        raise failure


def _end(workers: Sequence[RankProcess]) -> None:
    """Wait for the worker ranks to end after their driver has disconnected, and kill those that don't."""
    until = time.monotonic() + END_SECONDS
    while any(worker.running for worker in workers) and time.monotonic() < until:
        collect(workers, max(0.0, until - time.monotonic()))
    for worker in workers:
        if worker.running:
            worker.kill()


def _restored_process() -> Callable[[], None]:
    """A function that restores this process's present CPU affinity, thread count and determinism."""
    import torch

    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    def restore() -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        torch._C._set_deterministic_algorithms(deterministic)

    return restore
