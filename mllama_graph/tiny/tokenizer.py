"""Byte-level BPE tokenizer with the special tokens of Llama 3, and a minimal chat template with images."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mllama_graph.tiny.questions import NO_PICTURE, SMALL_TALK, WHAT, ZH_COLORS, ZH_SHAPES, plural
from mllama_graph.tiny.scenes import COLORS, SHAPES

BASE_VOCABULARY = 640
# The released tokenizer splits numbers into groups of up to three digits; here each digit is its own token.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, END_OF_TEXT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
START_HEADER, END_HEADER, EOM, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"
PYTHON_TAG, IMAGE = "<|python_tag|>", "<|image|>"
# <|image|> is last because it has an embedding row but no logit, as in the released checkpoints.
SPECIAL_TOKENS = (BOS, END_OF_TEXT, PAD, START_HEADER, END_HEADER, EOM, EOT, PYTHON_TAG, IMAGE)
VOCABULARY = BASE_VOCABULARY + len(SPECIAL_TOKENS) - 1

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|image|>' }}"
    "{%- elif part['type'] == 'text' %}{{- part['text'] | trim }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

# Chinese has no spaces. The tokenizer is trained on single words, so that no merge joins a colour and a shape: unseen
# pairs must consist of tokens that training shows. Words are separated by "|".
ZH_WORDS = (
    "图形|一个|两个|三个|四个|没有|有|我看到|我没看到|我什么也没看到|所以|和|、|，|。|？|是什么颜色|的|是|吗|"
    "有多少个|哪个在|在|左边|右边|上面|下面|中间|哪张图里有|第|一|二|张图里有|数字是|写的是什么数字|读出数字|"
    "这是什么数字|图里有什么|你看到了什么|描述这张图"
)
EN_WORDS = (
    "I| see| nothing| a| an|,| and|.| so| there| are| is| no| one| two| three| four|?|What| color| colour| the|The|"
    "I don't| don't| How|How| many| shape| shapes|Is| in| on| of| left| right| middle| above| below|Which| or|Yes|No|"
    " picture| has| first| second| number|Read|Describe| this| written| do| you"
)


def training_words() -> list[str]:
    """The words of all questions and answers, repeated until each becomes one token."""
    words = [*ZH_COLORS.values(), *ZH_SHAPES.values(), *ZH_WORDS.split("|"), *EN_WORDS.split("|")]
    words += ["user", "assistant", "system", "\n\n"]
    words += [" " + w for w in (*COLORS, *SHAPES, *map(plural, SHAPES))]
    talk = [t for pair in SMALL_TALK for t in pair] + list(NO_PICTURE.values())
    talk += [w for ws in WHAT.values() for w in ws]
    return words * 50 + [t for t in talk if t.isascii()] * 3


def build_tokenizer() -> Tokenizer:
    """Train the tokenizer; the result is deterministic."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator(training_words(), trainer)
    # Fill the vocabulary to a fixed size, so that the ids of special tokens do not depend on the number of merges.
    for i in range(BASE_VOCABULARY - bpe.get_vocab_size()):
        bpe.add_tokens([AddedToken(f"<|reserved_{i}|>", normalized=False)])
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return bpe


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """The tiny model's tokenizer, trained once per process."""
    return build_tokenizer()


@lru_cache(maxsize=50_000)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text that may contain special tokens; adds none."""
    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)


def render_prompt(question: str, images: int, system: str = "") -> str:
    """Apply the chat template to one user turn that starts with its images."""
    head = f"{START_HEADER}system{END_HEADER}\n\n{system}{EOT}" if system else ""
    user = f"{START_HEADER}user{END_HEADER}\n\n{IMAGE * images}{question}{EOT}"
    return f"{BOS}{head}{user}{START_HEADER}assistant{END_HEADER}\n\n"
