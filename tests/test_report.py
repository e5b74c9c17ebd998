"""The report page: whole by itself, true to what it was given, and not to be broken by odd numbers or captions."""

import base64
import html.parser
import io
import json
import math
import re
import time

import numpy as np
import pytest
from PIL import Image

from jaxcap import config, plots, report
from jaxcap.errors import UserError

VOID = {"meta", "img"}


class Page(html.parser.HTMLParser):
    """A page read strictly: its text, tags with attributes, and an error on a tag that is not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def samples(count=9, captions=("a dog runs",)):
    rng = np.random.default_rng(0)
    return [report.Sample(rng.integers(0, 256, (64, 64, 3), np.uint8), f"photo{i}", captions[i % len(captions)],
                          -i - 0.5, ["A dog runs .", "A brown dog"], {"cider": i / 2, "rouge_l": 0.5, "bleu4": 10.0})
            for i in range(count)]


def history(steps=40):
    lines = []
    for step in range(1, steps + 1):
        phase, within = ("decoder", step) if step <= steps // 2 else ("joint", step - steps // 2)
        lines.append({"step": step, "epoch": within / 10, "phase": phase, "loss": 5 / step, "loss_smooth": 6 / step,
                      "learning_rate": 1e-3, "step_ms": 1500.0})
        if within % 10 == 0:
            lines.append({"step": step, "epoch": within / 10, "split": "val", "bleu4": float(step)})
    return lines


SCORES = {"val": {"bleu1": 61.23, "bleu4": 19.54, "cider": 0.5123, "in_train": 0.25, "step": 40, "split": "val"},
          "novel": {"bleu1": 50.0, "bleu4": math.nan, "colours_right": 0.9, "own_score": 3.0}}


def write(folder, **changes):
    given = {"title": "A run", "scores": SCORES, "samples": samples(), "history": history()} | changes
    return Page(report.write(folder, **given))


def test_page_needs_nothing_but_itself(tmp_path):
    page = write(tmp_path)
    assert {attributes["src"][:10] for attributes in page.all("img")} == {"data:image"}
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    assert "http" not in page.source and "url(" not in page.source and "@import" not in page.source


def test_page_tells_scores_by_split(tmp_path):
    page = write(tmp_path)
    assert "val novel BLEU-1 61.2 50.0 BLEU-4" in page.text
    assert re.search(r"BLEU-4 .*? 19\.5 – CIDEr .*? 0\.512 – Colours right – 90\.0%", page.text)
    assert "own_score – 3" in page.text


def test_page_tells_how_long_training_took(tmp_path):
    assert "40 steps in 1.0 min" in write(tmp_path).text


def test_page_tells_the_config(tmp_path):
    given = config.override(config.load(None), ["seed=77", "phases.0.optim.learning_rate=0.125"])
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(given)))
    page = write(tmp_path)
    assert "small_cnn encoder and lstm decoder on shapes" in page.text
    assert "seed 77" in page.text and "adam at 0.125" in page.text
    assert '"learning_rate": 0.125' in page.text


def test_photos_stand_from_best_to_worst(tmp_path):
    page = write(tmp_path, samples=list(reversed(samples(9))))
    shown = [attributes["alt"] for attributes in page.all("img")]
    assert [re.search(r"photo(\d)", alt)[1] for alt in shown] == list("876543210")
    assert shown[0] == "Photo photo8, captioned: a dog runs"
    headings = [page.text.index(name) for name in ("Best photos", "Photos in the middle", "Worst photos")]
    assert headings == sorted(headings)
    assert "CIDEr 4.00 · log p −8.5" in page.text


def test_photos_survive_the_page(tmp_path):
    sample = samples(1)[0]
    page = write(tmp_path, samples=[sample])
    data = page.all("img")[0]["src"].split(",")[1]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), sample.image)


def test_captions_cannot_break_the_page(tmp_path):
    nasty = ['</p><script>alert("x")</script>', "a 'quoted' & \"doubly\" quoted <b>", "كلب بني", "犬が走る", "", "\udcff",
             "$x ${y}"]
    page = write(tmp_path, samples=samples(7, nasty), title="<i> & $title")
    assert not page.all("script")
    for caption in nasty[:4] + nasty[6:]:
        assert " ".join(caption.split()) in page.text
    assert "(no word)" in page.text
    assert "<i> & $title" in page.text
    captions = [attributes for attributes in page.all("p") if attributes.get("class") == "caption"]
    assert {attributes["dir"] for attributes in captions} == {"auto"}


@pytest.mark.parametrize("changes", [
    {"scores": {}, "samples": [], "history": []},
    {"history": history()[:1]},
    {"history": [{"step": 10, "split": "val", "bleu4": 3.0, "epoch": 1.0}]},
    {"history": [{"step": n, "phase": "p", "loss": math.nan, "loss_smooth": None} for n in range(3)]},
    {"history": [{"step": n, "loss": math.inf if n % 2 else 2.0, "loss_smooth": 2.0, "step_ms": 0} for n in range(9)]},
    {"samples": [report.Sample(np.zeros((500, 40, 3), np.uint8), 5, "x", math.nan, [], {"cider": math.nan})]},
])
def test_odd_input_still_makes_a_page(tmp_path, changes):
    page = write(tmp_path, **changes)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r'src="[^"]*"', "", page.source))


def test_a_hundred_thousand_lines_make_a_light_page_soon(tmp_path):
    start = time.process_time()
    page = write(tmp_path, history=history(100_000), samples=[])
    assert time.process_time() - start < 15
    assert len(page.source) < 300_000


def test_page_is_whole_or_absent(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        report.write(tmp_path / "nowhere", title="x", scores={}, samples=[], history=[])
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="report.html cannot be written"):
        report.write(tmp_path, title="x", scores={}, samples=[], history=[])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_epochs_go_on_over_phases():
    unit, places, phases = report._places(history(40))
    assert unit == "epoch" and phases == [(0.0, "decoder"), (2.0, "joint")]
    assert places == sorted(places) and places[-1] == 4.0


def test_epochs_go_on_over_phases_of_one_name():
    lines = [{**line, "phase": "same"} if "phase" in line else line for line in history(40)]
    assert report._places(lines)[1] == report._places(history(40))[1]


def test_thinning_keeps_ends_and_extremes():
    points = [(float(x), math.sin(x / 5000)) for x in range(100_000)]
    points[777], points[888] = (777.0, 50.0), (888.0, -50.0)
    thinned = plots.thin(points, 300)
    assert len(thinned) <= 301 and thinned == sorted(thinned)
    assert {points[0], points[777], points[888], points[-1]} <= set(thinned)
    assert plots.thin(points[:300], 300) == points[:300]


@pytest.mark.parametrize("low, high, texts", [
    (0, 10, ["0", "2", "4", "6", "8", "10"]), (0, 1e-3, ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]),
    (1.96, 2.21, ["2.00", "2.05", "2.10", "2.15", "2.20"]), (0, 20_000, ["0", "5k", "10k", "15k", "20k"]),
    (-1, 1, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]), (0, 3e6, ["0", "0.5M", "1M", "1.5M", "2M", "2.5M", "3M"]),
])
def test_ticks_are_round(low, high, texts):
    found = plots.ticks(low, high, 4)
    assert [text for _, text in found] == texts
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in found)


def test_curves_are_drawn_where_the_numbers_are():
    drawn = plots.chart("t", [plots.Curve("c", [(0, 0.0), (5, 10.0), (10, 5.0)])], x_range=(0, 10), from_zero=True)
    path = re.search(r'class="line c0" d="([^"]*)"', drawn)[1]
    assert path == "M0.00 100.00L50.00 5.66L100.00 52.83"  # the top is 6 % above the highest


def test_a_gap_is_left_where_a_number_is_missing():
    drawn = plots.chart("t", [plots.Curve("c", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0)])], x_range=(0, 3))
    path = re.search(r'class="line c0" d="([^"]*)"', drawn)[1]
    assert path.count("M") == 2 and path.count("L") == 1 and path.endswith("h0")
    assert "1 not a number" in drawn


def test_a_spike_does_not_flatten_the_rest():
    points = [(x, 1.0 + x % 3) for x in range(200)] + [(200, 1e6)]
    assert "0.4M" not in plots.chart("t", [plots.Curve("c", points)], x_range=(0, 200), shown=0.95)
    assert "0.4M" in plots.chart("t", [plots.Curve("c", points)], x_range=(0, 200))


def test_caption_grid_places_photos_and_words():
    images = [np.full((8, 8, 3), value, np.uint8) for value in (40, 80, 120, 160, 200)]
    sheet = report.caption_grid(images, ["a dog", "w" * 80, "", "two " * 30, "x"], columns=3, side=112)
    assert sheet.mode == "RGB" and sheet.width == 8 + 3 * 120
    pixels = np.asarray(sheet)
    assert (pixels[8:120, 8:120] == 40).all() and (pixels[8:120, 128:240] == 80).all()
    assert (pixels[120:140, 8:120] < 100).any()  # words below the first
    assert (pixels[120:140, 248:360] == 255).all()  # none below the third
    assert (pixels[:, 120:128] == 255).all()  # nothing runs over the gap between columns


def test_caption_grid_of_one():
    assert report.caption_grid([np.zeros((4, 6, 3), np.uint8)], ["x"]).width == 256
