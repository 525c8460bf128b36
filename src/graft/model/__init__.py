"""What several rooms share: tokenizer and chat masks (no torch at import), the frozen base, LoRA, packed attention, merge."""
