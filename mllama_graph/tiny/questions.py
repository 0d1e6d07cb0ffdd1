"""Questions about scenes with answers in whole sentences, in English and Chinese.

Every answer follows from the image alone, so that exact match is a fair measure. Answers that give a count first list
the shapes, so that the model can count its own words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from mllama_graph.tiny.scenes import COLORS, SHAPES, Scene, Shape

ZH_COLORS = dict(zip(COLORS, ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "黑色")))
ZH_SHAPES = dict(zip(SHAPES, ("圆形", "方形", "三角形", "星形", "十字形")))
COUNT_WORDS = {"en": ("no", "one", "two", "three", "four"), "zh": ("没有", "有一个", "有两个", "有三个", "有四个")}

LANGUAGES = ("en", "zh")
KINDS: tuple[str, ...] = ("what1", "what2", "what3", "color", "present", "absent", "count", "position", "two")
KINDS += ("digits1", "digits2", "digits3", "text")

SMALL_TALK = (
    ("Hello!", "Hello! Show me a picture."),
    ("Hi", "Hello! Show me a picture."),
    ("Who are you?", "I am a tiny vision model."),
    ("What are you?", "I am a tiny vision model."),
    ("What can you do?", "I can describe simple shapes, count them and read numbers."),
    ("Help", "I can describe simple shapes, count them and read numbers."),
    ("How are you?", "I am fine, thank you."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
    ("Bye", "Goodbye!"),
    ("你好", "你好！请给我一张图。"),
    ("你好！", "你好！请给我一张图。"),
    ("你是谁？", "我是一个小小的视觉模型。"),
    ("你会做什么？", "我会描述简单的图形、数数和读数字。"),
    ("你能做什么？", "我会描述简单的图形、数数和读数字。"),
    ("你好吗？", "我很好，谢谢。"),
    ("谢谢", "不客气。"),
    ("谢谢！", "不客气。"),
    ("再见", "再见！"),
)
NO_PICTURE = {"en": "There is no picture.", "zh": "没有图片。"}


@dataclass(frozen=True)
class Question:
    """One question; `answers` holds every accepted answer; training uses the first."""

    kind: str
    language: str
    text: str
    answers: tuple[str, ...]
    variety: str = ""  # the class of the answer within its kind, to balance evaluation sets


def article(words: str) -> str:
    """The words with `a` or `an` before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(shape: str) -> str:
    """The plural of the English name of a shape."""
    return shape + ("es" if shape.endswith("s") else "s")


def name(color: str, shape: str, language: str) -> str:
    """The name of a coloured shape; an empty colour or shape is left out."""
    if language == "en":
        return f"{color} {shape or 'shape'}".strip()
    return (ZH_COLORS[color] if color else "") + (ZH_SHAPES[shape] if shape else "图形")


def join(parts: list[str], language: str) -> str:
    """'a, b and c' in the given language."""
    comma, last = (", ", " and ") if language == "en" else ("、", "和")
    return parts[0] if len(parts) == 1 else comma.join(parts[:-1]) + last + parts[-1]


def listing(shapes: list[Shape], language: str) -> str:
    """'I see a red circle and a blue star', in the order given."""
    if not shapes:
        return "I see nothing" if language == "en" else "我什么也没看到"
    if language == "en":
        return "I see " + join([article(name(s.color, s.shape, "en")) for s in shapes], "en")
    return "我看到" + join(["一个" + name(s.color, s.shape, "zh") for s in shapes], "zh")


WHAT = {
    "en": ("What is in the picture?", "What do you see?", "Describe the picture."),
    "zh": ("图里有什么？", "你看到了什么？", "描述这张图。"),
}


def ask_what(scene: Scene, rng: random.Random, language: str) -> Question | None:
    """What is in the picture, if it shows one to three different (colour, shape) pairs."""
    pairs = [s.pair for s in scene.shapes]
    if not 1 <= len(pairs) <= 3 or len(set(pairs)) < len(pairs):
        return None
    answer = listing(scene.shapes, language) + ("." if language == "en" else "。")
    return Question(f"what{len(pairs)}", language, rng.choice(WHAT[language]), (answer,))


def ask_digits(scene: Scene, rng: random.Random, language: str) -> Question | None:
    """What number is written, if there is one."""
    if not scene.number:
        return None
    if language == "en":
        text = rng.choice(("What number is written?", "Read the number.", "What number is this?", *WHAT["en"][:1]))
        answer = f"The number is {scene.number}."
    else:
        text = rng.choice(("写的是什么数字？", "读出数字。", "这是什么数字？", *WHAT["zh"][:1]))
        answer = f"数字是{scene.number}。"
    return Question(f"digits{len(scene.number)}", language, text, (answer,))


def color_question(rng: random.Random, shape: str, language: str) -> str:
    """The text of a question about the colour of a shape."""
    if language == "en":
        return rng.choice((f"What color is the {shape}?", f"What colour is the {shape}?"))
    return f"{ZH_SHAPES[shape]}是什么颜色？"


def ask_color(scene: Scene, rng: random.Random, language: str) -> Question | None:
    """What colour a shape has, if the scene shows a shape exactly once."""
    names = [s.shape for s in scene.shapes]
    single = [s for s in scene.shapes if names.count(s.shape) == 1]
    if not single:
        return None
    s = rng.choice(single)
    answer = f"The {s.shape} is {s.color}." if language == "en" else f"{ZH_SHAPES[s.shape]}是{ZH_COLORS[s.color]}的。"
    return Question("color", language, color_question(rng, s.shape, language), (answer,), s.color)


def presence_question(color: str, shape: str, language: str) -> str:
    """The text of a question whether a coloured shape is there."""
    return f"Is there {article(name(color, shape, 'en'))}?" if language == "en" else f"有{name(color, shape, 'zh')}吗？"


def ask_present(scene: Scene, rng: random.Random, language: str) -> Question | None:
    """Whether a coloured shape is there, where one is clearly on the left, in the middle or on the right."""
    pairs, width = [s.pair for s in scene.shapes], scene.image.width
    places = [(s, s.x / width) for s in scene.shapes if pairs.count(s.pair) == 1]
    clear = [(s, x) for s, x in places if x < 0.36 or 0.44 < x < 0.56 or x > 0.64]
    if not clear:
        return None
    by_side = {side: [s for s, x in clear if side == (0 if x < 0.4 else 1 if x < 0.6 else 2)] for side in range(3)}
    side = rng.choice([k for k, v in by_side.items() if v])
    s = rng.choice(by_side[side])
    if language == "en":
        place = ("on the left", "in the middle", "on the right")[side]
        answer = f"Yes, {article(name(s.color, s.shape, 'en'))} {place}."
    else:
        answer = f"有，{('左边', '中间', '右边')[side]}有一个{name(s.color, s.shape, 'zh')}。"
    return Question("present", language, presence_question(s.color, s.shape, language), (answer,), str(side))


def ask_absent(scene: Scene, rng: random.Random, language: str, allowed: frozenset) -> Question | None:
    """A question about a coloured shape that is not there; often its colour or its shape is."""
    if scene.number:
        return None
    if rng.random() < 0.4:
        shape = rng.choice([s for s in SHAPES if s not in {q.shape for q in scene.shapes}])
        answer = f"I don't see {article(shape)}." if language == "en" else f"我没看到{ZH_SHAPES[shape]}。"
        return Question("absent", language, color_question(rng, shape, language), (answer,), "color")
    seen = {s.pair for s in scene.shapes}
    missing = sorted(allowed - seen)
    near = [p for p in missing if any(p[0] == s.color or p[1] == s.shape for s in scene.shapes)]
    color, shape = rng.choice(near if near and rng.random() < 0.7 else missing)
    thing = name(color, shape, language)
    answer = f"No, I don't see {article(thing)}." if language == "en" else f"没有，我没看到{thing}。"
    return Question("absent", language, presence_question(color, shape, language), (answer,), "pair")


def count_question(scene: Scene, color: str, shape: str, language: str) -> Question:
    """How many shapes match `color` and `shape`; an empty string matches all."""
    n = sum((not color or s.color == color) and (not shape or s.shape == shape) for s in scene.shapes)
    thing = name(color, shape, language)
    if language == "en":
        many = f"{color} {plural(shape or 'shape')}".strip()
        tail = f"so there {'is' if n == 1 else 'are'} {COUNT_WORDS['en'][n]} {thing if n == 1 else many}."
        text, answer = f"How many {many} are there?", f"{listing(scene.shapes, 'en')}, {tail}"
    else:
        text, answer = f"有多少个{thing}？", f"{listing(scene.shapes, 'zh')}，所以{COUNT_WORDS['zh'][n]}{thing}。"
    return Question("count", language, text, (answer,), str(n))


# Weights with which the counts 0 to 4 are drawn among those of a scene: higher for rare ones.
COUNT_WEIGHTS = (0.5, 0.55, 1.2, 3.0, 5.0)


def ask_count(scene: Scene, rng: random.Random, language: str, allowed: frozenset) -> Question | None:
    """How many shapes, shapes of one kind, of one colour, or of both there are."""
    if scene.number:
        return None
    options = [("", "")] + [("", s) for s in SHAPES] + [(c, "") for c in COLORS] + sorted(allowed)
    by_count: dict[str, list[Question]] = {}
    for color, shape in options:
        q = count_question(scene, color, shape, language)
        near = not scene.shapes or any(s.color == color or s.shape == shape for s in scene.shapes)
        if q.variety != "0" or near or rng.random() < 0.2:
            by_count.setdefault(q.variety, []).append(q)
    counts = sorted(by_count)
    return rng.choice(by_count[rng.choices(counts, [COUNT_WEIGHTS[int(c)] for c in counts])[0]])


DIRECTIONS = {
    "left": ("on the left", "on the left of", "左边"),
    "right": ("on the right", "on the right of", "右边"),
    "above": ("above", "above", "上面"),
    "below": ("below", "below", "下面"),
}


def ask_position(scene: Scene, rng: random.Random, language: str) -> Question | None:
    """Which of two coloured shapes is on the left, on the right, above or below."""
    pairs, names = [s.pair for s in scene.shapes], [s.shape for s in scene.shapes]
    usable = [s for s in scene.shapes if pairs.count(s.pair) == 1]
    if len(usable) < 2:
        return None
    a, b = rng.sample(usable, 2)
    direction = rng.choice(tuple(DIRECTIONS))
    axis, extent = ("x", scene.image.width) if direction in ("left", "right") else ("y", scene.image.height)
    distance = getattr(a, axis) - getattr(b, axis)
    if abs(distance) < 0.12 * extent:
        return None
    bare = names.count(a.shape) == 1 and names.count(b.shape) == 1 and rng.random() < 0.3
    first, second = (name("" if bare else s.color, s.shape, language) for s in (a, b))
    a_wins = (distance < 0) == (direction in ("left", "above"))
    winner, other = (first, second) if a_wins else (second, first)
    asked, stated, zh = DIRECTIONS[direction]
    if language == "en":
        text, answer = f"Which is {asked}, the {first} or the {second}?", f"The {winner} is {stated} the {other}."
    else:
        text, answer = f"{first}和{second}，哪个在{zh}？", f"{winner}在{other}的{zh}。"
    return Question("position", language, text, (answer,), direction + str(int(a_wins)))


def ask_two(scenes: list[Scene], rng: random.Random, language: str) -> Question | None:
    """Which of two images shows a coloured shape that only one of them shows."""
    holder = rng.randrange(2)
    mine, theirs = scenes[holder].shapes, scenes[1 - holder].shapes
    other_pairs, other_shapes = {s.pair for s in theirs}, {s.shape for s in theirs}
    only = [s for s in mine if s.pair not in other_pairs]
    if not only:
        return None
    s = rng.choice(only)
    bare = s.shape not in other_shapes and rng.random() < 0.3
    thing = name("" if bare else s.color, s.shape, language)
    if language == "en":
        text = f"Which picture has {article(thing)}?"
        answer = f"The {('first', 'second')[holder]} picture has {article(thing)}."
    else:
        text, answer = f"哪张图里有{thing}？", f"第{'一二'[holder]}张图里有{thing}。"
    return Question("two", language, text, (answer,), str(holder))


def ask_text(rng: random.Random) -> Question:
    """Small talk, or a question about an image that is missing."""
    if rng.random() < 0.7:
        text, answer = rng.choice(SMALL_TALK)
        return Question("text", "en" if text.isascii() else "zh", text, (answer,))
    language = rng.choice(LANGUAGES)
    shape, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    if language == "en":
        asked = (
            f"How many {plural(shape)} are there?",
            f"How many {color} shapes are there?",
            "What number is written?",
            color_question(rng, shape, "en"),
        )
    else:
        asked = (
            f"有多少个{ZH_SHAPES[shape]}？",
            f"有多少个{ZH_COLORS[color]}图形？",
            "写的是什么数字？",
            color_question(rng, shape, "zh"),
        )
    return Question("text", language, rng.choice((*WHAT[language], *asked)), (NO_PICTURE[language],))


def ask(kind: str, scene: Scene, rng: random.Random, language: str, allowed: frozenset) -> Question | None:
    """A question of this kind about a scene, or None if the scene does not allow one.

    `allowed` has the (colour, shape) pairs that a question may name although the scene does not show them.
    """
    if kind in ("absent", "count"):
        return {"absent": ask_absent, "count": ask_count}[kind](scene, rng, language, allowed)
    askers: dict[str, Callable[[Scene, random.Random, str], Question | None]] = {
        "what": ask_what,
        "digits": ask_digits,
        "color": ask_color,
        "present": ask_present,
        "position": ask_position,
    }
    return askers[kind](scene, rng, language)
