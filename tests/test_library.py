"""`LLM` in the caller's process: what it refuses, where it warns, and threads that share it."""

import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from engines import holds_nothing

from mllama_graph import LLM, Sampling, UserError

EAGER = {"backend": "eager", "backend.kernels": "plain", "dtype": "fp32", "quiet": True}


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(checkpoint("base"), batch=3, **EAGER) as llm:
        yield llm


@pytest.mark.parametrize(
    "keys, rule",
    [
        ({"model": "12b"}, "model='12b' is neither a folder nor one of 11b, 90b"),
        ({"model": None}, "model='None' is neither a folder nor one of 11b, 90b"),
        ({"batch": 0}, "batch=0 must be at least 1"),
        ({"batch": 3, "max_step_tokens": 2}, "max_step_tokens=2 must be at least batch=3"),
        ({"bacth": 3}, "there is no key 'bacth'. Did you mean batch? conf/config.yaml lists every key."),
        ({"plan": {"page_sise": 8}}, "there is no key 'plan.page_sise'. conf/config.yaml lists its keys."),
        ({"model": "11b", "weights": "meta"}, "weights=meta"),
        ({"backend": "nope"}, "backend=nope is not one of"),
        ({"tp": 3}, "tp=3 does not divide"),
        ({"task": "serve"}, "task='serve': LLM serves requests and runs no task. python -m mllama_graph does."),
        ({"min_p": 0.1}, "there is no key 'min_p': it is a field of requests."),
        ({"speculate": None}, "speculate=null: it must have a value. Leave speculate= out for its default, or use"),
    ],
    ids=str,
)
def test_invalid_arguments_of_llm_are_refused_in_one_line(keys, rule):
    with pytest.raises(UserError, match=re.escape(rule)) as error:
        LLM(**{"backend": "eager", "quiet": True} | keys)
    assert "\n" not in str(error.value)


PIXELS = np.zeros((8, 8, 3), dtype=np.uint8)
PART = {"role": "user", "content": [{"type": "image", "image": PIXELS}]}


@pytest.mark.parametrize(
    "given, rule",
    [
        (None, "a request is a string, a list of messages or a dict; this is of type NoneType."),
        (5, "this is of type int."),
        (b"hi", "this is of type bytes."),
        ({"role": "user", "content": "hi"}, 'Put it into a list: {"messages": [{"role": ..., "content": ...}]}.'),
        ({"promt": "hi"}, "this has none, but unknown fields: 'promt'."),
        ({"prompt": "x", "images": PIXELS}, "not ndarray: convert it with PIL.Image.fromarray."),
        ({"prompt": "x", "images": [PIXELS]}, "picture 1 is of type ndarray: convert it with PIL.Image.fromarray."),
        ([PART], "image_url.url, not ndarray: convert it with PIL.Image.fromarray."),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_request_of_a_wrong_form_is_refused_with_the_form_that_it_needs(given, rule, llm):
    with warnings.catch_warnings(), pytest.raises(UserError, match=re.escape(rule)):
        warnings.simplefilter("error")
        llm.generate(given)
    refused, served = llm.generate([given, {"input_ids": [3], "max_new_tokens": 1}])
    assert rule in refused.error and not served.error


def test_a_warning_of_an_unknown_field_names_the_callers_line(llm):
    asked = {"input_ids": [3], "max_new_tokens": 1, "temprature": 1}
    calls = [
        lambda: llm.generate(asked),
        lambda: list(llm.stream([asked])),
        lambda: llm.request(asked),
        lambda: llm.generate({"input_ids": [3]}, max_new_tokens=1, temprature=1),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="unknown fields are ignored: temprature") as caught:
            call()
        assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, call.__code__.co_firstlineno)]


def test_options_of_sampling_are_those_of_requests(llm):
    options = {"repetition_penalty": 1.5, "logit_bias": {7: 100}, "min_tokens": 3, "prompt_logprobs": 1, "logprobs": 1}
    asked = {"input_ids": [3, 4, 5], "max_new_tokens": 8}
    [by_field], [by_sampling] = llm.generate(asked | options), llm.generate(asked, Sampling(**options))
    assert by_field.token_ids == by_sampling.token_ids and 7 in by_field.token_ids
    assert by_field.prompt_logprobs == by_sampling.prompt_logprobs and len(by_field.prompt_logprobs) == 3
    deltas = [*llm.stream(asked | options)]
    assert [delta.token for delta in deltas] == by_field.token_ids
    assert [delta.prompt_logprobs for delta in deltas] == [by_field.prompt_logprobs] + [None] * 7


def test_threads_share_an_llm_and_each_gets_the_results_that_it_gets_alone(llm):
    asked = [[{"input_ids": [n + 3] * (m + 1), "max_new_tokens": 12} for m in range(4)] for n in range(4)]
    wanted = [[result.token_ids for result in llm.generate(requests)] for requests in asked]
    # A stream of another thread is open while the threads run, and is then left.
    stream = llm.stream(asked[0])
    next(stream)
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda requests: [result.token_ids for result in llm.generate(requests)], asked))
    stream.close()
    assert found == wanted and holds_nothing(llm._engine)


def test_a_long_text_of_one_thread_does_not_hold_up_the_short_text_of_another(llm):
    long = llm.stream({"input_ids": [3], "max_new_tokens": 100, "ignore_eos": True})
    next(long)
    with ThreadPoolExecutor(1) as thread:
        short = thread.submit(llm.generate, {"input_ids": [5], "max_new_tokens": 2})
        waited = sum(not short.done() for _ in long)
    # The short text needs two of its own steps; the rest is the time in which a thread starts.
    assert len(short.result()[0].token_ids) == 2 and waited < 50


def test_a_stream_of_a_closed_llm_is_refused(checkpoint):
    llm = LLM(checkpoint("base"), **EAGER)
    stream = llm.stream({"input_ids": [3], "max_new_tokens": 5, "ignore_eos": True})
    next(stream)
    llm.close()
    with pytest.raises(UserError, match="this LLM is closed"):
        next(stream)
