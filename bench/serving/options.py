"""What `fen bench serve` and `sweep` can be told: names, defaults and meaning of `vllm bench serve`, and a few besides.

Their options on the command line are made from these fields (server/bench_flags.py).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import msgspec

from engine.errors import FenError

DATASETS = ("random", "sharegpt", "custom", "prefix_repetition", "multi_turn")
FILES = ("sharegpt", "custom")  # the datasets that are read from --dataset-path
BACKENDS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
METRICS = ("ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
OBJECTIVES = ("ttft", "tpot", "e2el")


class ServeOptions(msgspec.Struct, kw_only=True):
    backend: str = "openai"
    base_url: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    endpoint: str | None = None
    header: list[str] = []
    insecure: bool = False
    launch: str | None = None
    ready_check_timeout_sec: int = 0
    model: str | None = None
    served_model_name: str | None = None
    tokenizer: str | None = None
    label: str | None = None
    seed: int = 0

    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int = 1000
    input_len: int | None = None
    output_len: int | None = None
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    sharegpt_output_len: int | None = None
    custom_output_len: int = 256
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128
    multi_turn_num_turns: int = 4
    multi_turn_input_len: int = 128
    multi_turn_output_len: int = 64
    multi_turn_prefix_len: int = 0
    disable_shuffle: bool = False

    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_up_strategy: str | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    max_concurrency: list[str] = []
    num_warmups: int = 0
    num_runs: int = 3
    ignore_eos: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logprobs: int | None = None
    extra_body: str | None = None

    goodput: list[str] = []
    percentile_metrics: str = "ttft,tpot,itl"
    metric_percentiles: str = "99"
    price: str | None = None
    num_devices: int = 1
    disable_tqdm: bool = False
    save_result: bool = False
    save_detailed: bool = False
    result_dir: str | None = None
    result_filename: str | None = None
    metadata: list[str] = []

    def check(self) -> None:
        """Raises FenError, naming the option, for what cannot be run."""
        _one_of("--backend", self.backend, tuple(BACKENDS))
        _one_of("--dataset-name", self.dataset_name, DATASETS)
        for name in self.selected:
            _one_of("--percentile-metrics", name, METRICS)
        _ = self.percentiles, self.objectives, self.concurrencies, self.body, self.headers, self.notes
        if (self.dataset_name in FILES) != (self.dataset_path is not None):
            raise FenError(
                f"--dataset-name {self.dataset_name} "
                + ("needs a file: --dataset-path." if self.dataset_name in FILES else "takes no --dataset-path.")
            )
        if not self.request_rate > 0 or not self.burstiness > 0:
            raise FenError("--request-rate and --burstiness must be above 0.")
        if not 0 <= self.random_range_ratio < 1:
            raise FenError("--random-range-ratio must be at least 0 and below 1.")
        self._check_ramp()

    def _check_ramp(self) -> None:
        start, end = self.ramp_up_start_rps, self.ramp_up_end_rps
        if self.ramp_up_strategy is None:
            if start is not None or end is not None:
                raise FenError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy.")
            return
        _one_of("--ramp-up-strategy", self.ramp_up_strategy, ("linear", "exponential"))
        if start is None or end is None or not 0 < start <= end:
            raise FenError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps, above 0 and growing.")
        if self.request_rate != math.inf:
            raise FenError("--ramp-up-strategy sets the rate; leave --request-rate out.")

    @property
    def path(self) -> str:
        return self.endpoint or BACKENDS[self.backend]

    @property
    def chat(self) -> bool:
        return self.backend == "openai-chat"

    @property
    def url(self) -> str:
        """Of the server, without the /v1 that clients of the OpenAI API like to write."""
        url = self.base_url or f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"
        return url.rstrip("/").removesuffix("/v1")

    @property
    def selected(self) -> list[str]:
        return [name.strip() for name in self.percentile_metrics.split(",") if name.strip()]

    @property
    def percentiles(self) -> list[float]:
        try:
            values = [float(word) for word in self.metric_percentiles.split(",")]
        except ValueError:
            values = [math.nan]
        if not all(0 <= value <= 100 for value in values):
            raise FenError(f"--metric-percentiles takes numbers from 0 to 100, not {self.metric_percentiles!r}.")
        return values

    @property
    def objectives(self) -> dict[str, float]:
        """--goodput: milliseconds that a request may take at most, by metric."""
        found = {}
        for pair in self.goodput:
            name, _, limit = pair.partition(":")
            _one_of("--goodput", name, OBJECTIVES)
            try:
                found[name] = float(limit)
            except ValueError:
                found[name] = math.nan
            if not found[name] >= 0:
                raise FenError(f"--goodput takes pairs such as ttft:200 (milliseconds), not {pair!r}.")
        return found

    @property
    def concurrencies(self) -> list[int | None]:
        """One measurement for each; None: as many at once as there are."""
        words = [word for part in self.max_concurrency for word in part.split(",") if word.strip()]
        if not all(re.fullmatch(r"\s*[1-9]\d*\s*", word) for word in words):
            raise FenError(f"--max-concurrency takes numbers from 1 on, not {' '.join(self.max_concurrency)!r}.")
        return [int(word) for word in words] or [None]

    @property
    def headers(self) -> dict[str, str]:
        return {name: value for name, value in map(_pair("--header"), self.header)}

    @property
    def notes(self) -> dict[str, str]:
        return {name: value for name, value in map(_pair("--metadata"), self.metadata)}

    @property
    def body(self) -> dict[str, Any]:
        """Fields of every request besides its prompt and length."""
        fields = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if self.logprobs is not None:
            fields |= {"logprobs": True, "top_logprobs": self.logprobs} if self.chat else {"logprobs": self.logprobs}
        if self.ignore_eos or (self.ignore_eos is None and self.dataset_name in ("random", "multi_turn")):
            fields["ignore_eos"] = True
        try:
            extra = json.loads(self.extra_body) if self.extra_body else {}
        except ValueError:
            extra = None
        if not isinstance(extra, dict):
            raise FenError("--extra-body takes a JSON object, such as '{\"top_k\": 1}'.")
        return fields | extra


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise FenError(f"{option} takes {', '.join(allowed)}; not {value!r}.")


def _pair(option: str) -> Any:
    def split(text: str) -> tuple[str, str]:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise FenError(f"{option} takes KEY=VALUE, not {text!r}.")
        return name.strip(), value.strip()

    return split
