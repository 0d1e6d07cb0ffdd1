"""Ranks on two hosts: network namespaces with an address each, joined by a cable that can be cut.

Where these can't be made, the tests warn and use two addresses of this machine; killing a host then cuts the cable.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import LIMITS, command_line
from engines import serve, start
from test_engine import few
from test_ranks import written, wrong

from mllama_graph.core.errors import PeerGone, UserError
from mllama_graph.core.network import interface_towards
from mllama_graph.core.place import Place, Rendezvous
from mllama_graph.engine import messages
from mllama_graph.engine.hosts import card, differing_weights, digests, refusal
from mllama_graph.engine.messages import Driver, Workers
from mllama_graph.model.files import CheckpointFiles

# timeout= of the runs, and the seconds in which their processes then end, even on a busy machine.
TIMEOUT, END_SECONDS = 3, 30
A, B = 0, 1


@dataclass
class Hosts:
    """Two hosts. `inside`: what runs a command on each. `cable`: the command that cuts it."""

    addresses: tuple[str, str]
    inside: tuple[list[str], list[str]]
    cable: tuple[str, ...] = ()
    started: tuple[subprocess.Popen, ...] = ()

    def start(self, host: int, command: list[str], port: int, cwd: Path, **variables: str) -> subprocess.Popen:
        """Start a command as the only rank of a host, as torchrun or srun would."""
        place = Place(host, 2, 0, 1).environment() | Rendezvous(self.addresses[A], port).environment()
        process = subprocess.Popen(
            [*self.inside[host], *command],
            env=os.environ | place | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )
        self.started += (process,)
        return process

    def both(self, folder: Path, *arguments: str) -> list[subprocess.Popen]:
        """Start run.py on both hosts."""
        port = free_port()
        return [self.start(host, command_line(folder, *arguments), port, folder.parent) for host in (A, B)]

    def cut(self) -> None:
        """Cut the cable."""
        if self.cable:
            subprocess.run(self.cable, check=True)
        else:
            self.started[-1].kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@pytest.fixture
def hosts():
    """Two hosts, which share the file system."""
    names = [f"mg{os.getpid()}{letter}" for letter in "ab"]
    ip = [
        *(f"netns add {name}" for name in names),
        f"link add {names[A]} netns {names[A]} type veth peer name {names[B]} netns {names[B]}",
        *(f"-n {name} addr add 10.7.0.{n}/24 dev {name}" for n, name in enumerate(names, start=1)),
        *(f"-n {name} link set {link} up" for name in names for link in ("lo", name)),
    ]
    try:
        for line in ip:
            subprocess.run(["ip", *line.split()], check=True, capture_output=True, text=True)
        found = Hosts(
            ("10.7.0.1", "10.7.0.2"),
            tuple(["ip", "netns", "exec", name] for name in names),
            ("ip", "-n", names[A], "link", "set", names[A], "down"),
        )
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip()
        warnings.warn(f"no network namespaces (they need root and ip): {why}; 127.0.0.1 and .2 instead", stacklevel=1)
        found = Hosts(("127.0.0.1", "127.0.0.2"), ([], []))
    yield found
    for process in found.started:
        process.kill()
        process.communicate()
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True) if found.cable else None


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """The exit code of a process, and its single error line."""
    out, err = process.communicate(timeout=END_SECONDS)
    [line] = [line for line in err.splitlines() if line.startswith("error: ")] or [err]
    assert "Traceback" not in out + err
    return process.returncode, line


def test_two_hosts_of_torchrun_give_the_tokens_of_one(hosts, checkpoint, requests, tmp_path):
    lines = few(requests, "half")
    one = serve(start(checkpoint("half"), batch=8), lines)
    given = [
        *LIMITS,
        f"weights={checkpoint('half')}",
        f"requests={written(tmp_path / 'requests.jsonl', lines)}",
        "backend=eager",
        "batch=8",
        "tp=2",
    ]
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    where = [f"--master-addr={hosts.addresses[A]}", f"--master-port={port}"]
    for host in (A, B):
        command = [*torchrun, f"--node-rank={host}", *where, *command_line(tmp_path / "out", *given)[1:]]
        hosts.start(host, command, port, tmp_path)
    for process in hosts.started:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    found = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert result["config"]["tp"] == 2 and len(found) == len(lines) and not wrong(found, one)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "requests.jsonl"}, "another rank wrote a folder"


def test_the_first_host_serves_and_a_cut_cable_ends_both(hosts, tmp_path):
    port = free_port()
    address = f"{hosts.addresses[A]}:{port}"
    server, worker = hosts.both(
        tmp_path / "out", *("task=serve", "host=0.0.0.0", f"port={port}", "backend=eager", "tp=2", f"timeout={TIMEOUT}")
    )
    for line in server.stderr:
        if line.startswith(("ready", "error")):
            break
    body = json.dumps({"messages": [{"role": "user", "content": "What can you do?"}], "max_tokens": 20})
    asking = (
        "import sys, urllib.request as r\n"
        "asked = r.Request(sys.argv[1], sys.argv[2].encode(), {'content-type': 'application/json'})\n"
        "print(r.urlopen(asked, timeout=30).read().decode())"
    )
    # The other host is the client.
    command = [*hosts.inside[B], sys.executable, "-c", asking, f"http://{address}/v1/chat/completions", body]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert answer["choices"][0]["message"]["content"] == "I can describe simple shapes, count them and read numbers."
    hosts.cut()
    begun = time.monotonic()
    code, line = ended(server)
    assert code == 1 and "rank 1" in line and "is gone" in line
    if hosts.cable:
        assert ended(worker) == (1, f"error: rank 1: rank 0 has sent nothing for {TIMEOUT} s")
    assert time.monotonic() - begun < END_SECONDS


def test_a_host_that_dies_ends_the_run_on_the_other(hosts, checkpoint, tmp_path):
    lines = [{"input_ids": [1, 2], "max_new_tokens": count, "ignore_eos": True, "id": count} for count in (2, 30000)]
    given = [
        *LIMITS,
        f"weights={checkpoint('half')}",
        f"requests={written(tmp_path / 'requests.jsonl', lines)}",
        *("backend=eager", "batch=2", "tp=2", f"timeout={TIMEOUT}", "max_output_length=30000"),
    ]
    runs = {host: hosts.both(tmp_path / f"{host}", *given) for host in (A, B)}
    for host, processes in runs.items():
        until = time.monotonic() + 120
        while not (found := tmp_path / f"{host}" / "results.jsonl").exists() or not found.read_text():
            assert all(process.poll() is None for process in processes) and time.monotonic() < until
            time.sleep(0.1)
    for host, processes in runs.items():
        processes[host].kill()
    code, line = ended(runs[B][A])
    assert code == 1 and "rank 1" in line and "gone" in line
    code, line = ended(runs[A][B])
    assert code == 1 and line.startswith("error: rank 1: ")
    for folder in ("0", "1"):
        kept = (tmp_path / folder / "results.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in kept] == [2], "a finished request was lost"


# ---- what hosts must have in common


def test_other_arguments_on_a_host_end_both_with_the_same_line(hosts, tmp_path):
    if not hosts.cable:
        # Ranks of one machine may have other arguments: a library's do.
        return
    given, port = ["backend=eager", "tp=2", 'prompt=What is "this"?'], free_port()
    for host, more in ((A, []), (B, ["batch=2"])):
        hosts.start(host, command_line(tmp_path / "out", *given, *more), port, tmp_path)
    (code, line), (other_code, other_line) = map(ended, hosts.started)
    assert code == other_code == 2 and other_line.replace("error: rank 1: ", "error: ") == line
    assert "was started with batch=2, rank 0 on host" in line and "with nothing else." in line


def other(**changes):
    """The card of rank 1 on another host, started with the same arguments."""
    return card(Place(1, 2, 0, 1), ["tp=2"]) | {"host": "b", "machine": "b"} | changes


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, ""),
        ({"arguments": ["batch=4", "tp=2"]}, "rank 1 on host b was started with batch=4, rank 0 on host"),
        ({"versions": card(Place())["versions"] | {"torch": "2.12.0"}}, "rank 1 on host b has torch 2.12.0, rank 0"),
        ({"one_host": True}, "Set LOCAL_WORLD_SIZE and LOCAL_RANK"),
    ],
)
def test_hosts_that_differ_are_refused_by_name(changes, expected):
    mine = card(Place(0, 2, 0, 1), ["tp=2", "hydra.run.dir=here"])
    reason = refusal(mine, [other(**changes)])
    assert reason.startswith(expected) or expected in reason
    assert bool(reason) == bool(expected)
    # Ranks of one host share its files, and a library's process has other arguments than its ranks.
    if "one_host" not in changes:
        assert not refusal(mine, [other(**changes) | {"machine": mine["machine"]}])


def test_weights_of_another_host_are_compared_by_content(checkpoint, tmp_path):
    source = checkpoint("half")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    expected, place = digests(CheckpointFiles(tmp_path)), Place(1, 2, 0, 1)
    assert not differing_weights(expected, place)
    [path] = map(Path, expected)
    content = bytearray(path.read_bytes())
    # A fine-tune changes nearly every byte; here it is one tensor.
    content[len(content) // 2 : len(content) // 2 + len(content) // 50] = bytes(len(content) // 50)
    for change, word in ((bytes(content), "other content"), (content[:-8], "bytes, not"), (None, "can't read")):
        path.write_bytes(change) if change else path.unlink()
        assert word in differing_weights(expected, place)


def test_a_refusal_reaches_both_ends_and_strangers_on_the_port_are_ignored(monkeypatch):
    monkeypatch.setattr(messages, "card", lambda place: other() if place.rank else card(place, ["tp=4"]))
    monkeypatch.setattr(messages, "PROOF_SECONDS", 1)
    port, said = free_port(), []
    rendezvous, places = Rendezvous("127.0.0.1", port), [Place(0, 2, 0, 1), Place(1, 2, 0, 1)]

    def worker() -> None:
        store = messages.meet(places[1], rendezvous)
        address, at, _ = json.loads(store.get("driver"))
        with socket.create_connection((address, at)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(UserError) as raised:
            Driver(places[1], store).first()
        said.append(str(raised.value))

    thread = threading.Thread(target=worker)
    thread.start()
    with pytest.raises(UserError, match="rank 1 on host b was started with tp=2, rank 0 on host") as raised:
        Workers(places[0], rendezvous, messages.meet(places[0], rendezvous), 5.0, lambda: None)
    thread.join()
    assert said == [str(raised.value)]


def test_a_rank_that_waits_says_for_whom_and_at_last_what_to_check(monkeypatch, capsys):
    monkeypatch.setattr(messages, "MEETING_SECONDS", 1)
    monkeypatch.setattr(messages, "LATE_SECONDS", 0.2)
    with pytest.raises(PeerGone, match="no rank 0 at 127.0.0.1:.* MASTER_ADDR must be"):
        messages.meet(Place(1, 2, 0, 1), Rendezvous("127.0.0.1", 1))
    assert capsys.readouterr().err == "rank 1 waits for rank 0 at 127.0.0.1:1, for at most 1 s\n"
    place, rendezvous = Place(0, 2, 0, 1), Rendezvous("127.0.0.1", free_port())
    with pytest.raises(PeerGone, match="rank 1 has not come within 1 s"):
        Workers(place, rendezvous, messages.meet(place, rendezvous), 5.0, lambda: None)
    assert capsys.readouterr().err == "rank 0 waits for rank 1, for at most 1 s\n"


def test_the_interface_towards_an_address_is_the_one_that_has_the_route():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None
