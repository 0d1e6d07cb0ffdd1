"""The table of GE operations that the interpreter can compute, and the decorator that adds an entry.

A function's positional parameters are the operation's inputs, its keyword-only parameters the attributes, by their
names in the graph and with the defaults of CANN's IR. Graphs with any other input or attribute are refused.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Compute = TypeVar("Compute", bound=Callable[..., Any])


class GraphError(ValueError):
    """A graph breaks a documented limit, or holds something that the interpreter does not know."""


@dataclass(frozen=True)
class Operation:
    """An entry of the table.

    compute: inputs and attributes by name -> one output or a tuple of them; an output that is not computed is None.
    overwritten: the inputs that the operation writes to, in the order of its outputs.
    lists: the parameters that take a variable number of inputs.
    """

    compute: Callable[..., Any]
    source: str
    overwritten: tuple[str, ...]
    inputs: tuple[str, ...]
    lists: tuple[str, ...]
    attributes: tuple[str, ...]

    def parameter(self, name: str) -> str:
        """The parameter that takes the graph's input `name`; inputs x0, x1, ... go to one list x.

        Raises GraphError for an input that the function does not list.
        """
        stem = re.sub(r"\d+$", "", name)
        for parameter in (name, f"{name}_", stem):
            if parameter in self.inputs and (parameter in self.lists) == (parameter == stem != name):
                return parameter
        raise GraphError(f"input {name!r} is not known")


OPERATIONS: dict[str, Operation] = {}


def operation(*names: str, source: str, overwritten: tuple[str, ...] = ()) -> Callable[[Compute], Compute]:
    """Adds a function to the table under the GE types `names`; its signature gives the inputs and attributes."""

    def add(compute: Compute) -> Compute:
        parameters = inspect.signature(compute).parameters.values()
        inputs = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        lists = tuple(p.name for p in inputs if p.annotation == list[Tensor])
        attributes = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        for name in names:
            OPERATIONS[name] = Operation(compute, source, overwritten, tuple(p.name for p in inputs), lists, attributes)
        return compute

    return add


def require(holds: bool, message: str) -> None:
    """Raises GraphError where a documented limit does not hold."""
    if not holds:
        raise GraphError(message)


def integers(x: Tensor) -> list[int]:
    """The values of an integer tensor."""
    return [int(value) for value in x.reshape(-1).tolist()]


def rounded(value: Tensor, like: Tensor) -> Tensor:
    """An fp32 result in the dtype of an input."""
    return value.to(like.dtype)
