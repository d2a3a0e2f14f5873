"""Request what `import torch` will read before it does: `python -I -S read_ahead.py FD PROCESS`, from image_start.py.

An image's files come through squashfuse. Each page fault of an import waits for it to unpack one block, one fault after
the other, and squashfuse's threads are idle meanwhile. Asked in advance, they unpack on the other cores while
the import continues. posix_fadvise copies nothing, and does nothing for pages that are already there.

It is a separate process, since the loader holds Python's lock while it maps and relocates libraries. FD is the list of
import_pieces.py, opened; this process holds its lock. PROCESS is the one that imports; when it ends, this one stops.
"""

import os
import sys

ASKED = 1 << 17  # bytes at a time: the kernel accepts no more per call


def read_ahead(listed: int, process: int) -> None:
    """Request each piece of the list for as long as the process runs."""
    name, descriptor = "", -1
    with open(listed) as lines:
        for line in lines:
            offset, length, path = line.rstrip("\n").split(" ", 2)
            if path != name:
                os.kill(process, 0)  # raises if it has ended
                if descriptor >= 0:
                    os.close(descriptor)
                name, descriptor = path, os.open(path, os.O_RDONLY)
            end = int(offset) + int(length)
            for start in range(int(offset), end, ASKED):
                os.posix_fadvise(descriptor, start, min(ASKED, end - start), os.POSIX_FADV_WILLNEED)


if __name__ == "__main__":
    given = int(sys.argv[1])
    os.closerange(given + 1, 256)  # so that nobody waiting for the end of a pipe waits for this process
    try:
        read_ahead(given, int(sys.argv[2]))
    except OSError:
        sys.exit(1)
