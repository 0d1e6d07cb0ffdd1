"""The forms in which an NPU's decode steps attend to pages (plan/cores.py), decided once per bucket. No torch.

backend.torchair.attention=auto takes the form of the least modelled latency; bsh, tnd and split force one where it can
compute the attention at all, and leave BSH elsewhere.
"""

from collections.abc import Iterator

from mllama_graph.core import cann
from mllama_graph.core.config import TorchairChoice
from mllama_graph.core.devices import Device
from mllama_graph.core.errors import UserError
from mllama_graph.core.hardware import HardwareChoice
from mllama_graph.model.formats import Storage
from mllama_graph.model.shape import ModelShape
from mllama_graph.plan.bucket import Bucket
from mllama_graph.plan.buckets import Plan
from mllama_graph.plan.cores import BSH, BSH_ALONE, FORMS, SPLIT, TND, TND_PAGE, TND_WIDTH, Form, Forms, accepted
from mllama_graph.plan.latency import BEST, BEST_WITHOUT_TND, Model

# The forms of the decode buckets that don't attend in BSH alone.
BucketForms = tuple[tuple[Bucket, Forms], ...]
AUTO = "auto"
# The mode of torchair whose lengths are tensors; that of captured kernels takes integers, and masks.
GE = "max-autotune"


def form_of(choice: TorchairChoice, device: Device) -> str:
    """`Model.form` of a run. CANN below 9.0, one whose version is not known, and captured kernels have no TND."""
    if choice.attention != AUTO:
        return choice.attention.upper()
    version = cann.release(cann.installed() or "")
    if choice.mode != GE:
        return BEST_WITHOUT_TND
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
        _check_tnd(model, choice.mode, device, plan.page_size)
    if asked == BSH or not (hardware.calibration.cores or asked in FORMS):
        return ()
    return tuple(_chosen(model, plan))


def _chosen(model: Model, plan: Plan) -> Iterator[tuple[Bucket, Forms]]:
    for bucket in plan.buckets():
        # TND and parts serve one row of a sequence.
        if bucket.phase == "decode" and bucket.each == 1:
            text = _form(model, plan, bucket.rows, bucket.pages, False, plan.num_pages)
            image = _form(model, plan, bucket.rows, bucket.image_pages, True, plan.num_image_pages)
            if (forms := Forms(text, image)) != BSH_ALONE:
                yield bucket, forms


def _form(model: Model, plan: Plan, rows: int, pages: int, masked: bool, pool: int) -> Form:
    """The form of attention to block tables of `pages` pages in a pool of `pool`.

    A pool that can't hold all pages of a batch's block tables has no SPLIT: all entries of attention must not have more
    pages than the pool (docs npu_fused_infer_attention_score), and a part without keys of its own has one.
    """
    if not pages:
        return Form()
    form = model.choice(model.pages(rows, pages * plan.page_size, masked, plan.page_size))
    return Form() if form.name == SPLIT and rows * pages > pool else form


def _check_tnd(model: Model, mode: str, device: Device, page_size: int) -> None:
    given, remedy = "backend.torchair.attention=tnd", "Use backend.torchair.attention=auto."
    if mode != GE:
        raise UserError(
            f"{given}: with backend.torchair.mode={mode} lengths are integers, so that masks hide the rest of a block "
            f"table, and this layout takes none. {remedy}"
        )
    version = cann.installed() if device.uses_cann else None
    if (known := cann.release(version or "")) and known < cann.ADVISED:
        raise UserError(f"{given}: CANN {version} has no flash decoding, which begins with CANN 9.0. {remedy}")
    if not accepted(of := model.pages(1, page_size, False, page_size), TND):
        raise UserError(
            f"{given}: its kernel takes pages of {TND_PAGE} tokens in 16 bits, heads {TND_WIDTH} wide, and more query "
            f"heads than key-value heads, but here pages hold {of.page}, heads are {of.width} wide, and {of.heads} "
            f"query heads of a rank share {of.kv_heads} key-value heads. {remedy}"
        )
