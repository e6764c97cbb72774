"""vLLM's metrics, as Prometheus's own library writes them, read and summed up."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from north_lightning.sampling.gauges import SamplerGauges, read_metrics


class Server:
    """Keeps metrics under vLLM's names, for two engines."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.kv_use = Gauge("vllm:kv_cache_usage_perc", "", ["engine"], registry=registry)
        self.running = Gauge("vllm:num_requests_running", "", ["engine"], registry=registry)
        self.tokens = Counter("vllm:generation_tokens", "", ["engine"], registry=registry)
        self.preemptions = Counter("vllm:num_preemptions", "", ["engine"], registry=registry)
        self.hits = Counter("vllm:prefix_cache_hits", "", ["engine"], registry=registry)
        self.queries = Counter("vllm:prefix_cache_queries", "", ["engine"], registry=registry)
        self.latency = Histogram("vllm:e2e_request_latency_seconds", "", ["engine"], registry=registry)

    def reading(self) -> dict[str, float]:
        return read_metrics(generate_latest(self.registry).decode())


def test_a_reading_sums_engines_and_leaves_out_what_is_not_kept() -> None:
    server = Server()
    server.running.labels("0").set(3)
    server.running.labels("1").set(4)
    server.tokens.labels("0").inc(100)
    server.latency.labels("0").observe(2.5)
    server.latency.labels("0").observe(0.5)
    assert server.reading() == {"running": 7.0, "generated_tokens": 100.0, "request_s": 3.0}
    with pytest.raises(ValueError):
        read_metrics("<html>not found</html> {")


def test_levels_are_spread_over_readings_and_counts_are_increases_over_servers() -> None:
    gauges, servers = SamplerGauges(), [Server(), Server()]
    servers[0].tokens.labels("0").inc(1000)  # before anybody looked
    for index, server in enumerate(servers):
        gauges.add(index, server.reading())
    gauges.take()
    for use, server, tokens in ((0.2, 0, 10), (0.6, 1, 30), (0.4, 0, 5)):
        servers[server].kv_use.labels("0").set(use)
        servers[server].running.labels("1").set(tokens // 10)
        servers[server].tokens.labels("0").inc(tokens)
        gauges.add(server, servers[server].reading())
    numbers = gauges.take()
    assert [numbers[f"kv_use/{how}"] for how in ("min", "mean", "max")] == pytest.approx([0.2, 0.4, 0.6])
    assert numbers["generated_tokens"] == 45
    assert numbers["busy"] == pytest.approx(2 / 3)
    assert gauges.take() == {}


def test_a_server_that_was_started_again_counts_from_zero_and_hits_are_a_rate() -> None:
    gauges, server = SamplerGauges(), Server()
    server.preemptions.labels("0").inc(50)
    gauges.add(0, server.reading())
    server = Server()
    server.preemptions.labels("0").inc(2)
    server.queries.labels("0").inc(80)
    server.hits.labels("0").inc(60)
    gauges.add(0, server.reading())
    numbers = gauges.take()
    assert numbers["preemptions"] == 2
    assert numbers["prefix_hit_rate"] == 0.75
    assert "prefix_hits" not in numbers
