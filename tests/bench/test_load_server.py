"""What a server's processes hold, as /proc says it."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from bench.load import server

SIZE = 64 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_of_a_mapped_file_are_not_a_process_s_own(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    pid = os.getpid()
    own, files = server._own(pid), server._memory(pid, "RssFile")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0  # each page is touched
        assert server._own(pid) - own < SIZE // 4
        assert server._memory(pid, "RssFile") - files > SIZE // 2
        # Of the system, not of what this process's allocator still has from earlier tests.
        with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as kept:
            kept.write(b"x" * SIZE)
            assert server._own(pid) - own > SIZE // 2
