"""Prometheus metrics under vLLM's names, labels and buckets, so that dashboards made for it work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from bench.prices import per_million
from engine.messages import STEP_SIZES

if TYPE_CHECKING:
    from server.choice import Choice
    from server.service import Service

disable_created_metrics()  # a *_created series beside every counter tells nobody anything

FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
PER_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
FINISH_REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """What happened to requests. The engine's own counters are read from `service.client.stats` at each scrape."""

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        name = self._name = service.model

        def histogram(metric: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"vllm:{metric}", about, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(name)

        success = Counter(
            "vllm:request_success", "Finished requests.", ["model_name", "finished_reason"], registry=self.registry
        )
        self.finished = {reason: success.labels(name, reason) for reason in FINISH_REASONS}
        self.refused = Counter(
            "fen:requests_refused", "Requests answered 429.", ["model_name"], registry=self.registry
        ).labels(name)
        self._responses = Counter(
            "fen:http_responses", "Requests answered, by status; 499: the client left.", ["model_name", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN)
        self.inter_token = histogram("inter_token_latency_seconds", "Between two tokens of a request.", PER_TOKEN)
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, of a request.", PER_TOKEN
        )
        self.latency = histogram("e2e_request_latency_seconds", "Arrival to last token.", LATENCY)
        self.queue = histogram("request_queue_time_seconds", "Arrival to first scheduled.", LATENCY)
        self.prefill = histogram("request_prefill_time_seconds", "First scheduled to first token.", LATENCY)
        self.decode = histogram("request_decode_time_seconds", "First token to last token.", LATENCY)
        self.inference = histogram("request_inference_time_seconds", "First scheduled to last token.", LATENCY)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self.generation_tokens = histogram("request_generation_tokens", "Generated tokens of a request.", TOKENS)
        self.max_tokens = histogram("request_params_max_tokens", "New tokens that a request allows.", TOKENS)
        self.most_tokens = histogram("request_max_num_generation_tokens", "Tokens of a request's longest.", TOKENS)
        self.n = histogram("request_params_n", "Completions that a request asks for.", (1, 2, 5, 10, 20))
        self.registry.register(EngineCollector(service))
        ProcessCollector(registry=self.registry)
        self.registry.register(CostCollector(service))

    def observe(self, choice: Choice) -> None:
        """Book one finished choice."""
        self.finished[choice.finish_reason or "abort"].inc()
        self.prompt_tokens.observe(len(choice.prompt))
        self.generation_tokens.observe(choice.completion_tokens)
        self.most_tokens.observe(choice.completion_tokens)
        if choice.started is None:
            return
        queued = choice.queue_seconds
        total, first = choice.ended - choice.arrival, choice.started - choice.arrival
        self.latency.observe(total)
        self.queue.observe(queued)
        self.prefill.observe(max(first - queued, 0.0))
        self.decode.observe(total - first)
        self.inference.observe(max(total - queued, 0.0))
        if choice.completion_tokens > 1:
            self.per_token.observe((total - first) / (choice.completion_tokens - 1))

    def responses(self, status: int) -> Counter:
        return self._responses.labels(self._name, str(status))

    def observe_request(self, n: int, choices: list[Choice]) -> None:
        """Book a request as a whole, before its choices run."""
        self.n.observe(n)
        self.max_tokens.observe(choices[0].params.max_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """Gauges and counters that live in the engine."""

    def __init__(self, service: Service):
        self.service = service

    def collect(self) -> Iterator[Metric]:
        stats, name = self.service.client.stats, [self.service.model]
        usage = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        gauges = {
            "num_requests_running": ("Requests in the batch.", stats.running),
            "num_requests_waiting": ("Requests in the queue.", max(stats.waiting, self.service.waiting)),
            "kv_cache_usage_perc": ("Share of KV blocks in use, 0 to 1.", usage),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", stats.prefix_hits),
            "num_preemptions": ("Requests preempted and recomputed.", stats.preemptions),
            "prompt_tokens": ("Prompt tokens processed.", stats.prompt_tokens),
            "generation_tokens": ("Tokens generated.", stats.generation_tokens),
        }
        bounds = [*(str(float(bound)) for bound in STEP_SIZES), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(stats.step_sizes), strict=True))
        steps = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=["model_name"])
        steps.add_metric(name, buckets, stats.scheduled_tokens)
        yield steps
        log = self.service.log
        ours = {
            "engine_restarts": ("Engine processes that were replaced.", getattr(self.service.client, "restarts", 0)),
            "log_lines_lost": ("Lines of the log that could not be written.", log.lost if log else 0),
        }
        for metric, (about, value) in gauges.items():
            gauge = GaugeMetricFamily(f"vllm:{metric}", about, labels=["model_name"])
            gauge.add_metric(name, value)
            yield gauge
        for metric, (about, value) in counters.items():
            counter = CounterMetricFamily(f"vllm:{metric}", about, labels=["model_name"])
            counter.add_metric(name, value)
            yield counter
        for metric, (about, value) in ours.items():
            counter = CounterMetricFamily(f"fen:{metric}", about, labels=["model_name"])
            counter.add_metric(name, value)
            yield counter
        healthy, _ = self.service.client.health()
        ready = GaugeMetricFamily("fen:ready", "1 while requests are answered.", labels=["model_name"])
        ready.add_metric(name, float(healthy and not self.service.draining))
        yield ready
        info = self.service.client.info
        if info is not None:
            config = GaugeMetricFamily(
                "vllm:cache_config_info", "The KV cache.", labels=["model_name", "block_size", "num_gpu_blocks"]
            )
            config.add_metric([*name, str(info.block_size), str(info.num_blocks)], 1)
            yield config


class CostCollector(Collector):
    """The ledger; US$ only where there is a price. The cost of a million tokens is under OpenCost's name and labels."""

    def __init__(self, service: Service):
        self.service = service

    def collect(self) -> Iterator[Metric]:
        service, name = self.service, self.service.model
        ledger = service.client.stats.ledger
        if ledger is None:
            return
        price, _ = service.price()
        wall = GaugeMetricFamily("fen:ledger_seconds", "Time that the ledger covers.", labels=["model_name"])
        wall.add_metric([name], ledger.end - ledger.start)
        in_flight = GaugeMetricFamily(
            "fen:in_flight_device_seconds", "Device seconds of running requests.", labels=["model_name"]
        )
        in_flight.add_metric([name], ledger.seconds["in_flight"])
        seconds = CounterMetricFamily("fen:device_seconds", "Device seconds by class.", labels=["model_name", "class"])
        cost = CounterMetricFamily("fen:cost_usd", "US$ by class of device seconds.", labels=["model_name", "class"])
        for kind, value in ledger.seconds.items():
            if kind != "in_flight":
                seconds.add_metric([name, kind], value)
                if price is not None:
                    cost.add_metric([name, kind], value * price.per_second)
        yield from (wall, in_flight, seconds)
        joules, _ = service.energy.read(service.client.info.device) if service.client.info else (None, None)
        if joules is not None:
            energy = CounterMetricFamily("fen:energy_joules", "By NVML's counter.", labels=["model_name"])
            energy.add_metric([name], joules)
            yield energy
        if price is None:
            return
        yield cost
        rate = GaugeMetricFamily(
            "fen:price_usd_per_device_hour", "The price.", labels=["model_name", "price", "date", "source"]
        )
        rate.add_metric([name, price.name, price.date, price.source], price.usd_per_device_hour)
        yield rate
        million = GaugeMetricFamily(
            "llm_cost_per_million_tokens",
            "US$ per million tokens; usage is the work with its waste, allocation is the whole bill.",
            labels=["model_name", "phase", "cost_basis"],
        )
        costs = per_million(ledger, price)
        phases = {"": "blended_3_to_1", "prompt": "prompt", "cached": "cached_prompt", "generation": "decode"}
        for label, basis in (("usage", "busy"), ("allocation", "wall")):
            for phase, kind in phases.items():
                if (usd := costs[basis][kind]) is not None:
                    million.add_metric([name, phase, label], usd)
        yield million
