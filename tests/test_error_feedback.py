"""4-bit rounding with error feedback, and the Hessians that it takes from requests."""

import io
import json

import pytest
import torch
from engines import resolved, run_of, start
from test_quantize import written

from mllama_graph.core.errors import UserError
from mllama_graph.core.report import Progress
from mllama_graph.engine.calibration import Calibration
from mllama_graph.engine.forced import served
from mllama_graph.model.codes import quantise, values
from mllama_graph.model.error_feedback import DAMPING, factor, quantise_with_feedback
from mllama_graph.model.formats import Format, chosen
from mllama_graph.tasks.quantize_options import QuantizeOptions


def correlated(inputs: int, seed: int = 0) -> torch.Tensor:
    """x^T x of rows whose inputs are correlated, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(400, inputs // 4, generator=generator) @ torch.randn(inputs // 4, inputs, generator=generator)
    rows += 0.3 * torch.randn(400, inputs, generator=generator)
    return rows.T @ rows


def one_column_at_a_time(rows: torch.Tensor, form: Format, hessian: torch.Tensor) -> torch.Tensor:
    """Oracle: optimal brain quantisation in fp64. After each column, the rest is solved for anew with the Hessian's
    inverse over the remaining columns."""
    w, h = rows.double().clone(), hessian.double().clone()
    h += DAMPING * h.diagonal().mean() * torch.eye(len(h))
    size, out = form.group or w.shape[1], torch.empty_like(w)
    for column in range(w.shape[1]):
        if column % size == 0:
            found = quantise(w[:, column : column + size].float(), Format("int4"))
            scale = found.scale[:, 0].double()
        out[:, column] = (w[:, column] / scale).round().clamp(-8, 7) * scale
        inverse = torch.linalg.inv(h[column:, column:])
        w[:, column:] -= ((w[:, column] - out[:, column]) / inverse[0, 0])[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("group", [32, 64, 0])
def test_feedback_is_optimal_brain_quantisation_column_by_column(group):
    # Inputs beyond one block of columns, and not a multiple of it.
    rows, hessian = torch.randn(24, 192, generator=torch.Generator().manual_seed(3)), correlated(192)
    form = Format("int4", group=group)
    found = values(quantise_with_feedback(rows, form, factor(hessian.clone())), form)
    expected = one_column_at_a_time(rows, form, hessian).float()
    # A value at the middle of two codes may fall to either side in fp32, which changes the columns after it.
    same = (found - expected).abs() < 1e-3
    assert same.float().mean() > 0.98
    plain = values(quantise(rows, form), form)

    def loss(given):
        return ((given - rows) @ hessian * (given - rows)).sum()

    assert loss(found) < 0.5 * loss(plain)


def test_without_correlation_feedback_changes_nothing():
    rows, form = torch.randn(8, 256, generator=torch.Generator().manual_seed(4)), Format("int4", group=32)
    found = quantise_with_feedback(rows, form, factor(torch.eye(256)))
    plain = quantise(rows, form)
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.scale, plain.scale)


def test_an_input_that_is_always_zero_is_no_fault():
    rows, hessian, form = torch.randn(8, 64), correlated(64), Format("int4", group=32)
    hessian[5], hessian[:, 5] = 0, 0
    assert values(quantise_with_feedback(rows, form, factor(hessian)), form).isfinite().all()


def test_hessians_are_sums_over_the_rows_of_requests_without_padding(checkpoint):
    """Oracle: a batch that needs padding gives what each request alone gives, and the count of rows is that of ids."""
    folder = checkpoint("no_template")
    lines = [(n, {"input_ids": [n + 3] * (5 + n), "max_new_tokens": 1, "ignore_eos": True}) for n in range(3)]

    def hessian(given):
        engine = start(folder, batch=3)
        formats = chosen("w4a16", 32, ["text"], engine.executor.run.shape, 1)
        calibration, found = Calibration(engine, formats, given, folder, Progress(io.StringIO())), {}
        calibration._gathering.hessians = {
            id(engine.executor.rank.weights.get_submodule(path)): found.setdefault(
                path, torch.zeros(2 * [engine.executor.rank.weights.get_submodule(path).weight.shape[1]])
            )
            for path in calibration._order
        }
        list(served(engine, given, folder, range(len(given))))
        return found

    together, alone = hessian(lines), [hessian([line]) for line in lines]
    for path, found in together.items():
        torch.testing.assert_close(found, sum(one[path] for one in alone), rtol=1e-4, atol=1e-3)


def test_gptq_writes_a_checkpoint(checkpoint, requests, tmp_path):
    lines = requests("base")[:6]
    (tmp_path / "calibration.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = {}
    for rounding, calibration in (("mse", None), ("gptq", str(tmp_path / "calibration.jsonl"))):
        folder = tmp_path / rounding
        folder.mkdir()
        _, out, found[rounding] = written(folder, checkpoint("base"), "w4a16", rounding, calibration)
        assert (out / "config.json").is_file()
    assert found["mse"].keys() == found["gptq"].keys()
    differing = [name for name in found["mse"] if not torch.equal(found["mse"][name], found["gptq"][name])]
    assert differing and all(name.endswith(("_packed", "_scale")) for name in differing)


def test_calibration_without_a_request_that_can_be_served_is_refused_and_leaves_no_folder(checkpoint, tmp_path):
    (tmp_path / "calibration.jsonl").write_text('{"prompt": ""}\n')
    with pytest.raises(UserError, match="task.calibration= has no request that can be served"):
        written(tmp_path, checkpoint("base"), "w4a16", "gptq", str(tmp_path / "calibration.jsonl"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"quant": "w8a16"}, {"quant_parts": ["vision"]}, {"tp": 2}])
def test_gptq_is_for_four_bits_of_the_language_model(changes, checkpoint, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"prompt": "x"}')
    options = QuantizeOptions(folder=str(tmp_path / "o"), rounding="gptq", calibration=str(tmp_path / "c.jsonl"))
    with pytest.raises(UserError, match="is for quant=w4a16"):
        resolved(run_of(checkpoint("base"), task=options, **{"quant": "w4a16"} | changes))
    with pytest.raises(UserError, match="Give both or neither"):
        QuantizeOptions(rounding="gptq").check()
