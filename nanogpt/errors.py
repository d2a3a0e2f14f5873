"""The errors that users see, and the exit codes of every command.

Exit codes: 0 done, 1 failed (`RunError`), 2 the user's input is wrong (`InputError`), 75 (`REQUEUE_EXIT_CODE`)
interrupted with a complete checkpoint.
"""

# EX_TEMPFAIL of sysexits.h: nothing is wrong; restart the run and it continues.
REQUEUE_EXIT_CODE = 75


class NanogptError(Exception):
    """Base of the errors that are shown as a message, without a traceback."""

    exit_code = 1


class RunError(NanogptError):
    """The input was right and the work failed: no network, disk full, a non-finite loss."""

    exit_code = 1


class InputError(NanogptError):
    """The user's input is wrong: a recipe, a flag, a file. The message names it and says what to do."""

    exit_code = 2


class Interrupted(NanogptError):
    """A signal ended the run between two steps; its progress is in the checkpoint."""

    exit_code = REQUEUE_EXIT_CODE
