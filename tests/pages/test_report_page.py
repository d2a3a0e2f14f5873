"""The report: what it says, in a real browser, and that nothing of a run becomes markup or script."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from chromium import Page, needs_chromium
from made_runs import change_record, made_run
from page_elements import EVIL, Elements

from nanogpt.pages.page import script_json


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    parent = tmp_path_factory.mktemp("reported")
    return [made_run(parent / f"run-{seed}", 3.2776 + 0.001 * seed, seed=seed, seconds=93 + seed) for seed in range(3)]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run that has markup wherever it may say something."""
    path = made_run(
        tmp_path_factory.mktemp("hostile") / f"run{EVIL.replace('/', '')}",
        overrides=[f"description={json.dumps(EVIL)}"],
    )
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines[0] |= {"device": EVIL, "name": EVIL}
    lines[-1] |= {"reason": EVIL, "state": "failed"}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "log.txt").write_text(EVIL)
    rank = {"rank": 0, "local_rank": 0, "host": EVIL, "device": EVIL}
    change_record(
        path,
        versions={EVIL: EVIL},
        code__commit=EVIL,
        code__clean=False,
        code__changed_files=[EVIL],
        computation__attention=EVIL,
        hardware__ranks=[rank],
        reason=EVIL,
    )
    return path


def report(nanogpt, out: Path, *paths: Path) -> Elements:
    done = nanogpt("report", *paths, "--out", out)
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    return Elements(out.read_text())


def test_one_run(runs, nanogpt, tmp_path):
    page = report(nanogpt, tmp_path / "new" / "report.html", runs[0])
    for said in (
        "3.2776 validation loss; target: 0.0024 below 3.28",
        "93.00 s training time",
        "8 x NVIDIA H100 80GB HBM3",
        "12 / 12 rules passed; 0 failed, 0 unknown",
        "one run says nothing about the spread",
        "3 505 198,574,080 59.8",  # a stage
        "files agree passed record, metrics, log and spec agree on 1,555 steps",
        "commit c0ffee0000",
        "torch 2.11.0",
        "lr_schedule:",  # of the recipe
    ):
        assert said in page.text, said
    figures = {figure["id"]: figure for figure in json.loads(page.figures)["figures"]}
    assert list(figures) == ["validation-step", "validation-time", "training-step", "training-time"]
    curve, target = figures["validation-time"]["lines"]
    assert (curve["x"][-1], curve["y"][-1], target["y"]) == (93.0, 3.2776, [3.28, 3.28])
    assert figures["validation-step"]["stages"] == [505, 1010, 1515]
    assert not [
        address
        for _, attributes in page.elements
        for address in (attributes.get("src"), attributes.get("href"))
        if address and address != "data:,"
    ]


def test_several_runs(runs, nanogpt, tmp_path):
    other = made_run(tmp_path / "other", 3.2811, seed=7, overrides=["optimizer.normuon.lr=0.025"])
    page = report(nanogpt, tmp_path / "report.html", *runs, other)
    assert "4 runs: speedrun-8xh100" in page.text
    assert "run-2 3.2796 0.0004 below 3.28 95.00 61.1 1,555 2 finished" in page.text
    assert "other 3.2811 0.0011 above 3.28" in page.text
    assert "spec optimizer.normuon.lr 0.023 run-0, run-1, run-2 0.025 other" in page.text
    assert "not shown yet: p = 0.068, p must be < 0.01" in page.text  # of the three that belong together
    figures = {figure["id"]: figure for figure in json.loads(page.figures)["figures"]}
    assert [line["y"][-1] for line in figures["difference"]["lines"]] == pytest.approx(
        [0, 0.001, 0.002, 0.0035], abs=1e-6
    )


def test_a_run_without_record_target_or_loss(nanogpt, tmp_path):
    young = made_run(tmp_path / "young", with_record=False)
    (young / "metrics.jsonl").write_text((young / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    page = report(nanogpt, tmp_path / "report.html", young)
    assert "not known to be FineWeb" in page.text and "has no record.json" in page.text
    assert page.figures is None  # nothing to draw, and no script


def test_what_cannot_be_read_is_said(runs, nanogpt, tmp_path):
    (tmp_path / "none").mkdir()
    done = nanogpt("report", runs[0], tmp_path / "none", "--out", tmp_path / "report.html")
    assert done.code == 1 and "left out" in done.err
    assert f"Left out: {tmp_path}/none: not a run directory" in Elements((tmp_path / "report.html").read_text()).text
    refused = nanogpt("report", runs[0], "--out", tmp_path / "report.pdf")
    assert refused.code == 2 and "expected the name of a page" in refused.err
    (tmp_path / "file").write_text("")
    full = nanogpt("report", runs[0], "--out", tmp_path / "file" / "report.html")
    assert full.code == 1 and "cannot be written" in full.err


def test_nothing_of_a_run_becomes_markup(hostile, nanogpt, tmp_path):
    page = report(nanogpt, tmp_path / "report.html", hostile)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 3 and "img" not in tags
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "<script>hacked=1</script><img src=x onerror=hacked=1>&\"'" in page.text  # shown
    assert "\x1b" not in page.text and "\u202e" not in page.text
    assert json.loads(page.figures)["figures"][0]["lines"][0]["name"].startswith("run&lt;script&gt;")
    assert json.loads(script_json({"a": EVIL})) == {"a": EVIL} and "<" not in script_json({"a": EVIL})


@needs_chromium
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(runs, nanogpt, tmp_path, browser: Page, width, scheme):
    report(nanogpt, tmp_path / "report.html", *runs)
    browser.open(tmp_path / "report.html", width, scheme)
    assert (browser.problems, browser.requests) == ([], [(tmp_path / "report.html").as_uri()])
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    # Three runs in five figures, the target in two.
    assert browser.evaluate("document.querySelectorAll('.scatterlayer .trace').length") == 3 * 5 + 2
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    assert browser.evaluate(brightness) == (255 if scheme == "light" else 20)
    text = "document.querySelector('.xtick text')"
    ink = browser.evaluate(f"getComputedStyle({text}).fill.match(/\\d+/g).map(Number)[0]")
    assert (ink < 100) if scheme == "light" else (ink > 200)


@needs_chromium
def test_a_curve_is_zoomed_read_off_and_hidden(runs, nanogpt, tmp_path, browser: Page):
    report(nanogpt, tmp_path / "report.html", *runs)
    browser.open(tmp_path / "report.html", 1400, "light")
    place = "const r = document.querySelector('#validation-step .nsewdrag').getBoundingClientRect()"
    x, y, w, h = browser.evaluate(f"(() => {{ {place}; return [r.x, r.y, r.width, r.height] }})()")
    nudges = itertools.cycle((0.0, 1.0))  # a move while the page still draws shows nothing

    def move() -> None:
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + 0.52 * w + next(nudges), y=y + h * 0.5)

    read = "document.querySelector('#validation-step .hoverlayer').textContent"
    browser.wait_for(f"/^750run-0 : \\d\\.\\d{{4}}run-1/.test({read})", move)  # the nearest, 35 pixels away
    shown = "document.querySelector('#validation-step')._fullLayout.xaxis.range"
    before = browser.evaluate(shown)
    for kind, part in (("mousePressed", 0.6), ("mouseMoved", 0.8), ("mouseReleased", 0.8)):
        button = {"button": "left", "buttons": 1, "clickCount": 1}
        browser.call("Input.dispatchMouseEvent", type=kind, x=x + part * w, y=y + h * part, **button)
    browser.wait_for(f"{shown}[0] > {before[0] + 500}")
    after = browser.evaluate(shown)
    assert before[0] < after[0] < after[1] < before[1]
    browser.wait_for(f"{read}.startsWith('1,250run-0')", move)
    browser.evaluate("document.querySelectorAll('.legend input')[1].click()")
    browser.wait_for("document.querySelectorAll('#validation-step .scatterlayer .trace').length === 3")
    assert browser.evaluate(shown) == after
    assert browser.problems == []


@needs_chromium
def test_a_hostile_run_in_a_browser(hostile, nanogpt, tmp_path, browser: Page):
    report(nanogpt, tmp_path / "report.html", hostile, made_run(tmp_path / "good"))
    browser.open(tmp_path / "report.html", 400, "light")
    assert browser.evaluate("typeof hacked") == "undefined"
    assert browser.evaluate("document.querySelectorAll('img, svg a, main script').length") == 0
    assert (browser.problems, len(browser.requests)) == ([], 1)
    assert browser.evaluate("document.documentElement.scrollWidth") == 400
