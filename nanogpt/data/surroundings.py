"""What the environment says about downloads: the hub's address, time limits, proxies, certificates, a token.

Checked before anything is sent, because the HTTP client reports mistakes in them as exceptions of many kinds that
name no variable. No message shows a password or a token.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from nanogpt.errors import InputError

SECONDS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def check_surroundings() -> None:
    """Raise `InputError` naming a variable that no download can work with, and the way out."""
    for name in SECONDS:
        value = os.environ.get(name)
        if value is not None and not re.fullmatch(r"[0-9]{1,6}", value):
            raise InputError(f"{name}: found {value!r}, expected whole seconds such as 10; or unset it")
    _check_endpoint(os.environ.get("HF_ENDPOINT"))
    _check_proxies(os.environ)
    _check_certificates(os.environ)


def _check_endpoint(endpoint: str | None) -> None:
    if not endpoint:
        return
    problem = _address_problem(endpoint, ("http", "https"))
    if problem:
        raise InputError(
            f"HF_ENDPOINT: found {_shown(endpoint)!r}: {problem}; expected an address that begins with https://, as"
            " https://huggingface.co does; or unset it"
        )
    if "@" in urlsplit(endpoint).netloc:
        raise InputError("HF_ENDPOINT: holds a name or a password; take them out, and put a token in HF_TOKEN")


def _check_proxies(environ: Mapping[str, str]) -> None:
    proxies = getproxies_environment()
    if "*" in (host.strip() for host in proxies.get("no", "").split(",")):
        return
    for kind in ("http", "https", "all"):
        value = proxies.get(kind)
        if not value:
            continue
        name = next((n for n in (f"{kind}_proxy", f"{kind}_proxy".upper()) if environ.get(n)), f"{kind}_proxy")
        url = value if "://" in value else f"http://{value}"
        problem = _address_problem(url, PROXY_SCHEMES)
        if problem:
            raise InputError(
                f"{name}: found {_shown(value)!r}: {problem}; expected e.g. http://proxy.example:3128, or unset it"
            )
        if url.startswith("socks") and importlib.util.find_spec("socksio") is None:
            raise InputError(
                f"{name}: found {_shown(value)!r}, a SOCKS proxy, which needs a package that is not installed: pip"
                f" install socksio (the image has none); or name an HTTP proxy in HTTPS_PROXY and unset {name}"
            )


def _check_certificates(environ: Mapping[str, str]) -> None:
    file, directory = environ.get("SSL_CERT_FILE"), environ.get("SSL_CERT_DIR")
    if file:
        try:
            ssl.create_default_context(cafile=file)
        except OSError as error:  # ssl.SSLError is one
            damaged = isinstance(error, ssl.SSLError)
            problem = "holds no certificates in PEM format" if damaged else error.strerror
            raise InputError(
                f"SSL_CERT_FILE: {file}: {problem}{_inside()}. Name the file with your site's certificates, or unset it"
            ) from error
    elif directory and not Path(directory).is_dir():
        raise InputError(
            f"SSL_CERT_DIR: {directory}: no such directory{_inside()}. Name the one with your site's certificates, or"
            " unset it"
        )


def _inside() -> str:
    if os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER"):
        return " in the container (slurm/prep.sh and slurm/nanogpt.sh bind it; otherwise --bind it)"
    return ""


def check_token(stored_in: str, endpoint: str, *, implicit: bool = True) -> None:
    """Raise `InputError` for a token that cannot be read or sent, or that others could read on its way to `endpoint`.

    Plain http is refused except for this machine's own addresses (no proxy between), where tests have their hub.

    Args:
        stored_in: the file of a stored token, used if no variable holds one.
        endpoint: the hub's address.
        implicit: whether a token is sent at all.
    """
    source, token = stored_in, ""
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_TOKEN"):
        if os.environ.get(name):
            source, token = name, os.environ[name].strip()
    if not implicit:
        return
    if source == stored_in:
        try:
            token = Path(stored_in).read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise InputError(
                f"{stored_in}: the stored token cannot be read: {error.strerror}. Repair or remove that file"
                " (HF_TOKEN_PATH, HF_HOME), or set HF_HUB_DISABLE_IMPLICIT_TOKEN=1: the data set is public"
            ) from error
    if not re.fullmatch(r"[!-~]*", token):
        at = next(index for index, character in enumerate(token) if not "!" <= character <= "~")
        raise InputError(
            f"{source}: its character {at + 1} cannot be part of a token: only ASCII letters, digits and signs. Copy"
            " the token again, or unset it: the data set is public"
        )
    if (token or os.environ.get("HF_OIDC_RESOURCE")) and not is_private_way(endpoint):
        raise InputError(
            f"HF_ENDPOINT: {endpoint} is plain http, where others can read the token of {source}. Use https://, or"
            " send no token: unset HF_TOKEN and set HF_HUB_DISABLE_IMPLICIT_TOKEN=1; the data set is public"
        )


def is_private_way(endpoint: str) -> bool:
    """Whether nobody on the way can read what is sent: https, or this machine itself without a proxy."""
    parts = urlsplit(endpoint)
    if parts.scheme == "https":
        return True
    host = parts.hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    proxies = getproxies_environment()
    proxied = bool(proxies.get("http") or proxies.get("all")) and not proxy_bypass(host)
    return loopback and not proxied


def _address_problem(url: str, schemes: tuple[str, ...]) -> str | None:
    """What is wrong with an address; None: nothing."""
    if not re.fullmatch(r"[!-~]+", url):
        return "has characters that no address has"
    try:
        parts = urlsplit(url)
        if parts.scheme not in schemes or not url.startswith(f"{parts.scheme}://"):
            return f"begins with none of {', '.join(f'{scheme}://' for scheme in schemes)}"
        if not parts.hostname:
            return "names no host"
        _ = parts.port
    except ValueError as error:
        return str(error)
    return None


def _shown(url: str) -> str:
    """An address without name and password."""
    return re.sub(r"^([^/@]*://)?[^/]*@", r"\1***@", url)
