"""The rule of the forms in which a decode step attends to pages (plan/cores.py).

Limits of shapes and dtypes are in ge_ops/attention.py.
"""

import torch

from mllama_graph.ascend.device_rules import DECODING, Faults, of_decoding, pool_of
from mllama_graph.ascend.graph import Context, LoweredGraph
from mllama_graph.ascend.graphdef import ATTENTION, INPUTS, VIEWS, OpDef, attributes_of, described_shape, inputs_of
from mllama_graph.plan.cores import BSH, SPLIT, TND, Form

# The input that counts the rows up to the end of each sequence.
ENDS = "prepared.ends_B"


def forms(graph: LoweredGraph, context: Context) -> Faults:
    """Attention has its bucket's form; packed rows come with their ends, and parts are merged by their log-sum-exp.

    Packed rows (TND) take cumulative lengths of queries (docs of npu_fused_infer_attention_score, actual_seq_lengths):
    whether a length is cumulative is not seen in a graph, so that the input must be the one that is made so. The
    log-sum-exp is fp32 (docs, softmaxLse); in 16 bits, sums of 30 would be rounded to steps of 1/8.
    """
    chosen = context.spec.forms_of(context.bucket)
    for op in graph.of_type(ATTENTION):
        pool = pool_of(graph, dict(inputs_of(op))["key0"])
        if pool and of_decoding(graph, context, op):
            yield from _form(graph, context, op, chosen.image if pool == "image_pages" else chosen.text)
        if attributes_of(op).get("softmax_lse_flag"):
            yield from _merged(graph, op)


def _form(graph: LoweredGraph, context: Context, op: OpDef, form: Form) -> Faults:
    sources, attributes = dict(inputs_of(op)), attributes_of(op)
    table = graph.maker(graph.behind(sources["block_table"])) if "block_table" in sources else op
    if table.type not in INPUTS:
        return  # reported by `straight` and `layouts`
    entries, found = described_shape(table)[0], attributes.get("input_layout", BSH)
    parts = entries // context.bucket.rows
    found = SPLIT if found == BSH and parts > 1 else found
    if (found, parts if found == SPLIT else 1) != (form.name, form.parts):
        yield op, f"attends in {found} with {parts} parts, but {form.name} with {form.parts} was chosen"
    if found == SPLIT and not attributes.get("softmax_lse_flag"):
        yield op, f"has {entries} entries for {context.bucket.rows} sequences, but no log-sum-exp to merge them by"
    ends = f"{DECODING if context.bucket.prompts else 'given.'}{ENDS}"
    if found == TND and (role := graph.role(graph.behind(sources["actual_seq_lengths"]))) != ends:
        yield op, f"takes {role or 'no input'} as the cumulative lengths of its packed rows, not {ends}"


def _merged(graph: LoweredGraph, op: OpDef) -> Faults:
    """Follows the log-sum-exp to the product with the results of the parts."""
    values, weighs = [f"{op.name}:1"], False
    while values:
        for taker, _ in graph.takers.get(value := values.pop(), []):
            narrowed = taker.type == "Cast" and graph.dtype(f"{taker.name}:0") != torch.float32
            if narrowed or (taker.type not in VIEWS and graph.dtype(value) not in (torch.float32, None)):
                yield taker, f"takes the log-sum-exp of {op.name}, or what is computed from it, out of fp32"
                return
            if _reads_results(graph, taker, op):
                weighs = True
            else:
                values.append(f"{taker.name}:0")
    if not weighs:
        yield op, "gives a log-sum-exp by which its results are not weighed"


def _reads_results(graph: LoweredGraph, taker: OpDef, op: OpDef) -> bool:
    """Whether an operation takes the attention's results, too."""
    return any(graph.behind(value, (*VIEWS, "Cast")) == f"{op.name}:0" for _, value in inputs_of(taker))
