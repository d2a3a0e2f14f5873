"""Ask for what `import torch` will read, before it does: `python -I -S read_ahead.py FD PROCESS`, by image_start.py.

An image's files come through squashfuse. Each page fault of an import waits for it to unpack one block, one fault after
the other, and squashfuse's threads have nothing to do meanwhile. Told beforehand, they unpack on the other cores while
the import continues. posix_fadvise copies nothing, and does nothing for pages that are there.

A process of its own, since the loader holds Python's lock while it maps and relocates libraries. FD is the open list of
import_pieces.py, whose lock this process holds; PROCESS the one that imports, without which there is no hurry.
"""

import os
import sys

ASKED = 1 << 17  # bytes at a time: the kernel takes no more of one call


def read_ahead(listed: int, process: int) -> None:
    """Ask for each piece of the list, for as long as the process runs."""
    name, descriptor = "", -1
    with open(listed) as lines:
        for line in lines:
            offset, length, path = line.rstrip("\n").split(" ", 2)
            if path != name:
                os.kill(process, 0)  # raises where it has ended
                if descriptor >= 0:
                    os.close(descriptor)
                name, descriptor = path, os.open(path, os.O_RDONLY)
            end = int(offset) + int(length)
            for start in range(int(offset), end, ASKED):
                os.posix_fadvise(descriptor, start, min(ASKED, end - start), os.POSIX_FADV_WILLNEED)


if __name__ == "__main__":
    given = int(sys.argv[1])
    os.closerange(given + 1, 256)  # whoever waits for the end of a pipe shall not wait for this process
    try:
        read_ahead(given, int(sys.argv[2]))
    except OSError:
        sys.exit(1)
