"""The forms in which an NPU's decode steps attend to pages (plan/cores.py), decided once per bucket. No torch.

backend.torchair.attention=auto takes the form of the least modelled latency; bsh, tnd and split force one where it can
compute the attention at all, and leave BSH elsewhere.
"""

from collections.abc import Iterator

from mllama_graph.core import cann
from mllama_graph.core.config import HardwareChoice, TorchairChoice
from mllama_graph.core.devices import Device
from mllama_graph.core.errors import UserError
from mllama_graph.model.formats import Storage
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.buckets import Plan
from mllama_graph.plan.cores import BSH, FORMS, SPLIT, TND, TND_PAGE, TND_WIDTH, Form, Forms, accepted
from mllama_graph.plan.latency import BEST, BEST_WITHOUT_TND, Model

# The forms of the decode buckets that don't attend in BSH alone.
BucketForms = tuple[tuple[Bucket, Forms], ...]
AUTO = "auto"
# The mode of torchair whose lengths are tensors; that of captured kernels takes integers, and attends in BSH.
GE = "max-autotune"


def form_of(choice: TorchairChoice, device: Device) -> str:
    """`Model.form` of a run. CANN below 9.0, or one whose version is not known, has no TND to choose."""
    if choice.attention != AUTO:
        return choice.attention.upper()
    version = cann.release(cann.installed() or "")
    return BEST if not device.uses_cann or version and version >= cann.ADVISED else BEST_WITHOUT_TND


def forms_of(
    choice: TorchairChoice,
    device: Device,
    shape: ModelShape,
    storage: Storage,
    ranks: int,
    hardware: HardwareChoice,
    plan: Plan,
) -> BucketForms:
    """The forms of a run's decode buckets; none where they all attend in BSH.

    Raises UserError where a form is asked for that this CANN or this model can't have.
    """
    if not device.compiles_on_rank:
        return ()
    asked = form_of(choice, device)
    model = Model(shape, storage, ranks, hardware, asked)
    if asked == TND:
        _check_tnd(model, device, plan.page_size)
    if asked == BSH or choice.mode != GE or not (hardware.calibration.cores or asked in FORMS):
        return ()
    return tuple(_chosen(model, plan))


def _chosen(model: Model, plan: Plan) -> Iterator[tuple[Bucket, Forms]]:
    size = plan.page_size
    for bucket in plan.buckets():
        if bucket.phase != "decode":
            continue
        text = model.choice(model.pages(bucket.rows, bucket.pages * size, False, size))
        image = model.choice(model.pages(bucket.rows, bucket.image_pages * size, True, size))
        forms = Forms(
            _that_fits(text, bucket.rows * bucket.pages, plan.num_pages),
            _that_fits(image, bucket.rows * bucket.image_pages, plan.num_image_pages) if bucket.image_pages else Form(),
        )
        if forms != Forms():
            yield bucket, forms


def _that_fits(form: Form, most: int, pages: int) -> Form:
    """BSH instead of SPLIT for a pool of `pages` that can't hold all `most` pages of a batch's block tables.

    Attention must not read more pages in all of its entries than the pool has (docs npu_fused_infer_attention_score),
    and a part without keys of its own reads one: see ops/npu_parts.py.
    """
    return Form() if form.name == SPLIT and most > pages else form


def _check_tnd(model: Model, device: Device, page_size: int) -> None:
    given, remedy = "backend.torchair.attention=tnd", "Use backend.torchair.attention=auto."
    version = cann.installed() if device.uses_cann else None
    if (known := cann.release(version or "")) and known < cann.ADVISED:
        raise UserError(f"{given}: CANN {version} has no flash decoding, which begins with CANN 9.0. {remedy}")
    if not accepted(of := model.pages(1, page_size, False, page_size), TND):
        raise UserError(
            f"{given}: its kernel takes pages of {TND_PAGE} tokens in 16 bits, heads {TND_WIDTH} wide, and more query "
            f"heads than key-value heads, but here pages hold {of.page}, heads are {of.width} wide, and {of.heads} "
            f"query heads of a rank share {of.kv_heads} key-value heads. {remedy}"
        )
