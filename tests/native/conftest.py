"""Fixtures: the native libraries, built once per session, and eight processes that act as ranks."""

import pytest
from teams import Team

from mllama_graph import native


@pytest.fixture(scope="session")
def libraries(cache_home):
    """The folder that contains the built libraries."""
    for name in native.LIBRARIES:
        native.build(name, cache_home)
    return cache_home


@pytest.fixture(scope="session")
def team():
    """run(world, function, *arguments) -> what each rank returned."""
    team = Team(8)
    yield team.run
    team.close()
