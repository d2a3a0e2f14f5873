"""The program of a rank that `launcher_alone.py` starts."""

import sys

if __name__ == "__main__":
    exec(sys.argv[1])
