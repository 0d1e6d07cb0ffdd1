"""docs/scale.md: its tables are those of docs/scale/service.py and of the simulation's file."""

import csv
import sys

import pytest
from commands import ROOT

SCALE = ROOT / "docs" / "scale"
PAGES = [ROOT / "docs" / "scale.md", ROOT / "docs" / "zh" / "scale.md"]


@pytest.fixture
def service(monkeypatch):
    """docs/scale/service.py."""
    monkeypatch.syspath_prepend(str(SCALE))
    import service

    yield service
    sys.modules.pop("service")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_rows_of_servers_are_computed(service, page):
    lines = page.read_text(encoding="utf8").splitlines()
    for row in service.rows():
        # The first cell is words, which are translated.
        assert any(line.endswith(f"| {' | '.join(row[1:])} |") for line in lines), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_rows_of_policies_are_those_of_the_simulation(page):
    lines = page.read_text(encoding="utf8").splitlines()
    with (SCALE / "routing.csv").open() as file:
        rows = [list(row.values()) for row in csv.DictReader(file)]
    compared, by_size = rows[:18], rows[18:]
    for load, policy, _, _, found, p50, p99, _, busiest in compared:
        assert f"| {load} | {policy} | {found} | {p50} | {p99} | {busiest} |" in lines
    for replicas in dict.fromkeys(row[2] for row in by_size):
        assert f"| {replicas} | {' | '.join(row[4] for row in by_size if row[2] == replicas)} |" in lines


def test_a_modelled_picture_is_never_faster_than_the_products_of_its_encoder(service):
    for device in (service.NPU, service.NPU_WHOLE, service.GPU, service.HOST):
        of = service.Replica(device)
        flops = service.work(of.shape, service.PAGE, service.Bucket("vision", 1, 1, 0, 51), service.Storage(2, 2, 2))[1]
        assert of.vision >= flops / device.hardware.flops / device.ranks
