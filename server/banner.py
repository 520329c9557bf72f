"""What `fen serve` prints once it answers: what runs, on what, with how much KV cache, and a line to try."""

from __future__ import annotations

import json

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from engine.messages import EngineInfo
from server.service import Service


def print_banner(console: Console, info: EngineInfo, service: Service, host: str, port: int) -> None:
    """`host`, `port`: where it listens."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{shown}:{port}"
    tokens = info.num_blocks * info.block_size
    model, settings, (price, reason) = service.model, service.settings, service.price()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in (
        ("Model", f"{model}: {count(info.parameters)} parameters, {info.quantization}, {size(info.weight_bytes)}"),
        ("Device", f"{info.device}, activations in {info.dtype}{', batch-invariant' if info.batch_invariant else ''}"),
        ("KV cache", f"{tokens:,} tokens, {info.num_blocks} blocks of {info.block_size}, {size(info.kv_cache_bytes)}"),
        (
            "Limits",
            f"context {info.max_model_len:,}, {settings.engine.max_num_seqs} at once, queue of {settings.max_queue}",
        ),
        ("Price", f"US${price.usd_per_device_hour:g} per device-hour ({price.name})" if price else reason),
        ("Loaded in", loaded(info)),
        ("OpenAI API", f"{url}/v1{'   (with an API key)' if service.keys else ''}"),
        ("In a browser", f"{url}   (routes: {url}/docs, metrics: {url}/metrics)"),
    ):
        table.add_row(name, value)
    console.print(Panel(table, title=f"Fen serves {model}", title_align="left", expand=False, border_style="green"))
    body = json.dumps({"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 64})
    key = ' -H "Authorization: Bearer $FEN_API_KEY"' if service.keys else ""
    line = f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
    console.print("Try it:", style="bold")
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def loaded(info: EngineInfo) -> str:
    """The engine's start, stage by stage."""
    stages = info.stages or [("weights and warm-up", info.load_seconds)]
    total = sum(seconds for _, seconds in stages)
    return f"{total:.1f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages)


def count(number: int) -> str:
    for unit, factor in (("billion", 1e9), ("million", 1e6)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return str(number)


def size(bytes: int) -> str:
    return f"{bytes / 2**30:.2f} GiB" if bytes >= 2**30 else f"{bytes / 2**20:.1f} MiB"
