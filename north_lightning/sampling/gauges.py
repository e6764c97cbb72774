"""What vLLM says of itself while it serves: cache, queue, tokens.

In: the text of a server's ``/metrics`` route, read every so often. Out: numbers to log. It asks nobody: that is the
caller's part.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean

from prometheus_client.parser import text_string_to_metric_families

METRICS_PATH = "/metrics"
LEVELS = {
    "vllm:kv_cache_usage_perc": "kv_use",  # share of the blocks, 0 to 1
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
}
COUNTS = {
    "vllm:num_preemptions_total": "preemptions",
    "vllm:generation_tokens_total": "generated_tokens",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:e2e_request_latency_seconds_sum": "request_s",
}

Reading = dict[str, float]


def read_metrics(text: str) -> Reading:
    """The values of ``LEVELS`` and ``COUNTS`` under our names, summed over engines; ``ValueError`` if it is no such
    text. A server that does not keep them has none."""
    reading = defaultdict[str, float](float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = LEVELS.get(sample.name) or COUNTS.get(sample.name)
            if name is not None:
                reading[name] += sample.value
    return dict(reading)


class SamplerGauges:
    """Readings of several servers, summed up.

    ``kv_use``, ``running`` and ``waiting`` each as min, mean and max over readings and servers; preemptions, prompt and
    generated tokens and ``request_s`` (seconds that finished requests took) counted over all servers; and
    ``prefix_hit_rate``, the share of prompt tokens that were found in the cache. ``busy`` is the share of readings that
    found a request running. A server that was started again counts from 0.
    """

    def __init__(self) -> None:
        self._counts: dict[int, Reading] = {}  # server -> its latest
        self._begin()

    def add(self, server: int, reading: Reading) -> None:
        """The first reading of a server only says where its counts begin."""
        before = self._counts.get(server)
        self._counts[server] = {name: reading[name] for name in COUNTS.values() if name in reading}
        for name in LEVELS.values():
            if name in reading:
                self._levels[name].append(reading[name])
        if before is None:
            return
        for name, count in self._counts[server].items():
            was = before.get(name, 0.0)
            self._increases[name] += count - was if count >= was else count

    def take(self) -> dict[str, float]:
        """What was read since the last call; empty for nothing."""
        numbers: dict[str, float] = {}
        for name, levels in self._levels.items():
            numbers |= {f"{name}/min": min(levels), f"{name}/mean": fmean(levels), f"{name}/max": max(levels)}
        if running := self._levels.get("running"):
            numbers["busy"] = sum(level > 0 for level in running) / len(running)
        numbers |= self._increases
        queries, hits = numbers.pop("prefix_queries", 0.0), numbers.pop("prefix_hits", 0.0)
        if queries:
            numbers["prefix_hit_rate"] = hits / queries
        self._begin()
        return numbers

    def _begin(self) -> None:
        self._levels = defaultdict[str, list[float]](list)
        self._increases = defaultdict[str, float](float)
