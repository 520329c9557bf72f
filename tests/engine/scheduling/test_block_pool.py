from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.scheduling.block_pool import FEW, BlockPool, block_hash, root_hash


def rings(pool: BlockPool) -> tuple[list[int], list[int]]:
    """The free blocks in the order of both rings: empty ones, cached ones; checks the links both ways."""
    found = []
    for head in (pool._empty, pool._lru):
        ring, block = [], pool._next[head]
        while block != head:
            assert pool._prev[pool._next[block]] == block
            ring.append(block)
            block = pool._next[block]
        found.append(ring)
    return found[0], found[1]


class BlockPoolMachine(RuleBasedStateMachine):
    """Against a model that is obviously right: lists of users' blocks, and what each block holds."""

    @initialize(num_blocks=st.integers(1, 12), contiguous=st.booleans())
    def start(self, num_blocks: int, contiguous: bool) -> None:
        self.pool = BlockPool(num_blocks, contiguous)
        self.users: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # block -> what it was registered with, while that is known to be there

    @rule(count=st.integers(1, 5), data=st.data())
    def allocate(self, count: int, data: st.DataObject) -> None:
        count = min(count, self.pool.num_free)
        empty, cached = rings(self.pool)
        growing = data.draw(st.sampled_from(self.users)) if self.users and data.draw(st.booleans()) else []
        if not self.pool.contiguous:
            expected = (empty + cached)[:count]
            assert self.pool.allocate(count, growing[-1] if growing else None) == expected
            blocks = expected
        else:
            blocks = self.pool.allocate(count, growing[-1] if growing else None)
        assert set(blocks) <= set(empty) | set(cached) and len(set(blocks)) == count
        evicted = set(blocks) & set(cached)
        few = self.pool.contiguous and (len(empty) - count) * FEW <= self.pool.num_blocks
        assert not evicted or set(empty) <= set(blocks) or few, "content was evicted while many blocks were empty"
        for block in blocks:
            self.content.pop(block, None)
        if growing:
            growing += blocks
        elif blocks:
            self.users.append(blocks)

    @precondition(lambda self: self.users)
    @rule(data=st.data(), hash=st.integers(0, 9))
    def register(self, data: st.DataObject, hash: int) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.users))))
        name = bytes([hash])
        self.pool.register(block, name)
        if name not in self.content.values() and block not in self.content:
            self.content[block] = name

    @rule(hash=st.integers(0, 9))
    def share(self, hash: int) -> None:
        block = self.pool.lookup(bytes([hash]))
        if block is not None:
            self.pool.share(block)
            self.users.append([block])

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.users.pop(data.draw(st.integers(0, len(self.users) - 1)))
        _, before = rings(self.pool)
        self.pool.release(blocks)
        _, after = rings(self.pool)
        freed = [block for block in reversed(blocks) if self.pool.is_free(block) and block in self.content]
        assert after == before + freed, "the tail of a chain must be the first to be evicted"

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        pool = self.pool
        empty, cached = rings(pool)
        used = [block for user in self.users for block in user]
        assert sorted(empty + cached + list(set(used))) == list(range(pool.num_blocks))
        assert pool.num_free == len(empty) + len(cached)
        assert pool._num_empty == len(empty)
        assert [used.count(block) for block in range(pool.num_blocks)] == pool._refs
        assert all(pool.is_free(block) == (block not in used) for block in range(pool.num_blocks))

    @invariant()
    def the_cache_tells_the_truth(self) -> None:
        empty, cached = rings(self.pool)
        assert not set(empty) & set(self.content)
        assert set(cached) <= set(self.content)
        for hash in range(10):
            holders = [block for block, name in self.content.items() if name == bytes([hash])]
            assert ([self.pool.lookup(bytes([hash]))] if holders else []) == holders
            assert holders or self.pool.lookup(bytes([hash])) is None


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


def test_a_hash_names_tokens_their_order_and_everything_before() -> None:
    root = root_hash("")
    chains = [
        block_hash(root, [1, 2]),
        block_hash(root, [2, 1]),
        block_hash(root, [1, 2, 0]),
        block_hash(root, [258, 0]),  # 1, 2 as bytes of one number
        block_hash(root_hash("salt"), [1, 2]),
        block_hash(block_hash(root, [1, 2]), [1, 2]),
    ]
    assert len(set(chains)) == len(chains)
    assert block_hash(root, [1, 2]) == chains[0]


def test_least_recently_used_content_goes_first_and_tails_before_heads() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    for index, block in enumerate(first + second):
        pool.register(block, bytes([index]))
    pool.release(second)
    pool.release(first)
    assert pool.allocate(3) == [second[1], second[0], first[1]]
    assert [pool.lookup(bytes([index])) for index in range(4)] == [first[0], None, None, None]


def test_content_that_is_used_again_becomes_the_youngest() -> None:
    pool = BlockPool(2)
    old, young = pool.allocate(2)
    for block in (old, young):
        pool.register(block, bytes([block]))
        pool.release([block])
    pool.share(old)
    pool.release([old])
    assert pool.allocate(1) == [young]


def test_the_second_copy_of_a_block_is_not_cached() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.register(first, b"x")
    pool.register(second, b"x")
    assert pool.lookup(b"x") == first
    pool.release([second])
    assert pool.lookup(b"x") == first
    assert pool.allocate(1) == [second], "it holds nothing, so it is given out before block 2"


def runs(blocks: list[int]) -> int:
    """In how many pieces a block table lies in the pool."""
    return 1 + sum(b != a + 1 for a, b in itertools.pairwise(blocks))


def grow_together(pool: BlockPool, sequences: int, blocks: int) -> list[list[int]]:
    tables: list[list[int]] = [[] for _ in range(sequences)]
    for _ in range(blocks):
        for table in tables:
            table += pool.allocate(1, table[-1] if table else None, blocks - len(table))
    return tables


@pytest.mark.parametrize("num_blocks", [64, 61])
def test_contiguous_sequences_that_grow_together_lie_in_one_piece(num_blocks: int) -> None:
    pool = BlockPool(num_blocks, contiguous=True)
    tables = grow_together(pool, sequences=8, blocks=7)
    assert all(runs(table) == 1 for table in tables)
    for table in tables:
        pool.release(table)
    assert sum(map(runs, grow_together(pool, sequences=8, blocks=7))) <= 9


def test_contiguous_reuse_of_cached_blocks_is_least_recently_used_and_in_order() -> None:
    pool = BlockPool(32, contiguous=True)
    tables = [pool.allocate(8) for _ in range(4)]
    for table in tables:
        for block in table:
            pool.register(block, bytes([block]))
    for table in tables:
        pool.release(table)
    for table in tables:
        assert pool.allocate(5) == table[3:]
        assert pool.allocate(3) == table[:3]


def test_contiguous_growth_spares_cached_blocks_while_there_are_empty_ones() -> None:
    pool = BlockPool(4, contiguous=True)
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.register(1, b"x")
    pool.release([1])
    pool.release([3])
    assert pool.allocate(1, after=0) == [3]
    assert pool.lookup(b"x") == 1
    assert pool.allocate(1, after=0) == [1]
    assert pool.lookup(b"x") is None


def test_a_pool_of_one_block() -> None:
    for contiguous in (False, True):
        pool = BlockPool(1, contiguous)
        assert pool.allocate(1) == [0]
        assert pool.num_free == 0
        pool.release([0])
        assert pool.allocate(1) == [0]
