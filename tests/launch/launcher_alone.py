"""`nanogpt launch` with ranks that are a few lines of Python instead of a training run: they start in no time.

python launcher_alone.py RANK_CODE [OPTION OF LAUNCH]... -- [ARGUMENT]...
"""

from __future__ import annotations

import os
import sys

from nanogpt.errors import NanogptError
from nanogpt.launch import launcher, meeting, tied

launcher.tied_command = lambda *_: tied.tied_command("runs_code", sys.argv[1])  # type: ignore[assignment]
if not os.environ.get("TEST_SERVE"):  # nobody asks, and torch takes long to load
    meeting.serve = lambda listener: listener  # type: ignore[assignment, return-value]
for name in ("STOPPED_S", "ENDING_S"):
    if seconds := os.environ.get(f"TEST_{name}"):
        setattr(launcher, name, float(seconds))

if __name__ == "__main__":
    try:
        code = launcher.launch(sys.argv[2:])
    except NanogptError as error:
        print(error, file=sys.stderr, flush=True)
        code = error.exit_code
    sys.exit(code)
