"""Batched generation over one frozen base and many adapters. Loads no Ray: evaluate and serve both stand on it."""
