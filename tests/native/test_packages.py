"""Collectives inside ahead-of-time packages, and packages run without the interpreter's lock."""

import os
import threading
import time

import pytest
import torch
from teams import segment

from mllama_graph import native

WIDTH = 16
# A name of our own, for the group's is baked into the package.
GROUP = "tensor_parallel"
STEPS = 50
# Seconds that one rank keeps the other waiting.
LATE = 0.5


def weight(rank: int) -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(rank))


class Layer(torch.nn.Module):
    """A row-parallel layer: every rank multiplies by its part, the sum is all ranks'."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


class SharedMemory(Layer):
    def forward(self, x):
        y = torch.ops.mllama_graph.all_reduce(x @ self.weight)
        return torch.ops.mllama_graph.all_gather(y * 2), y


class Gloo(Layer):
    def forward(self, x):
        total = torch.ops._c10d_functional.all_reduce(x @ self.weight, "sum", GROUP)
        return torch.ops._c10d_functional.wait_tensor(total) + 1


def compile_all(rank, world, folder):
    """Packages of both modules, compiled in a process that talks to no other; their paths by name."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    import torch._inductor
    import torch.distributed._functional_collectives

    # Inductor asks the group for its size, for a log that nobody reads; a stand-in without a backend answers. The
    # registry does not keep it alive.
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
    """A package bound to a weight, as a function."""
    native.load("runner", folder)
    ops = torch.ops.mllama_graph
    handle = ops.load_package(path, -1)
    assert ops.constant_names(handle) == ["weight"]
    ops.load_constants(handle, ["weight"], [weight])
    return lambda *given: ops.run_package(handle, list(given))


def run_shared(rank, world, folder, path, name):
    """(whether every step was right, error of a step without a peer, last_error())."""
    native.load("collectives", folder)
    native.attach(name, rank, world, 1.0)
    step, right = opened(folder, path, weight(rank)), True
    for seed in range(STEPS):
        expected = inputs(seed, 0) @ weight(0) + inputs(seed, 1) @ weight(1)
        gathered, total = step(inputs(seed, rank))
        right = right and torch.equal(gathered, torch.stack([2 * total] * 2)) and torch.allclose(total, expected)
    with pytest.raises(RuntimeError) as error:
        if rank == 0:
            step(inputs(0, 0))
        raise RuntimeError("rank 1 did not call")
    told = native.last_error()
    native.detach()
    return right, str(error.value), told


def test_shared_memory_collectives_work_in_a_package_and_tell_of_an_absent_rank(team, libraries, packages):
    first, second = team(2, run_shared, libraries, packages["shared"], segment())
    assert first[0] and second[0]
    # A package's own error has no text of the operator's: last_error() keeps it.
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
    """How often another thread of rank 0 got a turn while its package waited for rank 1."""
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
    # At the borders of the call a thread gets in by luck.
    return sum(start + LATE / 4 < turn < end - LATE / 4 for turn in turns)


def test_other_threads_run_while_a_package_waits(team, libraries, packages):
    assert team(2, run_late, libraries, packages["shared"], segment())[0] > 1


def run_bound(rank, world, folder, path, name):
    """Whether a package reads its weight outside, and reads it again after it was written."""
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


def test_constants_stay_outside_and_are_read_where_they_lie(team, libraries, packages):
    assert team(1, run_bound, libraries, packages["shared"], segment()) == [(True, True)]
