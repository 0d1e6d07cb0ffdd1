"""Composes a `Run` from key=value arguments and the files of conf/, with Hydra."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from mllama_graph.core.config import Run
from mllama_graph.core.errors import UserError
from mllama_graph.core.paths import PACKAGE
from mllama_graph.inputs.request import FIELDS
from mllama_graph.tasks.options import TASKS

# An installed package contains conf/; in a checkout conf/ lies beside the package.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
CONFIG, HYDRA_VERSION = "config", "1.3"
# Keys whose values are taken literally: Hydra's grammar would refuse commas, apostrophes, parentheses, = and Chinese.
LITERAL_KEYS = (
    "prompt",
    "image",
    "system",
    "requests",
    "weights",
    "adapter",
    "draft",
    "a",
    "b",
    "api_key",
    "files_below",
    "input",
    "output",
    "task.api_key",
    "task.files_below",
    "task.input",
    "task.output",
    "task.a",
    "task.b",
    "task.measured",
    "task.folder",
    "task.against",
    "task.calibration",
)
KEYS = tuple(entry.name for entry in fields(Run))
# Keys of a run in place of a request's field.
INSTEAD = {"max_new_tokens": " max_output_length= is the default of all requests.", "images": " image= has pictures."}
# Hydra's options.
OPTIONS = {
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p"),
    *("--run", "-r", "--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp"),
    *("--config-name", "-cn", "--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
}
# What OmegaConf calls the type of a value, and what the user should write.
KINDS = {"Float": "a number", "Integer": "a whole number", "bool": "true or false"}
# OmegaConf's message for a value of another type.
INVALID = re.compile(r"Value '(.*?)'(?: of type '\w+')? (?:could not be converted to|is not a valid) (\w+)", re.DOTALL)
# Launchers of conf/hydra/launcher/ and of the plugins that they need.
LAUNCHERS = ("parallel", "slurm", "joblib", "submitit_local", "submitit_slurm")
COMPOSING_ERRORS = (HydraException, OmegaConfBaseException)


def register_schemas() -> None:
    """Register the dataclasses of core/config.py and tasks/options.py, so that Hydra checks every key against them."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Run)
    for name, options in TASKS.items():
        store.store(group="schema/task", name=name, node=options)


def run_from(choices: Iterable[str], values: Mapping[str, Any]) -> Run:
    """Compose a run from group choices ("model=11b") and values by key, which may be nested. The library uses this.

    Raises UserError for choices or values that can't be composed.
    """
    register_schemas()
    try:
        with initialize_config_dir(str(CONF), version_base=HYDRA_VERSION):
            config = compose(CONFIG, list(choices))
        for key, value in values.items():
            OmegaConf.update(config, key, value, merge=True)
        run: Run = OmegaConf.to_object(config)  # type: ignore[assignment]
        return run
    except COMPOSING_ERRORS as error:
        raise UserError(explain(error)) from error


def run_again(asked: Mapping[str, Any]) -> Run:
    """The run that `asdict` turned into `asked`, as a task without keys of its own."""
    values = {key: value for key, value in asked.items() if key not in ("task", "output_dir")}
    run: Run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Run), values))  # type: ignore[assignment]
    return run


def quote(value: str) -> str:
    """Quote a string so that Hydra's grammar and then OmegaConf read it back unchanged.

    A backslash is special only before a quote, an interpolation or the end, so only those are doubled.
    """
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    value = re.sub(r'(\\*)"', r'\1\1\\"', value)
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return f'"{value}"'


def literal(argument: str) -> str:
    """The argument, with its value quoted if its key is in LITERAL_KEYS."""
    key, equals, value = argument.partition("=")
    return f"{key}={quote(value)}" if equals and key in LITERAL_KEYS else argument


def refuse_odd(arguments: Iterable[str]) -> None:
    """Raises UserError for an argument with dashes that is no option: keys have none; and for a group set to null."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        if value == "null" and group != "experiment" and (CONF / group).is_dir():
            names = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
            raise UserError(f"{argument}: it must have a value. Use one of {names}, or leave {group}= out.")
        if not argument.startswith("-") or argument.partition("=")[0] in OPTIONS:
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        key = name.replace("-", "_")
        if key.partition(".")[0] in KEYS:
            raise UserError(f"{argument}: keys are written without dashes. Write {key}={value if equals else 'VALUE'}.")
        raise UserError(
            f"{argument} is not an option. Keys are written as key=value, without dashes; --help lists them."
        )


def explain(error: Exception) -> str:
    """Rewrite Hydra's message as one line that gives the value, the rule and the remedy."""
    text = " ".join(str(error).split())
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=??? is how the configuration writes a missing value. Give something else."
    if isinstance(error, OverrideParseException):
        if error.override in KEYS:
            return f"{error.override} has no value. Write {error.override}=VALUE, and quote a value with spaces."
        if "=" not in error.override:
            return f"{error.override} is not of the form key=value. Quote a value with spaces: prompt='two words'."
        return (
            f"{error.override} can't be read. Write it as key=value, a list as key=[1,2] without spaces, and quote "
            "brackets for the shell: 'key=[1,2]'."
        )
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1])
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and error.full_key:
        return _unknown_key(error.full_key)
    if found := re.search(r"Could not (?:find|load) 'hydra/launcher/(\w+)'", text):
        if found[1] in LAUNCHERS:
            return f"hydra/launcher={found[1]} is not installed. Install it with: pip install 'mllama_graph[sweeps]'"
        return f"hydra/launcher={found[1]} is not one of basic, {', '.join(LAUNCHERS)}."
    found = re.search(r"Error merging override ([^=\s]+)=(.*?)\.?$", text.split(" full_key:")[0])
    if found and "is not a ListConfig" in str(error.__cause__):
        return f"{found[1]}={found[2]} must be a list. Use {found[1]}=[{found[2]}]."
    if found := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", text):
        return (
            f"{found[1]}={found[2]} gives several values. Use -m to run one job per value, "
            f"or {found[1]}=[{found[2]}] for a list."
        )
    if found := re.search(r"Could not find '([^'/]+)/([^']*)' Available options in '[^']+': (.*?) Config search", text):
        hint = (
            " A checkpoint folder goes to weights= (model=custom weights=/path/to/folder); weights are not downloaded."
            if found[1] == "model"
            else ""
        )
        return f"{found[1]}={found[2]} is not one of {', '.join(found[3].split())}.{hint}"
    invalid = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if found := re.search(r"field '([\w.]+)' is not Optional", str(invalid)):
        key = getattr(invalid, "full_key", None) or found[1]
        other = f", or use {key}=none" if key in ("quant", "speculate") else ""
        return f"{key}=null: it must have a value. Leave {key}= out for its default{other}."
    found = INVALID.match(str(invalid))
    if found and found[2] in KINDS and isinstance(invalid, OmegaConfBaseException):
        return f"{invalid.full_key}={found[1]} must be {KINDS[found[2]]}."
    cause = str(error.__cause__).splitlines()[0] if error.__cause__ else ""
    return f"{text.split(' full_key:')[0].split(' See https')[0]}. {cause}".rstrip(". ") + "."


def _unknown_key(key: str) -> str:
    group, dot, _ = key.partition(".")
    if dot:
        where = f"conf/{group}/ and conf/config.yaml list" if (CONF / group).is_dir() else "conf/config.yaml lists"
        return f"there is no key {key!r}. {where} its keys."
    if key in FIELDS:
        instead = INSTEAD.get(key, "")
        return (
            f"there is no key {key!r}: it is a field of requests. Write it on the lines of requests=FILE.jsonl, or in "
            f"the body of a request to task=serve; in Python, give it to generate().{instead}"
        )
    close = difflib.get_close_matches(key, KEYS, n=1)
    guess = f" Did you mean {close[0]}?" if close else ""
    return f"there is no key {key!r}.{guess} conf/config.yaml lists every key."
