"""Images as a vision tower takes them: the grid of patches that an image becomes, and the patches themselves.

Both are those of transformers' Qwen2VLImageProcessorPil with the base's own preprocessor_config.json, which needs no torchvision. The grid
follows from the size of an image alone, so that shards are made without decoding one again. An image of 1 MP takes about 60 ms of a core.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from graft.core.errors import ConfigError
from graft.core.hub import model_folder

CONFIG = "preprocessor_config.json"
DECIDES = (
    "patch_size",
    "temporal_patch_size",
    "merge_size",
    "do_resize",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
_KNOWN = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil", "Qwen2_5_VLImageProcessor")


class Seen(NamedTuple):
    """An image as a tower takes it."""

    grid: tuple[int, int, int]  # t, h, w, in patches
    patches: np.ndarray  # [t h w, channels · 2 · patch²] fp32


class ImageProcessor:
    """The base's own, with the recipe's limit of pixels."""

    def __init__(self, base: str, revision: str | None, most_pixels: int | None = None):
        """most_pixels: None for the base's limit alone. ConfigError where the base is of text alone, or of another family."""
        path = model_folder(base, revision) / CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"model.base = {base!r} has no {CONFIG}: it sees no images; name a Qwen2.5-VL model") from None
        except (OSError, ValueError) as e:
            raise ConfigError(f"model.base = {base!r}: {CONFIG} cannot be read ({e})") from None
        if config.get("image_processor_type") not in _KNOWN:
            kind = config.get("image_processor_type")
            raise ConfigError(f"model.base = {base!r} has an image processor that graft does not know ({kind}): name a Qwen2.5-VL model")
        self.processor = _of(config)
        size = self.processor.size
        self.most = min(size["longest_edge"], most_pixels or size["longest_edge"])  # transformers' names; both are numbers of pixels
        self.least = min(size["shortest_edge"], self.most)
        self.factor = self.processor.patch_size * self.processor.merge_size  # pixels of a token's side

    def settings(self) -> dict[str, Any]:
        """All that decides an image's patches, as JSON holds it; two processors of the same settings see alike."""
        named = ((name, getattr(self.processor, name)) for name in DECIDES)
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in named}
        return {"most_pixels": self.most, "least_pixels": self.least} | own

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """(1, rows, columns) of patches of an image of that size, which must not be 200 times as long as wide, or as wide as long."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        rows, columns = smart_resize(height, width, self.factor, self.least, self.most)
        return 1, rows // self.processor.patch_size, columns // self.processor.patch_size

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """How many tokens stand for an image of that grid."""
        t, h, w = grid
        return t * h * w // self.processor.merge_size**2

    def seen(self, image: Any) -> Seen:
        """An RGB image of PIL, resized and cut into patches."""
        return Seen(self.grid(*image.size), self.patches(image))

    def patches(self, image: Any) -> np.ndarray:
        """[t h w, channels · 2 · patch²] fp32 of an RGB image of PIL."""
        made = self.processor(images=[image], size={"longest_edge": self.most, "shortest_edge": self.least}, return_tensors="np")
        found: np.ndarray = made["pixel_values"]
        return found


def _of(config: dict[str, Any]) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_dict({k: v for k, v in config.items() if k not in ("image_processor_type", "processor_class")})


def copy_config(base: str, revision: str | None, folder: Path) -> None:
    """Put the base's preprocessor_config.json, where it has one, beside what was trained on it."""
    path = model_folder(base, revision) / CONFIG
    if path.is_file():
        (folder / CONFIG).write_bytes(path.read_bytes())


def write_config(folder: Path, patch_size: int = 14, merge_size: int = 2) -> None:
    """The preprocessor_config.json of a base that graft makes: Qwen2.5-VL's."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    made = Qwen2VLImageProcessorPil(patch_size=patch_size, merge_size=merge_size).to_dict()
    made["image_processor_type"] = "Qwen2VLImageProcessor"  # as the real ones say
    (folder / CONFIG).write_text(json.dumps(made, indent=1), encoding="utf-8")
