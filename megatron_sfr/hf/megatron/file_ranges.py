"""Ranges of files, and copying them into other files.

The copy stays in the kernel where the file systems allow it: each byte is moved once, without pages of this process.
"""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class FileRange:
    """Consecutive bytes of a file."""

    path: Path
    start: int
    bytes: int

    def copy_to(self, target: int, position: int) -> None:
        """Copies the range to a position of the file that is open as descriptor `target`."""
        done = 0
        with reading(self.path) as source:
            with contextlib.suppress(OSError):  # not between these file systems; a real failure appears again below
                while done < self.bytes:
                    left = self.bytes - done
                    if not (count := os.copy_file_range(source, target, left, self.start + done, position + done)):
                        break
                    done += count
            buffer = memoryview(bytearray(min(BUFFER_BYTES, self.bytes - done)))
            while done < self.bytes:
                part = buffer[: self.bytes - done]
                read_at(source, part, self.start + done, self.path)
                write_at(target, part, position + done)
                done += len(part)


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """A descriptor of the file, with a large readahead."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(source: int, buffer: memoryview, position: int, path: Path) -> None:
    """Fills the buffer from a position of a file. Raises ValueError if the file ends before."""
    while buffer:
        if not (count := os.preadv(source, [buffer], position)):
            raise ValueError(f"{path} ends at byte {position}: it was cut off while it was read")
        buffer, position = buffer[count:], position + count


def write_at(target: int, buffer: memoryview, position: int) -> None:
    """Writes all of the buffer at a position of a file."""
    while buffer:
        count = os.pwrite(target, buffer, position)
        buffer, position = buffer[count:], position + count
