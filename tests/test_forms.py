"""In which form decode buckets attend to pages: chosen by modelled time and CANN's version, or forced, or refused."""

from dataclasses import replace

import pytest
from latencies import hardware, released

from mllama_graph.core import cann
from mllama_graph.core.config import PlanChoice, TorchairChoice
from mllama_graph.core.devices import CPU, NPU, NPU_SIM
from mllama_graph.core.errors import UserError
from mllama_graph.model.formats import Storage
from mllama_graph.plan.cores import BSH, SPLIT, TND, Form, Forms
from mllama_graph.plan.forms import forms_of
from mllama_graph.plan.latency import Model, latency_of
from mllama_graph.plan.make import Limits, make_plan

BF16 = Storage(2, 2, 2)
LIMITS = Limits(4, 8000, 192, 1)


def plan_of(shape, **choice):
    return make_plan(PlanChoice(**choice), LIMITS, shape, NPU.paging, False)


def chosen(attention="auto", device=NPU_SIM, ranks=8, shape=None, mode="max-autotune", plan=None, known=None, **choice):
    shape = shape or released("11b")
    options = TorchairChoice(attention=attention, mode=mode)
    plan = plan or plan_of(shape, **choice)
    return dict(forms_of(options, device, shape, BF16, ranks, known or hardware(), plan)), plan


def names(forms, form):
    return {bucket for bucket, found in forms.items() if getattr(found, form).name != BSH}


@pytest.fixture
def cann_of(monkeypatch):
    return lambda version: monkeypatch.setattr(cann, "installed", lambda: version)


def test_many_keys_and_few_sequences_use_more_cores_and_are_modelled_so():
    forms, plan = chosen()
    long = plan.decode(1, 64, 0)
    assert forms[long] == Forms(text=Form(TND))
    assert forms[plan.decode(1, 64, 51)] == Forms(Form(TND), Form(SPLIT, 20))
    assert plan.decode(1, 1, 0) not in forms
    model = Model(released("11b"), BF16, 8, hardware())
    assert latency_of(model, 128, long, forms[long]).seconds < latency_of(model, 128, long).seconds
    assert latency_of(model, 128, long, forms[long]).described_cores == "16"


@pytest.mark.parametrize(("version", "form"), [("9.0.0", TND), ("9.1.0", TND), ("8.5.0", SPLIT), (None, SPLIT)])
def test_flash_decoding_is_chosen_only_where_cann_has_it(version, form, cann_of):
    cann_of(version)
    forms, plan = chosen(device=NPU)
    assert forms[plan.decode(1, 64, 0)].text.name == form


@pytest.mark.parametrize("attention", ["tnd", "split"])
def test_a_forced_form_is_taken_wherever_it_can_be(attention):
    forms, plan = chosen(attention, ranks=1)
    decode = {bucket for bucket in plan.buckets() if bucket.phase == "decode"}
    # A single page has no parts; a kernel of packed rows takes no mask.
    assert names(forms, "text") == {bucket for bucket in decode if attention == "tnd" or bucket.pages > 1}
    assert names(forms, "image") == {bucket for bucket in decode if attention == "split" and bucket.image_pages}
    assert chosen("bsh")[0] == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"version": "8.5.0"},
            r"attention=tnd: CANN 8.5.0 has no flash decoding.* Use backend.torchair.attention=auto",
        ),
        ({"page_size": 256}, "here pages hold 256, heads are 128 wide, and 4 query heads of a rank share 1"),
        ({"width": 64}, "here pages hold 128, heads are 64 wide"),
        ({"kv_heads": 32}, "heads are 128 wide, and 4 query heads of a rank share 4"),
    ],
)
def test_flash_decoding_is_refused_where_it_can_not_be(change, said, cann_of):
    cann_of(change.get("version", "9.1.0"))
    text = released("11b").text
    text = replace(text, head_width=change.get("width", 128), kv_heads=change.get("kv_heads", 8))
    shape = replace(released("11b"), text=text)
    with pytest.raises(UserError, match=said):
        chosen("tnd", NPU, shape=shape, page_size=change.get("page_size", 128))


def test_a_pool_too_small_for_every_part_keeps_one():
    roomy, plan = chosen("split")
    small = replace(plan, num_pages=plan.scratch_pages + 65)
    forms, _ = chosen("split", plan=small)
    assert roomy[plan.decode(4, 64, 0)].text == Form(SPLIT, 5)
    assert plan.decode(4, 64, 0) not in forms and forms[plan.decode(1, 64, 0)].text.name == SPLIT


def test_captured_kernels_have_parts_alone():
    forms, plan = chosen(mode="npugraph_ex")
    assert forms[plan.decode(1, 64, 51)] == Forms(Form(SPLIT, 20), Form(SPLIT, 20))
    with pytest.raises(UserError, match="attention=tnd: with backend.torchair.mode=npugraph_ex lengths are integers"):
        chosen("tnd", mode="npugraph_ex")


def test_other_devices_and_hardware_without_figures_have_one_form():
    assert chosen(device=CPU)[0] == {}
    bare = replace(hardware(), calibration=replace(hardware().calibration, cores=0))
    assert chosen(known=bare)[0] == {}
