"""`make pull` and slurm/check_image.sh against a registry made here: what is fetched, gone on with, and refused.

With a real registry and real signatures: tests/cluster/test_registry.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest

ROOT = Path(__file__).parents[2]
IMAGE = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(IMAGE).hexdigest()
LAYER = "application/vnd.sylabs.sif.layer.v1.sif"


class Registry(ThreadingHTTPServer):
    """An OCI registry with one image."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blob = IMAGE
        self.media_type = LAYER
        self.auth: str | None = None  # Basic, Bearer
        self.cut: list[int] = []  # after how many bytes the next answers end
        self.ranges = True
        self.drops = 0  # how many questions for the manifest are not answered, after the first
        self.asked: list[str] = []  # path and range of each request

    @property
    def manifest(self) -> bytes:
        layer = {"mediaType": self.media_type, "size": len(IMAGE), "digest": f"sha256:{DIGEST}"}
        config = {"mediaType": "application/vnd.sylabs.sif.config.v1+json", "size": 2, "digest": "sha256:" + "4" * 64}
        return json.dumps({"schemaVersion": 2, "config": config, "layers": [layer]}, indent=1).encode()

    @property
    def address(self) -> str:
        return f"oras://127.0.0.1:{self.server_port}/me/nanogpt"


class Handler(BaseHTTPRequestHandler):
    server: Registry

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: self.server.cut.pop(0)] if "/blobs/" in self.path and self.server.cut else body
        self.wfile.write(body)

    def do_GET(self) -> None:
        registry, given, asked = self.server, self.headers.get("Authorization"), self.headers.get("Range")
        registry.asked.append(self.path.partition("?")[0] + (f" {asked}" if asked else ""))
        login = "Basic " + base64.b64encode(b"me:secret").decode()
        if self.path.startswith("/token"):
            wanted = {"service": ["s"], "scope": ["repository:me/nanogpt:pull"]}
            right = given == login and parse_qs(self.path.partition("?")[2]) == wanted
            self.answer(200, json.dumps({"token": "t1" if right else "wrong"}).encode())
        elif registry.auth and given != {"Basic": login, "Bearer": "Bearer t1"}[registry.auth]:
            realm = f'realm="http://127.0.0.1:{registry.server_port}/token",service="s"'
            self.answer(401, WWW_Authenticate=f"{registry.auth} {realm}")
        elif "/manifests/" in self.path and registry.drops and len(registry.asked) > 1:
            registry.drops -= 1
            self.close_connection = True
        elif self.path == "/v2/me/nanogpt/manifests/1" or "/manifests/sha256:" in self.path:
            self.answer(200, registry.manifest)
        elif self.path != f"/v2/me/nanogpt/blobs/sha256:{DIGEST}":
            self.answer(404)
        elif asked and registry.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            span = f"bytes {start}-{len(registry.blob) - 1}/{len(registry.blob)}"
            self.answer(206, registry.blob[start:], Content_Range=span)
        else:
            self.answer(200, registry.blob)


@pytest.fixture
def registry() -> Iterator[Registry]:
    with Registry() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def pull(place: Path, address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Fetch to n.sif in `place`, which is also home; without looking at signatures unless `environment` says so."""
    proxies = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environ = proxies | {"HOME": str(place), "UNSIGNED": "yes"} | environment
    command = ["bash", ROOT / "containers" / "pull.sh", address, "n.sif"]
    return subprocess.run(command, cwd=place, env=environ, capture_output=True, text=True, check=False, timeout=120)


def test_an_image_has_its_name_once_it_is_right(registry: Registry, tmp_path: Path) -> None:
    done = pull(tmp_path, f"{registry.address}:1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "n.sif").read_bytes() == IMAGE
    assert os.access(tmp_path / "n.sif", os.X_OK)
    assert f"NANOGPT_SIF_SHA256={DIGEST}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["n.sif"]
    asked = len(registry.asked)
    again = pull(tmp_path, f"{registry.address}:1")
    assert "already" in again.stderr
    assert len(registry.asked) == asked + 1  # the manifest's alone


def test_a_pull_goes_on_where_the_connection_or_an_earlier_one_ended(registry: Registry, tmp_path: Path) -> None:
    registry.cut = [100_000, 50_000]
    assert pull(tmp_path, f"{registry.address}:1").returncode == 0
    ranges = [line.partition(" bytes=")[2] for line in registry.asked if "/blobs/" in line]
    assert ranges == ["", "100000-", "150000-"]
    assert (tmp_path / "n.sif").read_bytes() == IMAGE

    (tmp_path / "n.sif").rename(tmp_path / f"n.sif.part-{DIGEST[:16]}")
    os.truncate(tmp_path / f"n.sif.part-{DIGEST[:16]}", 300_000)
    registry.asked.clear()
    assert pull(tmp_path, f"{registry.address}:1").returncode == 0
    assert [line.partition(" bytes=")[2] for line in registry.asked if "/blobs/" in line] == ["300000-"]
    assert (tmp_path / "n.sif").read_bytes() == IMAGE


def test_a_network_that_is_gone_for_a_while_is_waited_for(registry: Registry, tmp_path: Path) -> None:
    registry.cut, registry.drops = [100_000, 0], 2
    done = pull(tmp_path, f"{registry.address}:1", PATH=f"{quick_sleep(tmp_path / 'bin')}:{os.environ['PATH']}")
    assert (tmp_path / "n.sif").read_bytes() == IMAGE, done.stderr
    assert registry.drops == 0


def test_a_server_that_cannot_begin_in_the_middle_is_asked_for_all(registry: Registry, tmp_path: Path) -> None:
    registry.cut, registry.ranges = [100_000], False
    done = pull(tmp_path, f"{registry.address}:1")
    assert (tmp_path / "n.sif").read_bytes() == IMAGE, done.stderr


def test_a_connection_that_brings_nothing_is_given_up_and_what_came_is_kept(registry: Registry, tmp_path: Path) -> None:
    registry.cut = [100_000, *[0] * 20]
    done = pull(tmp_path, f"{registry.address}:1", PATH=f"{quick_sleep(tmp_path / 'bin')}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "continues there" in done.stderr.splitlines()[-1]
    assert (tmp_path / f"n.sif.part-{DIGEST[:16]}").stat().st_size == 100_000
    assert not (tmp_path / "n.sif").exists()


def quick_sleep(directory: Path) -> Path:
    """A directory with a `sleep` that sleeps briefly, however long it is told to."""
    directory.mkdir()
    (directory / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.1\n")
    (directory / "sleep").chmod(0o755)
    return directory


def test_what_is_not_as_the_manifest_says_is_removed(registry: Registry, tmp_path: Path) -> None:
    registry.blob = IMAGE[:-1] + b"x"
    done = pull(tmp_path, f"{registry.address}:1")
    assert done.returncode == 1
    assert "damaged or changed" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_image_than_the_pinned_one_is_not_fetched(registry: Registry, tmp_path: Path) -> None:
    refused = pull(tmp_path, f"{registry.address}:1", NANOGPT_SIF_SHA256="0" * 64)
    assert (refused.returncode, DIGEST in refused.stderr) == (2, True)
    assert not any("/blobs/" in line for line in registry.asked)
    manifest = hashlib.sha256(registry.manifest).hexdigest()
    assert pull(tmp_path, f"{registry.address}@sha256:{manifest}", NANOGPT_SIF_SHA256=DIGEST).returncode == 0
    (tmp_path / "n.sif").unlink()
    moved = pull(tmp_path, f"{registry.address}@sha256:{'1' * 64}")
    assert "a manifest other than" in moved.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("auth", ["Basic", "Bearer"])
def test_a_login_is_used_where_the_registry_wants_one(registry: Registry, tmp_path: Path, auth: str) -> None:
    registry.auth = auth
    refused = pull(tmp_path, f"{registry.address}:1")
    assert (refused.returncode, "apptainer registry login" in refused.stderr) == (1, True)
    config = tmp_path / ".apptainer" / "docker-config.json"
    config.parent.mkdir()
    login = {"auth": base64.b64encode(b"me:secret").decode()}
    hosts = {"elsewhere:1": {"auth": "x"}, registry.address.split("/")[2]: login}
    config.write_text(json.dumps({"auths": hosts}, indent="\t"))
    assert pull(tmp_path, f"{registry.address}:1").returncode == 0
    (tmp_path / "n.sif").unlink()
    config.unlink()
    user = {"APPTAINER_DOCKER_USERNAME": "me", "APPTAINER_DOCKER_PASSWORD": "secret"}
    assert pull(tmp_path, f"{registry.address}:1", **user).returncode == 0


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        ("docker://debian:trixie", 2, "expected oras://"),
        ("", 2, "expected oras://"),
        ("oras://127.0.0.1:9/me/nanogpt:1", 1, "cannot be reached"),
        (":2", 1, "has no me/nanogpt:2"),
    ],
)
def test_what_is_not_there_is_told(registry: Registry, tmp_path: Path, address: str, code: int, said: str) -> None:
    done = pull(tmp_path, registry.address + address if address.startswith(":") else address)
    assert (done.returncode, said in done.stderr.splitlines()[-1]) == (code, True), done.stderr


def test_an_image_of_docker_s_is_told_apart(registry: Registry, tmp_path: Path) -> None:
    registry.media_type = "application/vnd.oci.image.layer.v1.tar+gzip"
    done = pull(tmp_path, f"{registry.address}:1")
    assert (done.returncode, "not an Apptainer image" in done.stderr) == (2, True)


def check(image: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """slurm/check_image.sh."""
    command = ["bash", ROOT / "slurm" / "check_image.sh", image]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_a_pinned_image_is_checked_before_anything_of_it_runs(tmp_path: Path) -> None:
    image = tmp_path / "n.sif"
    image.write_bytes(IMAGE)
    assert check(image).returncode == 0
    assert check(image, NANOGPT_SIF_SHA256=DIGEST.upper()).returncode == 0
    other = check(image, NANOGPT_SIF_SHA256="0" * 64)
    assert (other.returncode, DIGEST in other.stderr, "not run" in other.stderr) == (2, True, True)
    unpacked = check(tmp_path, NANOGPT_SIF_SHA256=DIGEST)
    assert (unpacked.returncode, "unset NANOGPT_SIF_SHA256" in unpacked.stderr) == (2, True)


def test_a_signature_is_asked_of_apptainer(tmp_path: Path) -> None:
    image, key, apptainer = tmp_path / "n.sif", tmp_path / "key.pem", tmp_path / "apptainer"
    image.write_bytes(IMAGE)
    apptainer.write_text(
        '#!/bin/sh\necho "$*" >> "$0.log"\n[ ! -e "$0.refuses" ] || { echo "FATAL:   no." >&2; exit 255; }\n'
    )
    apptainer.chmod(0o755)
    missing = check(image, NANOGPT_SIF_KEY=str(key), APPTAINER=str(apptainer))
    assert (missing.returncode, str(key) in missing.stderr) == (2, True)
    key.write_text("a key")
    assert check(image, NANOGPT_SIF_KEY=str(key), APPTAINER=str(apptainer)).returncode == 0
    assert check(image, NANOGPT_SIF_KEY="keyring", APPTAINER=str(apptainer)).returncode == 0
    assert (tmp_path / "apptainer.log").read_text().splitlines() == [
        f"verify --key {key} {image}",
        f"verify --local {image}",
    ]
    (tmp_path / "apptainer.refuses").touch()
    refused = check(image, NANOGPT_SIF_KEY="keyring", APPTAINER=str(apptainer))
    assert (refused.returncode, "keyring: no." in refused.stderr) == (2, True)
