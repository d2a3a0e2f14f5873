"""Fixtures of the tests with a real Apptainer: an ordinary user, and an image built as that user.

Files of tests run side by side (pytest-xdist); what all of them use is made by the first process that asks for it.
As root, as CI is, commands run as the user CLUSTER_TEST_USER (default nanogpt, whom setup-apptainer.sh makes) in a copy
of the checkout in that user's home; otherwise as whoever runs the tests, in the checkout itself.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
USER = os.environ.get("CLUSTER_TEST_USER", "nanogpt")
OTHER_USER = f"{USER}-plain"  # without subordinate ids
MINUTES_FOR_A_BUILD = 30
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def home_of_user(user: str = USER) -> Path:
    """Home of the user that the tests run commands as."""
    return Path(pwd.getpwnam(user).pw_dir) if os.geteuid() == 0 else Path.home()


def environment_of_user(extra: dict[str, str] | None = None, user: str = USER) -> dict[str, str]:
    """This process's environment with the user's own home and names, and `extra`."""
    environment = dict(os.environ)
    if os.geteuid() == 0:
        environment |= {"HOME": str(home_of_user(user)), "USER": user, "LOGNAME": user}
    environment.pop("XDG_RUNTIME_DIR", None)
    return environment | (extra or {})


@pytest.fixture(scope="module", autouse=True)
def slurm_of_machine() -> None:
    """The real Slurm: here tests/conftest.py puts nothing before it."""


@pytest.fixture(scope="session")
def as_user() -> Run:
    """Run a command as an ordinary user: `as_user(["apptainer", ...], cwd=..., environment={...}, timeout=seconds)`.

    Text in and out; a failure of the command is the caller's to look at, unless `check` is set.
    """
    return runner(USER)


@pytest.fixture(scope="session")
def as_other() -> Run:
    """`as_user` for another user, who has no subordinate ids; there is one where the tests run as root."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be two users")
    return runner(OTHER_USER)


def runner(user: str) -> Run:
    """What runs commands as this user."""

    def run(
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
        timeout: float = 600,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        prefix = [shutil.which("runuser") or "runuser", "-u", user, "--"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [*prefix, *map(str, command)],
            cwd=cwd or home_of_user(user),
            env=environment_of_user(environment, user),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture(scope="session")
def user_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout that the user may read and write: this one, or as root a copy of it in the user's home."""
    if os.geteuid() != 0:
        return CHECKOUT
    copy = home_of_user() / "nanogpt-checkout"
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # of this run of pytest alone
    made = shared / "user-checkout-made"
    with (shared / "user-checkout-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            copy_checkout(copy)
            made.touch()
    return copy


def copy_checkout(copy: Path) -> None:
    """Copy what git knows of the checkout, or would, to the directory `copy`, which then is the user's."""
    copy.mkdir(exist_ok=True)
    git = ["git", "-c", "safe.directory=*", "-C", CHECKOUT]
    listed = subprocess.run(
        [*git, "ls-files", "-z", "-co", "--exclude-standard"], check=True, capture_output=True
    ).stdout
    names = sorted({name for name in listed.decode().split("\0") if name and (CHECKOUT / name).is_file()})
    for entry in copy.iterdir():  # what was built stays
        if entry.name not in ("build", ".venv"):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(CHECKOUT / name, copy / name)
    git_directory = subprocess.run(
        [*git, "rev-parse", "--path-format=absolute", "--git-dir"], check=True, capture_output=True, text=True
    ).stdout.strip()
    shutil.copytree(git_directory, copy / ".git", symlinks=True)
    subprocess.run(["chown", "-R", f"{USER}:", copy], check=True)


def build_sif(as_user: Run, checkout: Path, flavour: str, *arguments: str) -> Path:
    """Build the image of the flavour in the checkout; quick where nothing that goes into it has changed."""
    out = checkout / "build" / "sif" / f"nanogpt-{flavour}.sif"
    done = as_user(
        ["make", "sif", f"FLAVOUR={flavour}", "BASE=tree", f"OUT={out}", *arguments],
        cwd=checkout,
        timeout=60 * MINUTES_FOR_A_BUILD,
        check=True,
    )
    print(done.stderr)
    return out


@pytest.fixture(scope="session")
def sif(as_user: Run, user_checkout: Path) -> Path:
    """An image, built as the user, of CLUSTER_TEST_FLAVOUR (default cpu); CLUSTER_TEST_SIF names one that is there."""
    given = os.environ.get("CLUSTER_TEST_SIF")
    flavour = os.environ.get("CLUSTER_TEST_FLAVOUR", "cpu")
    return Path(given) if given else build_sif(as_user, user_checkout, flavour)
