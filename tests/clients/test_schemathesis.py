"""The schemathesis command makes up 200 requests a route, valid and not, from /openapi.json: no 5xx, every reply as
described."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)


@pytest.mark.timeout(1800)
def test_200_requests_a_route(url: str, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"]
    options = {"max-examples": "200", "checks": ",".join(CHECKS), "seed": "1", "request-timeout": "60"}
    flags = ["--phases=coverage,fuzzing", "--generation-deterministic", "--suppress-health-check=all", "--no-color"]
    arguments = [f"--{name}={value}" for name, value in options.items()] + flags
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS)}
    done = subprocess.run([*command, *arguments], env=environment, cwd=tmp_path)  # it leaves files there
    assert done.returncode == 0, "what it found stands above"
