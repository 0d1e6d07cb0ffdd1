"""Shared-memory collectives: exact to the last bit, with an error where a rank is absent or calls something else."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from teams import segment

from mllama_graph import native

# Bytes: kOnePhaseBytes of collectives.cpp, and a slot size so small that a message takes several slots.
ONE_PHASE, SLOT = 256 << 10, 384 << 10
SHORT = 0.5
# Seconds within which a rank stops waiting for an absent one, even on a machine without an idle core.
SOON = 20

SUMMED = (torch.float32, torch.bfloat16, torch.float16)
# Zero, one, odd; around the one-phase limit in elements of 4 and of 2 bytes; one slot and several.
COUNTS = (
    0,
    1,
    1001,
    ONE_PHASE // 4,
    ONE_PHASE // 4 + 1,
    ONE_PHASE // 2 + 1,
    SLOT // 4,
    SLOT // 2,
    SLOT // 2 + 7,
    3 * SLOT // 4 + 13,
)


def given(seed: int, rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """A rank's input of a call, which every other rank can compute too."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return (torch.randn(count, generator=generator) * 2.0 ** (rank % 5)).to(dtype)


def sum_in_rank_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """The oracle: sums in fp32 in the order of the ranks, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def joined(rank, world, folder, name, timeout=60.0, slot_bytes=SLOT):
    native.load("collectives", folder)
    native.attach(name, rank, world, timeout, slot_bytes)
    return torch.ops.mllama_graph


def every_size(rank, world, folder, name):
    """Names of the calls whose result differs from the oracle's in any bit."""
    ops, wrong = joined(rank, world, folder, name), []
    for dtype in SUMMED:
        for seed, count in enumerate(COUNTS):
            parts = [given(seed, r, count, dtype) for r in range(world)]
            if bits(ops.all_reduce(parts[rank])) != bits(sum_in_rank_order(parts)):
                wrong.append(f"all_reduce {dtype} {count}")
            if bits(ops.all_gather(parts[rank])) != bits(torch.stack(parts)):
                wrong.append(f"all_gather {dtype} {count}")
    native.detach()
    return wrong


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_rank_holds_the_sum_in_rank_order_to_the_last_bit(team, libraries, world):
    assert team(world, every_size, libraries, segment()) == [[]] * world


def mixed_calls(rank, world, folder, name, slot_bytes):
    ops, wrong = joined(rank, world, folder, name, slot_bytes=slot_bytes), []
    choose = random.Random(7)
    for call in range(200):
        count, dtype = choose.choice((0, 1, 63, 1500, 30000, 90000)) + choose.randrange(2), choose.choice(SUMMED)
        parts = [given(call, r, count, dtype) for r in range(world)]
        if choose.random() < 0.7:
            right = bits(ops.all_reduce(parts[rank])) == bits(sum_in_rank_order(parts))
        else:
            right = bits(ops.all_gather(parts[rank])) == bits(torch.stack(parts))
        if not right:
            wrong.append(call)
    native.detach()
    return wrong


# The oracle does not depend on slots, so that results equal to it are the same for every slot size.
@pytest.mark.parametrize("world, slot_bytes", [(2, 1 << 20), (3, SLOT), (4, 4096)])
def test_two_hundred_calls_of_mixed_kinds_and_sizes_whatever_the_slots(team, libraries, world, slot_bytes):
    assert team(world, mixed_calls, libraries, segment(), slot_bytes) == [[]] * world


def odd_tensors(rank, world, folder, name):
    ops = joined(rank, world, folder, name)
    base = torch.arange(24.0).view(4, 6) + rank
    both = torch.arange(24.0).view(4, 6) * 2 + 1
    reduced, gathered = ops.all_reduce(base.t()), ops.all_gather(base[:, ::2])
    assert torch.equal(reduced, both.t()) and reduced.is_contiguous()
    assert gathered.shape == (2, 4, 3) and torch.equal(gathered[1 - rank], base[:, ::2] + 1 - 2 * rank)
    assert torch.equal(base, torch.arange(24.0).view(4, 6) + rank), "inputs are not written"
    assert ops.all_reduce(torch.tensor(1.5)).item() == 3 and ops.all_gather(torch.tensor(rank)).tolist() == [0, 1]
    assert ops.all_reduce(torch.zeros(3, 0, 5)).shape == (3, 0, 5)
    assert ops.all_gather(torch.zeros(0, 2)).shape == (2, 0, 2)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float64, torch.complex64, torch.float8_e4m3fn):
        parts = [torch.arange(r, r + 9).to(dtype) for r in range(world)]
        assert bits(ops.all_gather(parts[rank])) == bits(torch.stack(parts)), dtype
    for special in (float("inf"), float("nan"), -0.0, 1e-41, 65519.0):
        for dtype in SUMMED:
            parts = [torch.full((70,), special).to(dtype), torch.full((70,), -0.0).to(dtype)]
            total = ops.all_reduce(parts[rank])
            assert torch.equal(total, sum_in_rank_order(parts)) or total.isnan().all() and special != special, special
            assert total.signbit().all() == (special == 0) or special != special
    with pytest.raises(RuntimeError, match="sums float32, bfloat16 and float16"):
        ops.all_reduce(torch.zeros(2, dtype=torch.int64))
    native.detach()


def test_strides_dimensions_dtypes_and_special_values(team, libraries):
    team(2, odd_tensors, libraries, segment())


def misfit(rank, world, folder, name, case):
    """(error, seconds until it, error of the next call, last_error()) where the last rank differs from the others."""
    ops = joined(rank, world, folder, name, timeout=SHORT if case == "absent" else 60.0)
    ops.all_reduce(torch.ones(10))
    last, start = rank == world - 1, time.monotonic()
    if case == "absent" and last:
        # By now the others have timed out, which this rank's own error reports.
        time.sleep(4 * SHORT)
    calls = {
        "absent": lambda: ops.all_reduce(torch.ones(10)),
        "size": lambda: ops.all_reduce(torch.ones(11 if last else 10)),
        "pieces": lambda: ops.all_reduce(torch.ones(3 * SLOT if last else 10)),
        "kind": lambda: (ops.all_gather if last else ops.all_reduce)(torch.ones(10)),
        "dtype": lambda: ops.all_reduce(torch.ones(20, dtype=torch.float16) if last else torch.ones(10)),
    }
    with pytest.raises(RuntimeError) as error:
        calls[case]()
    seconds = time.monotonic() - start
    with pytest.raises(RuntimeError) as again:
        ops.all_reduce(torch.ones(1))
    told = native.last_error()
    native.detach()
    return str(error.value), seconds, str(again.value), told


def test_an_absent_rank_is_named_within_the_timeout_and_gets_an_error_itself(team, libraries):
    outcomes = team(4, misfit, libraries, segment(), "absent")
    for error, seconds, again, told in outcomes:
        assert "rank 3 did not arrive at an all-reduce within 0.5 s" in error and seconds < SOON
        assert "rank 3 did not arrive" in again and told == again
    assert "gave up: rank 3" in outcomes[3][0]


@pytest.mark.parametrize(
    "case, rule",
    [
        ("size", "rank 0 makes an all-reduce of 40 bytes .*, rank 2 an all-reduce of 44 bytes"),
        ("pieces", f"rank 0 makes an all-reduce of 40 bytes .*, rank 2 an all-reduce of {3 * SLOT * 4} bytes"),
        ("kind", "rank 0 makes an all-reduce of 40 bytes .*, rank 2 an all-gather of 40 bytes"),
        ("dtype", r"rank 0 makes .* \(dtype number 6\), rank 2 .* \(dtype number 5\)"),
    ],
)
def test_ranks_whose_calls_differ_all_raise(team, libraries, case, rule):
    for error, _, again, told in team(3, misfit, libraries, segment(), case):
        with pytest.raises(RuntimeError, match=rule):
            raise RuntimeError(error)
        assert "ranks disagree at call 2" in again and told == again


def refused(rank, world, folder, name, case):
    """The error of rank 1, which may not join."""
    native.load("collectives", folder)
    if rank == 0 and case != "no rank 0":
        native.attach(name, 0, 2, 5.0, SLOT)
        time.sleep(3 * SHORT)
        native.detach()
        native.unlink(name)
        native.unlink(name)
        return None
    if rank == 0:
        return None
    with pytest.raises(RuntimeError) as error:
        native.attach(name, *((1, 3, SHORT, SLOT) if case == "world" else (1, 2, SHORT, 2 * SLOT)))
    return str(error.value)


@pytest.mark.parametrize(
    "case, rule",
    [
        ("world", "was created for 2 ranks, not 3"),
        ("slots", f"has slots of {SLOT} bytes, not {2 * SLOT}"),
        ("no rank 0", "rank 1 could not join shared memory .* within 0.5 s: rank 0 did not create it"),
    ],
)
def test_a_rank_with_other_settings_is_refused(team, libraries, case, rule):
    name = segment()
    with pytest.raises(RuntimeError, match=rule):
        raise RuntimeError(team(2, refused, libraries, name, case)[1])
    assert not Path("/dev/shm", name).exists()


def reused(rank, world, folder, name):
    """Whether the name of the shared memory still exists after this rank joined a group, for two groups in turn."""
    seen = []
    for _ in range(2):
        ops = joined(rank, world, folder, name)
        ops.all_reduce(torch.ones(1))
        seen.append(Path("/dev/shm", name).exists())
        # No rank may join the second group before all have finished with the first.
        ops.all_reduce(torch.ones(1))
        native.detach()
    return seen


def test_the_name_is_gone_once_all_have_joined_and_a_stale_segment_is_replaced(team, libraries):
    name = segment()
    # As left by a process that was killed; it has no valid header.
    Path("/dev/shm", name).write_bytes(b"stale")
    assert team(2, reused, libraries, name) == [[False, False]] * 2


def test_collectives_need_a_group(libraries):
    native.load("collectives", libraries)
    with pytest.raises(RuntimeError, match="attach first"):
        torch.ops.mllama_graph.all_reduce(torch.ones(1))


def test_traced_shapes_equal_those_at_run_time(libraries):
    class Both(torch.nn.Module):
        def forward(self, x):
            return torch.ops.mllama_graph.all_gather(torch.ops.mllama_graph.all_reduce(x.t()) + 1)

    native.load("collectives", libraries)
    native.declare(3)
    traced = torch.export.export(Both(), (torch.ones(2, 5),), strict=False)
    assert [node.meta["val"].shape for node in traced.graph.nodes if node.op == "call_function"][-1] == (3, 5, 2)
    native.attach(segment(), 0, 1, 5.0)
    try:
        assert torch.equal(Both()(torch.ones(2, 5)), torch.full((1, 5, 2), 2.0))
        for op in (torch.ops.mllama_graph.all_reduce.default, torch.ops.mllama_graph.all_gather.default):
            torch.library.opcheck(op, (torch.ones(4, 3).t(),), test_utils=("test_schema", "test_faketensor"))
    finally:
        native.detach()


def test_unlinking_needs_no_torch():
    code = (
        "import sys; from mllama_graph import native; native.unlink('mllama_graph-none'); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], env=os.environ)
