"""A run as one self-contained HTML page, read from artifacts alone. Imports no torch, Ray or transformers."""
