"""POST /tokenize and /detokenize: the ids of a prompt or of messages, and the text of ids."""

from collections.abc import Mapping
from typing import Any

from mllama_graph.model.fields import describe
from mllama_graph.server import fields
from mllama_graph.server.chat import TEMPLATE, texts
from mllama_graph.server.completions import ids_of
from mllama_graph.server.errors import refused
from mllama_graph.server.service import Service


def tokenize(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of `prompt`, or of `messages` in the chat template. Pictures are not decoded: one token stands for each.

    Raises ApiError or UserError.
    """
    service.model(body)
    if (body.get("prompt") is None) == (body.get("messages") is None):
        raise refused("give one of prompt and messages.", "prompt")
    if body.get("messages") is not None:
        service.check_text(sum(map(len, texts(body["messages"]))), "messages")
        given = {name: body[name] for name in TEMPLATE if body.get(name) is not None}
        messages = service.pictures.resolved(body["messages"])
        ids = [*service.processor.request({**given, "messages": messages}).ids]
    else:
        if not isinstance(body["prompt"], str):
            raise refused(f"prompt is {describe(body['prompt'])}; it must be a text.", "prompt")
        service.check_text(len(body["prompt"]), "prompt")
        ids = ids_of(service.processor, body["prompt"], fields.flag(body, "add_special_tokens", True))
    shown = [service.tokens.label(id) for id in ids] if fields.flag(body, "return_token_strs") else None
    return {"count": len(ids), "max_model_len": service.run.plan.max_length, "tokens": ids, "token_strs": shown}


def detokenize(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """The text of `tokens`, special tokens included. Raises ApiError."""
    service.model(body)
    ids, most = body.get("tokens"), service.processor.shape.embeddings
    if not isinstance(ids, list) or not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise refused(f"tokens is {describe(ids)}; it must be a list of ids.", "tokens")
    if wrong := [id for id in ids if not 0 <= id < most]:
        raise refused(f"tokens holds {wrong[0]}; ids run from 0 to {most - 1}.", "tokens")
    return {"prompt": b"".join(map(service.tokens.raw, ids)).decode("utf8", "replace")}
