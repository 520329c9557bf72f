"""How far the fast dtypes are from float32: `python -m bench.quality`. The same weights, the same text, both ways of
computing it: in prefill chunks (many rows, dense copy of the weights) and a token at a time (few rows, 4-bit weights as
they are).

KL divergence from the exact distribution to the fast one, in nats, and how often both put the same token first.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import results
from bench.prompts import prose_tokens
from bench.report import markdown_table
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.core.runner import Runner
from engine.errors import FenError
from engine.messages import EngineOptions

RESULTS = Path(__file__).resolve().parent / "results"


def log_probabilities(checkpoint: Checkpoint, dtype: str, tokens: list[int], rows: int) -> torch.Tensor:
    """float32 [T, V] of the text computed `rows` positions at a time."""
    options = EngineOptions(model=checkpoint.name, dtype=dtype, device="cpu", kv_cache_tokens=len(tokens) + 64)
    runner = Runner(checkpoint, options)
    parts = [runner.logits(tokens[i : i + rows], i) for i in range(0, len(tokens), rows)]
    return torch.cat(parts).log_softmax(-1)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """(mean over positions of KL(exact || other) in nats, share of positions with the same most likely token)."""
    kl = (exact.exp() * (exact - other)).sum(-1).mean().item()
    return kl, (exact.argmax(-1) == other.argmax(-1)).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="path, short name or Hugging Face id")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path, default=RESULTS / "quality.json", help="where the result is kept")
    arguments = parser.parse_args()
    try:
        checkpoint = open_checkpoint(arguments.model)
    except FenError as error:
        sys.exit(str(error))
    prose = prose_tokens(checkpoint.tokenizer)
    if not 2 <= arguments.tokens <= len(prose):
        sys.exit(f"--tokens must be 2 to {len(prose)}, the length of the text.")
    tokens = prose[: arguments.tokens]
    exact = log_probabilities(checkpoint, "float32", tokens, 512)
    found = {}
    for name, rows in {"prefill, 512 at a time": 512, "decode, 1 at a time": 1}.items():
        found[name] = divergence(exact, log_probabilities(checkpoint, "auto", tokens, rows))
    data = {
        "tokens": len(tokens),
        "divergence": {name: {"kl_nats": kl, "top1_agreement": same} for name, (kl, same) in found.items()},
    }
    result = results.new("quality", data, model=checkpoint.path.name, quantization=checkpoint.quantization)
    results.save(arguments.json, result)
    print(f"{result.model} on {result.device}: the default dtypes against float32 over {len(tokens)} tokens")
    print(
        markdown_table(
            ["", "KL divergence, nats", "same most likely token"],
            [[name, f"{kl:.2e}", f"{same:.1%}"] for name, (kl, same) in found.items()],
        )
    )
    print(f"kept in {arguments.json}")


if __name__ == "__main__":
    main()
