"""One rank of test_two_ranks_give_the_logits_of_one: `rank.py RANK WORLD CHECKPOINT FOLDER`, writes FOLDER/RANK.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parents[2])]

from engines import Model, load_model  # noqa: E402
from lowered import lower  # noqa: E402
from test_steps import Compiled, Conversation, play  # noqa: E402

from mllama_graph.checkpoint import Checkpoint, Pixels, build, from_checkpoint  # noqa: E402
from mllama_graph.ops.npu import npu_ops  # noqa: E402
from mllama_graph.ops.ranks import GROUP  # noqa: E402
from mllama_graph.table import Shard  # noqa: E402


def main(rank: int, world: int, checkpoint: Path, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    torch._C._distributed_c10d._register_process_group(GROUP, dist.group.WORLD)
    whole = load_model(checkpoint)
    weights = build(whole.shape, Pixels(1.0, (0.0,) * 3, (1.0,) * 3), torch.float32, torch.device("cpu"),
                    from_checkpoint(Checkpoint(checkpoint)), lambda count: None, Shard(rank, world))
    for name, buffer in whole.weights.vision.named_buffers():
        setattr(weights.vision, name, buffer)
    compiled = Compiled(Model(weights, whole.shape), torch.float32, npu_ops(world), world)
    logits = play(compiled, Conversation(whole.shape))
    found = [(key[-1], lowered.operations) for key, lowered in compiled.lowered.items() if key[0] != "vision"]
    own = torch.arange(6.0).view(2, 3).add(10 * rank).bfloat16().to("npu")
    gathered, summed = (lower(function)(own) for function in (npu_ops(world).all_gather, npu_ops(world).all_reduce))
    torch.save({"logits": logits, "operations": found, "gathered": gathered, "summed": summed}, folder / f"{rank}.pt")
    dist.destroy_process_group()


main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
