"""What a server counts, for Prometheus. Nothing of what is said, and no names of sessions or tenants."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """One app's."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("mnemic_requests", "Requests.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "mnemic_request_seconds", "Until the last byte.", ["route"], registry=registry, buckets=SECONDS
        )
        self.first = Histogram(
            "mnemic_first_piece_seconds", "Until an answer begins.", registry=registry, buckets=SECONDS
        )
        self.read = Counter("mnemic_prompt_tokens", "Tokens that were read of requests.", registry=registry)
        self.said = Counter("mnemic_answer_tokens", "Tokens that were said.", registry=registry)
        self.turns = Counter("mnemic_turns", "Answers by how they ended.", ["end"], registry=registry)

    def watch(self, name: str, told: str, value: Callable[[], float]) -> None:
        """One more number, as it is when it is asked for."""
        Gauge(name, told, registry=self.registry).set_function(value)
