"""task=bench: the columns that are promised, and figures that add up."""

import csv

from test_run import run

SEED = ["batch", "input_len", "output_len", "embedding_len", "first_token_time(ms)", "non_first_token_time(ms)",
        "ResponseTime(ms)", "E2E Throughput Average(Tokens/s)"]


def test_each_case_has_a_line_with_the_columns_of_the_seed_system_first(tmp_path):
    done = run(tmp_path / "out", "task=bench", "batch_sizes=[1,2]", "lengths=[5,40]", "task.new_tokens=4",
               "task.repetitions=2", "backend=eager")
    assert done.code == 0, done.err
    with (tmp_path / "out" / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0])[:8] == SEED
    assert [(line["batch"], line["input_len"]) for line in lines] == [("1", "5"), ("1", "40"), ("2", "5"), ("2", "40")]
    for line in lines:
        figures = {name: float(value) for name, value in line.items() if name != "engine"}
        # The tiny model's picture: 2 tiles of 74 tokens, the class token with them.
        assert figures["output_len"] == 4 and figures["embedding_len"] == 148
        assert figures["decode_ms_least"] <= figures["non_first_token_time(ms)"] <= figures["decode_ms_most"]
        assert figures["first_token_time(ms)"] >= figures["vision_ms"] + figures["prefill_ms"] > 0
        # Without a vision pass: the image is known.
        assert 0 < figures["first_token_again_ms"]
        assert figures["decode_of_floor"] > 0 and figures["read_gb_per_s"] > 0
    assert float(lines[3]["self_kv_bytes"]) > float(lines[1]["self_kv_bytes"])


def test_an_unknown_peer_and_no_batch_are_refused(tmp_path):
    for given, said in (("peers=[vllm]", "peers=vllm is not one of transformers"), ("batch_sizes=[0]", "batch_sizes=0")):
        done = run(tmp_path / "out", "task=bench", given)
        assert done.code == 2 and said in done.err, done.err
