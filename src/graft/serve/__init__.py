"""The served adapter: an OpenAI-compatible API and a chat page, on Ray Serve, over the engine."""
