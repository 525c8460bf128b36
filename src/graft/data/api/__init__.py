"""Asking a paid, OpenAI-compatible API: never twice for one answer, never over the budget, never against its limits."""
