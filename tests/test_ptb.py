"""Tokens equal those of coco-caption's Java tool; golden/ptb.tsv holds its answers for machines without it."""

import importlib.util
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from jaxcap import ptb

GOLDEN = [tuple(line.split("\t")) for line in
          (Path(__file__).parent / "golden" / "ptb.tsv").read_text(encoding="utf-8").splitlines()]
DROPPED_BY_COCO_CAPTION = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split()


def java_tokens(captions, folder):
    """What coco-caption makes of each caption by itself; skips where Java or pycocoevalcap is missing."""
    if not shutil.which("java"):
        pytest.skip("java is not installed")
    if not importlib.util.find_spec("pycocoevalcap"):
        pytest.skip("pycocoevalcap is not installed")
    package = Path(importlib.util.find_spec("pycocoevalcap.tokenizer.ptbtokenizer").origin).parent
    lines = folder / "captions.txt"
    # The tool peeks at the next line after "plan B.": a line in between makes each caption stand alone.
    lines.write_text("".join(f"{caption}\nx\n" for caption in captions), encoding="utf-8")
    tool = subprocess.run(["java", "-Dfile.encoding=UTF-8", "-cp", package / "stanford-corenlp-3.4.1.jar",
                           "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", lines],
                          capture_output=True, check=True)
    answers = tool.stdout.decode("utf-8").split("\n")[:-1:2]
    assert len(answers) == len(captions)
    return [" ".join(token for token in line.split(" ") if token not in DROPPED_BY_COCO_CAPTION) for line in answers]


def differences(captions, truth):
    return [(caption, said, ptb.tokenize(caption)) for caption, said in zip(captions, truth)
            if ptb.tokenize(caption) != said]


@pytest.mark.parametrize("caption, tokens", GOLDEN)
def test_golden_table(caption, tokens):
    assert ptb.tokenize(caption) == tokens


def test_golden_table_is_what_the_java_tool_says(tmp_path):
    captions = [caption for caption, _ in GOLDEN]
    assert java_tokens(captions, tmp_path) == [tokens for _, tokens in GOLDEN]


def test_golden_table_needs_every_rule(monkeypatch):
    """A rule that no golden line obeys is a rule that nobody checks."""
    used = set()
    longest = ptb._longest

    def spy(text, place):
        match, rule = longest(text, place)
        used.add(rule)
        return match, rule

    monkeypatch.setattr(ptb, "_longest", spy)
    ptb.tokenize.cache_clear()
    ptb._tokens_apart.cache_clear()
    for caption, _ in GOLDEN:
        ptb.tokenize(caption)
    assert [rule.pattern.pattern for rule in ptb._RULES if rule not in used] == []


def test_equal_to_java_on_real_captions(shared, tmp_path):
    lines = shared("flickr8k", "Flickr8k_text", "Flickr8k.token.txt").read_text(encoding="utf-8").splitlines()
    captions = [line.split("\t")[1] for line in lines]
    assert differences(captions, java_tokens(captions, tmp_path)) == []


def test_nearly_equal_to_java_on_nonsense(tmp_path):
    """Words and signs glued at random, as nobody writes: at most 1 line in 300 may differ."""
    rng = random.Random(0)
    words = [word for caption, _ in GOLDEN for word in caption.split()]
    captions = ["".join(rng.choice(words) + rng.choice(["", " ", " ", "-", ".", ",", "'", '"'])
                        for _ in range(rng.randint(1, 4))) for _ in range(1500)]
    wrong = differences(captions, java_tokens(captions, tmp_path))
    assert len(wrong) <= 5, wrong[:5]


def test_white_space_is_one_kind():
    assert ptb.tokenize(" a\tdog\nruns \r\n") == "a dog runs"
    assert ptb.tokenize("") == ptb.tokenize(" \n ") == ptb.tokenize("...") == ""


def test_tokens_do_not_depend_on_what_was_asked_before():
    assert ptb.tokenize("see no. 5") == "see no. 5"
    assert ptb.tokenize("see no.") == "see no"
    assert ptb.tokenize("see no. 5") == "see no. 5"


def test_a_thousand_captions_take_no_time():
    captions = [f"A {colour} dog isn't on the {place}-side {n % 7} ." for n in range(500)
                for colour, place in [("red", "hill"), ("blue", "road")]]
    start = time.process_time()
    for caption in captions:
        ptb.tokenize(caption)
    assert time.process_time() - start < 2
