"""Steps of a simulated NPU, launched before the ids of the step before are read: the ids stay on the device."""

import torch
from engines import holds_nothing, serve, start
from test_engine import few
from torch.utils._python_dispatch import TorchDispatchMode

from test_serving import NPU_SIM  # isort: skip


class Blocking(TorchDispatchMode):
    """Notes the operations that wait for the device: reads of a value, and copies that are not asynchronous."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(function)
        places = {x.device.type for x in args if isinstance(x, torch.Tensor)}
        to = kwargs.get("device")
        copied = name.startswith("aten._to_copy") and to is not None and torch.device(to).type not in places
        crossing = name.startswith("aten.copy_") and len(places) > 1
        waits = (copied or crossing) and not (kwargs.get("non_blocking") or True in args[2:])
        if waits or name.startswith("aten._local_scalar_dense") and places != {"cpu"}:
            self.found.append(name)
        return function(*args, **kwargs)


def test_greedy_steps_overlap_and_give_the_tokens_of_steps_in_turns(checkpoint, requests, tmp_path, monkeypatch):
    wanted = ("bos_only", "text_64")
    lines = [line | {"logprobs": None, "max_new_tokens": 8} for line in few(requests, "base") if line["id"] in wanted]
    plan = NPU_SIM | {"dtype": "fp32", "graph_cache": str(tmp_path)}
    expected = serve(start(checkpoint("base"), overlap=False, **plan), lines)
    engine = start(checkpoint("base"), **plan)
    assert engine.executor.run.overlap, "the default of an NPU"
    rank, ahead, blocking = engine.executor.rank, [], Blocking()
    launch, finish = rank.launch, rank.finish

    def watched(*given):
        ahead.append(ahead[-1] + 1 if ahead else 1)
        with blocking:
            return launch(*given)

    def taken(launched):
        ahead.append(ahead[-1] - 1)
        return finish(launched)

    serve(engine, lines)
    monkeypatch.setattr(rank, "launch", watched)
    monkeypatch.setattr(rank, "finish", taken)
    found = serve(engine, [line | {"id": f"{line['id']} again"} for line in lines])
    assert all(found[f"{id} again"].token_ids == result.token_ids for id, result in expected.items())
    assert max(ahead) == 2 and holds_nothing(engine)
    assert blocking.found == []
