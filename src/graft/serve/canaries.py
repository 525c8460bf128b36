"""The images by which an adapter over a base that sees is judged: as in training, and made into patches by the same numbers.

Training leaves the settings of its image processor, and the grid of each image, in parity.json; a server that has another
preprocessor_config.json or another limit of pixels would show the model something else, whatever the adapter's effect on small images.
"""

from __future__ import annotations

from typing import Any

from graft.core.errors import GraftError
from graft.core.store import Version
from graft.model.chat import Messages, image_parts
from graft.model.images import CONFIG, ImageProcessor, Seen
from graft.model.pixels import Unusable, shown


def fault(version: Version, parity: dict[str, Any], processor: ImageProcessor | None) -> str | None:
    """What is not as it was in training, as the end of a line that begins with the version's name; None of an adapter of text too."""
    canaries = [c for c in parity.get("canaries", []) if c.get("images")]
    if (trained := parity.get("image_processor")) is None:
        return "has canaries with images, and nothing says how training saw them" if canaries else None
    if processor is None:
        return "was trained on images, and this server shows its model none: serve it on an engine that does"
    if differs := _differs(trained, processor.settings()):
        return f"was trained on images that became patches otherwise: {differs} here (the base's {CONFIG}, or shard.image_pixels)"
    try:
        own = ImageProcessor(str(version.folder), None, trained["most_pixels"]).settings()
    except GraftError as e:
        return f"comes with no {CONFIG} that can be used ({e})"
    if differs := _differs(trained, own):
        return f"was trained with another {CONFIG} than the one it comes with: {differs} in that"
    for image in (image for c in canaries for image in c["images"]):
        if image["file"] not in version.about["files"]:
            return f"lacks the image {image['file']} of its canaries"
        try:
            grid = processor.grid(*shown((version.folder / image["file"]).read_bytes()).size)
        except Unusable as e:
            return f"has an image that cannot be shown, {image['file']}: {e}"
        if list(grid) != image["grid"]:
            return f"was trained on {image['file']} as {image['grid']} patches, here it becomes {list(grid)}"
    return None if canaries else "was trained on images and has no canaries with any: nothing says what it does with one"


def tokens(messages: Messages, processor: ImageProcessor | None) -> list[int]:
    """How many stand for each image of a conversation here."""
    sizes = [(part["width"], part["height"]) for part in image_parts(messages)]
    return [processor.tokens(processor.grid(*size)) for size in sizes] if processor else []


def seen(version: Version, canary: dict[str, Any], processor: ImageProcessor | None) -> tuple[Seen, ...]:
    """The images of a canary that fault() found nothing wrong with. About 60 ms of a core and 24 MB for 1 MP."""
    files = [version.folder / image["file"] for image in canary.get("images", [])]
    return tuple(processor.seen(shown(file.read_bytes())) for file in files) if processor else ()


def _differs(trained: dict[str, Any], here: dict[str, Any]) -> str | None:
    name = next((name for name in {**trained, **here} if trained.get(name) != here.get(name)), None)
    return name and f"{name} was {trained.get(name)} and is {here.get(name)}"
