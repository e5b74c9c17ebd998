"""What captions are made of: how long they are, which words they use and which never, which are written again and again.

Words are the vocabulary's tokens, so that this holds in every language; punctuation marks do not count.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxcap import ptb
from jaxcap.metrics import Tokenize
from jaxcap.vocab import SPECIAL, Vocab

WORDS_SHOWN = 15  # of the most written ones, and of those that are never written
REPEATED_SHOWN = 5  # captions

Captions = Mapping[str, str]
References = Mapping[str, Sequence[str]]


def lengths(captions: Iterable[str], vocabulary: Vocab) -> collections.Counter[int]:
    """How many captions have how many words."""
    return collections.Counter(len(_words(text, vocabulary)) for text in captions)


def usage(captions: Captions, references: References, vocabulary: Vocab) -> dict[str, Any]:
    """Which words of the vocabulary captions use, beside the references of the same photos.

    `vocabulary` is its number of words, `used` and `used_by_references` those that stand in a caption, or in the first reference
    of a photo: as many captions of each. `written` lists (word, share of captions, share of references) of the words in the
    most captions, `unwritten` (word, share of references, whether the vocabulary has it) of those in the most references and
    in no caption. Shares are 0–1, ties in alphabetical order.
    """
    own = [set(_words(captions[i], vocabulary)) for i in references]
    told = [[set(_words(text, vocabulary)) for text in texts] for texts in references.values()]
    every = [words for texts in told for words in texts]
    known = {word for word in vocabulary.words[len(SPECIAL):] if _is_word(word)}
    written, meant = (collections.Counter(word for words in texts for word in words) for texts in (own, every))
    first = set().union(*(texts[0] for texts in told if texts))
    missed = [(word, n) for word, n in _falling(meant) if word not in written]
    return {"vocabulary": len(known), "used": len(known & set(written)), "used_by_references": len(known & first),
            "written": [(word, n / len(own), meant[word] / len(every)) for word, n in _falling(written)[:WORDS_SHOWN]],
            "unwritten": [(word, n / len(every), word in known) for word, n in missed[:WORDS_SHOWN]]}


def times_in_train(captions: Iterable[str], train_captions: Iterable[str], tokenize: Tokenize = ptb.tokenize) -> dict[str, int]:
    """By caption, how many training captions are the same word for word; punctuation and case do not count."""
    plain = {text: tokenize(text) for text in captions}
    wanted = set(plain.values())
    times = collections.Counter(text for text in map(tokenize, train_captions) if text in wanted)
    return {text: times[words] for text, words in plain.items()}


def repeated(captions: Captions) -> list[tuple[str, int]]:
    """The captions that several photos share, with the number of photos, most first; ties in alphabetical order."""
    return [(text, photos) for text, photos in _falling(collections.Counter(captions.values())) if photos > 1][:REPEATED_SHOWN]


def _words(caption: str, vocabulary: Vocab) -> list[str]:
    return [token for token in vocabulary.tokenize(caption) if _is_word(token)]


def _is_word(token: str) -> bool:
    return any(letter.isalnum() for letter in token)


def _falling(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
