"""What every Python of the image does first: another checkout's code, another FlashAttention, caches outside of home.

The build puts this into site-packages, with a .pth line that imports it. Variables of the host cannot be read
in the definition's %environment: Apptainer clears them before and brings them back after.
"""

import os
import sys


def start() -> None:
    """Act on NANOGPT_SRC and NANOGPT_FLASH_ATTN; point libraries' caches away from home."""
    path = []
    source = os.environ.get("NANOGPT_SRC")
    if source:
        if not os.path.isfile(os.path.join(source, "nanogpt", "__init__.py")):  # noqa: PTH113, PTH118
            fail(
                f"NANOGPT_SRC={source}: has no nanogpt/__init__.py, as seen in the container; expected a checkout."
                " A directory outside of home and the current one needs --bind."
            )
        path.append(source)
    flash_attention = os.environ.get("NANOGPT_FLASH_ATTN")
    if flash_attention:
        if not os.path.isdir(flash_attention):  # noqa: PTH112
            fail(
                f"NANOGPT_FLASH_ATTN={flash_attention}: no such directory, as seen in the container; expected what"
                " build-flash-attn --out made. It may need --bind."
            )
        path.append(flash_attention)
    sys.path[:0] = path
    cache = os.environ.get("NANOGPT_CACHE")
    if cache and cache != "off":
        os.environ.setdefault("HF_HOME", os.path.join(cache, "huggingface"))  # noqa: PTH118
    name = f"nanogpt-matplotlib-{os.getuid()}"
    os.environ.setdefault("MPLCONFIGDIR", os.path.join(os.environ.get("TMPDIR") or "/tmp", name))  # noqa: PTH118


def fail(message: str) -> None:
    """Leave with the code of wrong input: an exception would only be shown, and the wrong code run."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()
    os._exit(2)


start()
