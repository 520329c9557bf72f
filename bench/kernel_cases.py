"""What is measured and checked, as data: layer shapes of four models, rows, contexts, formats. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one decoder layer and of the vocabulary."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the four matrix products of a layer: y [M, N] = x [M, K] W^T."""
        inner = self.heads * self.head_dim
        return {
            "qkv": (inner + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, inner),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


SMOLLM2 = Shape("smollm2-135m", 576, 1536, 9, 3, 64, 49152, 30)
YI_6B = Shape("yi-6b", 4096, 11008, 32, 4, 128, 64000, 32)
LLAMA_3_8B = Shape("llama-3-8b", 4096, 14336, 32, 8, 128, 128256, 32)
YI_34B = Shape("yi-34b", 7168, 20480, 56, 8, 128, 64000, 60)
MODELS = {shape.name: shape for shape in (SMOLLM2, YI_6B, LLAMA_3_8B, YI_34B)}
TINY = Shape("tiny", 192, 128, 3, 1, 64, 1000, 2)  # for the dry mode

FORMATS = {"Q4_1": (32, False), "W4 g128": (128, False), "W4 g128 zero points": (128, True)}  # group, zero_point
# Of 8 bits: type, columns of a group (0: a row), minima. w8a8 takes those of rows.
EIGHT_BITS = {
    "int8 row": ("int8", 0, False), "int8 g128": ("int8", 128, False), "Q8_0": ("int8", 32, False),
    "Q5_K": ("int8", 32, True), "Q6_K": ("int8", 16, False), "fp8 row": ("fp8", 0, False),
    "fp8 block": ("fp8", 128, False),
}  # fmt: skip
PER_ROW = ("int8 row", "fp8 row")
ROUNDED = ("int8", "float8_e4m3fn")  # what w8a8 makes of its activations
FLOAT8 = (8, 9)  # the first compute capability with float8 arithmetic
LARGE = 64 << 20  # weights: layers from here on have a target of their own


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one size.

    rows: of x, or of logits; for attention the queries of all sequences. dtype: of activations or of the KV cache, or
    the weights' format. layer: which linear. q_lens, kv_lens: of the sequences, for attention.
    """

    kernel: str
    shape: Shape
    rows: int
    dtype: str = "bfloat16"
    layer: str = ""
    q_lens: tuple[int, ...] = ()
    kv_lens: tuple[int, ...] = ()
    block_size: int = 64
    window: int = 0
    options: tuple[tuple[str, float], ...] = ()  # of sampling

    @property
    def label(self) -> str:
        """Unique among the cases of a kernel: "llama-3-8b gate_up W4 g128 M16"."""
        words = [self.shape.name, self.layer, self.dtype]
        if self.kv_lens:
            same = len(set(self.kv_lens)) == 1 and len(self.kv_lens) > 3
            lens = f"{len(self.kv_lens)}x{self.kv_lens[0]}" if same else "+".join(map(str, self.kv_lens))
            words += [f"kv {lens}", f"block {self.block_size}" if self.block_size != 64 else ""]
            if set(self.q_lens) != {1}:
                words.append("" if self.q_lens == self.kv_lens else f"q {'+'.join(map(str, self.q_lens))}")
            words.append(f"window {self.window}" if self.window else "")
        else:
            words.append(f"M{self.rows}")
        words += [f"{name} {value:g}" for name, value in self.options]
        return " ".join(word for word in words if word)

    @property
    def float8(self) -> bool:
        """Whether the kernel needs the instructions of float8 (sm_89); weights alone are read without."""
        return self.dtype == "float8_e4m3fn" or (self.kernel == "w8a8" and self.dtype.startswith("fp8"))


def possible(cases: Iterable[Case], capability: tuple[int, int]) -> list[Case]:
    """Those that a GPU of this capability has the instructions for."""
    return [case for case in cases if capability >= FLOAT8 or not case.float8]


def linear(shape: Shape, layer: str, rows: int, weights: str) -> Case:
    return Case("w4a16", shape, rows, weights, layer)


def eight_bit(shape: Shape, layer: str, rows: Iterable[int], formats: Iterable[str] = PER_ROW) -> list[Case]:
    """w8a16, and w8a8 for the formats that it has."""
    kernels = [("w8a16", name) for name in formats] + [("w8a8", name) for name in formats if name in PER_ROW]
    return [Case(kernel, shape, m, name, layer) for kernel, name in kernels for m in rows]


def decode(
    shape: Shape, kv_lens: Iterable[int], dtype: str = "bfloat16", block_size: int = 64, window: int = 0
) -> Case:
    lens = tuple(kv_lens)
    return Case("decode", shape, len(lens), dtype, "", (1,) * len(lens), lens, block_size, window)


def prefill(
    shape: Shape,
    q_lens: Iterable[int],
    kv_lens: Iterable[int] | None = None,
    dtype: str = "bfloat16",
    block_size: int = 64,
    window: int = 0,
) -> Case:
    queries = tuple(q_lens)
    lens = queries if kv_lens is None else tuple(kv_lens)
    return Case("prefill", shape, sum(queries), dtype, "", queries, lens, block_size, window)


TOP_P = (("temperature", 0.8), ("top_p", 0.9))
TOP_K_P = (*TOP_P, ("top_k", 50))
SAMPLING = ((("temperature", 0.0),), (("temperature", 0.8),), TOP_P, TOP_K_P)
FUSED = ("add_rmsnorm", "silu_mul", "rope_and_cache_write")
FLEX = prefill(LLAMA_3_8B, (2048,))  # the one size that FlexAttention is always compiled for
ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def full() -> list[Case]:
    """`fen bench kernels` on a GPU: M = 1 to 4096, contexts 128 to 32k."""
    cases = []
    for shape in MODELS.values():
        weights = ["Q4_1"] if shape is SMOLLM2 else ["Q4_1", "W4 g128"]
        cases += [linear(shape, layer, m, w) for layer in shape.linears for w in weights for m in ROWS]
        formats = EIGHT_BITS if shape is LLAMA_3_8B else (*PER_ROW, "Q6_K")
        for layer in shape.linears:
            cases += eight_bit(shape, layer, (1, 16, 64, 256, 1024, 4096), formats if layer == "gate_up" else PER_ROW)
        for context in (128, 1024, 8192, 32768):
            for batch in (1, 16, 64):
                if batch * context <= 1 << 19:
                    cases.append(decode(shape, (context,) * batch))
        cases += [decode(shape, (8192,) * 16, dtype) for dtype in ("int8", "float8_e4m3fn")]
        cases += [prefill(shape, (tokens,)) for tokens in (128, 512, 2048, 8192, 32768)]
        cases += [Case(kernel, shape, m) for kernel in FUSED for m in (1, 16, 64, 512, 4096)]
        cases += [Case("sample", shape, m, "float32", options=o) for m in (1, 16, 64) for o in SAMPLING]
        cases += [Case("logprobs", shape, m, "float32") for m in (1, 64)]
        cases += [Case("layer", shape, m, weights[-1]) for m in (1, 16, 32, 64)]
        cases += [Case("dequant_w4", shape, 0, weights[-1], layer) for layer in shape.linears]
        cases += [Case("dequant_w8", shape, 0, "Q6_K", layer) for layer in shape.linears]
        cases += [Case("quantise_rows", shape, m, dtype) for dtype in ROUNDED for m in (1, 64, 4096)]
    return cases


def short() -> list[Case]:
    """`python -m bench.gpu`: what the targets speak of, in some two minutes."""
    big = [linear(LLAMA_3_8B, "gate_up", m, "W4 g128") for m in (1, 16, 32, 64, 128, 256, 512, 1024, 4096)]
    big += [linear(LLAMA_3_8B, "gate_up", m, "Q4_1") for m in (1, 16, 64)]
    big += [linear(YI_34B, "gate_up", m, "W4 g128") for m in (1, 16, 64, 1024)]
    small = [linear(LLAMA_3_8B, layer, m, "W4 g128") for layer in ("qkv", "o", "down") for m in (1, 16, 64)]
    small += [linear(SMOLLM2, layer, m, "Q4_1") for layer in SMOLLM2.linears for m in (1, 16, 256)]
    small += [Case("layer", SMOLLM2, m, "Q4_1") for m in (1, 16, 64)]
    small += [Case("layer", LLAMA_3_8B, m, "W4 g128") for m in (1, 16, 64)]
    eight = eight_bit(LLAMA_3_8B, "gate_up", (1, 16, 64, 256, 1024))
    eight += eight_bit(LLAMA_3_8B, "gate_up", (1, 16), ("Q6_K", "fp8 block"))
    eight += [Case("dequant_w8", LLAMA_3_8B, 0, "Q6_K", "gate_up")]
    eight += [Case("quantise_rows", LLAMA_3_8B, m, dtype) for dtype in ROUNDED for m in (1, 1024)]
    lens = ((128, 1), (1024, 1), (8192, 1), (32768, 1), (1024, 64), (8192, 16))
    attention = [decode(LLAMA_3_8B, (context,) * batch) for context, batch in lens]
    attention += [decode(LLAMA_3_8B, (8192,) * 16, dtype) for dtype in ("int8", "float8_e4m3fn")]
    attention += [decode(YI_34B, (8192,) * 16), decode(SMOLLM2, (1024,) * 64)]
    attention += [prefill(LLAMA_3_8B, (tokens,)) for tokens in (512, 2048, 8192)]
    attention += [prefill(SMOLLM2, (2048,)), prefill(YI_34B, (2048,))]
    rest = [Case(kernel, LLAMA_3_8B, m) for kernel in FUSED for m in (1, 64, 4096)]
    rest += [Case("sample", LLAMA_3_8B, m, "float32", options=o) for m in (1, 64) for o in SAMPLING]
    rest += [Case("logprobs", LLAMA_3_8B, 16, "float32"), Case("dequant_w4", LLAMA_3_8B, 0, "W4 g128", "gate_up")]
    return big + small + eight + attention + rest


def checks() -> list[Case]:
    """Correctness on the device: every dtype, GQA group, head size, page size and awkward length, small."""
    cases = []
    for i, dtype in enumerate(("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")):
        for j, group in enumerate((1, 3, 4, 7, 8)):
            shape = Shape(f"g{group}", 256, 256, 2 * group, 2, (64, 128, 96)[(i + j) % 3], 1000, 1)
            block, window = (64, 16, 128, 32)[(i + j) % 4], (0, 100, 0)[j % 3]
            cases.append(decode(shape, (1, 63, 65, 700, 0, 2500), dtype, block, window))
            cases.append(prefill(shape, (5, 129, 64, 1), (5, 200, 64, 333), dtype, block, window))
    awkward = Shape("awkward", 192, 208, 4, 2, 48, 1000, 1)
    medium = Shape("medium", 640, 896, 8, 2, 64, 1000, 1)
    for weights in FORMATS:
        shapes = ((SMOLLM2, "down"), (YI_6B, "o")) if weights != "Q4_1" else ((awkward, "qkv"), (SMOLLM2, "qkv"))
        cases += [linear(shape, layer, m, weights) for shape, layer in shapes for m in (1, 3, 17, 64, 100, 300, 900)]
        cases += [Case("dequant_w4", shape, 0, weights, layer) for shape, layer in shapes]
        cases += [Case("layer", medium, m, weights) for m in (3, 33)]
    for shape, layer in ((SMOLLM2, "down"), (awkward, "qkv")):
        formats = EIGHT_BITS if shape is SMOLLM2 else (*PER_ROW, "Q5_K")
        cases += eight_bit(shape, layer, (1, 17, 100, 900), formats)
        cases += [Case("dequant_w8", shape, 0, name, layer) for name in formats]
        cases += [Case("quantise_rows", shape, m, dtype) for dtype in ROUNDED for m in (1, 333)]
    for dtype in ("bfloat16", "float16", "float32"):
        for shape in (SMOLLM2, awkward):
            cases += [Case(kernel, shape, m, dtype) for kernel in FUSED for m in (1, 5, 333)]
    cases += [Case("rope_and_cache_write", Shape("d96", 3072, 8192, 32, 32, 96, 1000, 1), 5)]
    cases += [Case("rope_and_cache_write", YI_34B, 33, dtype) for dtype in ("int8", "float8_e4m3fn")]
    for shape in (SMOLLM2, awkward):
        cases += [Case("sample", shape, 8, dtype, options=o) for o in SAMPLING for dtype in ("float32", "bfloat16")]
        cases += [Case("logprobs", shape, 8, dtype) for dtype in ("float32", "bfloat16")]
    return cases


def dry() -> list[Case]:
    """Every kernel once, small enough for Triton's interpreter, which as shipped is right for float16 and float32."""
    cases = [linear(TINY, "qkv", m, "Q4_1") for m in (1, 900)] + [linear(TINY, "o", 3, "Q4_1")]
    cases += [Case("layer", TINY, 3, "Q4_1")]
    cases += eight_bit(TINY, "qkv", (3, 900), ("int8 row", "Q6_K"))
    cases += [Case("w8a16", TINY, 3, "fp8 row", "qkv"), Case("dequant_w8", TINY, 0, "Q5_K", "qkv")]
    cases += [Case("quantise_rows", TINY, 2, "int8"), decode(TINY, (70, 5), "float8_e4m3fn")]
    cases += [decode(TINY, (70, 0, 5), "float16"), decode(TINY, (40, 40), "float16")]
    cases += [prefill(TINY, (20, 5), (20, 40), "float16"), prefill(TINY, (40,), dtype="float16")]
    cases += [Case(kernel, TINY, 2, "float16") for kernel in FUSED]
    cases += [Case("sample", TINY, 2, "float32", options=TOP_P), Case("logprobs", TINY, 2, "float32")]
    return [*cases, Case("dequant_w4", TINY, 0, "Q4_1", "o")]


def cpu(shape: Shape = SMOLLM2) -> list[Case]:
    """`fen bench kernels` without a GPU: the CPU's operations at the sizes of the default model."""
    cases = []
    for m in (1, 16, 512):
        formats = ("Q4_1", "bfloat16", "float16", "float32") if m < 512 else ("bfloat16", "float16", "float32")
        cases += [Case("linear", shape, m, dtype, layer) for layer in shape.linears for dtype in formats]
    cases += [decode(shape, (context,) * batch, "float16") for context, batch in ((128, 1), (1024, 1), (1024, 16))]
    cases += [prefill(shape, (tokens,), dtype="float32") for tokens in (128, 512)]
    cases += [Case(kernel, shape, m, "bfloat16") for kernel in FUSED for m in (1, 16, 512)]
    return cases + [Case("sample", shape, m, "float32", options=SAMPLING[1]) for m in (1, 16)]


SPEEDUP = {1: 3.0, 16: 3.0, 32: 2.9, 64: 2.0, 128: 1.2, 256: 0.8, 512: 0.65, 1024: 0.75, 2048: 0.75, 4096: 0.75}


def target(case: Case) -> tuple[str, float] | None:
    """What is wanted of a case on a GPU: ("torch.mm bf16", 3.0) is three times as fast as that baseline, ("ceiling",
    0.85) that share of the limit, ("sdpa", 0.85) of the faster of its backends. None: no target of its own."""
    if case.kernel == "w4a16":
        n, k = case.shape.linears[case.layer]
        if n * k < LARGE or case.rows not in SPEEDUP:
            return None
        wanted = SPEEDUP[case.rows]
        return "torch.mm bf16", min(wanted, 2.5) if case.dtype == "Q4_1" and case.rows <= 16 else wanted
    if case.kernel == "decode" and case.dtype == "bfloat16":
        pages = sum(case.kv_lens) * case.shape.kv_heads * case.shape.head_dim * 4
        return ("ceiling", 0.85) if pages > 64 << 20 else None
    if case.kernel == "prefill" and case.q_lens == case.kv_lens and case.rows >= 512:
        return "sdpa", 0.85
    return None
