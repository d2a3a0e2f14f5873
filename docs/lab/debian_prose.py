"""English prose out of Debian's packages, as JSON lines for `prep-text --split-by field:source`.

    python docs/lab/debian_prose.py OUT [--jobs N]

writes OUT/documentation.jsonl, manuals and handbooks, and OUT/other.jsonl, scripture, essays, quotations and tales, a
set out of their domain; and OUT/packages.json, what they were made of. Packages are downloaded to OUT/packages and not
installed; OUT/prose has the prose of each, so that a second call goes on where the first was stopped.

What is kept are paragraphs that read like English sentences: by length, letters, stop words and their end. Needs
apt-get, dpkg-deb, and the Python packages lxml and pypdfium2.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath

import lxml.html
import pypdfium2


def _words(text: str) -> list[str]:
    return text.split()


DOCUMENTATION = _words("""
    apache2-doc aptitude-doc-en bacula-doc bash-doc bind9-doc debian-faq debian-handbook debian-history debian-policy
    debian-reference-en debmake-doc developers-reference exim4-doc-html festival-doc gap-doc
    gimp-help-en git-doc gnome-user-docs gnucash-docs gnumeric-doc gnuplot-doc grass-doc gretl-doc guile-3.0-doc
    harden-doc installation-guide-amd64 kicad-doc-en libreoffice-help-en-us libvirt-doc lilypond-doc-html linux-doc-6.1
    maint-guide maxima-doc octave-doc openmpi-doc pari-doc perl-doc postfix-doc postgis-doc postgresql-doc-15
    python-django-doc python3.11-doc r-doc-html rt4-doc-html sbcl-doc shorewall-doc
    slurm-wlm-doc sqlite3-doc subversion swi-prolog-doc texlive-humanities-doc texlive-lang-english
    texlive-latex-base-doc texlive-latex-extra-doc texlive-latex-recommended-doc texlive-metapost-doc
    texlive-pictures-doc texlive-pstricks-doc texlive-publishers-doc texlive-science-doc vim-doc zsh-doc
""")
ENGLISH = {  # where packages of many languages have it
    "debian-handbook": "/en-US/",
    "gnome-user-docs": "/help/C/",
    "installation-guide-amd64": "/en/",
}
OTHER = _words("anarchism fortunes jargon-text sword-text-kjv sword-text-web wesnoth-1.16-data")

STOP_WORDS = frozenset(
    _words("""
        the of and a to in is it that for on as with be are this by not or an from at which you can if will has have
        but was were he she they we his her their i all one there when who what so no its more may your than other
    """)
)
SENTENCE_END = re.compile(r"[.!?:;…][\"')\]”’]*$")  # noqa: RUF001
INNER = ".//p | .//ul | .//ol | .//dl | .//table | .//pre"  # of what is no paragraph
LEAST_WORDS = 12
LEAST_CHARACTERS = 400  # of a document
TEX_PACKAGE = re.compile(r"/texlive-doc/[^/]+/([^/]+)/")
CAMPAIGN = re.compile(r"/campaigns/([^/]+)/")


def is_prose(paragraph: str) -> bool:
    """Whether it reads like English sentences."""
    words = re.findall(r"[a-z']+", paragraph.lower())
    if len(words) < LEAST_WORDS or not SENTENCE_END.search(paragraph):
        return False
    marks = [c for c in paragraph if not c.isspace()]
    letters = sum(c.isalpha() for c in marks) / len(marks)
    common = sum(word in STOP_WORDS for word in words) / len(words)
    return letters >= 0.88 and common >= 0.28 and sum(map(len, words)) / len(words) < 8


def of_html(data: bytes) -> Iterator[str]:
    """Paragraphs of HTML, and of the XML of help pages."""
    if not data.strip():
        return
    try:
        data.decode()
        parser = lxml.html.HTMLParser(encoding="utf-8")
    except UnicodeDecodeError:  # it says itself what it is
        parser = lxml.html.HTMLParser()
    root = lxml.html.fromstring(data, parser=parser)
    for element in root.iter("p", "para", "div", "dd", "li"):
        if element.tag == "div" and element.get("class") != "para":
            continue
        if element.tag in ("p", "para") or not element.xpath(INNER):
            yield element.text_content()


def of_pdf(data: bytes) -> Iterator[str]:
    """Paragraphs of a PDF: a short line that ends a sentence ends one, and so does a page that does."""
    document = pypdfium2.PdfDocument(data)
    lines = [line.strip() for page in document for line in page.get_textpage().get_text_range().splitlines()]
    document.close()
    lengths = sorted(len(line) for line in lines if len(line) > 30)
    full = lengths[len(lengths) * 3 // 4] if lengths else 0
    held = ""
    for line in lines:
        text = line.replace("\ufffe", "-").replace("\x02", "-")
        if held.endswith("-") and text[:1].islower():
            held = held[:-1] + text
        else:
            held = f"{held} {text}"
        if not text or (SENTENCE_END.search(text) and len(text) < 0.85 * full):
            yield held
            held = ""
    yield held


def of_text(data: bytes) -> Iterator[str]:
    """Paragraphs between blank lines; of fortunes, between percent signs."""
    text = data.decode("utf-8", "replace")
    yield from re.split(r"\n%\n" if "\n%\n" in text else r"\n\s*\n", text)


def of_campaign(data: bytes) -> Iterator[str]:
    """What is said and told in a campaign of Wesnoth."""
    for message in re.findall(r'(?:message|story|text)\s*=\s*_\s*"((?:[^"]|"")+)"', data.decode("utf-8", "replace")):
        yield message.replace('""', '"')


def of_sword(index: bytes, blocks: bytes) -> Iterator[str]:
    """Paragraphs of a compressed SWORD module, book by book."""
    for offset, size, _ in struct.iter_unpack("<III", index):
        book = zlib.decompress(blocks[offset : offset + size]).decode("utf-8", "replace")
        book = re.sub(r"<(note|title)\b[^>]*>.*?</\1>", " ", book, flags=re.DOTALL)
        for paragraph in re.split(r'<div [^>]*type="x-p"', book):
            yield re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"<[^>]*>|^[^<]*>", " ", paragraph))


READERS = {
    ".html": of_html, ".htm": of_html, ".xhtml": of_html, ".page": of_html, ".pdf": of_pdf, ".txt": of_text,
    ".pod": of_text, ".rst": of_text, ".md": of_text, ".info": of_text, ".cfg": of_campaign,
}  # fmt: skip


def prose(paragraphs: Iterable[str]) -> list[str]:
    """Those that are, on one line each."""
    return [text for text in (" ".join(paragraph.split()) for paragraph in paragraphs) if is_prose(text)]


def read(member: tuple[str, bytes]) -> list[str]:
    """The prose of one file; none of what cannot be read."""
    name, data = member
    try:
        unpacked = gzip.decompress(data) if name.endswith(".gz") else data
        return prose(READERS.get(_suffix(name), of_text)(unpacked))
    except Exception as error:  # whatever a library finds wrong with one of thirty thousand files
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return []


def _suffix(name: str) -> str:
    return PurePosixPath(name.removesuffix(".gz")).suffix


def members(package: Path) -> Iterator[tuple[str, bytes]]:
    """Its files that may hold prose, in the package's order; nothing is unpacked to the disk."""
    english = ENGLISH.get(package.name.partition("_")[0], "")
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            name, suffix = member.name, _suffix(member.name)
            if english not in name:
                continue
            told = CAMPAIGN.search(name) if suffix == ".cfg" else suffix in READERS or "/games/fortunes/" in name
            if member.isfile() and (told or suffix in (".bzs", ".bzz")):
                file = archive.extractfile(member)
                assert file is not None
                yield name, file.read()


def documents(package: Path, pool: ProcessPoolExecutor) -> Iterator[tuple[str, list[str]]]:
    """(file, paragraphs) of a package."""
    found = members(package)
    if package.name.startswith("sword-"):
        files = dict(found)
        for name, blocks in files.items():
            if name.endswith(".bzz"):
                yield name, prose(of_sword(files[name.replace(".bzz", ".bzs")], blocks))
        return
    while batch := list(islice(found, 64)):
        yield from zip((name for name, _ in batch), pool.map(read, batch, chunksize=4), strict=True)


def extract(package: Path, kept: Path, pool: ProcessPoolExecutor) -> None:
    """A package's prose into the file `kept`, a line of JSON a file: what is there already is not made anew."""
    if kept.exists():
        return
    partial = kept.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as lines:
        for file, paragraphs in documents(package, pool):
            if paragraphs:
                lines.write(json.dumps([file.removeprefix("./"), paragraphs], ensure_ascii=False) + "\n")
    partial.replace(kept)
    print(f"{kept}: {kept.stat().st_size:,} bytes", flush=True)


def source_of(package: str, file: str) -> str:
    """What the split leaves together: a package, but of TeX Live and of tales a folder."""
    match = TEX_PACKAGE.search(file) or CAMPAIGN.search(file)
    return match[1] if match else package


def join(out: Path, name: str, packages: dict[str, Path]) -> list[dict[str, object]]:
    """One set, each paragraph once, of what was extracted; what each package came to."""
    seen: set[bytes] = set()
    told = []
    with (out / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
        for package, path in packages.items():
            characters = 0
            for line in (out / "prose" / f"{package}.jsonl").open(encoding="utf-8"):
                file, paragraphs = json.loads(line)
                kept = []
                for paragraph in paragraphs:
                    key = hashlib.blake2b(paragraph.encode(), digest_size=12).digest()
                    if key not in seen:
                        kept.append(paragraph)
                    seen.add(key)
                text = "\n\n".join(kept)
                if len(text) >= LEAST_CHARACTERS:
                    characters += len(text)
                    record = {"text": text, "source": source_of(package, file), "file": file}
                    lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            with path.open("rb") as package_file:
                digest = hashlib.file_digest(package_file, "sha256").hexdigest()
            told.append({"set": name, "file": path.name, "sha256": digest, "characters": characters})
    return told


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, help="processes; as many as there are cores")
    arguments = parser.parse_args()
    place, extracted = arguments.out / "packages", arguments.out / "prose"
    for folder in (place, extracted):
        folder.mkdir(parents=True, exist_ok=True)
    told = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for name, packages in (("other", OTHER), ("documentation", DOCUMENTATION)):
            paths = {}
            for package in packages:
                if not list(place.glob(f"{package}_*.deb")):
                    subprocess.run(["apt-get", "download", "-qq", package], cwd=place, check=True)
                (paths[package],) = place.glob(f"{package}_*.deb")
                extract(paths[package], extracted / f"{package}.jsonl", pool)
            told += join(arguments.out, name, paths)
    (arguments.out / "packages.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
