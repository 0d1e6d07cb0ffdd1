"""Packages that only call operators: Inductor's code compiled with native/graph.h, run by torch's package loader."""

import logging
import zipfile

import pytest
import torch

from mllama_graph import native


class Calls(torch.nn.Module):
    """Calls of this project's operators, one with two results and one that writes its input, and views."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(16, generator=torch.Generator().manual_seed(0))
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x, at, pages, slot):
        ops = torch.ops.mllama_graph
        normed, total = ops.add_rms_norm(x, x, self.weight, 1e-5, None)
        heads = normed[:, :8].view(4, 2, 4)
        ops.write_pages_(heads, heads, pages, pages, None, None, slot, None)
        return ops.gelu(normed.view(2, 8, -1)).view(4, -1), ops.take_rows(total, at)


def inputs(row=1):
    generator = torch.Generator().manual_seed(1)
    x, pages = torch.randn(4, 16, generator=generator), torch.zeros(3, 2, 2, 4)
    return [x, torch.tensor([row]).int(), pages, torch.tensor([5, 0, 2, 1]).int()]


def build(path, cache_home):
    """The package of `Calls`, as torch loads it, and its C++ sources by the end of their names."""
    from mllama_graph.graphs.build import build_package

    native.load("kernels", cache_home)
    program = torch.export.export(Calls(), tuple(inputs()), strict=False)
    build_package(program, path, {"cpp.threads": 1}, cpu=True, calls=True)
    with zipfile.ZipFile(path) as package:
        sources = {
            end: package.read(name).decode()
            for name in package.namelist()
            for end in ("wrapper.cpp", "kernel.cpp")
            if name.endswith(end)
        }
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1), sources


@pytest.fixture(scope="module")
def package(tmp_path_factory, cache_home):
    return build(tmp_path_factory.mktemp("calls") / "graph.pt2", cache_home)


def bound(loader, module):
    loader.load_constants({"weight": module.weight}, False, True, True)
    return loader


def test_a_package_computes_and_writes_what_its_module_does(package):
    module, (ours, theirs) = Calls(), (inputs(), inputs())
    for _ in range(3):
        for mine, other in zip(bound(package[0], module).boxed_run(list(ours)), module(*theirs), strict=True):
            assert torch.equal(mine, other)
        assert torch.equal(ours[2], theirs[2]) and ours[2].any()


def test_weights_are_read_in_place(package):
    module = Calls()
    loader = bound(package[0], module)
    module.weight.mul_(3)
    assert torch.equal(loader.boxed_run(inputs())[0], module(*inputs())[0])
    assert loader.get_constant_fqns() == ["weight"]


def test_no_header_of_torch_is_compiled_with_it_and_nothing_is_generated(package):
    _, sources = package
    assert "#include <torch" not in sources["wrapper.cpp"] and "Graph::run_impl" in sources["wrapper.cpp"]
    assert "{" not in sources["kernel.cpp"]


def test_an_operators_error_message_reaches_the_caller(package):
    with pytest.raises(RuntimeError, match="take_rows takes the numbers of rows"):
        bound(package[0], Calls()).boxed_run(inputs(row=7))


def test_a_missing_weight_is_refused(package):
    with pytest.raises(RuntimeError):
        package[0].load_constants({}, False, True, True)


def test_where_the_header_does_not_suffice_torchs_own_are_compiled(tmp_path, cache_home, monkeypatch, caplog):
    from mllama_graph.graphs import build as module

    (tmp_path / "graph.h").write_text("#error too little\n")
    monkeypatch.setattr(module, "HEADER", tmp_path / "graph.h")
    with caplog.at_level(logging.WARNING):
        loader, sources = build(tmp_path / "graph.pt2", cache_home)
    assert "more than native/graph.h has" in caplog.text and "#include <torch" in sources["wrapper.cpp"]
    for mine, other in zip(bound(loader, Calls()).boxed_run(inputs()), Calls()(*inputs()), strict=True):
        assert torch.equal(mine, other)
