"""What /metrics tells, by model, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one replica. A model's name is one that is served, or "unknown"."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("graft_requests", "Requests that were answered", ["model", "status"], registry=registry)
        self.prompt_tokens = Counter("graft_prompt_tokens", "Tokens of prompts", ["model"], registry=registry)
        self.completion_tokens = Counter("graft_completion_tokens", "Tokens that were generated", ["model"], registry=registry)
        self.first_token_s = Histogram(
            "graft_first_token_seconds", "From the request to its first token, of streamed answers", ["model"], buckets=SECONDS, registry=registry
        )
        self.request_s = Histogram(
            "graft_request_seconds", "From the request to the end of its answer", ["model"], buckets=SECONDS, registry=registry
        )
        self.under_way = Gauge("graft_requests_under_way", "Requests that run or wait", registry=registry)
        self.image_bytes = Gauge("graft_image_bytes", "Bytes of the images whose answers are under way", registry=registry)
        self.adapters = Gauge("graft_adapters", "Adapters by state", ["state"], registry=registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
