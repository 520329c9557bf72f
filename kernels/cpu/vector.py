"""Vector code for a CPU, made at run time: LLVM IR written with llvmlite, compiled for this machine, a kernel in 0.2 s.

Vectors are of WIDTH float32 lanes; LLVM splits them where the registers are narrower. The functions below write the IR
of one thing each at the builder's place. A kernel is a function of one argument, int64 *: its arguments, of which
pointers are addresses. `Kernel` runs it on all of torch's threads at once; they share the work by counting up one of
the arguments (`each_of`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

try:
    from llvmlite import binding, ir
except ImportError:  # the GPU's kernels and float32 on a CPU run without
    ir = None

Value = Any  # of ir
Builder = Any
WIDTH = 16
_MAGIC = 1.5 * 2**23  # added to a small float32 it leaves a whole number in the lowest bits
# Of the series of 2^x: log(2)^n / n!, from n = 6 down to 0.
_EXP2 = [math.log(2) ** n / math.factorial(n) for n in range(6, -1, -1)]

_TYPES: list[Any] = [ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)] if ir is not None else [None] * 4
I8, I16, I32, I64 = _TYPES
F32: Any = ir.FloatType() if ir is not None else None
FLOATS, INTEGERS, BYTES = [ir and ir.VectorType(kind, WIDTH) for kind in (F32, I32, I8)]
# What `load` reads: the type of an element in memory.
STORED = {torch.float32: F32, torch.bfloat16: I16, torch.int8: I8, torch.float8_e4m3fn: I8}


def available() -> bool:
    return ir is not None


class Kernel:
    """A compiled kernel. write(builder, arguments): its body, up to the return."""

    def __init__(self, write: Callable[[Builder, Value], None]):
        module = ir.Module()
        module.triple = binding.get_process_triple()
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), "kernel")
        builder = ir.IRBuilder(function.append_basic_block())
        write(builder, function.args[0])
        builder.ret_void()
        self._engine, self._address = _compiled(str(module))
        self._serial = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)

    def __call__(self, arguments: np.ndarray) -> None:
        """arguments: int64, which must live and stay where they are until this returns."""
        threads, parallel = torch.get_num_threads(), _openmp()
        if threads == 1 or parallel is None:
            self._serial(arguments.ctypes.data)
        else:
            parallel(self._address, arguments.ctypes.data, threads, 0)


def _compiled(text: str) -> tuple[Any, int]:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=3
    )
    module = binding.parse_assembly(text)
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine, engine.get_function_address("kernel")


@functools.cache
def _openmp() -> Any:
    """GNU OpenMP's call that runs a function on a team of threads: of the library that torch has loaded, so that its
    threads are torch's own. None where torch uses another."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "libgomp" in line}
        parallel = ctypes.CDLL(max(paths, key=lambda path: "torch" in path)).GOMP_parallel  # others may bring their own
    except (OSError, ValueError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


# Control.


@contextlib.contextmanager
def loop(b: Builder, start: Value, stop: Value) -> Iterator[Value]:
    """The body is run for each int64 of start .. stop - 1."""
    before, head, body, after = b.block, *(b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    index = b.phi(I64)
    index.add_incoming(start, before)
    b.cbranch(b.icmp_signed("<", index, stop), body, after)
    b.position_at_end(body)
    yield index
    index.add_incoming(b.add(index, I64(1)), b.block)
    b.branch(head)
    b.position_at_end(after)


@contextlib.contextmanager
def each_of(b: Builder, counter: Value, stop: Value) -> Iterator[Value]:
    """The body is run for the numbers below `stop` that this thread is the first to take from *counter."""
    head, body, after = (b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    index = b.atomic_rmw("add", counter, I64(1), "monotonic")
    b.cbranch(b.icmp_signed("<", index, stop), body, after)
    b.position_at_end(body)
    yield index
    b.branch(head)
    b.position_at_end(after)


def variable(b: Builder, kind: Any, value: Value) -> Value:
    with b.goto_entry_block():
        place = b.alloca(kind)
    b.store(value, place)
    return place


# Memory.


def at(b: Builder, pointer: Value, *terms: Value | int | tuple[Value | int, ...]) -> Value:
    """pointer + the sum of the terms, in elements; a tuple is the product of what it has."""
    total = I64(0)
    for term in terms:
        factors = [I64(x) if isinstance(x, int) else x for x in (term if isinstance(term, tuple) else (term,))]
        total = b.add(total, functools.reduce(b.mul, factors))
    return b.gep(pointer, [total])


def address(b: Builder, value: Value, kind: Any) -> Value:
    """An int64 as a pointer to `kind`."""
    return b.inttoptr(value, kind.as_pointer())


def load(b: Builder, pointer: Value, dtype: torch.dtype = torch.float32) -> Value:
    """WIDTH elements of a dtype of STORED from `pointer` on, as float32."""
    raw = b.load(b.bitcast(pointer, ir.VectorType(STORED[dtype], WIDTH).as_pointer()), align=1)
    if dtype == torch.bfloat16:
        return b.bitcast(b.shl(b.zext(raw, INTEGERS), integers(16)), FLOATS)
    if dtype == torch.int8:
        return b.sitofp(b.sext(raw, INTEGERS), FLOATS)
    if dtype == torch.float8_e4m3fn:  # its bits in place of float16's are 2^-8 of its value, denormals too
        words = ir.VectorType(I16, WIDTH)
        raw = b.zext(raw, words)
        sign, rest = (b.and_(raw, ir.Constant(words, [mask] * WIDTH)) for mask in (0x80, 0x7F))
        sign, rest = (b.shl(x, ir.Constant(words, [by] * WIDTH)) for x, by in ((sign, 8), (rest, 7)))
        half = b.bitcast(b.or_(sign, rest), ir.VectorType(ir.HalfType(), WIDTH))
        return b.fmul(b.fpext(half, FLOATS), floats(256))
    return raw


def gather(b: Builder, pointer: Value, stride: Value) -> Value:
    """WIDTH float32, `stride` elements apart."""
    found = floats(0)
    for i in range(WIDTH):
        found = b.insert_element(found, b.load(at(b, pointer, (stride, i))), I32(i))
    return found


def store(b: Builder, value: Value, pointer: Value) -> None:
    b.store(value, b.bitcast(pointer, FLOATS.as_pointer()), align=1)


def prefetch(b: Builder, pointer: Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    b.call(_intrinsic(b, kind, "llvm.prefetch.p0"), [b.bitcast(pointer, I8.as_pointer()), I32(0), I32(3), I32(1)])


# Arithmetic.


def floats(value: float) -> Value:
    return ir.Constant(FLOATS, [value] * WIDTH)


def integers(value: int) -> Value:
    return ir.Constant(INTEGERS, [value] * WIDTH)


def splat(b: Builder, value: Value) -> Value:
    one = b.insert_element(ir.Constant(FLOATS, ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, one, _lanes([0] * WIDTH))


def add_product(b: Builder, total: Value, x: Value, y: Value) -> Value:
    """total + x * y, fused."""
    return b.fadd(total, b.fmul(x, y, flags=("contract",)), flags=("contract",))


def larger(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def total_of(b: Builder, x: Value) -> Value:
    """The sum of all lanes."""
    reduce = _intrinsic(b, ir.FunctionType(F32, [F32, FLOATS]), f"llvm.vector.reduce.fadd.v{WIDTH}f32")
    return b.call(reduce, [F32(0), x], fastmath=("reassoc",))


def largest_of(b: Builder, x: Value) -> Value:
    reduce = _intrinsic(b, ir.FunctionType(F32, [FLOATS]), f"llvm.vector.reduce.fmax.v{WIDTH}f32")
    return b.call(reduce, [x], fastmath=("nnan",))


def exp2(b: Builder, x: Value) -> Value:
    """2^x of a vector, x <= 126, to 2 units in the last place; below -126 it is 2^-126. NaN stays NaN."""
    x = b.select(b.fcmp_ordered("<", x, floats(-126)), floats(-126), x)
    shifted = b.fadd(x, floats(_MAGIC))
    part = b.fsub(x, b.fsub(shifted, floats(_MAGIC)))  # of -1/2 .. 1/2
    power = b.shl(b.add(b.bitcast(shifted, INTEGERS), integers(127)), integers(23))  # the magic number's bits fall off
    value = floats(_EXP2[0])
    for coefficient in _EXP2[1:]:
        value = add_product(b, floats(coefficient), value, part)
    return b.fmul(value, b.bitcast(power, FLOATS))


def square_root(b: Builder, x: Value) -> Value:
    return b.call(_intrinsic(b, ir.FunctionType(F32, [F32]), "llvm.sqrt.f32"), [x])


def sums(b: Builder, vectors: list[Value]) -> Value:
    """The sum of the lanes of each of WIDTH vectors, in order: a tree of WIDTH - 1 additions of whole vectors."""
    stack: list[tuple[Value, int]] = []  # each with the number of lanes that are parts of one sum
    for vector in vectors:
        stack.append((vector, WIDTH))
        while len(stack) > 1 and stack[-1][1] == stack[-2][1]:
            (y, size), (x, _) = stack.pop(), stack.pop()
            stack.append((_halved(b, x, y, size), size // 2))
    ((found, _),) = stack
    return found


def _halved(b: Builder, x: Value, y: Value, size: int) -> Value:
    """x and y have parts of `size` lanes; the result has first those of x, then those of y, each half as long."""
    low = [i for i in range(2 * WIDTH) if i % size < size // 2]
    high = [i + size // 2 for i in low]
    return b.fadd(b.shuffle_vector(x, y, _lanes(low)), b.shuffle_vector(x, y, _lanes(high)))


def _lanes(indices: Sequence[int]) -> Value:
    return ir.Constant(ir.VectorType(I32, len(indices)), list(indices))


def _intrinsic(b: Builder, kind: Any, name: str) -> Any:
    return b.module.globals.get(name) or ir.Function(b.module, kind, name)
