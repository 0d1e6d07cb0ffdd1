"""Collectives inside ahead-of-time compiled packages, and packages that run without Python's GIL."""

import ctypes
import os
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from teams import segment

from mllama_graph import native
from mllama_graph.graphs import loaded
from mllama_graph.graphs.loaded import LoadedPackages

WIDTH = 16
# The name of the process group, which is compiled into the package.
GROUP = "tensor_parallel"
STEPS = 50
# Seconds by which rank 1 is late.
LATE = 0.5
# Milliseconds after which a thread that holds the interpreter no longer waits for a package that waits for it.
GIVE_UP_MS = 20_000


def weight(rank: int) -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(rank))


class Layer(torch.nn.Module):
    """A row-parallel layer: each rank multiplies by its shard of the weight, and the results are summed over ranks."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


class SharedMemory(Layer):
    """Uses its input up between two collectives."""

    def forward(self, x):
        y = torch.ops.mllama_graph.all_reduce(x @ self.weight)
        return torch.ops.mllama_graph.all_gather(y - x), y


class Gloo(Layer):
    def forward(self, x):
        total = torch.ops._c10d_functional.all_reduce(x @ self.weight, "sum", GROUP)
        return torch.ops._c10d_functional.wait_tensor(total) + 1


def compile_all(rank, world, folder):
    """Paths of the packages of both modules, compiled in a process without other ranks."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    import torch._inductor
    import torch.distributed._functional_collectives

    # Inductor logs the size of the group, so that it needs a group; this one has no backend. The variable keeps it
    # alive, since the registry does not.
    stand_in = torch.distributed.ProcessGroup(0, 2)
    torch._C._distributed_c10d._register_process_group(GROUP, stand_in)
    native.load("collectives", folder)
    native.declare(2)
    settings = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True, "cpp.threads": 1}
    paths = {}
    for name, module in {"shared": SharedMemory(weight(0)), "gloo": Gloo(weight(0))}.items():
        program = torch.export.export(module, (torch.ones(3, WIDTH),), strict=False)
        paths[name] = torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / f"{name}.pt2"), inductor_configs=settings
        )
    torch._C._distributed_c10d._unregister_process_group(GROUP)
    return paths


@pytest.fixture(scope="module")
def packages(team, libraries):
    return team(1, compile_all, libraries)[0]


def inputs(seed: int, rank: int) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * seed + rank))


def opened(folder, path, weight):
    """A function that runs a package with the given weight."""
    native.load("runner", folder)
    ops = torch.ops.mllama_graph
    handle = ops.load_package(path, -1)
    assert ops.constant_names(handle) == ["weight"]
    ops.load_constants(handle, ["weight"], [weight])
    return lambda *given: ops.run_package(handle, list(given))[0]


def run_shared(rank, world, folder, path, name):
    """(whether every step was right, error of a step that the other rank does not call, last_error())."""
    native.load("collectives", folder)
    native.attach(name, rank, world, 60.0)
    step, right = opened(folder, path, weight(rank)), True
    for seed in range(STEPS):
        expected = inputs(seed, 0) @ weight(0) + inputs(seed, 1) @ weight(1)
        gathered, total = step(inputs(seed, rank))
        differences = torch.stack([total - inputs(seed, 0), total - inputs(seed, 1)])
        right = right and torch.equal(gathered, differences) and torch.allclose(total, expected)
    native.detach()
    native.attach(f"{name}-absent", rank, world, 1.0)
    with pytest.raises(RuntimeError) as error:
        if rank == 0:
            step(inputs(0, 0))
        raise RuntimeError("rank 1 did not call")
    told = native.last_error()
    native.detach()
    return right, str(error.value), told


def test_shared_memory_collectives_work_in_a_package_and_report_an_absent_rank(team, libraries, packages):
    first, second = team(2, run_shared, libraries, packages["shared"], segment())
    assert first[0] and second[0]
    # A package's error does not contain the operator's message, which last_error() keeps.
    assert "did not call" not in first[1]
    assert "rank 1 did not arrive at an all-reduce within 1 s" in first[2]


def run_gloo(rank, world, folder, path, store):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    torch._C._distributed_c10d._register_process_group(GROUP, dist.group.WORLD)
    step, right = opened(folder, path, weight(rank)), True
    for seed in range(STEPS):
        expected = inputs(seed, 0) @ weight(0) + inputs(seed, 1) @ weight(1) + 1
        right = right and torch.allclose(step(inputs(seed, rank))[0], expected)
    torch._C._distributed_c10d._unregister_process_group(GROUP)
    dist.destroy_process_group()
    return right


def test_gloo_collectives_in_a_package_do_not_wait_for_the_interpreter(team, libraries, packages, tmp_path):
    assert team(2, run_gloo, libraries, packages["gloo"], str(tmp_path / "store")) == [True, True]


def run_late(rank, world, folder, path, name):
    """How often another thread of rank 0 ran while the package waited for rank 1."""
    native.load("collectives", folder)
    native.attach(name, rank, world, 60.0)
    step, done, turns = opened(folder, path, weight(rank)), threading.Event(), []
    step(inputs(0, rank))

    def count():
        while not done.wait(0.005):
            turns.append(time.monotonic())

    thread = threading.Thread(target=count)
    thread.start()
    if rank == 1:
        time.sleep(LATE)
    start = time.monotonic()
    step(inputs(0, rank))
    end = time.monotonic()
    done.set()
    thread.join()
    native.detach()
    # Near the start and end of the call, a thread may run by chance.
    return sum(start + LATE / 4 < turn < end - LATE / 4 for turn in turns)


def test_other_threads_run_while_a_package_waits(team, libraries, packages):
    assert team(2, run_late, libraries, packages["shared"], segment())[0] > 1


def run_beside(rank, world, folder, path, name, asked, ended):
    """Whether rank 1 ended its run while another thread of rank 0 held the interpreter, from within a package's run on.

    Rank 1 begins when that thread writes to the pipe `asked`, so that rank 0 waits in its first collective until then.
    Calls of PyDLL keep the interpreter.
    """
    native.load("collectives", folder)
    native.attach(name, rank, world, 60.0)
    step = opened(folder, path, weight(rank))
    step(inputs(0, rank))
    asked, ended = (os.open(path, os.O_WRONLY if rank == at else os.O_RDONLY) for at, path in enumerate((asked, ended)))
    if rank == 1:
        os.read(asked, 1)
        step(inputs(0, rank))
        os.write(ended, b".")
        native.detach()
        return True
    libc, called, seen, given = ctypes.PyDLL(None), threading.Lock(), [], inputs(0, rank)

    def hold():
        with called:
            libc.write(asked, b".", 1)
            # struct pollfd: the file number, and POLLIN.
            seen.append(libc.poll(struct.pack("ihh", ended, 1, 0), 1, GIVE_UP_MS) == 1)

    called.acquire()
    thread = threading.Thread(target=hold)
    thread.start()
    usual = sys.getswitchinterval()
    # Nobody is made to give the interpreter away: the other thread gets it where the package's call gives it away.
    sys.setswitchinterval(1000)
    called.release()
    step(given)
    sys.setswitchinterval(usual)
    thread.join()
    native.detach()
    return seen[0]


def test_a_package_does_not_wait_for_the_interpreter_when_it_has_used_an_input_up(team, libraries, packages, tmp_path):
    pipes = [str(tmp_path / name) for name in ("asked", "ended")]
    for pipe in pipes:
        os.mkfifo(pipe)
    assert team(2, run_beside, libraries, packages["shared"], segment(), *pipes) == [True, True]


def test_an_engine_beside_the_main_thread_releases_the_interpreter(monkeypatch, tmp_path):
    """As a server's engine does; where the library for that can't be built, it says so and goes on without."""
    said = []
    graphs = LoadedPackages.__new__(LoadedPackages)
    graphs.spec, graphs.store = SimpleNamespace(device="cpu"), SimpleNamespace(libraries=tmp_path)
    graphs._weights, graphs.say = {}, said.append
    monkeypatch.setattr(loaded, "load_package", lambda *given: "holds the GIL")
    monkeypatch.setattr(loaded, "RankPackage", lambda *given: "releases the GIL")
    with ThreadPoolExecutor(1) as other:
        assert graphs._package(tmp_path) == "holds the GIL"
        assert other.submit(graphs._package, tmp_path).result() == "releases the GIL"
        monkeypatch.setattr(loaded, "RankPackage", Mock(side_effect=native.BuildError("no compiler")))
        assert other.submit(graphs._package, tmp_path).result() == "holds the GIL"
    assert said == ["other threads wait while a graph runs: no compiler"]


def run_bound(rank, world, folder, path, name):
    """Whether a package reads its weight from the given tensor, before and after that tensor is changed."""
    native.load("collectives", folder)
    native.attach(name, 0, 1, 5.0)
    native.declare(1)
    outside = torch.eye(WIDTH)
    step, x = opened(folder, path, outside), inputs(0, 0)
    before = torch.equal(step(x)[1], x)
    outside.mul_(3)
    after = torch.equal(step(x)[1], x @ outside)
    ops = torch.ops.mllama_graph
    handle = ops.load_package(path, -1)
    with pytest.raises(RuntimeError, match="1 names of constants, but 0 tensors"):
        ops.load_constants(handle, ["weight"], [])
    with pytest.raises(RuntimeError):
        ops.load_constants(handle, [], [])
    ops.unload_package(handle)
    with pytest.raises(RuntimeError, match=f"no package is loaded under handle {handle}"):
        ops.run_package(handle, [x])
    native.detach()
    return before, after


def test_constants_stay_outside_a_package_and_are_read_in_place(team, libraries, packages):
    assert team(1, run_bound, libraries, packages["shared"], segment()) == [(True, True)]
