"""A small, real tokenizer in the released layout: any text encodes, Chinese and emoji included."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# In the order of the released tokenizer; <|image|> follows at id == vocab_size, outside the head's range.
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
IMAGE_TOKEN = "<|image|>"

# Llama 3's split pattern: contractions, words, up to three digits, punctuation, white space.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The released template without its tools and date: header, parts in place, <|eot_id|>.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- '<|image|>' }}"
    "{%- elif part['type'] == 'text' %}{{- part['text'] | trim }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)

TOKENIZER_CORPUS = [
    "What is this? What do you see in the picture? The cat sits on the mat and looks at the bird.",
    "Compare the two images: the first image shows a red circle, the second image shows a blue square.",
    "You are a helpful assistant. Answer the question about the image in one short sentence.",
    "user assistant system there are three small triangles above the big green star",
    "Please describe every colour, number and letter that appears on the yellow sign near the old house.",
    "Which of these animals is larger, and how many people are standing behind the white car today?",
    "The weather was cold, so nobody could walk along the river before the morning train arrived there.",
    "图里有什么？图片中有一个红色的圆形和一个蓝色的方块。请比较这两张图片。",
] * 4


def write_tokenizer(folder: Path, text_vocab: int, template: str | None) -> None:
    """Byte-level BPE of `text_vocab` entries, Llama 3's special tokens, then <|image|>.

    Raises ValueError when the corpus gives too few merges for `text_vocab`.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TOKENIZER_CORPUS, trainers.BpeTrainer(vocab_size=text_vocab, initial_alphabet=alphabet, show_progress=False)
    )
    if tokenizer.get_vocab_size() != text_vocab:
        raise ValueError(f"text_vocab={text_vocab}, but the corpus gives {tokenizer.get_vocab_size()} entries")
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in [*SPECIAL_TOKENS, IMAGE_TOKEN]]
    )
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]}:1 $B:1", special_tokens=[bos]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
    }
    if template == "tokenizer_config":
        config["chat_template"] = CHAT_TEMPLATE
    elif template == "jinja":
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
