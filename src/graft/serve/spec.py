"""What is served, where, and within which limits; it travels to every replica."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServeSpec:
    """base: a folder or hub id, `identity` what tells it from others; tokenizer: the folder whose chat template the base is asked by.

    store: of the adapters (core/store.py), None for a model that takes none; ready: their names that the server does not start without.
    """

    base: str
    revision: str | None
    precision: str
    identity: str
    tokenizer: str
    store: str | None = None
    ready: tuple[str, ...] = ()
    base_name: str = "base"
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
    def max_waiting(self) -> int:
        return 8 * self.max_batch
