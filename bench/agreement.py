"""`fen bench serve` beside a client that others wrote: `python -m bench.agreement --peer-venv FOLDER`.

The peer is NVIDIA's aiperf (PyPI), installed in a virtual environment of its own; with --install it is put there first.
Both clients measure the same `fen serve` with fresh prompts of the same lengths, in turn; the medians of the
repetitions are compared: throughput within 5%, median time to first token within 15%. The server runs on cores of its
own, so that it is not the clients' appetite that is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import results
from bench.local_server import local_server
from bench.report import markdown_table, median_and_spread
from bench.serving.measure import Measurement, measure
from bench.serving.options import ServeOptions
from bench.serving.vocabulary import Vocabulary, open_vocabulary
from engine.errors import FenError

PEER = "aiperf==0.13.0"
RESULTS = Path(__file__).resolve().parent / "results"
WANTED = {"output_throughput": 0.05, "median_ttft_ms": 0.15}  # relative differences that are still agreement
LABELS = {
    "output_throughput": "generated tokens/s",
    "request_throughput": "requests/s",
    "median_ttft_ms": "median TTFT, ms",
    "median_itl_ms": "median ITL, ms",
    "median_e2el_ms": "median E2EL, ms",
    "server_decode_ms": "server's own decode, ms/token",  # differs where one client takes more of the server's CPU
}


class Clients:
    """The two, with a server at `url`. Every call makes prompts that nobody has sent before."""

    def __init__(self, arguments: argparse.Namespace, url: str, vocabulary: Vocabulary, folder: Path):
        self.arguments, self.url, self.vocabulary, self.folder = arguments, url, vocabulary, folder
        self.about: Measurement | None = None
        self._draw = random.Random(0)
        self._count = 0

    def fen(self) -> dict[str, float]:
        options = ServeOptions(
            base_url=self.url,
            tokenizer=self.arguments.model,
            dataset_name="custom",
            dataset_path=str(self._prompts("prompt")),
            custom_output_len=self.arguments.output_len,
            num_prompts=self.arguments.num_prompts,
            max_concurrency=[str(self.arguments.concurrency)],
            num_runs=1,
            ignore_eos=True,
            temperature=0.0,
            disable_tqdm=True,
        )
        self.about = measure(options, lambda found, point: None)
        return {name: float(self.about.points[0][name]) for name in LABELS if name != "server_decode_ms"}

    def aiperf(self) -> dict[str, float]:
        """Raises FenError when it fails; its last words are in the message."""
        count, output = self.arguments.num_prompts, self.folder / "artifacts"
        shutil.rmtree(output, ignore_errors=True)
        fields = {"max_tokens": self.arguments.output_len, "ignore_eos": True, "temperature": 0.0}
        assert self.about is not None, "fen goes first, and learns the model's name"
        command = [
            str(self.arguments.peer_venv / "bin" / "aiperf"), "profile", "--model", self.about.model,
            "--url", self.url, "--endpoint-type", "completions", "--streaming", "--tokenizer", str(self.folder),
            "--input-file", str(self._prompts("text")), "--custom-dataset-type", "single_turn",
            "--dataset-sampling-strategy", "sequential", "--extra-inputs", json.dumps(fields),
            "--concurrency", str(self.arguments.concurrency), "--request-count", str(count), "--workers-max", "1",
            "--use-server-token-count", "--no-server-metrics", "--no-gpu-telemetry", "--ui", "none",
            "--export-level", "summary", "--output-artifact-dir", str(output),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=400)
        files = list(output.rglob("profile_export_aiperf.json"))
        if done.returncode or not files:
            words = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()
            raise FenError(f"aiperf failed with status {done.returncode}: {' / '.join(words[-40:])}")
        found = json.loads(files[0].read_text(encoding="utf-8"))
        if round(found["request_count"]["avg"]) != count:
            raise FenError(f"aiperf counts {found['request_count']['avg']:.0f} good requests of {count}.")
        return {
            "output_throughput": found["output_token_throughput"]["avg"],
            "request_throughput": found["request_throughput"]["avg"],
            "median_ttft_ms": found["time_to_first_token"]["p50"],
            "median_itl_ms": found["inter_token_latency"]["p50"],
            "median_e2el_ms": found["request_latency"]["p50"],
        }

    def _prompts(self, key: str) -> Path:
        self._count += 1
        path = self.folder / f"prompts-{self._count}.jsonl"
        texts = (self.vocabulary.text(self.arguments.input_len, self._draw) for _ in range(self.arguments.num_prompts))
        path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
        return path


def beside_the_ledger(url: str, client: Callable[[], dict[str, float]]) -> dict[str, float]:
    """A client's figures, and the device milliseconds that the server spent on each generated token meanwhile."""

    def decode() -> tuple[float, int]:
        time.sleep(2.5)  # an idle engine tells of itself once a second
        with urllib.request.urlopen(f"{url}/v1/cost", timeout=30) as reply:
            ledger = json.load(reply)
        return ledger["device_seconds"]["decode"], ledger["tokens"]["decode"]

    seconds, tokens = decode()
    figures = client()
    seconds, tokens = (after - before for after, before in zip(decode(), (seconds, tokens), strict=True))
    return figures | {"server_decode_ms": 1e3 * seconds / tokens}


def apart(threads: int) -> tuple[set[int], set[int]]:
    """The server's cores and the clients'. Raises FenError where none is left for them."""
    if sys.platform != "linux":
        raise FenError("a process is kept on cores of its own on Linux only")
    cores = sorted(os.sched_getaffinity(0))
    if threads >= len(cores):
        raise FenError(f"--threads {threads} leaves none of this machine's {len(cores)} cores to the clients.")
    return set(cores[:threads]), set(cores[threads:])


def save_any_tokenizer(folder: Path) -> None:
    """One that transformers opens: the peer wants a tokenizer even where the server counts the tokens."""
    import tokenizers

    words = tokenizers.models.WordLevel({"?": 0}, unk_token="?")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', encoding="utf-8")


def compare(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """For each figure both medians, their relative difference, and what is wanted of it."""
    found = {}
    for name in LABELS:
        own, peer = (statistics.median(run[name] for run in runs[client]) for client in ("fen", "aiperf"))
        difference = abs(own - peer) / peer
        wanted = WANTED.get(name)
        met = None if wanted is None else difference <= wanted
        found[name] = {"fen": own, "aiperf": peer, "difference": difference, "wanted": wanted, "met": met}
    return found


def render(runs: dict[str, list[dict[str, float]]], compared: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, label in LABELS.items():
        entry = compared[name]
        wanted = "" if entry["wanted"] is None else f"{entry['wanted']:.0%}: {'met' if entry['met'] else 'missed'}"
        cells = [median_and_spread([run[name] for run in runs[client]]) for client in ("fen", "aiperf")]
        rows.append([label, *cells, f"{entry['difference']:.1%}", wanted])
    return markdown_table(["", "fen bench serve", PEER.replace("==", " "), "differ by", "wanted within"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.agreement", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--peer-venv", type=Path, required=True, help="virtual environment with aiperf in it")
    parser.add_argument("--install", action="store_true", help=f"make that environment and install {PEER} there")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="path, short name or Hugging Face id")
    parser.add_argument("--threads", type=int, default=1, help="of the server, on as many cores of its own")
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "agreement.json", help="where the result is kept")
    arguments = parser.parse_args()
    arguments.peer_venv = arguments.peer_venv.resolve()
    if arguments.install:
        venv.create(arguments.peer_venv, with_pip=True)
        subprocess.run([str(arguments.peer_venv / "bin" / "pip"), "install", "--quiet", PEER], check=True)
    if not (arguments.peer_venv / "bin" / "aiperf").exists():
        sys.exit(f"There is no bin/aiperf in {arguments.peer_venv}; --install puts it there.")
    try:
        run(arguments)
    except FenError as error:
        sys.exit(str(error))


def run(arguments: argparse.Namespace) -> None:
    vocabulary = open_vocabulary(arguments.model, arguments.model)
    serve = ["--model", arguments.model, "--threads", str(arguments.threads), "--kv-cache-tokens", "16384"]
    runs: dict[str, list[dict[str, float]]] = {"fen": [], "aiperf": []}
    servers_cores, clients_cores = apart(arguments.threads)
    os.sched_setaffinity(0, servers_cores)  # what is started from here on stays there
    with tempfile.TemporaryDirectory() as folder, local_server(serve) as url:
        os.sched_setaffinity(0, clients_cores)
        save_any_tokenizer(Path(folder))
        clients = Clients(arguments, url, vocabulary, Path(folder))
        clients.fen()  # everything is warm
        for repetition in range(1, arguments.repetitions + 1):
            for name in runs if repetition % 2 else reversed(runs):
                print(f"repetition {repetition} of {arguments.repetitions}: {name}", file=sys.stderr, flush=True)
                runs[name].append(beside_the_ledger(url, getattr(clients, name)))
        about = clients.about
    assert about is not None
    compared = compare(runs)
    settings = ("concurrency", "num_prompts", "input_len", "output_len", "repetitions", "threads")
    cores = {"server": len(servers_cores), "clients": len(clients_cores)}
    measured = {"runs": runs, "compared": compared}
    data = {"peer": PEER, **{name: getattr(arguments, name) for name in settings}, "cores": cores, **measured}
    quantization = about.server.get("quantization")
    result = results.new(
        "agreement", data, model=about.model, quantization=quantization, device=about.server.get("device")
    )
    results.save(arguments.json, result)
    print(
        f"{about.model} ({quantization}) on {result.device}, concurrency {arguments.concurrency}, "
        f"{arguments.num_prompts} fresh prompts of {arguments.input_len} tokens, {arguments.output_len} new ones each; "
        f"medians of {arguments.repetitions} (smallest to largest), the clients taking turns, on other cores."
    )
    print(render(runs, compared))
    print(f"kept in {arguments.json}")


if __name__ == "__main__":
    main()
