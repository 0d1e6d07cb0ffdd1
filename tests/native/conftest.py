"""Fixtures: the libraries, built once a session, and a team of eight processes."""

import pytest
from teams import Team

from mllama_graph import native


@pytest.fixture(scope="session")
def libraries(cache_home):
    """The folder that the libraries are built in."""
    for name in native.LIBRARIES:
        native.build(name, cache_home)
    return cache_home


@pytest.fixture(scope="session")
def team():
    """run(world, function, *arguments) -> what each rank returned."""
    team = Team(8)
    yield team.run
    team.close()
