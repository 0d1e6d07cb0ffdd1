"""Pictures of requests. Clients send data: URIs; nothing that they write is opened or fetched unless the operator
allows it."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from mllama_graph.core.errors import UserError
from mllama_graph.inputs.chat import IMAGE_PARTS
from mllama_graph.inputs.image_formats import formats
from mllama_graph.inputs.image_sources import part_source, read_source, shorten
from mllama_graph.server.errors import refused
from mllama_graph.server.fetch import Fetcher
from mllama_graph.server.limits import Bounds

DETAILS = (None, "auto", "low", "high", "original")


class Pictures:
    """Replaces the pictures of a request by their bytes, within the bounds.

    fetch_hosts, below: the hosts and the folder that the operator allows; none by default.
    """

    def __init__(self, bounds: Bounds, fetch_hosts: Sequence[str] = (), below: Path | None = None):
        self._bounds, self._below = bounds, below.resolve() if below else None
        self._fetcher = Fetcher(fetch_hosts, bounds.body) if fetch_hosts else None

    @property
    def waits(self) -> bool:
        """Whether reading a picture may wait for other hosts."""
        return self._fetcher is not None

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
        scheme, shown = source[:40].lstrip().partition(":")[0].lower(), f"picture {number} ({shorten(source)})"
        try:
            if scheme == "data":
                data = read_source(source)
                assert isinstance(data, bytes)
                return data
            if scheme in ("http", "https") and self._fetcher:
                return self._fetcher.fetch(source.strip())
            if scheme == "file" and self._below:
                return self._file(source.strip())
        except UserError as error:
            raise refused(f"{shown} can't be read: {error}", "messages", "invalid_image") from None
        text = f"{shown}: this server reads data: URIs only (data:image/png;base64,...)."
        raise refused(text, "messages", "invalid_image_url")

    def _file(self, uri: str) -> bytes:
        """The bytes of a file below the folder that the operator allows, after all links are followed."""
        assert self._below is not None
        parts = urlsplit(uri)
        refusal = UserError("it is no file below the server's files_below=.")
        if parts.netloc not in ("", "localhost") or "\0" in unquote(parts.path):
            raise refusal
        try:
            path = Path(unquote(parts.path)).resolve(strict=True)
            # The same message wherever the path leads, so that nobody learns which files exist.
            if not path.is_relative_to(self._below) or not path.is_file():
                raise refusal
            with path.open("rb") as file:
                data = file.read(self._bounds.body + 1)
        except (OSError, RuntimeError):
            raise refusal from None
        if len(data) > self._bounds.body:
            raise UserError(f"it has more than {self._bounds.body / (1 << 20):g} MiB.")
        return data

    def _check(self, data: bytes, number: int) -> None:
        """Check the pixels that a picture announces, before anything of it is decoded."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(data), formats=formats()) as image:
                    pixels = image.width * image.height
        except Image.DecompressionBombError as error:
            raise refused(f"picture {number}: {error}", "messages", "image_too_large") from None
        except Exception:
            # What is wrong with it is said by the processor, which knows more forms of damage.
            return
        if pixels > self._bounds.picture_pixels:
            text = (
                f"picture {number} has {image.width} x {image.height} pixels, more than the "
                f"{self._bounds.picture_pixels / 1e6:g} million that are read. Scale it down."
            )
            raise refused(text, "messages", "image_too_large")
