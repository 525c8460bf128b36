"""Evaluation: one file a metric family; generation goes through `graft.engine`, the same that serves."""
