"""What the server counts, in Prometheus' text form."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from llava.serve.front import FrontStats

STAGES = ("queue", "read", "prepare", "first_token", "answer")
"""Of one request: waiting for a place; fetching and decoding images; from messages to a prompt, waiting for a batch
included; from the prompt to the first token; from the prompt to the last one."""
CANCELLED = "cancelled"
"""In place of a status: the client left before the end."""
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counts of one server."""

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]], front: Callable[[], "FrontStats"]):
        """Start at zero.

        Args:
            gauges: name, description and present value of what goes up and down.
            front: what the front has done.
        """
        self._registry = CollectorRegistry()
        self._registry.register(_Asked(gauges, front))
        self.requests = Counter(
            "llava_requests", "Chat completions by HTTP status, or cancelled.", ["status"], registry=self._registry
        )
        self._seconds = Histogram(
            "llava_stage_seconds", "Seconds of a request, by stage.", ["stage"],
            registry=self._registry, buckets=_BUCKETS,
        )  # fmt: skip
        for stage in STAGES:
            self._seconds.labels(stage)
        self.prompt_tokens = self._count("llava_prompt_tokens", "Positions of prompts, after reduction.")
        self.written_tokens = self._count("llava_completion_tokens", "Tokens written.")
        self.image_tokens = self._count("llava_image_tokens", "Image tokens of prompts, after reduction.")
        self.image_patches = self._count("llava_image_patches", "Patches of the same images, before reduction.")

    def _count(self, name: str, description: str) -> Counter:
        return Counter(name, description, registry=self._registry)

    def time(self, stage: str) -> AbstractContextManager:
        """Time what runs inside as one of `STAGES`."""
        return self._seconds.labels(stage).time()

    def observe(self, stage: str, seconds: float) -> None:
        """Note the time of one of `STAGES`."""
        self._seconds.labels(stage).observe(seconds)

    def to_text(self) -> bytes:
        """Return what a scrape reads."""
        return generate_latest(self._registry)


class _Asked:
    """Values that others keep."""

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]], front: Callable[[], "FrontStats"]):
        self._gauges = gauges
        self._front = front

    def collect(self) -> Iterator[Metric]:
        for name, (description, ask) in self._gauges.items():
            yield GaugeMetricFamily(name, description, value=ask())
        stats = self._front()
        hits = CounterMetricFamily("llava_image_cache_hits", "Images found, by what was found.", labels=["found"])
        hits.add_metric(["tokens"], stats.token_hits)
        hits.add_metric(["features"], stats.feature_hits)
        yield hits
        yield CounterMetricFamily("llava_image_cache_misses", "Images that were encoded.", value=stats.misses)
        yield GaugeMetricFamily("llava_image_cache_bytes", "Bytes of what is kept of images.", value=stats.cache_bytes)
        seconds = CounterMetricFamily("llava_front_seconds", "Seconds of the front's work, by stage.", labels=["stage"])
        for stage, value in stats.seconds.items():
            seconds.add_metric([stage], value)
        yield seconds
