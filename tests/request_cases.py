"""Requests for a checkpoint of checkpoints.py, with prompt and image shapes that engines tend to get wrong.

Lengths lie on and around 16, 32, 64, 128 and 256, where buckets and pages end. Most requests give
`input_ids`, which fixes every token and every image's position; a few give `messages` or `prompt`.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from checkpoints import Spec
from PIL import Image

# name: (width, height, mode, file ending)
IMAGES = {
    "photo": (120, 90, "RGB", "jpg"),
    "square": (56, 56, "RGB", "png"),
    "tall": (61, 163, "RGB", "png"),
    "panorama": (800, 100, "RGB", "jpg"),
    "tower": (100, 800, "RGB", "png"),
    "large": (3000, 500, "RGB", "jpg"),
    "small": (10, 10, "RGB", "png"),
    "dot": (1, 1, "RGB", "png"),
    "thread": (1000, 3, "RGB", "png"),
    "grey": (90, 70, "L", "png"),
    "grey_alpha": (70, 50, "LA", "png"),
    "alpha": (75, 140, "RGBA", "png"),  # HF composites on white
    "palette": (130, 64, "P", "png"),
    "palette_alpha": (64, 64, "P+transparency", "png"),
    "cmyk": (99, 101, "CMYK", "jpg"),
    "binary": (40, 40, "1", "png"),
}


@dataclass(frozen=True)
class Case:
    """A prompt of `length` ids with `<|image|>` at `places`, one image for each."""

    length: int
    new_tokens: int
    images: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    ignore_eos: bool = False


CASES = {
    "bos_only": Case(1, 16),
    "text_15": Case(15, 24),
    "text_16": Case(16, 17),
    "text_64": Case(64, 96, ignore_eos=True),
    "text_257": Case(257, 24),
    "bos_image": Case(2, 32, ("photo",), (1,)),
    "image_first_17": Case(17, 64, ("photo",), (1,), ignore_eos=True),
    "image_before_bos_31": Case(31, 24, ("square",), (0,)),
    "text_before_image_32": Case(32, 32, ("tall",), (20,)),
    "image_last_33": Case(33, 48, ("photo",), (32,)),
    "text_before_image_63": Case(63, 66, ("alpha",), (40,), ignore_eos=True),
    "two_images_64": Case(64, 32, ("photo", "square"), (1, 30)),
    "chain_of_two_65": Case(65, 40, ("tall", "photo"), (1, 2)),
    "chain_of_three_48": Case(48, 96, ("small", "panorama", "square"), (1, 2, 3), ignore_eos=True),
    "three_images_127": Case(127, 24, ("grey", "tower", "photo"), (5, 40, 90)),
    "chain_then_one_128": Case(128, 33, ("square", "dot", "large"), (1, 2, 70)),
    "one_then_chain_129": Case(129, 64, ("alpha", "palette", "tall"), (10, 80, 81), ignore_eos=True),
    "chain_last_19": Case(19, 24, ("photo", "grey"), (17, 18)),
    "same_image_twice_49": Case(49, 24, ("photo", "photo"), (1, 25)),
    "panorama_20": Case(20, 24, ("panorama",), (1,)),
    "tower_21": Case(21, 24, ("tower",), (1,)),
    "large_22": Case(22, 24, ("large",), (1,)),
    "small_23": Case(23, 24, ("small",), (4,)),
    "dot_24": Case(24, 24, ("dot",), (1,)),
    "thread_25": Case(25, 24, ("thread",), (1,)),
    "grey_26": Case(26, 16, ("grey",), (1,)),
    "grey_alpha_27": Case(27, 16, ("grey_alpha",), (1,)),
    "palette_28": Case(28, 16, ("palette",), (1,)),
    "palette_alpha_29": Case(29, 16, ("palette_alpha",), (1,)),
    "cmyk_30": Case(30, 16, ("cmyk",), (1,)),
    "binary_18": Case(18, 16, ("binary",), (1,)),
    "image_255": Case(255, 40, ("photo",), (1,)),
    "two_images_256": Case(256, 32, ("tall", "panorama"), (100, 200)),
}


def cases(folder: Path, spec: Spec, seed: int) -> list[dict]:
    """Requests as in a requests.jsonl; their images are written to `folder` and named by absolute path."""
    rng = np.random.default_rng(seed)
    files = write_images(Path(folder), rng)
    requests = []
    for name, case in CASES.items():
        request = {"id": name, "input_ids": prompt_ids(case, spec, rng), "max_new_tokens": case.new_tokens}
        if case.images:
            request["images"] = [files[image] for image in case.images]
        if case.ignore_eos:
            request["ignore_eos"] = True
        requests.append(request)
    requests += templated_requests(files, spec)
    for number, request in enumerate(requests):
        if number % 4:  # every fourth request is without log-probabilities, so that batches mix both
            request["logprobs"] = 3
    return requests


def prompt_ids(case: Case, spec: Spec, rng: np.random.Generator) -> list[int]:
    """<|begin_of_text|> first (second after an image at 0), random text ids, <|image|> at the case's places."""
    ids = rng.integers(0, spec.text_vocab, case.length).tolist()
    ids[1 if 0 in case.places else 0] = spec.special_id("<|begin_of_text|>")
    for place in case.places:
        ids[place] = spec.vocab
    return ids


def templated_requests(files: dict[str, str], spec: Spec) -> list[dict]:
    """Requests that the engine tokenizes: `prompt`, and `messages` where the checkpoint has a template."""
    requests = [
        {"id": "prompt_text", "prompt": "What's 2+2=4, (really)?", "max_new_tokens": 20},
        {
            "id": "prompt_images",
            "prompt": "比较这两张图片。",
            "images": [files["photo"], files["tall"]],
            "max_new_tokens": 24,
        },
    ]
    if spec.template is None:
        return requests
    data = base64.b64encode(Path(files["square"]).read_bytes()).decode()
    ask = {"type": "text", "text": "What do you see in the picture?"}
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": files["photo"]}}, ask]},
        {"role": "assistant", "content": "A cat."},
        {
            "role": "user",
            "content": [ask, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}],
        },
    ]
    requests.append(
        {"id": "messages_text", "messages": [{"role": "user", "content": "图里有什么？"}], "max_new_tokens": 24}
    )
    requests.append({"id": "messages_images", "messages": chat, "max_new_tokens": 32})
    return requests


def resolve(request: dict, tokenizer) -> tuple[list[int], list[Image.Image]]:
    """Token ids and images of a request, by way of HF's tokenizer and chat template."""
    images = [Image.open(path) for path in request.get("images", [])]
    if "input_ids" in request:
        return request["input_ids"], images
    if "prompt" in request and tokenizer.chat_template is None:
        return tokenizer.encode(
            f"<|begin_of_text|>{'<|image|>' * len(images)}{request['prompt']}", add_special_tokens=False
        ), images
    if "prompt" in request:
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": request["prompt"]}]
        messages = [{"role": "user", "content": parts}]
    else:
        messages = []
        for message in request["messages"]:
            content = message["content"]
            if not isinstance(content, str):
                urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
                images += [open_url(url) for url in urls]
                content = [{"type": "image"} if part["type"] == "image_url" else part for part in content]
            messages.append({"role": message["role"], "content": content})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False), images


def open_url(url: str) -> Image.Image:
    """An image from a file path or a base64 data: URI."""
    if url.startswith("data:"):
        return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))
    return Image.open(url)


def write_images(folder: Path, rng: np.random.Generator) -> dict[str, str]:
    """Write `IMAGES` to `folder`; returns the absolute path of each."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, (width, height, mode, ending) in IMAGES.items():
        path = (folder / f"{name}.{ending}").resolve()
        options = {"quality": 90} if ending == "jpg" else {}
        if mode == "P+transparency":
            mode, options = "P", {"transparency": 3}
        random_image(width, height, mode, rng).save(path, **options)
        files[name] = str(path)
    return files


def random_image(width: int, height: int, mode: str, rng: np.random.Generator) -> Image.Image:
    """Soft random blobs with some noise: neighbouring pixels agree as in a photo, and no two images look alike."""
    rough = rng.integers(0, 256, (2 + min(height, 40) // 8, 2 + min(width, 40) // 8, 4), dtype=np.uint8)
    smooth = np.asarray(
        Image.fromarray(rough, "RGBA").resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16
    )
    pixels = np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    if mode == "P":
        return image.convert("RGB").quantize(16)
    return image if mode == "RGBA" else image.convert(mode) if mode == "LA" else image.convert("RGB").convert(mode)
