"""Pictures of requests. Clients send data: URIs; nothing that they write is opened or fetched unless the operator
allows it."""

import io
import warnings
from typing import Any

from PIL import Image

from mllama_graph.inputs.chat import IMAGE_PARTS
from mllama_graph.inputs.image_formats import formats
from mllama_graph.inputs.image_sources import part_source, read_source, shorten
from mllama_graph.server.errors import refused
from mllama_graph.server.limits import Bounds

DETAILS = (None, "auto", "low", "high", "original")


class Pictures:
    """Replaces the pictures of a request by their bytes, within the bounds."""

    def __init__(self, bounds: Bounds):
        self._bounds = bounds

    def resolved(self, messages: Any) -> Any:
        """The messages with the bytes of each picture in place of its address. Other faults are left to the processor.

        Raises ApiError or UserError for a picture that may not be read or can't be.
        """
        if not isinstance(messages, list):
            return messages
        number = 0
        shown = []
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list):
                parts = []
                for part in content:
                    if isinstance(part, dict) and part.get("type") in IMAGE_PARTS:
                        number += 1
                        part = {"type": "image", "image": self._bytes(part, number)}
                    parts.append(part)
                message = {**message, "content": parts}
            shown.append(message)
        return shown

    def _bytes(self, part: dict[str, Any], number: int) -> bytes:
        if number > self._bounds.pictures:
            text = f"more than {self._bounds.pictures} pictures in one request. Set max_images= at the server's start."
            raise refused(text, "messages", "too_many_images")
        inner = part.get("image_url")
        detail = inner.get("detail") if isinstance(inner, dict) else part.get("detail")
        if detail not in DETAILS:
            raise refused(f"picture {number}: detail must be auto, low or high.", "messages")
        source = part_source(part, number)
        if not isinstance(source, str):
            raise refused(f"picture {number}: image_url.url must be a string.", "messages", "invalid_image")
        data = self._read(source, number)
        self._check(data, number)
        return data

    def _read(self, source: str, number: int) -> bytes:
        scheme = source[:40].lstrip().partition(":")[0].lower()
        if scheme != "data":
            text = (
                f"picture {number} ({shorten(source)}): this server reads data: URIs only (data:image/png;base64,...)."
            )
            raise refused(text, "messages", "invalid_image_url")
        try:
            data = read_source(source)
        except Exception as error:
            raise refused(
                f"picture {number} ({shorten(source)}) can't be read: {error}", "messages", "invalid_image"
            ) from None
        assert isinstance(data, bytes)
        return data

    def _check(self, data: bytes, number: int) -> None:
        """Check the pixels that a picture announces, before anything of it is decoded."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(data), formats=formats()) as image:
                    pixels = image.width * image.height
        except Exception:
            # What is wrong with it is said by the processor, which knows more forms of damage.
            return
        if pixels > self._bounds.picture_pixels:
            text = (
                f"picture {number} has {image.width} x {image.height} pixels, more than the "
                f"{self._bounds.picture_pixels / 1e6:g} million that are read. Scale it down."
            )
            raise refused(text, "messages", "image_too_large")
