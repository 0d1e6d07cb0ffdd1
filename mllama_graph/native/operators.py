"""Schemas of the C++ operators, and fake implementations, which give tracing the shapes of their results.

The operators of `kernels` are declared here and implemented in C++. The other libraries declare their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Imported only where it is used: the command line uses this module before torch is imported.
    from torch import Tensor

    Maybe = Tensor | None

# Number of ranks, while collectives are traced.
world: int | None = None


def _like(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


def _all_gather(x: Tensor) -> Tensor:
    if world is None:
        raise RuntimeError("the number of ranks is not known: declare(world) or attach first")
    return x.new_empty((world, *x.shape))


def _nothing(*given: Any) -> None:
    return None


def _linear(x: Tensor, weight: Tensor, *others: Maybe) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, real: Maybe) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _rope_angles(position: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    size = (position.shape[0], 2 * inv_freq.shape[0])
    return inv_freq.new_empty(size), inv_freq.new_empty(size)


def _swiglu(h: Tensor, real: Maybe) -> Tensor:
    return h.new_empty((h.shape[0], h.shape[1] // 2))


def _embed(id: Tensor, weight: Tensor, scale: Maybe, first: Maybe, real: Maybe) -> Tensor:
    import torch

    return weight.new_empty((id.shape[0], weight.shape[1]), dtype=torch.float32)


def _take_rows(x: Tensor, at: Tensor) -> Tensor:
    return x.new_empty((at.shape[0], *x.shape[1:]))


def _normalise(tiles: Tensor, real: Tensor, scale: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return scale.new_empty(tiles.shape)


def _patch_embed(x: Tensor, weight: Tensor) -> Tensor:
    C, _, height, width = x.shape
    side = weight.shape[-1]
    return x.new_empty((C, (height // side) * (width // side), weight.shape[0]))


def _add_positions(x: Tensor, *others: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] + 1, x.shape[2]))


def _pad_rows(x: Tensor, real: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    import torch

    C, L, E = x.shape
    rows = C * (L + -L % multiple)
    return x.new_empty((rows, E)), x.new_empty((rows,), dtype=torch.bool)


def _join_features(x: Tensor, kept: list[Tensor], tiles: int, tokens: int) -> Tensor:
    return x.new_empty((tiles * tokens, x.shape[1] * (1 + len(kept))))


# Library -> operator -> (schema, or None if the library declares it itself; fake implementation). `real` is the number
# of rows that are not padding: padding rows are not read, and their results are zeros. Weights, biases, gates and
# tables may be stored in 16 bits.
OPERATORS: dict[str, dict[str, tuple[str | None, Callable[..., Any]]]] = {
    "kernels": {
        "lay_rows_": ("(Tensor(a!) weight, int at, Tensor rows) -> ()", _nothing),
        "linear": ("(Tensor x, Tensor weight, Tensor? bias, Tensor? real) -> Tensor", _linear),
        "rms_norm": ("(Tensor x, Tensor weight, float eps, Tensor? real) -> Tensor", _like),
        "add_rms_norm": (
            "(Tensor x, Tensor y, Tensor weight, float eps, Tensor? real) -> (Tensor, Tensor)",
            _add_rms_norm,
        ),
        "layer_norm": ("(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", _like),
        "rope_angles": ("(Tensor position, Tensor inv_freq) -> (Tensor, Tensor)", _rope_angles),
        "rope": ("(Tensor x, Tensor cosine, Tensor sine, Tensor? real) -> Tensor", _like),
        "gelu": ("(Tensor x) -> Tensor", _like),
        "swiglu": ("(Tensor h, Tensor? real) -> Tensor", _swiglu),
        "gated": ("(Tensor y, Tensor gate, Tensor see) -> Tensor", _like),
        "add_gated": ("(Tensor x, Tensor y, Tensor? bias, Tensor? gate) -> Tensor", _like),
        "embed": ("(Tensor id, Tensor weight, Tensor? scale, Tensor? first, Tensor? real) -> Tensor", _embed),
        "take_rows": ("(Tensor x, Tensor at) -> Tensor", _take_rows),
        "normalise": ("(Tensor tiles, Tensor real, Tensor scale, Tensor mean, Tensor std) -> Tensor", _normalise),
        "patch_embed": ("(Tensor x, Tensor weight) -> Tensor", _patch_embed),
        "add_tile_embedding": ("(Tensor x, Tensor table, Tensor aspect, Tensor gate) -> Tensor", _like),
        "add_positions": (
            "(Tensor x, Tensor first, Tensor position, Tensor table, Tensor aspect, Tensor gate) -> Tensor",
            _add_positions,
        ),
        "pad_rows": ("(Tensor x, Tensor real, int multiple) -> (Tensor, Tensor)", _pad_rows),
        "join_features": ("(Tensor x, Tensor[] kept, int tiles, int tokens) -> Tensor", _join_features),
        "write_pages_": (
            "(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? k_scales, Tensor(d!)? v_scales, "
            "Tensor slot, Tensor? real) -> ()",
            _nothing,
        ),
        "attend_pages": (
            "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? k_scales, Tensor? v_scales, Tensor table, "
            "Tensor length, float scale) -> Tensor",
            _like,
        ),
        "attend_prompt": (
            "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? k_scales, Tensor? v_scales, Tensor table, "
            "Tensor rows, Tensor past, Tensor? decoding, float scale) -> Tensor",
            _like,
        ),
        "attend_tiles": ("(Tensor q, Tensor k, Tensor v, Tensor pad, float scale) -> Tensor", _like),
        "attend_image": (
            "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor? k_scales, Tensor? v_scales, Tensor table, Tensor fill, "
            "Tensor see, Tensor? rows, Tensor? decoding, float scale) -> Tensor",
            _like,
        ),
    },
    "quantised": {
        "lay_codes_": (
            "(Tensor(a!) weight, int at, Tensor stored, int layout, Tensor? order, bool whole) -> ()",
            _nothing,
        ),
        "lay_rounded_": (
            "(Tensor(a!) weight, Tensor(b!) scale, int at, Tensor rows, int first, int groups, Tensor steps, "
            "bool panels, bool whole) -> ()",
            _nothing,
        ),
        "sum_codes": ("(Tensor rows) -> Tensor", _nothing),
        "unnested": (
            "(Tensor bytes, Tensor map, Tensor of_blocks, int each, int skipped, float added) -> Tensor",
            _nothing,
        ),
        "linear_coded": (
            "(Tensor x, Tensor weight, Tensor scale, Tensor? shift, Tensor? order, Tensor? table, Tensor? bias, "
            "Tensor? real) -> Tensor",
            _linear,
        ),
        "linear_integers": (
            "(Tensor x, Tensor weight, Tensor scale, Tensor? shift, Tensor? order, Tensor? input_scale, "
            "Tensor? input_zero, Tensor? largest, Tensor? bias, Tensor? real) -> Tensor",
            _linear,
        ),
    },
    "collectives": {"all_reduce": (None, _like), "all_gather": (None, _all_gather)},
    "runner": {},
    "streams": {},
}
