"""Metrics for Prometheus."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gpt2.serve.models import ServedModel

LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by path and status.", "path", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.", "model")
        self.new_tokens = self._counter("new_tokens", "New tokens.", "model")
        self.time_to_first_token = self._histogram("first_token_seconds", "Time to first token.", LATENCY_BUCKETS)
        self.inter_token_latency = self._histogram(
            "between_tokens_seconds", "Inter-token latency of a sequence.", INTER_TOKEN_BUCKETS
        )
        running = Gauge("gpt2_running_texts", "Sequences that have a slot.", ["model"], registry=self._registry)
        waiting = Gauge("gpt2_waiting_texts", "Sequences that wait for a slot.", ["model"], registry=self._registry)
        slots = Gauge("gpt2_slots", "Sequences that can run at the same time.", ["model"], registry=self._registry)
        for name, served in models.items():
            running.labels(name).set_function(_scheduler_gauge(served, "running"))
            waiting.labels(name).set_function(_scheduler_gauge(served, "waiting"))
            slots.labels(name).set(served.scheduler.slots)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"gpt2_{name}", description, labels, registry=self._registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"gpt2_{name}", description, ["model"], buckets=buckets, registry=self._registry)


def _scheduler_gauge(served: ServedModel, attribute: str) -> Callable[[], float]:
    return lambda: float(getattr(served.scheduler, attribute))
