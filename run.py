"""python run.py key=value ... : compose the configuration, then do the task. The only file that imports Hydra.

No torch here: what must stand in the environment before torch is imported is set first, and a run that can't be
composed fails in a moment.
"""

import difflib
import logging
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

# While modules are imported Ctrl-C ends the process without a word, rather than with the stack of an import.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Errors reach main() as exceptions, so that a person sees one line and run.log the stack.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mllama_graph.core.config import Interrupted, PeerGone, RankFailed, Run, UserError, check
from mllama_graph.launch.supervisor import join, launch
from mllama_graph.core.place import place_from
from mllama_graph.core.report import write_failure
from mllama_graph.measure.sweep import standing, write_summary

# Taken literally: Hydra's grammar would refuse commas, apostrophes, parentheses, = and Chinese.
LITERAL_KEYS = ("prompt", "image", "system", "requests", "weights", "a", "b", "task.measured")

# Those of conf/hydra/launcher/ and of the plugins that they need.
LAUNCHERS = ("parallel", "slurm", "joblib", "submitit_local", "submitit_slurm")

# 2: an error that the user can mend.
EXIT_CODES = {UserError: 2, Interrupted: 130}

log = logging.getLogger("mllama_graph")


class JobFailed(Exception):
    """A job of a sweep ended with an error that has been reported already; the sweep goes on and counts it.

    Its argument is the exit code: launchers may have run the job in another process.
    """


def quote(value: str) -> str:
    """A string as Hydra's grammar and then OmegaConf read it back unchanged.

    Backslashes count only before a quote or an interpolation: there they are doubled.
    """
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    value = re.sub(r'(\\*)"', r'\1\1\\"', value)
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return f'"{value}"'


def literal(argument: str) -> str:
    """key=value with the value quoted, where the key is a literal one."""
    key, equals, value = argument.partition("=")
    return f"{key}={quote(value)}" if equals and key in LITERAL_KEYS else argument


# Exit codes of the jobs that failed in this process.
failures: list[int] = []


def swept_in(sweep: Path) -> dict[str, int]:
    """The keys that a sweep sweeps over, and how many values each has."""
    noted = OmegaConf.load(sweep / "multirun.yaml").hydra
    given = {word.partition("=")[0]: word for word in noted.overrides.task}
    words = {name: f"{name}={value}" for name, value in (noted.sweeper.get("params") or {}).items()} | given
    parsed = OverridesParser.create().parse_overrides(list(words.values()))
    return {o.key_or_group: len(list(o.sweep_string_iterator())) for o in parsed if o.is_sweep_override()}


def announce(sweep: Path, number: int, overrides: list[str]) -> int:
    """Tell a person which job of a sweep begins, and how long the rest will take; how many jobs there are."""
    swept, begun = swept_in(sweep), (sweep / "multirun.yaml").stat().st_mtime
    own = ", ".join(word for word in overrides if word.partition("=")[0] in swept)
    total = math.prod(swept.values())
    print(f"{standing(sweep, number, total, begun, time.time())}: {own}", file=sys.stderr, flush=True)
    return total


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(cfg: DictConfig) -> None:
    """One job: a run alone, or one of a sweep."""
    state, failed_before = HydraConfig.get(), len(failures)
    folder, sweeping = Path(state.runtime.output_dir), state.mode == RunMode.MULTIRUN
    run: Run = OmegaConf.to_object(cfg)
    run.output_dir = str(folder)
    # Of an earlier run in the same folder: it must not be taken for this one's.
    (folder / "result.json").unlink(missing_ok=True)
    jobs = announce(folder.parent, state.job.num, state.overrides.task) if sweeping else 1
    try:
        check(run)
        # A sweep's jobs share this process, so each gets fresh ones for its ranks.
        launch(run, fresh=sweeping)
    except (UserError, Interrupted, RankFailed, PeerGone) as error:
        log.exception("the run ended early")
        _fail(run, folder, str(error), EXIT_CODES.get(type(error), 1))
    except Exception as error:
        log.exception("internal error")
        _fail(run, folder, f"internal error: {type(error).__name__}: {error} (stack in {folder / 'run.log'})", 1)
    finally:
        if sweeping:
            path = write_summary(folder.parent)
            if state.job.num + 1 == jobs:
                print(path, file=sys.stderr, flush=True)
    if sweeping and len(failures) > failed_before:
        raise JobFailed(failures[-1])


def _fail(run: Run, folder: Path, message: str, exit_code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    write_failure(folder, asdict(run), message)
    failures.append(exit_code)


def explain(error: Exception) -> str:
    """Hydra's message as one line that gives the value, the rule and the remedy."""
    text = " ".join(str(error).split())
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=??? is how the configuration writes a missing value. Give something else."
    if isinstance(error, OverrideParseException):
        return (f"{error.override} can't be read: {error.message.splitlines()[0].rstrip('.')}. Write it as key=value, a list as "
                "key=[1,2] without spaces, and quote for the shell what has brackets: 'key=[1,2]'.")
    if found := re.search(r"Could not override '([^']+)'", text):
        known = [entry.name for entry in fields(Run)]
        close = difflib.get_close_matches(found[1].split(".")[0], known, n=1)
        guess = f" Did you mean {close[0]}?" if close else ""
        listed = "conf/config.yaml lists every key." if "." not in found[1] else (
            f"conf/{found[1].split('.')[0]}/ and conf/config.yaml list its keys.")
        return f"there is no key {found[1]!r}.{guess if '.' not in found[1] else ''} {listed}"
    if found := re.search(r"Could not (?:find|load) 'hydra/launcher/(\w+)'", text):
        if found[1] in LAUNCHERS:
            return f"hydra/launcher={found[1]} is not installed. Install it with: pip install -e '.[sweeps]'"
        return f"hydra/launcher={found[1]} is not one of basic, {', '.join(LAUNCHERS)}."
    found = re.search(r"Error merging override ([^=\s]+)=(.*?)\.?$", text.split(" full_key:")[0])
    if found and "is not a ListConfig" in str(error.__cause__):
        return f"{found[1]}={found[2]} must be a list. Use {found[1]}=[{found[2]}]."
    if found := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", text):
        return (f"{found[1]}={found[2]} names several values. Use -m to run a job for each, "
                f"or {found[1]}=[{found[2]}] for a list.")
    if found := re.search(r"Could not find '([^']+)/([^']+)' Available options in '[^']+': (.*?) Config search", text):
        return f"{found[1]}={found[2]} is not one of {', '.join(found[3].split())}."
    cause = str(error.__cause__).splitlines()[0] if error.__cause__ else ""
    return f"{text.split(' full_key:')[0].split(' See https')[0]}. {cause}".rstrip(". ") + "."


def hear_interrupts() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> int:
    """The exit code: 0, or 2 for an error that the user can mend."""
    try:
        place = place_from(os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if place and place.rank > 0:
        # torchrun starts every rank alike; rank 0 alone composes the run and writes its folder.
        hear_interrupts()
        return join(place)
    for argument in sys.argv[1:]:
        if not argument.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in argument):
            print(f"error: {argument!r} is not valid UTF-8 text.", file=sys.stderr)
            return 2
    ConfigStore.instance().store(name="schema", node=Run)
    # argparse takes no overrides after an option that follows overrides, so the sweep's flag goes first.
    given = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    sys.argv[1:] = [literal(argument) for argument in given]
    try:
        hear_interrupts()
        job()
    except JobFailed as error:
        return error.args[0]
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 130
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}. The run's folder must be writable (hydra.run.dir).", file=sys.stderr)
        return 2
    return failures[0] if failures else 0


if __name__ == "__main__":
    sys.exit(main())
