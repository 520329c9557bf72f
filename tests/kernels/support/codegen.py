"""Compiles Triton kernels for GPUs that are not here and reads the machine code back.

Needs no GPU, no driver and no CUDA toolkit: the Triton wheel bundles ptxas, nvdisasm and cuobjdump.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes a thread block may use
TENSOR_CORE = frozenset(("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA"))
GLOBAL_LOADS = frozenset(("LDG", "LDGSTS", "UTMALDG"))
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
OPCODE = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_x]+)*)\s", re.M)


def compile_only(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    capability: int,
    *,
    num_warps: int,
    num_stages: int,
    divisible_by_16: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Compiles a `@triton.jit` function for `sm_<capability>` and returns Triton's CompiledKernel.

    signature: type of each run-time argument: '*bf16', 'i32', 'fp32', 'tensordesc<bf16[128,64]>' ...
    divisible_by_16: integer arguments to be taken as multiples of 16; pointers always are, as torch's allocations are.
    """
    while not hasattr(kernel, "arg_names"):
        kernel = kernel.fn  # unwrap heuristics
    names = kernel.arg_names
    missing = [n for n in names if n not in constexprs and n not in signature]
    assert not missing, f"no type given for {missing}"
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name in divisible_by_16]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constexprs), attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=dict(num_warps=num_warps, num_stages=num_stages, **options))


def tail_types(tail: str) -> dict[str, str]:
    """Of a matmul's arguments for its epilogue, which is some of "silu", "norm" and "add" (which needs a norm)."""
    types = {"s_residual": "i32", "eps": "fp32", "out_scale": "fp32"}
    if "norm" in tail:
        types |= {"now": "*fp32", "before": "*fp32"}
    return types | ({"residual": "*fp32", "norm_weight": "*fp32"} if "add" in tail else {})


def tail_constants(tail: str, hidden: int) -> dict[str, Any]:
    absent = {"now", "before", "residual", "norm_weight"} - set(tail_types(tail))
    return dict.fromkeys(absent) | {"H": hidden if "norm" in tail else 0, "SILU": "silu" in tail}


class MachineCode:
    """What ptxas made of a compiled kernel.

    Attributes: `registers` per thread; `spills` (local loads and stores); `shared_memory` bytes; `count[opcode]` over
    the whole kernel; `loop` (opcodes of the main loop: the innermost with tensor-core instructions, else with loads).
    """

    def __init__(self, compiled: Any) -> None:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text = _tool("nvdisasm", "-c", file.name)
            resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        found = re.search(r"REG:(\d+)", resources)
        assert found, "cuobjdump printed no register count"
        self.registers = int(found[1])
        self.shared_memory: int = compiled.metadata.shared
        self.num_warps: int = compiled.metadata.num_warps
        self.opcodes = OPCODE.findall(text)
        self.count = Counter(op.split(".")[0] for op in self.opcodes)
        self.spills = self.count["LDL"] + self.count["STL"]
        self.loop = _main_loop(text.split("\n"))

    def per_element(self, elements: int) -> float:
        """Thread-instructions of the main loop for each of the `elements` that one iteration of the program handles."""
        assert self.loop, "no loop with loads or tensor-core instructions"
        return len(self.loop) * self.num_warps * 32 / elements

    def widths(self, opcode: str) -> Counter[str]:
        """Bits that each `opcode` instruction moves per thread: {'128': 4, '32': 1}."""
        sizes = ("128", "64", "U16", "S16", "U8", "S8")
        of_opcode = (op.split(".") for op in self.opcodes if op.split(".")[0] == opcode)
        return Counter(next((size for size in sizes if size in op), "32") for op in of_opcode)


def _tool(name: str, *args: str) -> str:
    return subprocess.run([os.path.join(TOOLS, name), *args], capture_output=True, text=True, check=True).stdout


def _main_loop(lines: list[str]) -> list[str]:
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"^\.(L_x_\d+):", line))}
    best: tuple[tuple[bool, bool, int], list[str]] | None = None
    for end, line in enumerate(lines):
        branch = re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)
        if not branch or labels.get(branch[1], end) >= end:
            continue  # not a jump backwards
        opcodes = OPCODE.findall("\n".join(lines[labels[branch[1]] : end + 1]))
        names = {op.split(".")[0] for op in opcodes}
        if "EXIT" in names:
            continue  # a jump back from code that the compiler moved out of line, with the epilogue between
        rank = (bool(names & TENSOR_CORE), bool(names & GLOBAL_LOADS), -len(opcodes))
        if (rank[0] or rank[1]) and (best is None or rank > best[0]):
            best = rank, opcodes
    return best[1] if best else []
