"""Words to ids and back, in any language, through one readable file."""

import numpy as np
import pytest

from jaxcap import vocab
from jaxcap.errors import UserError
from jaxcap.vocab import BOS, EOS, PAD, UNK

CAPTIONS = ["A dog's ball .", "a dog runs .", "A cat , and a dog"]


def test_words_below_min_count_are_unknown_and_order_is_by_count_then_alphabet():
    v = vocab.build(CAPTIONS, min_count=2)
    assert v.words == (*vocab.SPECIAL, "a", ".", "dog")
    assert v.counts == (0, 0, 0, 6, 4, 2, 2)  # dog's, ball, runs, cat, ",", and: … counted under <unk>


def test_counts_add_up():
    v = vocab.build(CAPTIONS, min_count=2)
    assert sum(v.counts) == sum(len(v.tokenize(c)) for c in CAPTIONS)


def test_encode_decode_round_trip():
    v = vocab.build(CAPTIONS, min_count=1)
    ids = v.encode("A dog runs.", 20)
    assert ids[0] == BOS and ids[-1] == EOS
    assert v.decode(ids) == "a dog runs."
    assert v.encode("a zebra runs", 20)[2] == UNK
    assert len(v.encode("a dog runs .", 2)) == 4
    assert v.decode([BOS, *v.encode("a dog", 5)[1:], PAD, v.encode("cat", 5)[1]]) == "a dog"


def test_a_word_that_looks_like_a_marker_is_none():
    v = vocab.build(["a <eos> dog <pad>"], min_count=1, tokenizer="whitespace")
    assert v.words == (*vocab.SPECIAL, "a", "dog")
    assert v.encode("a <eos> dog <pad> <bos>", 9)[1:-1] == [v.words.index("a"), UNK, v.words.index("dog"), UNK, UNK]


@pytest.mark.parametrize("text, tokens", [
    ("Ein Mädchen läuft.", ["ein", "mädchen", "läuft", "."]),
    ("Девочка бежит, быстро!", ["девочка", "бежит", ",", "быстро", "!"]),
    ("कुत्ता दौड़ता है", ["कुत्ता", "दौड़ता", "है"]),
    ("l'homme d’à côté", ["l'homme", "d’à", "côté"]),
    ("a t-shirt - blue", ["a", "t-shirt", "-", "blue"]),
    ("I ❤️ my dog 👍🏽🇩🇪.", ["i", "❤️", "my", "dog", "👍🏽", "🇩🇪", "."]),
    ("👨‍👩‍👧 می\u200cروند", ["👨‍👩‍👧", "می\u200cروند"]),
    ("", []),
])
def test_words_of_many_languages(text, tokens):
    assert vocab.TOKENIZERS["words"].split(text) == tokens


def test_languages_without_spaces_are_cut_into_characters():
    v = vocab.build(["一只狗在跑", "一只猫"], min_count=1, tokenizer="characters")
    assert v.decode(v.encode("一只狗", 9)) == "一只狗"


def test_file_round_trip_is_readable(tmp_path):
    v = vocab.build(["a dog\tруns ein Mädchen"], min_count=1)
    v.save(tmp_path / "vocabulary.tsv")
    assert vocab.load(tmp_path / "vocabulary.tsv") == v
    lines = (tmp_path / "vocabulary.tsv").read_text("utf-8").splitlines()
    assert lines[1] == "0\t0\t<pad>" and lines[5].split("\t")[0] == "4"
    assert [p.name for p in tmp_path.iterdir()] == ["vocabulary.tsv"]


@pytest.mark.parametrize("spoil, word", [
    (lambda lines: ["nonsense", *lines[1:]], "not a jaxcap vocabulary"),
    (lambda lines: lines[:5] + lines[6:], "line 6"),
    (lambda lines: lines[:-1] + ["6\tx\tdog"], "line 8"),
    (lambda lines: lines[:-1] + [lines[-1].rsplit("\t", 1)[0] + "\ta"], "every word once"),
])
def test_a_damaged_file_names_the_line(tmp_path, spoil, word):
    path = tmp_path / "vocabulary.tsv"
    vocab.build(["a a b b c c"], min_count=2).save(path)
    path.write_text("\n".join(spoil(path.read_text().splitlines())) + "\n")
    with pytest.raises(UserError, match=word):
        vocab.load(path)


def test_no_words_and_no_room_are_errors():
    with pytest.raises(UserError, match="min_count"):
        vocab.build(["a b c"], min_count=4)
    with pytest.raises(UserError, match="no room"):
        vocab.build(CAPTIONS, min_count=1, max_size=4)
    assert len(vocab.build(CAPTIONS, min_count=1, max_size=6)) == 6


def test_pad():
    np.testing.assert_array_equal(vocab.pad([[1, 2], [1, 4, 2]], 4), [[1, 2, 0, 0], [1, 4, 2, 0]])
