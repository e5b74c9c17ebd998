"""The report page: whole by itself, true to what it was given, and not to be broken by odd numbers or captions."""

import base64
import dataclasses
import functools
import html.parser
import io
import json
import math
import re
import shutil
import time
import types

import jax
import numpy as np
import pytest
from PIL import Image

from jaxcap import (captioner, checkpoints, claims, config, evaluate, explain, finish, parallel, plots, prepare, report,
                    report_photos, runs, vocab, wording)
from jaxcap.errors import UserError
from jaxcap.inference import Caption
from jaxcap.step import TrainState

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
    assert "phase 1: words encoder and decoder, aim: a caption's words in no order, 6,000 steps, adam" in page.text
    assert "phase 2: captions encoder and decoder, 5,000 steps, adam" in page.text
    assert "seed 77" in page.text and "adam at 0.125" in page.text
    assert '"learning_rate": 0.125' in page.text


@pytest.mark.parametrize("changes, told", [
    ([], "search beam 3, at most 20 words batch"),
    (["search.beam=1", "search.no_repeat_ngram=2", "search.length_normalization=0.7", "search.forbidden=dog,cat"],
     "search beam 1, at most 20 words, length normalization 0.7, no repeat ngram 2, forbidden dog cat batch"),
    (["search.sample=true", "search.nucleus=0.9", "search.max_words=12"],
     "search 3 drawn captions, at most 12 words, nucleus 0.9 batch"),
])
def test_page_tells_every_search_setting_that_was_changed(tmp_path, changes, told):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(config.override(config.load(None), changes))))
    assert told in write(tmp_path).text


def test_scores_are_drawn_where_the_journal_has_them(tmp_path):
    def titles(lines):
        return [plot["aria-label"].split(".")[0] for plot in write(tmp_path, history=lines).all("div") if "aria-label" in plot]

    lines = history()
    assert titles(lines) == ["Loss", "Learning rate", "BLEU-4", "Step time, ms"]
    scored = [{**line, "cider": 0.1 * line["step"]} if "bleu4" in line else {**line, "grad_norm": 1.0, "reward": 0.2}
              for line in lines]
    assert titles(scored) == ["Loss", "Learning rate", "BLEU-4", "CIDEr", "Reward", "Gradient norm", "Step time, ms"]
    assert "CIDEr. val: from 1 to 4, lowest 1, highest 4." in write(tmp_path, history=scored).source
    assert titles([line for line in lines if "bleu4" not in line]) == ["Loss", "Learning rate", "Step time, ms"]


def test_photos_stand_from_best_to_worst(tmp_path):
    page = write(tmp_path, samples=list(reversed(samples(9))))
    shown = [attributes["alt"] for attributes in page.all("img")]
    assert [re.search(r"photo(\d)", alt)[1] for alt in shown] == list("876543210")
    assert shown[0] == "Photo photo8, captioned: a dog runs"
    headings = [page.text.index(name) for name in ("Best photos", "Photos in the middle", "Worst photos")]
    assert headings == sorted(headings)
    assert "CIDEr 4.00 · log p −8.5" in page.text


def test_photos_tell_whether_their_caption_was_read_before(tmp_path):
    one, two, three = samples(3)
    page = write(tmp_path, samples=[dataclasses.replace(one, in_train=12), dataclasses.replace(two, in_train=0), three])
    assert "CIDEr 0.00 · log p −0.5 · 12 × in train" in page.text and "CIDEr 0.50 · log p −1.5 · new" in page.text
    assert "CIDEr 1.00 · log p −2.5 A dog runs" in page.text  # where nobody counted, nothing is said


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


VOCAB = vocab.build(["a red dog runs .", "a brown dog", "two boys in blue and red"], min_count=1)
TRAIN = ["A brown dog .", "a brown dog", "two boys in blue", "a dog runs"]
REFERENCES = {"a": ["A brown dog runs.", "a brown dog", "one dog"], "b": ["two boys in red", "boys in red"],
              "c": ["a zebra", "a zebra and a dog", "a wall"], "d": ["a dog and a ball", "a dog"],
              "e": ["a blue dog", "a dog", "a dog"]}
CAPTIONS = {"a": "a brown dog .", "b": "two boys in blue .", "c": "a brown dog .", "d": "a red dog runs .",
            "e": "a blue dog"}


def words(captions=CAPTIONS, references=REFERENCES, **changes):
    times = wording.times_in_train(captions.values(), TRAIN)
    texts = {"captions": captions.values(), "references": [text for several in references.values() for text in several]}
    return dataclasses.replace(report.Words(
        "val", len(TRAIN), claims.familiarity(captions, references, TRAIN), claims.colours(captions, references),
        [(text, photos, times[text]) for text, photos in wording.repeated(captions)],
        {writer: wording.lengths(some, VOCAB) for writer, some in texts.items()},
        wording.usage(captions, references, VOCAB)), **changes)


def test_words_are_counted_by_hand():
    assert wording.lengths(CAPTIONS.values(), VOCAB) == {3: 3, 4: 2}  # the full stop is none
    assert wording.lengths(["", "?!", "犬 が 走る。"], VOCAB) == {0: 2, 3: 1}
    used = wording.usage(CAPTIONS, REFERENCES, VOCAB)
    # Of a, and, blue, boys, brown, dog, in, red, runs, two the captions lack "and".
    assert (used["vocabulary"], used["used"], used["used_by_references"]) == (10, 9, 10)
    assert used["written"][:4] == [("a", 4 / 5, 10 / 13), ("dog", 4 / 5, 9 / 13), ("blue", 2 / 5, 1 / 13),
                                   ("brown", 2 / 5, 2 / 13)]
    assert [word for word, *_ in used["written"][4:]] == ["boys", "in", "red", "runs", "two"]
    assert used["unwritten"] == [("and", 2 / 13, True), ("zebra", 2 / 13, False), ("ball", 1 / 13, False), ("one", 1 / 13, False),
                                 ("wall", 1 / 13, False)]


def test_captions_are_found_again_by_hand():
    times = {"a brown dog .": 2, "two boys in blue .": 1, "a red dog runs .": 0, "a blue dog": 0}
    assert wording.times_in_train(CAPTIONS.values(), TRAIN) == times
    assert wording.repeated(CAPTIONS) == [("a brown dog .", 2)]
    assert wording.repeated({str(i): "xyzabc"[i % 6] for i in range(13)}) == [("x", 3), *((c, 2) for c in "abcy")]


def test_page_tells_what_the_captions_are_made_of(tmp_path):
    page = write(tmp_path, words=words())
    assert re.search(r"in train 3 60\.0% \d\.\d{3} \d+\.\d new 2 40\.0% \d\.\d{3} \d+\.\d In train", page.text)
    assert "one of the 4 training captions. Of the photos’ first references, 0.0% are." in page.text
    assert "Written most often photos in train a brown dog . 2 2 ×" in page.text
    assert "brown 2 1 50% 1 1 100% blue 2 1 50% 0 – red 1 0 0% 1 0 0% all 5 2 40% 2 1 50%" in page.text
    assert "Precision is 40.0% (beside other photos’ references, which is what guessing gives, 0.0%), recall 50.0%." in page.text
    assert "use 9 (90.0%) of the vocabulary’s 10 words; the photos’ first references" in page.text
    assert "as many captions, use 10." in page.text
    assert "Mean number of words: captions 3.4, references 3.0." in page.text
    assert "a 80.0% 76.9% dog 80.0% 69.2% blue 40.0% 7.7% brown 40.0% 15.4%" in page.text
    assert "Never written references and 15.4% zebra not in the vocabulary 15.4% ball" in page.text
    bars = re.findall(r"<title>(\w+), (\S+) words: (\S+)</title>", page.source)
    assert bars == [("captions", "3", "60.0%"), ("captions", "4", "40.0%"), ("references", "2", "46.2%"),
                    ("references", "3", "23.1%"), ("references", "4", "15.4%"), ("references", "5", "15.4%")]


def test_new_captions_alone_have_no_score_of_old_ones(tmp_path):
    page = write(tmp_path, words=words(familiarity=claims.familiarity(CAPTIONS, REFERENCES, ["a wall"])))
    assert re.search(r"in train 0 0\.0% – – new 5 100\.0% \d", page.text)


def test_nothing_is_said_of_what_is_absent(tmp_path):
    plain = write(tmp_path)
    headings = ("Novelty", "Colours", "Length and vocabulary", "Where it looked")
    assert not any(f"<h2>{name}" in plain.source for name in headings) and "Attention" not in plain.text
    assert [link["href"] for link in plain.all("a")] == ["#scores", "#training", "#photos"]
    colourless = {"a": ["a dog", "one dog"], "b": ["a wall", "walls"]}
    page = write(tmp_path, words=words({"a": "a dog", "b": "a wall ."}, colourless), history=[])
    assert "<h2>Novelty" in page.source and "<h2>Colours" not in page.source and "Written most often" not in page.text
    assert [link["href"] for link in page.all("a")] == ["#scores", "#words", "#photos"]
    assert {link["href"][1:] for link in page.all("a")} <= {part.get("id") for _, part in page.tags}


def test_words_cannot_break_the_page(tmp_path):
    nasty = '<script>"x"</script>&'
    captions = dict.fromkeys("abc", nasty) | {"d": "a dog"}
    references = {i: [nasty + "<u>y", "a <i>"] for i in captions}
    page = write(tmp_path, words=words(captions, references, split="<val>"), maps=[
        (dataclasses.replace(samples(1)[0], caption=nasty, image_id="<id>"),
         explain.Explanation(np.zeros((32, 32, 3), np.uint8), ["<u>", '"&'], np.ones((2, 2, 2)) / 4, True))])
    assert not page.all("script") and not page.all("u") and not page.all("i")
    assert f"{nasty} 3 new" in page.text and "<val>" in page.text and "<u> up to 25%" in page.text
    assert [image["alt"] for image in page.all("img")][:3] == [
        f"Photo <id>, captioned: {nasty}", "Map of “<u>”, brightest at the top left", 'Map of “"&”, brightest at the top left']


def test_bars_stand_where_the_counts_are():
    drawn = plots.histogram("Length", {"captions": {3: 1, 4: 3}, "references": {4: 2, 5: 2}, "nobody": {}}, "words")
    found = re.findall(r'<rect class="c\d" x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"', drawn)
    bars = [tuple(map(float, bar)) for bar in found]
    third, most = 100 / 3, 100 / 1.06  # the highest bar, 75 %, leaves a little room
    assert np.allclose(bars, [(0.1 * third, 100 - most / 3, 0.4 * third, most / 3), (1.1 * third, 100 - most, 0.4 * third, most),
                              (1.5 * third, 100 - most / 1.5, 0.4 * third, most / 1.5),
                              (2.5 * third, 100 - most / 1.5, 0.4 * third, most / 1.5)], atol=0.006)
    assert re.findall(r'class="x" style="left:(\S+)%">([^<]*)<', drawn) == [("16.67", "3"), ("50.00", "4"), ("83.33", "5")]
    assert "captions: 4, from 3 to 4 words, mean 3.8, most often 4; references: 4, from 4 to 5 words, mean 4.5" in drawn
    assert "nobody" not in drawn and "no values" in plots.histogram("Length", {"captions": {3: 0}}, "words")


def test_the_last_bar_gathers_a_long_tail():
    drawn = plots.histogram("Length", {"captions": {**dict.fromkeys(range(1, 12), 100), 40: 3, 90: 2}}, "words")
    titles = re.findall(r"<title>captions, (\S+) words: (\S+)</title>", drawn)
    assert [name for name, _ in titles] == [*map(str, range(1, 11)), "11+"]
    assert titles[-1][1] == "9.5%" and titles[0][1] == "9.0%"  # 105 and 100 of 1105
    assert "from 1 to 90 words" in drawn


def test_a_list_is_spread_over_its_ends_and_middle():
    assert finish._spread(list("abcdefgh"), 2) == list("abdegh")
    assert finish._spread(list("abcde"), 2) == list("abcde") and finish._spread([], 2) == []
    assert finish._spread(list(range(100)), 12) == [*range(12), *range(44, 56), *range(88, 100)]


def test_maps_stand_word_by_word_over_the_photo(tmp_path):
    image = np.full((32, 32, 3), (200, 30, 30), np.uint8)
    maps_Thw = np.full((2, 3, 3), 0.1)
    maps_Thw[0, 2, 1] = maps_Thw[1, 1, 1] = 0.2
    page = write(tmp_path, maps=[(samples(1)[0], explain.Explanation(image, ["red", "wall"], maps_Thw, True))], samples=[])
    assert "From one word to the next 10% of the attention moves; it is spread as over 9 of 9 places." in page.text
    assert [found["alt"] for found in page.all("img")] == [
        "Photo photo0, captioned: a dog runs", "Map of “red”, brightest at the bottom", "Map of “wall”, brightest in the middle"]
    assert "would give each place 11.1%" in page.text and "red up to 20% wall up to 20%" in page.text
    photo, red, wall = (np.asarray(Image.open(io.BytesIO(base64.b64decode(found["src"].split(",")[1])))).astype(int)
                        for found in page.all("img"))
    assert abs(photo - (200, 30, 30)).max() < 8  # the photo itself, without the margins of `explain`'s sheet
    side = len(red)
    assert side == len(wall) == report_photos.MAP_PIXELS
    assert red[-side // 5:, side // 2].sum() > 1.5 * red[:side // 5, side // 2].sum()
    assert wall[side // 2, side // 2].sum() > 1.5 * wall[-1, side // 2].sum()


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run of a tiny captioner that attends, on one-coloured photos, ready for its end; no step is taken."""
    root = tmp_path_factory.mktemp("report")
    (root / "photos").mkdir()
    lines = []
    for i in range(18):
        name, rgb = (("red", (220, 40, 40)), ("green", (40, 180, 60)))[i % 2]
        Image.new("RGB", (32, 32), rgb).save(root / "photos" / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "captions": [f"a {name} wall .", f"the wall is {name} ."],
                                 "split": "val" if i >= 10 else "train"}))
    (root / "captions.jsonl").write_text("\n".join(lines))
    assert not prepare.main(["folder", "--source", str(root / "photos"), "--captions", str(root / "captions.jsonl"), "--label",
                             "tiny", "--size", "32", "--data-dir", str(root / "data")])
    words = vocab.build(["a red wall .", "the wall is green ."], min_count=1)
    configuration = config.check(config.Config(
        batch_size=8, eval_batch_size=8, data=config.Data("folder", str(root / "data"), "tiny", 32, max_words=8),
        decoder=config.Decoder(embedding=8, hidden=8, image="attention", attention=config.Attention(size=8)),
        search=config.Search(beam=1, max_words=4, min_words=3), phases=(config.Phase("decoder", steps=1),)))
    init = functools.partial(captioner.build(configuration, len(words)).init, size=32)
    random = np.random.default_rng(0)
    params, batch_stats = jax.tree.map(lambda leaf: jax.numpy.asarray(random.uniform(0.1, 0.3, leaf.shape), leaf.dtype),
                                       jax.eval_shape(init, jax.random.key(0)))
    runs.create(root / "run", configuration, words)
    keeper = checkpoints.Checkpoints(root / "run" / "checkpoints", configuration.checkpoints)
    keeper.save(TrainState(np.int32(1), params, batch_stats, (), jax.random.PRNGKey(0)),
                {"step": 1, "phase": 0, "phase_step": 1, "words": len(words)})
    keeper.close()
    return root / "run", parallel.Parallel("shard_map", jax.devices()[:1])


def test_the_end_of_a_run_shows_what_it_looked_at(unfinished, monkeypatch, capsys):
    monkeypatch.setattr(finish, "MAPPED", 1)
    directory, devices = unfinished
    finish.finish(directory, devices)
    page = Page(directory / "report.html")
    captions = [item["caption"] for item in json.loads((directory / "results" / "val.json").read_text())]
    seen = [image["alt"] for image in page.all("img")]
    maps = re.findall("Map of “(.*?)”", " ".join(seen))
    assert len([alt for alt in seen if alt.startswith("Photo")]) == len(captions) + 3 and len(captions) == 8
    assert 9 <= len(maps) <= 12  # three captions of three or four words
    assert set(maps) <= {word for caption in captions for word in caption.replace(".", " .").split()}
    assert "<h2>Novelty" in page.source and "<h2>Length and vocabulary" in page.source
    assert page.text.count(" · new") + page.text.count(" × in train") >= len(captions)


def test_the_end_of_a_run_whose_words_are_characters_is_scored_by_them(unfinished, tmp_path, monkeypatch):
    directory, devices = unfinished
    shutil.copytree(directory, tmp_path / "run")
    words = tmp_path / "run" / "vocabulary.tsv"
    words.write_text(words.read_text("utf-8").replace("tokenizer=words", "tokenizer=characters"), encoding="utf-8")
    monkeypatch.setattr(evaluate.Evaluator, "captions", lambda self, *_: {i: Caption("ared wall!", -1.0, True) for i in self.split.image_ids})
    monkeypatch.setattr(finish, "_maps", lambda *_: [])
    shown = {}
    monkeypatch.setattr(report, "write", lambda directory, **parts: shown.update(parts))
    scores = finish.finish(tmp_path / "run", devices)["val"]
    assert scores["words"] == 8 and scores["in_train"] == 1 and scores["bleu4"] > 50  # PTB sees two words, in no reference
    assert shown["words"].familiarity["in_train"]["photos"] == 8
    assert {(sample.caption, sample.in_train) for sample in shown["samples"]} == {("ared wall!", 5)}  # as written
    assert {item["caption"] for item in json.loads((tmp_path / "run" / "results" / "val.json").read_text())} == {"ared wall!"}


def test_the_end_of_a_run_that_sees_the_photo_once_makes_no_maps(monkeypatch):
    monkeypatch.setattr(explain, "Explainer", None)
    run = types.SimpleNamespace(captioner=types.SimpleNamespace(attends=False))
    assert finish._maps(run, samples()) == []
