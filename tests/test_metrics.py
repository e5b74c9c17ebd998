"""Scores equal coco-caption's, whose Python scorers (package pycocoevalcap) run beside ours on the same tokens."""

import collections
import json
import math
import random
import shutil
import time

import pytest

from benchmarks import metrics as benchmark
from jaxcap import metrics, ptb, vocab
from jaxcap.errors import UserError

REFERENCES = {
    "sea": ["A brown dog runs along the beach.", "A dog is running on wet sand near the sea", "The dog runs"],
    "park": ["Two children play football in a park .", "Kids kick a ball, laughing.", "two kids and a ball"],
    "street": ["A man in a red shirt rides a bicycle down the street."],
    "rock": ["A woman climbs a steep rock wall", "a climber on a rock face", "Someone's climbing!", "a rock climber",
             "A woman with a rope is climbing up a steep, grey rock"],
}
CANDIDATES = {"rock": "a woman is climbing a steep rock", "street": "a man rides a bicycle down the street .",
              "sea": "a dog runs along the beach", "park": "two boys are in a park with a park bench"}


def coco_caption(candidates, references):
    """coco-caption's own numbers on our tokens: corpus scores (BLEU 0–1), CIDEr and ROUGE-L per photo."""
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu", reason="pycocoevalcap is not installed")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = {i: [ptb.tokenize(text) for text in texts] for i, texts in references.items()}
    ours = {i: [ptb.tokenize(candidates[i])] for i in references}
    bleus, _ = bleu.Bleu(4).compute_score(truth, ours, verbose=0)
    cider, ciders = Cider().compute_score(truth, ours)
    rouge, rouges = Rouge().compute_score(truth, ours)
    return ({f"bleu{n}": b for n, b in enumerate(bleus, 1)} | {"cider": cider, "rouge_l": rouge},
            dict(zip(truth, ciders)), dict(zip(truth, rouges)))


def assert_equal_to_coco_caption(candidates, references):
    theirs, ciders, rouges = coco_caption(candidates, references)
    ours = metrics.score(candidates, references)
    photos = metrics.per_photo(candidates, references)
    assert set(ours) == set(theirs)
    for n in (1, 2, 3, 4):
        assert ours[f"bleu{n}"] / 100 == pytest.approx(theirs[f"bleu{n}"], rel=1e-12)
    for name in ("cider", "rouge_l"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)
    for i in references:
        assert photos[i]["cider"] == pytest.approx(ciders[i], abs=1e-6)
        assert photos[i]["rouge_l"] == pytest.approx(rouges[i], abs=1e-6)


@pytest.fixture
def flickr8k(shared):
    """1,000 real photos: four references each, and as candidate the fifth, half of them shuffled or cut."""
    captions = collections.defaultdict(list)
    for line in shared("flickr8k", "Flickr8k_text", "Flickr8k.token.txt").read_text().splitlines():
        name, caption = line.split("\t")
        captions[name.split("#")[0]].append(caption)
    photos = [name for name, texts in captions.items() if len(texts) == 5][:1000]
    rng = random.Random(0)
    candidates = {}
    for name in photos:
        words = captions[name][0].split()
        candidates[name] = " ".join(words if rng.random() < 0.5 else rng.sample(words, rng.randint(1, len(words))))
    return candidates, {name: captions[name][1:] for name in photos}


def test_equal_to_coco_caption_on_ragged_references():
    assert_equal_to_coco_caption(CANDIDATES, REFERENCES)


def test_equal_to_coco_caption_with_empty_and_one_word_captions():
    references = REFERENCES | {"blank": ["...", "A wall ."], "word": ["Snow", "snow !"]}
    assert_equal_to_coco_caption(CANDIDATES | {"blank": "", "word": "snow"}, references)
    assert_equal_to_coco_caption(CANDIDATES | {"blank": "a wall", "word": ""}, references)


def test_equal_to_coco_caption_where_no_ngram_matches_or_none_is_long_enough():
    references = {"dog": ["a dog runs slowly", "the dog"], "men": ["two men sit here"]}
    assert_equal_to_coco_caption({"dog": "a dog runs fast", "men": "two men sit down"}, references)
    assert_equal_to_coco_caption({"dog": "the dog", "men": "two men"}, references)


def test_equal_to_coco_caption_on_one_photo():
    assert_equal_to_coco_caption({"sea": CANDIDATES["sea"]}, {"sea": REFERENCES["sea"]})


def test_equal_to_coco_caption_on_real_captions(flickr8k):
    assert len(flickr8k[0]) >= 1000
    assert_equal_to_coco_caption(*flickr8k)


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program and there is no Java")
def test_meteor_is_coco_captions_on_real_captions(flickr8k):
    meteor = pytest.importorskip("pycocoevalcap.meteor.meteor", reason="pycocoevalcap is not installed")
    candidates, references = flickr8k
    references = {i: texts[:len(texts) - n % 3] for n, (i, texts) in enumerate(references.items())}  # two to four
    theirs = meteor.Meteor()  # loads its tables while ours does
    total, photos = metrics.with_java("meteor", candidates, references)
    truth = {i: [ptb.tokenize(text) for text in texts] for i, texts in references.items()}
    expected, expected_photos = theirs.compute_score(truth, {i: [ptb.tokenize(candidates[i])] for i in references})
    assert total == pytest.approx(expected, abs=1e-6)
    assert list(photos.values()) == pytest.approx(expected_photos, abs=1e-6)
    assert list(photos) == list(references) and 0.1 < total < 0.6


def test_scoring_again_is_faster_than_coco_caption(flickr8k):
    candidates, captions = ({name: of[name] for name in list(of)[:300]} for of in flickr8k)
    references = metrics.References(captions)
    metrics.score(candidates, references)
    start = time.process_time()
    metrics.score(candidates, references)
    ours = time.process_time() - start
    start = time.process_time()
    coco_caption(candidates, captions)
    assert ours < time.process_time() - start


@pytest.mark.parametrize("lines", [None, "a.jpg#0\tA dog .\n" * 5 + "b.jpg#0\tA cat .\n"])
def test_the_benchmark_measures_both(tmp_path, capsys, lines):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    path = tmp_path / "captions.txt"
    path.write_text(lines or "no captions")
    file = ["--json", str(tmp_path / "found.json"), "--photos", "8", "--repeats", "1"]
    assert benchmark.main([str(path), *file] if lines else file) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [r["scores"] for r in found["results"]] == ["BLEU, CIDEr-D, ROUGE-L", "CIDEr-D"]
    assert all(r["captions"] == (1 if lines else 8) and r["ours_per_s"] > 0 < r["peer_per_s"] for r in found["results"])
    if not lines:
        with pytest.raises(UserError, match="captions.txt is no file of lines"):
            benchmark.main([str(path)])


def test_identical_candidates_score_full_marks():
    scores = metrics.score({i: texts[-1] for i, texts in REFERENCES.items()}, REFERENCES)
    assert [scores[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx([100] * 4)
    assert scores["rouge_l"] == pytest.approx(1)


def test_cider_of_the_only_reference_is_ten():
    references = {"a": ["a red ball on the grass"], "b": ["two blue boxes stand here"]}
    assert metrics.score({i: t[0] for i, t in references.items()}, references)["cider"] == pytest.approx(10)


def test_known_bleu():
    # By hand: clipped 1-grams 4/5, 2-grams 2/4; 5 words beside a reference of 6: brevity penalty exp(1 - 6/5).
    scores = metrics.score({"x": "the cat on the mat"}, {"x": ["a cat is on the mat"]})
    penalty = 0.8187307531
    assert scores["bleu1"] == pytest.approx(100 * penalty * 4 / 5)
    assert scores["bleu2"] == pytest.approx(100 * penalty * (4 / 5 * 2 / 4) ** 0.5)
    assert scores["bleu4"] == pytest.approx(100 * penalty * (4 / 5 * 2 / 4 * 1 / 3 * 1e-15 / 2) ** 0.25)  # a count of 0 is 1e-15


def test_all_captions_empty_scores_zero():
    assert set(metrics.score(dict.fromkeys(REFERENCES, ""), REFERENCES).values()) == {0}


def test_order_of_photos_does_not_matter():
    backwards = dict(reversed(REFERENCES.items()))
    assert metrics.score(CANDIDATES, backwards) == pytest.approx(metrics.score(CANDIDATES, REFERENCES))


def test_references_are_tokenized_once():
    calls = []
    references = metrics.References(REFERENCES, lambda text: calls.append(text) or ptb.tokenize(text))
    calls.clear()
    first, second = metrics.score(CANDIDATES, references), metrics.score(CANDIDATES, references)
    assert first == second
    assert sorted(calls) == sorted(2 * list(CANDIDATES.values()))


def test_photos_average_to_the_score():
    photos = metrics.per_photo(CANDIDATES, REFERENCES)
    scores = metrics.score(CANDIDATES, REFERENCES)
    for name in ("cider", "rouge_l"):
        assert sum(p[name] for p in photos.values()) / len(photos) == pytest.approx(scores[name])
    assert photos["sea"]["bleu4"] > photos["park"]["bleu4"] > 0


def test_novelty_looks_past_case_and_punctuation():
    train = ["A dog runs.", "Two cats", "two cats"]
    assert metrics.novelty({"1": "a dog runs", "2": "Two cats .", "3": "a dog", "4": "two cats"}, train) == 0.75
    assert metrics.novelty({"1": "a dog runs"}, []) == 0


def test_variety():
    assert metrics.variety({"1": "a dog runs .", "2": "A dog runs", "3": "cats", "4": "a cat"}) == {
        "distinct": 0.75, "words": 2.25, "vocabulary": 5}


def test_a_language_without_blanks_is_scored_by_characters():
    words, characters = (vocab.build(["犬がTシャツを着ている。"], min_count=1, tokenizer=name) for name in ("words", "characters"))
    assert metrics.tokenizer(words) is ptb.tokenize
    tokenize = metrics.tokenizer(characters)
    assert tokenize("犬が、Tシャツを 着ている。") == "犬 が t シ ャ ツ を 着 て い る"
    assert tokenize("น้ำ ใส!") == "น้ำ ใ ส" and tokenize("") == tokenize("。") == ""
    candidates, texts = {"a": "犬が走っている。", "b": "猫が寝ている"}, {"a": ["犬が走っていた", "犬"], "b": ["白い猫が寝ている。"]}
    references = metrics.References(texts, tokenize)
    scores = metrics.score(candidates, references)
    # By hand: 4-grams 4 - 1 of 犬's and 3 of 猫's; 13 characters beside references of 15.
    by_hand = (12 / 13 * 10 / 11 * 8 / 9 * 6 / 7) ** 0.25
    assert scores["bleu4"] == pytest.approx(100 * math.exp(1 - 15 / 13) * by_hand)
    assert scores["cider"] > 1 and scores["rouge_l"] > 0.7 and metrics.per_photo(candidates, references)["b"]["rouge_l"] < 1
    assert metrics.score(candidates, texts)["bleu2"] < 1e-9
    assert metrics.novelty(candidates, ["犬が走っている", "猫"], tokenize) == 0.5
    assert metrics.variety(candidates, tokenize) == {"distinct": 1, "words": 6.5, "vocabulary": 9}


@pytest.mark.parametrize("candidates, references, says", [
    ({}, {"a": ["x"]}, "no captions to score"),
    ({"a": "x"}, {}, "no photo"),
    ({"a": "x"}, {"a": []}, "1 photo (a) without a reference"),
    ({"a": "x"}, {"a": ["x"], "b": ["y"], "c": ["z"]}, "2 photos (b, c) of the references without a caption"),
    ({n: "x" for n in "abcdef"}, {"a": ["x"]}, "5 photos (b, c, d, …) with a caption but no reference"),
])
@pytest.mark.parametrize("function", [metrics.score, metrics.per_photo])
def test_bad_input_is_a_clear_sentence(function, candidates, references, says):
    with pytest.raises(UserError) as error:
        function(candidates, references)
    assert says in str(error.value)


@pytest.mark.parametrize("function", [lambda: metrics.novelty({}, ["a dog"]), lambda: metrics.variety({})])
def test_no_candidates_is_a_clear_sentence(function):
    with pytest.raises(UserError, match="no captions to score"):
        function()
