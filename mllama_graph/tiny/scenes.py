"""Simple scenes drawn with Pillow: up to four coloured shapes, or a number of one to three digits."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling

from mllama_graph.tiny.tiling import TILE, canvas_scale

SHAPES = ("circle", "square", "triangle", "star", "cross")
# RGB values of each colour in common paint programs; a scene mixes two of them.
COLORS = {
    "red": ((255, 0, 0), (237, 28, 36), (200, 20, 30)),
    "orange": ((255, 127, 39), (255, 140, 0), (255, 165, 0)),
    "yellow": ((255, 255, 0), (255, 242, 0), (245, 215, 20)),
    "green": ((0, 255, 0), (34, 177, 76), (0, 128, 0)),
    "blue": ((0, 0, 255), (63, 72, 204), (30, 90, 230)),
    "purple": ((128, 0, 128), (163, 73, 164), (130, 40, 190)),
    "black": ((0, 0, 0), (20, 20, 20), (40, 40, 40)),
}
# One pair per shape that never occurs in a training image, question or answer.
UNSEEN = (("orange", "circle"), ("green", "square"), ("purple", "triangle"), ("blue", "star"), ("red", "cross"))
PAIRS = tuple((c, s) for c in COLORS for s in SHAPES)
SEEN = tuple(p for p in PAIRS if p not in UNSEEN)

SMALLEST_RADIUS = 7.0  # canvas pixels: a shape two patches wide
LARGEST_RADIUS = (42.0, 26.0, 21.0, 18.0)  # canvas pixels, by number of shapes
GAP = 7.0  # canvas pixels between two centres along x, so that "from left to right" is never ambiguous


@dataclass
class Shape:
    """One drawn shape; centre and radius in image pixels."""

    color: str
    shape: str
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.color, self.shape


@dataclass
class Glyph:
    """A drawn shape or digit, as the patch labels need it; its centre in image pixels."""

    label: str
    color: str
    x: float
    y: float


@dataclass
class Scene:
    """An image and what it shows."""

    image: Image.Image
    shapes: list[Shape]  # from left to right; empty on dense pages
    number: str  # empty if there is none
    glyphs: list[Glyph]
    mask: Image.Image  # i + 1 where glyph i was drawn, else 0


def random_size(rng: random.Random) -> tuple[int, int]:
    """Width and height of an image in pixels: from half a tile to 1000, with aspect ratios from 1:4 to 4:1."""
    if rng.random() < 0.12:
        return rng.randint(TILE // 2, TILE), rng.randint(TILE // 2, TILE)
    long_side = math.exp(rng.uniform(math.log(52), math.log(330 if rng.random() < 0.93 else 1000)))
    stretch = rng.random()
    aspect = 1.0 if stretch < 0.2 else math.exp(rng.uniform(0, 0.55 if stretch < 0.65 else 1.4))
    sides = int(long_side), max(20, int(long_side / aspect))
    return sides if rng.random() < 0.55 else sides[::-1]


def paint(rng: random.Random, color: str) -> tuple[int, int, int]:
    """A random RGB value of this colour."""
    a, b = rng.choices(COLORS[color], k=2)
    t = rng.random()
    red, green, blue = (max(0, min(255, round(u * t + v * (1 - t) + rng.uniform(-14, 14)))) for u, v in zip(a, b))
    return red, green, blue


@lru_cache(maxsize=1)
def noise_bank() -> np.ndarray:
    """Gaussian noise from which `add_noise` crops: [1200, 1200, 3] float32."""
    return np.random.default_rng(0).standard_normal((1200, 1200, 3), dtype=np.float32)


def draw_background(rng: random.Random, size: tuple[int, int], dark: bool) -> Image.Image:
    """An image of plain, tinted, graded or ruled paper."""
    style = rng.random()
    if dark:
        base = tuple(rng.randint(18, 62) for _ in range(3))
    elif style < 0.4:
        base = (255, 255, 255)
    else:
        level = rng.randint(195, 250)
        base = tuple(min(255, level + rng.randint(-14, 14)) for _ in range(3))
    image = Image.new("RGB", size, base)
    if style > 0.85:
        other = tuple(max(0, min(255, v + rng.randint(-40, 40))) for v in base)
        ramp = Image.linear_gradient("L").resize(size)
        image = Image.composite(Image.new("RGB", size, other), image, ramp if rng.random() < 0.5 else ramp.rotate(180))
    elif style > 0.75:
        pen = ImageDraw.Draw(image)
        line = tuple(v + (22 if dark else -22) for v in base)
        step = max(5, int(max(size) / rng.randint(5, 16)))
        for y in range(rng.randint(1, step), size[1], step):
            pen.line((0, y, size[0], y), fill=line)
        if rng.random() < 0.5:
            for x in range(rng.randint(1, step), size[0], step):
                pen.line((x, 0, x, size[1]), fill=line)
    return image


def add_noise(rng: random.Random, image: Image.Image, dark: bool) -> Image.Image:
    """Add pixel noise to half of the images, of a standard deviation up to 16 levels (8 on a dark background)."""
    if rng.random() < 0.5:
        return image
    width, height = image.size
    x, y = rng.randint(0, 1200 - width), rng.randint(0, 1200 - height)
    noise = noise_bank()[y : y + height, x : x + width] * rng.uniform(2, 8 if dark else 16)
    noisy = np.asarray(image, np.float32) + noise
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def outline_points(shape: str, x: float, y: float, r: float, tilt: float, squeeze: float) -> list[tuple[float, float]]:
    """Corners of a shape of radius r, rotated by `tilt` radians, with its width scaled by `squeeze`."""
    if shape == "circle":
        corners = [(math.sin(i * math.pi / 20), math.cos(i * math.pi / 20)) for i in range(40)]
    elif shape == "square":
        corners = [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    elif shape == "triangle":
        corners = [(0, -1), (1, 0.8), (-1, 0.8)]
    elif shape == "star":
        radii = [1.1 if i % 2 == 0 else 0.45 for i in range(10)]
        corners = [(q * math.sin(i * math.pi / 5), -q * math.cos(i * math.pi / 5)) for i, q in enumerate(radii)]
    else:
        a = 0.34
        corners = [(-a, -1), (a, -1), (a, -a)]
        for _ in range(3):
            corners += [(-v, u) for u, v in corners[-3:]]  # the previous arm, rotated by 90 degrees
    cos, sin = math.cos(tilt) * r, math.sin(tilt) * r
    return [(x + (u * cos - v * sin) * squeeze, y + u * sin + v * cos) for u, v in corners]


def draw_shape(
    rng: random.Random, pen: ImageDraw.ImageDraw, mask: ImageDraw.ImageDraw, shape: Shape, mark: int, scale: float
) -> None:
    """Draw a shape filled, outlined, or filled with a dark outline; fill it with `mark` in the mask."""
    tilt = rng.uniform(-0.16, 0.16) if rng.random() < 0.5 else 0.0
    points = outline_points(shape.shape, shape.x, shape.y, shape.radius, tilt, rng.uniform(0.86, 1.14))
    color, style = paint(rng, shape.color), rng.random()
    thin = 1.3 / scale
    if style < 0.65:
        pen.polygon(points, fill=color)
    elif style < 0.9:
        width = max(1, round(max(thin, rng.uniform(0.08, 0.3) * shape.radius)))
        pen.line([*points, points[0], points[1]], fill=color, width=width, joint="curve")
    else:
        pen.polygon(points, fill=color)
        width = max(1, round(min(thin, 0.08 * shape.radius)))
        pen.line([*points, points[0], points[1]], fill=(45, 45, 45), width=width, joint="curve")
    mask.polygon(points, fill=mark)


def place_shapes(rng: random.Random, size: tuple[int, int], shapes: list[Shape]) -> bool:
    """Set a random radius and position of every shape, without overlap. Returns False if they do not fit."""
    scale = canvas_scale(*size)
    width, height = size[0] * scale, size[1] * scale
    largest = min(0.44 * min(width, height), LARGEST_RADIUS[len(shapes) - 1])
    if largest < SMALLEST_RADIUS:
        return False
    placed: list[tuple[float, float, float]] = []
    for _ in shapes:
        for _ in range(30):
            r = math.exp(rng.uniform(math.log(SMALLEST_RADIUS), math.log(largest)))
            if min(width, height) < 2.3 * r:
                continue
            x, y = rng.uniform(r * 1.12, width - r * 1.12), rng.uniform(r * 1.12, height - r * 1.12)
            if all(abs(x - a) > GAP and math.hypot(x - a, y - b) > 1.22 * (r + c) for a, b, c in placed):
                placed.append((x, y, r))
                break
        else:
            return False
    for shape, (x, y, r) in zip(shapes, placed):
        shape.x, shape.y, shape.radius = x / scale, y / scale, r / scale
    return True


def draw_scene(rng: random.Random, pairs: list[tuple[str, str]]) -> Scene:
    """A scene with these (colour, shape) pairs at random positions."""
    shapes = [Shape(*p) for p in pairs]
    size = random_size(rng)
    while shapes and not place_shapes(rng, size, shapes):
        size = random_size(rng)
    shapes.sort(key=lambda s: s.x)
    dark = rng.random() < 0.2 and not any(s.color == "black" for s in shapes)
    image = draw_background(rng, size, dark)
    mask = Image.new("L", size, 0)
    pen, mask_pen = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    scale = canvas_scale(*size)
    for i, shape in enumerate(shapes):
        draw_shape(rng, pen, mask_pen, shape, i + 1, scale)
    glyphs = [Glyph(s.shape, s.color, s.x, s.y) for s in shapes]
    return Scene(add_noise(rng, image, dark), shapes, "", glyphs, mask)


@lru_cache(maxsize=128)
def digit_font(size: int) -> ImageFont.FreeTypeFont:
    """The scalable typeface that ships with Pillow."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def render_number(
    rng: random.Random, number: str, height: int, mark: int
) -> tuple[Image.Image, Image.Image, list[float]]:
    """Ink and label mask of a number about `height` pixels high, and the centres of its digits as fractions."""
    font = digit_font(max(8, round(height / 0.72 / 4) * 4))
    bold = round(font.size * rng.choice((0, 0, 0.02, 0.04)))
    space = font.size * rng.uniform(0.0, 0.14)
    edges = [bold + 1.0]
    for digit in number:
        edges.append(edges[-1] + font.getlength(digit) + 2 * bold + space)
    size = math.ceil(edges[-1] + bold), math.ceil(font.size * 0.76) + 2 * bold + 2
    ink, mask = Image.new("L", size, 0), Image.new("L", size, 0)
    pen, mask_pen = ImageDraw.Draw(ink), ImageDraw.Draw(mask)
    for i, digit in enumerate(number):
        pen.text((edges[i] + bold, size[1] - 1 - bold), digit, font=font, fill=255, anchor="ls", stroke_width=bold)
        mask_pen.rectangle((edges[i], 0, edges[i + 1] - space, size[1]), fill=mark + i)
    centers = [(a + b) / 2 / size[0] for a, b in zip(edges, edges[1:])]
    final = max(3, round(size[0] * height / size[1] * rng.uniform(0.85, 1.2))), max(5, height)
    ink, mask = ink.resize(final, Resampling.BILINEAR), mask.resize(final, Resampling.NEAREST)
    if rng.random() < 0.4:
        angle = rng.uniform(-7, 7)
        ink = ink.rotate(angle, Resampling.BILINEAR, expand=True)
        mask = mask.rotate(angle, Resampling.NEAREST, expand=True)
    return ink, mask, centers


def random_number(rng: random.Random, length: int) -> str:
    """A number of `length` digits without a leading zero."""
    first = rng.choice("0123456789" if length == 1 else "123456789")
    return first + "".join(rng.choice("0123456789") for _ in range(length - 1))


def draw_number(rng: random.Random, number: str) -> Scene:
    """A scene with a number, at least 15 canvas pixels high."""
    while True:
        size = random_size(rng)
        scale = canvas_scale(*size)
        tallest = min(size[1] * 0.9, 1.45 * size[0] / len(number) * 0.9)
        if tallest * scale >= 16:
            break
    height = round(math.exp(rng.uniform(math.log(max(15 / scale, tallest * 0.25)), math.log(tallest))))
    ink, mask_part, centers = render_number(rng, number, height, 1)
    fit = min(1.0, 0.97 * size[0] / ink.width, 0.97 * size[1] / ink.height)
    if fit < 1:
        smaller = max(1, int(ink.width * fit)), max(1, int(ink.height * fit))
        ink, mask_part = (ink.resize(smaller, Resampling.BILINEAR), mask_part.resize(smaller, Resampling.NEAREST))
    x, y = rng.randint(0, size[0] - ink.width), rng.randint(0, size[1] - ink.height)
    dark = rng.random() < 0.2
    color = rng.choice([c for c in COLORS if not (dark and c == "black")])
    image, mask = draw_background(rng, size, dark), Image.new("L", size, 0)
    image.paste(Image.new("RGB", ink.size, paint(rng, color)), (x, y), ink)
    mask.paste(mask_part, (x, y))
    glyphs = [Glyph(d, color, x + c * ink.width, y + ink.height / 2) for d, c in zip(number, centers)]
    return Scene(add_noise(rng, image, dark), [], number, glyphs, mask)


def draw_page(rng: random.Random) -> Scene:
    """A dense page for the patch head: some twenty shapes and digits, or numbers in small print."""
    length = rng.choice((1, 1, 2, 3))  # digits per number; pages of single digits also hold shapes
    while True:
        size = random_size(rng)
        scale = canvas_scale(*size)
        if size[0] * size[1] * scale**2 > 0.75 * (2 * TILE) ** 2 or rng.random() < 0.05:
            break
    dark = rng.random() < 0.2
    image, mask = draw_background(rng, size, dark), Image.new("L", size, 0)
    pen, mask_pen = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    glyphs: list[Glyph] = []
    # In canvas pixels. A digit is about 0.7 times as wide as high.
    cell = 17 + min(rng.expovariate(1 / 4 if length == 1 else 1 / 2), 30)
    columns = max(1, int(size[0] * scale / (cell * (0.3 + 0.7 * length))))
    rows = max(1, int(size[1] * scale / cell))
    wide, high = size[0] / columns, size[1] / rows
    for place in range(columns * rows):
        if rng.random() < 0.1:
            continue
        left, top, room = place % columns * wide, place // columns * high, min(wide / (0.3 + 0.7 * length), high)
        if length == 1 and rng.random() < 0.5:
            color, shape = rng.choice([p for p in SEEN if not (dark and p[0] == "black")])
            r = min(room / 2.3, max(SMALLEST_RADIUS / scale, room / 2.3 * rng.uniform(0.65, 1)))
            x, y = left + rng.uniform(1.1 * r, wide - 1.1 * r), top + rng.uniform(1.1 * r, high - 1.1 * r)
            glyphs.append(Glyph(shape, color, x, y))
            draw_shape(rng, pen, mask_pen, Shape(color, shape, x, y, r), len(glyphs), scale)
        else:
            color = rng.choice([c for c in COLORS if not (dark and c == "black")])
            number = "".join(rng.choices("0123456789", k=length))
            ink, part, centers = render_number(rng, number, round(room * rng.uniform(0.72, 0.98)), len(glyphs) + 1)
            x = round(left + rng.random() * max(0, wide - ink.width))
            y = round(top + rng.random() * max(0, high - ink.height))
            image.paste(Image.new("RGB", ink.size, paint(rng, color)), (x, y), ink)
            mask.paste(part, (x, y))
            glyphs += [Glyph(d, color, x + c * ink.width, y + ink.height / 2) for d, c in zip(number, centers)]
    return Scene(add_noise(rng, image, dark), [], "", glyphs, mask)
