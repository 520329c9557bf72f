"""Which KV block belongs to whom: free lists, reference counts, the prefix cache. Knows block numbers, not tensors.

A block is *used* (reference count above 0) or *free*. A free block whose content is registered in the prefix cache
stays there until its room is needed: free blocks without such content are given out first, then the least recently
used. Both kinds wait in doubly linked rings inside two arrays, so that any block joins or leaves in O(1).
"""

from __future__ import annotations

import array
import functools
import hashlib

ROOM = 8  # one sequence keeps at most one part in so many of the pool clear of others
FEW = 8  # fewer than one block in so many being empty counts as a full pool


def root_hash(salt: str) -> bytes:
    """The parent of a sequence's first block. Sequences of different salts never share a block."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def block_hash(parent: bytes, tokens: list[int]) -> bytes:
    """Names a full block by its own tokens and, through the parent's hash, by all tokens before it."""
    return hashlib.blake2b(parent + array.array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Blocks 0 .. num_blocks - 1.

    contiguous: lay a sequence's blocks side by side, and sequences close together, where that is possible (a CPU reads
    such a cache faster, a GPU does not care): a sequence grows into the block after its last one, and others start
    behind the room that it may come to need.
    """

    def __init__(self, num_blocks: int, contiguous: bool = False):
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._num_empty = num_blocks  # free and not cached
        self.contiguous = contiguous
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        # Two rings; their heads are the entries after the blocks' own. A used block is in neither.
        self._empty, self._lru = num_blocks, num_blocks + 1
        self._next = list(range(num_blocks + 2))
        self._prev = list(range(num_blocks + 2))
        for block in range(num_blocks):
            self._link(block, before=self._empty)

    def lookup(self, hash: bytes) -> int | None:
        """The block that holds this content, if the cache has it. It is not safe from eviction until `share`d."""
        return self._cached.get(hash)

    def is_free(self, block: int) -> bool:
        return self._refs[block] == 0

    def share(self, block: int) -> None:
        """One more user for a block that `lookup` found."""
        if self._refs[block] == 0:
            self._unlink(block)
            self.num_free -= 1
        self._refs[block] += 1

    def allocate(self, count: int, after: int | None = None, room: int = 0) -> list[int]:
        """`count` blocks of one user and no meaning; at most `num_free`.

        after: the last block of the same sequence. room: blocks it may come to need, these included.
        """
        assert count <= self.num_free, "the caller asks num_free first"
        blocks: list[int] = []
        for wanted in range(count, 0, -1):
            after = self._pick(after, wanted, room - len(blocks))
            self._unlink(after)
            self.num_free -= 1
            self._refs[after] = 1
            content = self._hashes[after]
            if content is None:
                self._num_empty -= 1
            else:
                del self._cached[content]
                self._hashes[after] = None
            blocks.append(after)
        return blocks

    def register(self, block: int, hash: bytes) -> None:
        """Offers the content of a used block to the cache. If an equal block is there already, that one stays."""
        if hash not in self._cached and self._hashes[block] is None:
            self._cached[hash] = block
            self._hashes[block] = hash

    def forget(self, blocks: list[int]) -> None:
        """Takes used blocks out of the cache."""
        for block in blocks:
            if (content := self._hashes[block]) is not None:
                del self._cached[content]
                self._hashes[block] = None

    def release(self, blocks: list[int]) -> None:
        """One user fewer for each block of a sequence, given in the order of its block table.

        The last block is freed first, so that a chain is evicted from its tail: without its head it cannot be found.
        """
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            self.num_free += 1
            if self._hashes[block] is not None:
                self._link(block, before=self._lru)
                continue
            self._num_empty += 1
            if self.contiguous and block != blocks[0]:
                self._link(block, before=self._empty)  # the inside of a sequence is a poor start for another one
            else:
                self._link(block, before=self._next[self._empty])  # reused first, while the device's own caches know it

    def _pick(self, after: int | None, wanted: int, room: int) -> int:
        """The free block to give out next; `wanted` with this one. O(1) for each block given out, and for each of the
        room."""
        empty = self._next[self._empty]
        if self.contiguous and after is not None:
            # The neighbour, if it is free. While many blocks are empty, no cached content is given up for it. Once the
            # cache has filled the pool, something is evicted for nearly every block that is given out, and a sequence
            # in one piece is worth more than the exact order of eviction.
            neighbour = after + 1
            free = neighbour < self.num_blocks and self._refs[neighbour] == 0
            if free and (self._hashes[neighbour] is None or self._num_empty * FEW <= self.num_blocks):
                return neighbour
        if empty != self._empty:
            if self.contiguous:
                self._set_aside(empty, min(max(room, 0), self.num_blocks // ROOM))
            return empty
        block = self._next[self._lru]
        if self.contiguous:
            # A released sequence lies here last block first. Step back over as many of its blocks as are wanted, so
            # that the same blocks are evicted but given out left to right. Each step back is a neighbour taken later.
            for _ in range(wanted - 1):
                if self._next[block] != block - 1:
                    break
                block -= 1
        return block

    def _set_aside(self, start: int, room: int) -> None:
        """Empty blocks behind `start` become the last to start another sequence, the middle of the room first."""
        for offset in _halving(room):
            block = start + offset
            if offset and block < self.num_blocks and not self._refs[block] and self._hashes[block] is None:
                self._unlink(block)
                self._link(block, before=self._empty)

    def _link(self, block: int, before: int) -> None:
        previous = self._prev[before]
        self._next[previous] = self._prev[before] = block
        self._prev[block], self._next[block] = previous, before

    def _unlink(self, block: int) -> None:
        previous, following = self._prev[block], self._next[block]
        self._next[previous], self._prev[following] = following, previous


@functools.cache
def _halving(count: int) -> list[int]:
    """0 .. count - 1 in van der Corput's order, halving the gaps: however many are taken, they lie far apart."""
    bits = count.bit_length()
    reversed_bits = (int(format(i, f"0{bits}b")[::-1], 2) for i in range(1 << bits))
    return list(dict.fromkeys(i * count >> bits for i in reversed_bits))
