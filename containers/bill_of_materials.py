"""Write a CycloneDX list of what is in the image: Debian packages, and Python packages with their licences.

Runs during the image's build, with the image's python3; standard library only. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any


def debian_packages() -> list[dict[str, Any]]:
    """The packages that dpkg knows, as components."""
    layout = "${binary:Package}\t${Version}\t${Architecture}\n"
    lines = subprocess.run(["dpkg-query", "-W", "-f", layout], check=True, capture_output=True, text=True).stdout
    found = []
    for line in lines.splitlines():
        name, version, architecture = line.split("\t")
        name = name.partition(":")[0]
        purl = f"pkg:deb/debian/{name}@{version}?arch={architecture}"
        found.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
    return found


def python_packages(site_packages: list[str]) -> list[dict[str, Any]]:
    """The distributions installed in `site_packages`, as components."""
    found = []
    for distribution in metadata.distributions(path=site_packages):
        name = distribution.metadata["Name"].lower().replace("_", "-")
        purl = f"pkg:pypi/{name}@{distribution.version}"
        component = {"type": "library", "bom-ref": purl, "name": name, "version": distribution.version, "purl": purl}
        licence = distribution.metadata.get("License-Expression")
        if licence:
            component["licenses"] = [{"expression": licence}]
        found.append(component)
    return found


def bill(name: str, version: str, commit: str, created: str, lock: bytes, components: list[dict[str, Any]]) -> str:
    """The document, as JSON text."""
    components = sorted(components, key=lambda component: component["purl"])
    content = json.dumps([name, version, commit, components], sort_keys=True).encode()
    return (
        json.dumps(
            {
                "bomFormat": "CycloneDX",
                "specVersion": "1.6",
                "serialNumber": f"urn:uuid:{uuid.UUID(bytes=hashlib.sha256(content).digest()[:16], version=4)}",
                "version": 1,
                "metadata": {
                    "timestamp": created,
                    "component": {"type": "container", "bom-ref": name, "name": name, "version": version},
                    "properties": [
                        {"name": "nanogpt:commit", "value": commit},
                        {"name": "nanogpt:lock:sha256", "value": hashlib.sha256(lock).hexdigest()},
                    ],
                },
                "components": components,
            },
            indent=1,
        )
        + "\n"
    )


def main() -> None:
    """Write the list for /opt/venv and dpkg's database."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for option in ("--name", "--version", "--commit", "--created"):
        parser.add_argument(option, required=True)
    parser.add_argument("--lock", type=Path, required=True)
    parser.add_argument("--environment", type=Path, default=Path("/opt/venv"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sites = [str(path) for path in sorted(args.environment.glob("lib/python3*/site-packages"))]
    components = debian_packages() + python_packages(sites)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(bill(args.name, args.version, args.commit, args.created, args.lock.read_bytes(), components))
    print(f"{len(components)} components in {args.out}")


if __name__ == "__main__":
    main()
