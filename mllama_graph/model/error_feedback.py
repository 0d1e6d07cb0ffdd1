"""Rounding with error feedback: what rounding one input's column loses is made up for in the columns after it.

Source: GPTQ (Frantar et al., 2022): the squared error of a layer's outputs, sum over calibration rows x of
|x (W - Q)|^2, is a quadratic form in the Hessian sum x x^T, and is minimised column by column.
"""

import torch
from torch import Tensor

from mllama_graph.model.codes import Codes, quantise
from mllama_graph.model.formats import Format

# Share of the mean of the Hessian's diagonal that is added to it, as in GPTQ.
DAMPING = 0.01
# Columns whose error is applied to the rest at once, by one product.
BLOCK = 128


def factor(hessian_II: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian, fp32 (I, I); overwrites the Hessian."""
    diagonal = hessian_II.diagonal()
    # Inputs that are always 0 cost nothing: any value will do.
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    return torch.linalg.cholesky(inverse, upper=True)


def quantise_with_feedback(
    rows_OI: Tensor, form: Format, factor_II: Tensor, scale_dtype: torch.dtype = torch.float32
) -> Codes:
    """`codes.quantise` for 4-bit codes of whole rows, fp32, with error feedback.

    A group's scale is chosen when its first column is reached, with the errors of all columns before it applied.
    """
    assert form.code == "int4"
    w_OI, inputs = rows_OI.clone(), rows_OI.shape[1]
    size = form.group or inputs
    # Scales belong to blocks of columns that are up to date, so a block has whole groups, or is part of one.
    step = size if size < BLOCK else BLOCK
    one_group = Format("int4", group=0)
    codes_OI, scales = torch.empty(rows_OI.shape, dtype=torch.uint8), []
    for first in range(0, inputs, step):
        last = min(first + step, inputs)
        if first % size == 0:
            ahead = w_OI[:, first : first + size]
            scales.append(quantise(ahead, one_group, scale_dtype).scale)
        scale_O = scales[-1][:, 0]
        divisor_O = torch.where(scale_O > 0, scale_O, 1.0)
        errors = torch.empty(len(w_OI), last - first)
        for column in range(first, last):
            code_O = (w_OI[:, column] / divisor_O).round().clamp(-8, 7)
            codes_OI[:, column] = (code_O + 8).to(torch.uint8)
            error_O = (w_OI[:, column] - code_O * scale_O) / factor_II[column, column]
            w_OI[:, column:last] -= error_O[:, None] * factor_II[column, column:last]
            errors[:, column - first] = error_O
        w_OI[:, last:] -= errors @ factor_II[first:last, last:]
    return Codes(codes_OI, torch.cat(scales, dim=1))
