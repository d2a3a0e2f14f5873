"""Upload an export to the Hugging Face hub, only on request."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nanogpt.data.surroundings import check_surroundings, is_private_way
from nanogpt.errors import InputError, RunError


def check_name(name: str) -> None:
    """Raise InputError if `name` is not a repository's OWNER/NAME."""
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII):
        raise InputError(f"--push-to-hub: found {name!r}, expected OWNER/NAME, such as my-lab/speedrun-1555")


def push(directory: Path, name: str, *, private: bool) -> str:
    """Upload all of `directory` as the model `name`, created if missing; returns its address.

    Endpoint and token are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN or `hf auth login`.

    Raises:
        InputError: no token, or an address where others could read it.
        RunError: no network, or the hub refuses.
    """
    check_surroundings()
    from huggingface_hub import HfApi, constants, errors, get_token

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    token = get_token()
    if not token:
        raise InputError("--push-to-hub: there is no token; set HF_TOKEN, or run: hf auth login")
    if not is_private_way(endpoint):
        raise InputError(f"HF_ENDPOINT: {endpoint} is plain http, where others can read the token; use https://")
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message="nanogpt export")
    except errors.HfHubHTTPError as error:
        raise RunError(f"{endpoint}: the hub refuses {name}: {error}. The export is complete in {directory}") from error
    except (OSError, ValueError) as error:  # among them those of the HTTP client
        raise RunError(
            f"{endpoint}: {name} cannot be uploaded: {error}. The export is complete in {directory}"
        ) from error
    return f"{endpoint}/{name}"
