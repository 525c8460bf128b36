"""graft: from a few seed examples and a raw corpus to a served LoRA adapter."""

__version__ = "0.1.0"
