"""report.html: self-contained, accessible, numbers from the samples; opened in headless Chromium where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from lever_plus.experiments import audit, charts, gallery, record, report, words
from lever_plus.rl.rewards import RewardRule
from tests.experiments.test_audit import random_data
from tests.reference.fake_run import make_samples, write_run, write_training

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
VOID = {"meta", "img", "input", "br", "hr", "link", "path", "use", "rect", "stop"}
INTERACTIVE = {"a", "input", "select", "option", "summary", "button"}


class Page(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of two seeds with an audit, its folder and its first run."""
    folder = tmp_path_factory.mktemp("report")
    pixels = np.random.default_rng(0).integers(0, 255, (56, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.jpg")
    runs = []
    for seed in (1, 2):
        run = write_run(folder / f"run{seed}", make_samples(seed, n=40, image=str(folder / "a.jpg"), random_seeds=2))
        runs.append(record.load_run(run, write_training(folder / f"v3_{seed}", seed)))
    price = {"beam_data": 152000, "rl_data": 62000, "training": 0, "evaluation": 900}
    built = record.build(runs, "exp3", price, {"prompts": {"anchors": 563, "prompts": 213940}})
    found = audit.audit(random_data(np.random.default_rng(0), queries=60), RewardRule())
    report.write(folder / "report.html", {"exp3": (built, runs)}, "zh", audit=found)
    report.write(folder / "report_en.html", {"exp3": (built, runs)}, "en", audit=found)
    return folder, built, runs


@pytest.mark.parametrize("name", ["report.html", "report_en.html"])
def test_page_is_self_contained_and_accessible(made, name):
    text = (made[0] / name).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    outside = [u for u in re.findall(r"https?://[^\s\"'<)]+", text) if "w3.org" not in u and "matplotlib.org" not in u]
    assert outside == []
    for tag, attrs in page.tags:
        assert not [a for a in attrs if a.startswith("on")], "handlers belong in the script"
        for attribute in ("src", "href", "xlink:href"):
            if attribute in attrs:
                assert attrs[attribute].startswith(("#", "data:image/")), (tag, attrs[attribute][:60])
        if tag == "img":
            assert attrs["alt"].strip()
        if tag == "text":  # of a chart; black is none to read on a dark page
            assert "fill: currentColor" in attrs["style"], attrs
        if tag == "figure":
            assert attrs["role"] == "img" and attrs["aria-label"].strip()
        if "tabindex" in attrs:
            assert tag in INTERACTIVE
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    anchors = {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"}
    assert anchors <= set(ids) and {"exp3", "audit", "gallery"} <= set(ids)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1 and tags.count("main") == 1
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert dict(page.tags)["html"]["lang"] == ("zh-CN" if name == "report.html" else "en")
    for rule in ("prefers-color-scheme: dark", "@media print"):
        assert rule in text


def test_numbers_of_the_page_are_the_records(made):
    folder, built, _ = made
    text = (folder / "report_en.html").read_text(encoding="utf-8")
    for by_shot in built["accuracy"].values():
        for cell in by_shot.values():
            assert f"{cell['mean']:.1f}% [{cell['ci95'][0]:.1f}, {cell['ci95'][1]:.1f}]" in text
    for line in record.conclusion(built, "en"):
        assert line.replace("'", "&#39;").replace(">", "&gt;") in text
    assert "563 anchors, 213,940" in text and "RCE_EPOCHS" in text


def test_the_first_screen_is_one_sentence_and_one_chart(made):
    folder, built, _ = made
    text = (folder / "report_en.html").read_text(encoding="utf-8")
    section = text[text.index('<section id="exp3">') :]
    first, rest = section[: section.index("<details>")], section[section.index("<details>") :]
    assert record.conclusion(built, "en")[0] in first and record.conclusion(built, "en")[2] in rest
    assert first.count("<figure") == 1 and first.count("<svg") == 2  # wide and narrow
    shown = report.first_methods(built)
    assert shown == ["v3", "v2", "zero_shot"], "here v2 is the best rival"
    label = re.search(r'<figure role="img" aria-label="([^"]*)"', first)[1]
    assert all(words.method(name, "en") in label for name in shown) and "random" not in label
    assert "sign-flip" not in first and text.index('id="notes"') > text.index('id="gallery"')


def test_a_picture_is_in_the_page_once(made):
    text = (made[0] / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r"data:image/jpeg;base64,[\w+/=]+", text)
    assert pictures and len(pictures) == len(set(pictures)) and text.count("data-thumbnail=") > len(pictures)


def test_chinese_text_has_chinese_brackets(made):
    text = (made[0] / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"<(script|style|svg).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL)
    assert re.findall(r"[\u4e00-\u9fff] ?\([^)]*\)|\([^)]*[\u4e00-\u9fff][^)]*\)", page) == []


def test_gallery_counts_and_outcomes(made):
    samples = made[2][0].samples
    counts = gallery.counts(samples)
    for shot, by in counts.items():
        v3, v2 = samples.scores("v3", shot) > 0, samples.scores("v2", shot) > 0
        assert by == {
            "v3": (v3 & ~v2).sum(),
            "v2": (v2 & ~v3).sum(),
            "both": (v3 & v2).sum(),
            "none": (~v3 & ~v2).sum(),
        }
    cards = gallery.cards(samples, limit=3, per_shot=2)
    for shot, by in counts.items():  # every filter has something to show
        for outcome, n in by.items():
            assert sum(c.outcome[shot] == outcome for c in cards) >= min(n, 3 if shot == 4 else 2)
    few = gallery.cards(samples, limit=gallery.PRINTED + 2)
    for outcome, n in counts[4].items():
        assert sum(c.printed for c in few if c.outcome[4] == outcome) == min(n, gallery.PRINTED)
    assert len(gallery.cards(samples, limit=3, per_shot=0)) == sum(min(3, n) for n in counts[4].values())
    for card in cards:
        row = next(r for r in samples.cells["v3", 4, None] if r["question_id"] == card.question_id)
        assert [d.answer for d in card.sides[0].demonstrations] == row["icd_answers"]
        assert card.sides[0].answers[4] == (row["answer"], row["score"]) and card.image.startswith("data:image/jpeg")
        assert sum(n for _, n in card.answers) == 10


def test_missing_images_and_runs_without_v2_still_make_a_page(tmp_path):
    run = record.load_run(write_run(tmp_path / "a", make_samples(1, n=20)))
    built = record.build([run], "my run", {"beam_data": None, "rl_data": None, "training": 0, "evaluation": None}, {})
    text = report.render({"my run": (built, [run])}, "en")
    assert "image missing" in text and Page(text).open == []
    alone = record.load_run(write_run(tmp_path / "b", make_samples(1, n=20, only=["v3", "zero_shot"])))
    built = record.build([alone], "b", {"beam_data": None, "rl_data": None, "training": 0, "evaluation": None}, {})
    assert 'id="gallery"' not in report.render({"b": (built, [alone])}, "zh")
    assert "没有 v2 的结果" in record.render(built, "zh")


def test_text_from_data_is_escaped(tmp_path):
    lines = make_samples(1, n=20)
    for line in lines:
        line["question"] = '<script>alert("x")</script>'
    run = record.load_run(write_run(tmp_path / "a", lines))
    built = record.build([run], "exp1", {"beam_data": None, "rl_data": None, "training": 0, "evaluation": None}, {})
    text = report.render({"exp1": (built, [run])}, "en")
    assert '<script>alert("x")' not in text and "&lt;script&gt;alert" in text


def test_figures_are_deterministic(made):
    assert charts.accuracy(made[1]) == charts.accuracy(made[1])


HARNESS = """<!DOCTYPE html><title>t</title><iframe id="f" src="report.html" style="width:360px;height:800px"></iframe>
<pre id="result"></pre><script>
document.getElementById("f").onload = function () {
  var d = this.contentDocument, w = this.contentWindow, out = {counts: {}};
  out.asked = d.querySelectorAll("img[src]").length;
  d.querySelectorAll("details").forEach(function (x) { x.open = true; });
  w.setTimeout(function () {
  out.width = [d.documentElement.scrollWidth, w.innerWidth];
  out.background = w.getComputedStyle(d.body).backgroundColor;
  out.broken = Array.from(d.images).filter(function (i) { return !i.naturalWidth; }).length;
  var charts = Array.from(d.querySelectorAll("figure svg")).filter(function (s) { return s.getClientRects().length; });
  out.charts = charts.map(function (s) { return s.getBoundingClientRect().width; });
  var form = d.getElementById("filter");
  ["1", "4"].forEach(function (shot) {
    form.elements.shot.value = shot;
    form.elements.shot.dispatchEvent(new w.Event("change", {bubbles: true}));
    ["all", "v3", "v2", "both", "none"].forEach(function (o) {
      form.querySelector("input[value=" + o + "]").click();
      var seen = Array.from(d.querySelectorAll(".card")).filter(function (c) { return c.offsetParent !== null; });
      out.counts[shot + o] = [seen.length, +d.getElementById("shown").textContent];
    });
  });
  var stops = Array.from(d.querySelectorAll("a[href], input, select, summary"));
  out.focus = stops.every(function (e) { e.focus(); return d.activeElement === e; });
  document.getElementById("result").textContent = JSON.stringify(out);
  }, 500);
};</script>"""


def browse(folder, *options):
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
               f"--user-data-dir={folder / 'profile'}", *options]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("scheme", "background"), [(1, "rgb(255, 255, 255)"), (0, "rgb(22, 23, 26)")])
def test_in_headless_chromium(made, scheme, background):
    folder, _, runs = made
    (folder / "harness.html").write_text(HARNESS)
    shown = browse(
        folder, "--virtual-time-budget=8000", f"--blink-settings=preferredColorScheme={scheme}",
        "--enable-logging=stderr", "--dump-dom", f"file://{folder}/harness.html",
    )  # fmt: skip
    assert "Uncaught" not in shown.stderr
    found = json.loads(re.search(r'<pre id="result">(.*?)</pre>', shown.stdout)[1])
    assert found["width"][0] <= found["width"][1] <= 360, "a phone must not scroll sideways"
    assert found["asked"] == 0, "pictures are loaded when they are looked at"
    assert found["background"] == background and found["broken"] == 0 and found["focus"]
    assert found["charts"] and all(100 < width <= 360 for width in found["charts"])
    cards = gallery.cards(runs[0].samples)
    for shot in (1, 4):
        for outcome in gallery.OUTCOMES:
            expected = sum(card.outcome[shot] == outcome for card in cards)
            assert found["counts"][f"{shot}{outcome}"] == [expected, expected]
        assert found["counts"][f"{shot}all"] == [len(cards)] * 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_prints(made):
    folder = made[0]
    browse(folder, f"--print-to-pdf={folder}/page.pdf", "--no-pdf-header-footer", f"file://{folder}/report_en.html")
    pdf = (folder / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6
