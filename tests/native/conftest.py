"""Fixtures: the libraries, built once a session, and a team of eight processes."""

import pytest

from teams import Team

from mllama_graph import native


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """The folder that both libraries are built in."""
    folder = tmp_path_factory.mktemp("libraries")
    for name in native.LIBRARIES:
        native.build(name, folder)
    return folder


@pytest.fixture(scope="session")
def team():
    """run(world, function, *arguments) -> what each rank returned."""
    team = Team(8)
    yield team.run
    team.close()
