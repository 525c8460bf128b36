"""The contracts: recipes, artifacts, row and shard formats, errors. Imports no torch, ray or transformers."""
