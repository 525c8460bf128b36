"""What is served, where, and within which limits; it travels to every replica."""

from __future__ import annotations

from dataclasses import dataclass

from graft.core.recipe import BASE_NAME


@dataclass(frozen=True)
class ServeSpec:
    """base: a folder or hub id, `identity` what tells it from others; tokenizer: the folder whose chat template the base is asked by.

    store: of the adapters (core/store.py), None for a model that takes none; ready: names or versions of those that the server does not start without.
    """

    base: str
    revision: str | None
    precision: str
    identity: str
    tokenizer: str
    store: str | None = None
    ready: tuple[str, ...] = ()
    base_name: str = BASE_NAME
    host: str = "127.0.0.1"
    port: int = 8000
    engine: str = "auto"  # or hf, vllm
    replicas: int = 1
    max_batch: int = 16  # rows under way
    max_adapters: int = 8  # in memory at once
    max_rank: int = 64
    kv_tokens: int | None = None  # None: what the memory allows
    image_pixels: int | None = None  # of an image that the base is shown; None: the base's own limit
    max_images: int = 16  # of a request
    fetch_images: bool = False  # from http(s) URLs too
    max_concurrent: int = 128  # requests of one key
    system: str | None = None  # what the chat page begins with
    deadline_s: float = 600.0  # for a request

    @property
    def own(self) -> str:
        """What the recipe's own model answers as, whatever its name stands for."""
        return self.ready[0] if self.ready else self.base_name

    @property
    def max_waiting(self) -> int:
        return 8 * self.max_batch
