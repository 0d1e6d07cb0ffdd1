"""Converts Meta's tokenizer.model, a list of tokens in tiktoken's format, into a tokenizer. Needs no tiktoken.

Each line holds a token's bytes in base64, and its rank, which is also its id. The split pattern and the special tokens
are those of llama_models 0.3.0 (llama3/tokenizer.py). As in transformers' conversion, `<|image|>` gets the id after
all others, which is the first of the embedding's additional rows; Meta's code replaces the id while it encodes.
"""

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from mllama_graph.core.errors import UserError

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_SPECIAL = 256
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
IMAGE = "<|image|>"


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.model. Raises UserError where the file is damaged or in another format."""
    ranks = _ranks(path)
    characters = _byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {text(token): rank for token, rank in ranks.items()}
    merges = [(text(left), text(right)) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_special_token_{i + 2}|>" for i in range(NUM_SPECIAL - len(SPECIAL_TOKENS))]
    special = [*SPECIAL_TOKENS, *reserved, IMAGE]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def _ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path} can't be read: line {number} is not a token in base64 and its rank. Download Meta's "
                "tokenizer.model again, or put the model's tokenizer.json beside it."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path} is damaged: its ranks have gaps, or some bytes have no token. Download it again.")
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that joins to a token, in the order of the joined token's rank.

    tiktoken merges the adjacent pair whose joined token has the lowest rank, whatever the pair.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte: the byte's own, or the next after 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
