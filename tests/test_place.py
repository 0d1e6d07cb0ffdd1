"""Places, devices, ports and threads of ranks, from environment variables alone."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from mllama_graph.core import machine
from mllama_graph.core.devices import CPU, CUDA, NPU
from mllama_graph.core.errors import UserError
from mllama_graph.core.machine import block_sigint
from mllama_graph.core.place import MASTER_PORT, PORTS, Place, bind_master_port, place_from

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


def test_a_rank_finds_its_place_in_torchruns_variables():
    found = place_from(TORCHRUN)
    assert found == Place(5, 8, 1, 4) and not found.one_host
    assert place_from(TORCHRUN | found.environment()) == found
    # A master port alone is a setting, not a place.
    assert place_from({"MASTER_PORT": "20031"}) is None
    # So is one process of one, without a master.
    assert place_from({"RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    "given, message",
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 WORLD_SIZE=2 without MASTER_ADDR, MASTER_PORT: this process can't"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE=2 without RANK: "),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK=0 WORLD_SIZE=2 without MASTER_PORT: "),
    ],
    ids=str,
)
def test_a_place_without_a_master_is_refused(given, message):
    with pytest.raises(UserError) as error:
        place_from(given)
    assert str(error.value).startswith(message) and "start with torchrun" in str(error.value)


@pytest.mark.parametrize(
    "change", [{"RANK": "8"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "9"}, {"WORLD_SIZE": "two"}]
)
def test_inconsistent_torchrun_variables_are_refused(change):
    with pytest.raises(UserError, match="torchrun|must be numbers"):
        place_from(TORCHRUN | change)


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("cores", [1, 2, 3, 8, 12])
def test_ranks_of_a_host_share_its_cores_evenly(ranks, cores, monkeypatch):
    monkeypatch.setattr(machine, "CORES", list(range(10, 10 + cores)))
    places = [Place(rank, ranks, rank, ranks) for rank in range(ranks)]
    assert {p.threads() for p in places} == {max(1, cores // ranks)}
    if ranks <= cores:
        taken = [core for p in places for core in p.cores()]
        assert len(taken) == len(set(taken)) == ranks * (cores // ranks)
    else:
        assert all(p.cores() == list(range(10, 10 + cores)) for p in places)


@pytest.mark.parametrize("device, variable", [(CUDA, "CUDA_VISIBLE_DEVICES"), (NPU, "ASCEND_RT_VISIBLE_DEVICES")])
def test_too_few_visible_devices_are_refused_by_name(device, variable):
    device.check_count(2, {variable: "3, 1"})
    assert device.visible({variable: "3, 1"}) == ["3", "1"]
    with pytest.raises(UserError, match=rf"tp=4 needs 4 {device.name} devices; {variable}=3,1 shows 2"):
        device.check_count(4, {variable: "3,1"})
    with pytest.raises(UserError, match=f"{variable}=1,1 names a device twice"):
        device.check_count(1, {variable: "1,1"})
    with pytest.raises(UserError, match="shows none"):
        device.check_count(1, {variable: ""})


def test_npu_devices_are_numbers():
    with pytest.raises(UserError, match="ASCEND_RT_VISIBLE_DEVICES=0;1 must be a comma list"):
        NPU.visible({"ASCEND_RT_VISIBLE_DEVICES": "0;1"})


def test_a_cpu_needs_no_devices():
    CPU.check_count(8, {"CUDA_VISIBLE_DEVICES": ""})


def test_a_taken_master_port_is_replaced_and_reported():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        listening, line = bind_master_port({"MASTER_PORT": str(taken)})
        with listening:
            port = listening.getsockname()[1]
            assert port in PORTS and line == f"port {taken} is taken; the ranks meet at {port}"
            with pytest.raises(OSError):
                socket.create_server(("127.0.0.1", port))
    listening, line = bind_master_port({"MASTER_PORT": str(taken)})
    listening.close()
    assert listening.fileno() == -1 and line is None
    assert MASTER_PORT in PORTS


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x", ""])
def test_an_invalid_master_port_is_refused(port):
    with pytest.raises(UserError, match=f"MASTER_PORT={port} must be a port number"):
        bind_master_port({"MASTER_PORT": port})
    with pytest.raises(UserError, match=f"MASTER_PORT={port} must be a port number"):
        place_from({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})


@pytest.mark.parametrize("threads", [0, 1])
def test_an_interrupt_is_not_lost_while_a_child_starts_with_it_blocked(threads):
    done, blocked = (
        threading.Event(),
        "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))",
    )
    for _ in range(threads):
        threading.Thread(target=done.wait).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            with block_sigint():
                child = subprocess.Popen([sys.executable, "-c", blocked], stdout=subprocess.PIPE, text=True)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
            time.sleep(1)
    finally:
        done.set()
    assert child.communicate()[0] == "True\n"
