"""The leaderboard: what is listed and what is not, and that no submission takes the page down or gets a word in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from chromium import Page, needs_chromium
from made_runs import change_record, loaded, made_run, made_runs
from page_elements import EVIL, Elements

from nanogpt.cli.main import main
from nanogpt.pages import entry
from nanogpt.pages.leaderboard import write_leaderboard

LOSSES = (3.2756, 3.2758, 3.2759)


@pytest.fixture(scope="module")
def submitted(tmp_path_factory) -> Path:
    """A good submission, in both layouts."""
    parent = tmp_path_factory.mktemp("submitted")
    runs = made_runs(parent, LOSSES)
    words = ["--description", "Bigrams, hashed", "--contributors", "Ada,Grace", "--log-url", "https://example.org/log"]
    with pytest.raises(SystemExit) as end:
        main(["submission", *map(str, runs), *words, "--out", str(parent / "good"), "--format", "modded-nanogpt"])
    assert not end.value.code
    return parent / "good"


def change(submission: Path, **fields: object) -> None:
    path = submission / "submission.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def first_run(submission: Path) -> Path:
    return min((submission / "runs").iterdir())


def edit(submission: Path, name: str, old: str, new: str) -> None:
    path = first_run(submission) / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def unhashed(run: Path) -> None:
    data = loaded(run)[0].record.data
    change_record(run, data__val=[data.val[0].model_copy(update={"sha256": None})])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "another-time": (lambda s: change(s, record_time_seconds=60.0), "claims 60.000 s, but its runs took 93.010 s"),
    "unofficial": (lambda s: change(s, official=False), "marked unofficial"),
    "no-text": (lambda s: change(s, description=" "), "--description: is empty"),
    "a-script-for-an-address": (lambda s: change(s, log_url="javascript:alert(1)"), "--log-url"),
    "numbers-for-names": (lambda s: change(s, contributors=[1]), "submission.json: contributors.0: "),
    "no-json": (lambda s: (s / "submission.json").write_text("{" * 100_000), "submission.json: is not JSON"),
    "logs-alone": (lambda s: [(s / "submission.json").unlink(), (s / "README.md").touch()], "logs alone cannot be"),
    "no-runs": (lambda s: shutil.rmtree(s / "runs"), "has no runs"),
    "a-link": (lambda s: (s / "runs" / "log.txt").symlink_to("/etc/passwd"), "runs/log.txt: is a link"),
    "a-pipe": (lambda s: os.mkfifo(s / "loss.pipe"), "loss.pipe: is not a file"),
    "another-loss": (lambda s: edit(s, "metrics.jsonl", "3.2756", "3.2656"), "run-0: files agree: "),
    "another-log": (
        lambda s: next(s.glob("records/*/*/*.txt")).write_text("x"),
        "is the log of none of its runs",
    ),
    "not-fineweb": (lambda s: unhashed(first_run(s)), "run-0: validation shards is unknown"),
    "steps-without-end": (lambda s: edit(s, "spec.yaml", "steps: 505", "steps: 4000000000000"), "runs/run-0/spec.yaml"),
    "a-list": (lambda s: (first_run(s) / "record.json").write_text("[" * 100_000), "record.json"),
    "one-run": (lambda s: [shutil.rmtree(s / "runs" / f"run-{i}") for i in range(1, 3)], "one run says nothing"),
}


def test_the_page_and_its_data(submitted, nanogpt, tmp_path):
    """The good, the broken, one that is quicker, and one with the same runs."""
    place = tmp_path / "submissions"
    for name, (damage, _) in BROKEN.items():
        damage(shutil.copytree(submitted, place / name))
    shutil.copytree(submitted, place / "_good & so on")
    shutil.copytree(submitted, place / "same")
    quick = [made_run(tmp_path / f"q{seed}", loss, seed=seed, seconds=80) for seed, loss in enumerate(LOSSES)]
    made = nanogpt(
        "submission", *quick, "--description", EVIL, "--contributors", EVIL, "--out", place / EVIL.replace("/", "")
    )
    assert made.code == 0, made.err
    (place / "a file").touch()

    site = tmp_path / "site"
    done = nanogpt("leaderboard", place, "--out", site)
    assert done.code == 0 and f"3 listed, {len(BROKEN)} not" in done.err and str(tmp_path) not in done.err
    data = json.loads((site / "leaderboard.json").read_text())
    assert [(found["rank"], found["seconds"]) for found in data["entries"]] == [(1, 80.0), (2, 93.01), (3, 93.01)]
    second = data["entries"][1]
    assert (second["submission"], second["shares_runs_with"]) == ("_good & so on", ["same"])
    assert (second["description"], second["contributors"]) == ("Bigrams, hashed", ["Ada", "Grace"])
    assert (second["runs"], second["date"], second["p"]) == (3, "2026-03-01", pytest.approx(0.00022, abs=2e-4))
    reasons = {found["submission"]: found["reason"] for found in data["rejected"]}
    assert list(reasons) == sorted(BROKEN)
    for name, (_, reason) in BROKEN.items():
        assert reason in reasons[name], (name, reasons[name])
    assert str(tmp_path) not in json.dumps(data)

    page = Elements((site / "index.html").read_text())
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links[1:4] == [found["report"] for found in data["entries"][:1]] + [second["report"], second["log_url"]]
    for found in data["entries"]:
        report = Elements((site / found["report"]).read_text())
        assert "significant: the mean is below 3.28" in report.text
        assert ("a", {"href": "../index.html"}) in report.elements
        assert not Path(found["report"]).name.startswith(("_", "."))
    assert (site / ".nojekyll").exists()
    assert {path.name for path in site.iterdir()} == {
        ".nojekyll", "index.html", "leaderboard.json", "plotly.min.js", "reports",
    }  # fmt: skip
    assert "script" not in [tag for tag, _ in page.elements] and "img" not in [tag for tag, _ in page.elements]


@pytest.fixture(scope="module")
def site(submitted, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("board")
    for name in ("one", "two", "bad"):
        shutil.copytree(submitted, place / "submissions" / name)
    change(place / "submissions" / "two", description=EVIL)
    change(place / "submissions" / "bad", description=EVIL, record_time_seconds=1)
    write_leaderboard(place / "submissions", place / "site")
    return place / "site"


@needs_chromium
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(site, browser: Page, width, scheme):
    browser.open(site / "index.html", width, scheme)
    assert (browser.problems, browser.requests) == ([], [(site / "index.html").as_uri()])
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(
        "[document.querySelectorAll('tr').length, document.querySelectorAll('details').length]"
    ) == [3, 1]
    report = json.loads((site / "leaderboard.json").read_text())["entries"][0]["report"]
    browser.open(site / report, width, scheme)
    assert browser.problems == []
    assert browser.requests == [(site / report).as_uri(), (site / "plotly.min.js").as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("document.querySelectorAll('.scatterlayer .trace').length") == 3 * 5 + 2
    assert browser.evaluate("typeof hacked") == "undefined"


def test_it_is_renewed_and_other_files_stay(submitted, nanogpt, tmp_path):
    place, out = tmp_path / "submissions", tmp_path / "site"
    shutil.copytree(submitted, place / "one")
    out.mkdir()
    (out / "CNAME").write_text("lab.example.org")
    assert nanogpt("leaderboard", place, "--out", out).code == 0
    (place / "one").rename(place / "other")
    assert nanogpt("leaderboard", place, "--out", out).code == 0
    assert [path.name for path in (out / "reports").iterdir()] == [entry.page_name(place / "other")]
    assert (out / "CNAME").read_text() == "lab.example.org"


def test_wrong_places(nanogpt, tmp_path):
    (tmp_path / "empty").mkdir()
    refused = nanogpt("leaderboard", tmp_path / "empty", "--out", tmp_path / "out")
    assert refused.code == 2 and "has no submissions" in refused.err
    assert nanogpt("leaderboard", tmp_path / "none", "--out", tmp_path / "out").code == 2
    (tmp_path / "empty" / "one").mkdir()
    (tmp_path / "index.html").write_text("mine")
    refused = nanogpt("leaderboard", tmp_path / "empty", "--out", tmp_path)
    assert refused.code == 2 and "not a leaderboard" in refused.err
    assert (tmp_path / "index.html").read_text() == "mine"


def test_a_check_that_hangs_or_dies_is_one_entry_s(submitted, monkeypatch, tmp_path):
    monkeypatch.setattr(entry, "LIMIT_S", 0.0)
    assert "took longer" in entry.checked_entry(submitted, tmp_path / "report.html")["reason"]
    monkeypatch.setattr(entry, "LIMIT_S", 60.0)
    monkeypatch.setattr(entry, "_work", os._exit)  # called with too much, the process dies
    assert "exit code 1" in entry.checked_entry(submitted, tmp_path / "report.html")["reason"]
