"""Caption scores: BLEU-1..4, CIDEr-D and ROUGE-L equal to coco-caption's, and how new and varied the captions are.

Candidates are `{image_id: caption}`, references `{image_id: [caption, …]}`, both as people write them; they are tokenized
here, by `ptb.tokenize` as coco-caption does unless another function is given (`tokenizer`). BLEU is on the scale 0–100,
ROUGE-L 0–1, CIDEr as coco-caption reports it (10 × the cosine similarity), METEOR and SPICE, which need Java, 0–1.
"""

import collections
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import regex
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.bleu import BLEUScore

from jaxcap import java, ptb
from jaxcap.cider import CiderD
from jaxcap.errors import UserError
from jaxcap.vocab import Vocab

ORDERS = (1, 2, 3, 4)  # n-grams that BLEU looks at
ROUGE_BETA = 1.2  # weight of recall over precision in coco-caption's ROUGE-L

Tokenize = Callable[[str], str]  # to tokens joined by single spaces
_PUNCTUATION = regex.compile(r"\p{P}")


def tokenizer(vocabulary: Vocab) -> Tokenize:
    """How captions of a vocabulary are cut for scores: as coco-caption does, or, where its tokens are characters, into those.

    PTB sees one word in a sentence without blanks. Punctuation and case do not count in characters either.
    """
    if vocabulary.tokenizer != "characters":
        return ptb.tokenize
    return lambda text: " ".join(token for token in vocabulary.tokenize(text.lower()) if not _PUNCTUATION.match(token))


class References:
    """The references of one split, tokenized and counted once, so that scoring it again and again is cheap.

    Raises `UserError` if there is no photo or a photo without a reference.
    """

    def __init__(self, captions: Mapping[str, Sequence[str]], tokenize: Tokenize = ptb.tokenize):
        if not captions:
            raise UserError("there are no references to score against: the split holds no photo")
        bare = [image_id for image_id, texts in captions.items() if not texts]
        if bare:
            raise UserError(f"{_listed(bare)} without a reference caption: every photo needs at least one")
        self.tokenize = tokenize
        self.captions = {image_id: tuple(map(tokenize, texts)) for image_id, texts in captions.items()}

    @cached_property
    def bleu(self) -> BLEU:
        """sacrebleu with coco-caption's settings and these references' n-grams inside."""
        most = max(map(len, self.captions.values()))
        padded = [list(texts) + [None] * (most - len(texts)) for texts in self.captions.values()]
        return BLEU(tokenize="none", lowercase=False, smooth_method="none", effective_order=False, force=True,
                    references=list(zip(*padded)))

    @cached_property
    def ids(self) -> dict[str, int]:
        """A number from 1 on for every word."""
        words = dict.fromkeys(word for texts in self.captions.values() for text in texts for word in text.split())
        return {word: i for i, word in enumerate(words, start=1)}

    @cached_property
    def cider(self) -> CiderD:
        """CIDEr-D against these references, over `ids`."""
        return CiderD([[[self.ids[word] for word in text.split()] for text in texts] for texts in self.captions.values()])

    @cached_property
    def masks(self) -> dict[str, list[tuple[int, dict[str, int]]]]:
        """Per reference: its length in words and, for each word, the bits of the places where it stands."""
        return {image_id: [_word_masks(text) for text in texts] for image_id, texts in self.captions.items()}


def score(candidates: Mapping[str, str], references: References | Mapping[str, Sequence[str]]) -> dict[str, float]:
    """`bleu1`..`bleu4` (0–100), `cider` and `rouge_l` of a split, as coco-caption scores it.

    Raises `UserError` if candidates and references are not of the same photos, or there are none.
    """
    references = _references(references)
    texts = _tokenized(candidates, references)
    return _bleu(references.bleu.corpus_score(list(texts.values()), None)) | {
        "cider": statistics.fmean(_cider(texts, references).values()),
        "rouge_l": statistics.fmean(_rouge_l(texts[i], references, i) for i in texts)}


def per_photo(candidates: Mapping[str, str],
              references: References | Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """`cider`, `rouge_l` and `bleu4` of every photo; the first two average to `score`'s.

    A single caption rarely shares four words in a row with a reference, so this BLEU-4 (0–100) is sacrebleu's sentence
    BLEU with exponential smoothing: good for ranking photos, not comparable with `score`'s. Raises as `score` does.
    """
    references = _references(references)
    texts = _tokenized(candidates, references)
    sentence = BLEU(tokenize="none", lowercase=False, smooth_method="exp", effective_order=True, force=True)
    ciders = _cider(texts, references)
    return {i: {"cider": ciders[i], "rouge_l": _rouge_l(text, references, i),
                "bleu4": sentence.sentence_score(text, references.captions[i]).score} for i, text in texts.items()}


def with_java(name: str, candidates: Mapping[str, str],
              references: References | Mapping[str, Sequence[str]]) -> tuple[float, dict[str, float]]:
    """"meteor" or "spice" of a split and of every photo. Raises as `score` and `java.score` do."""
    references = _references(references)
    return java.score(name, _tokenized(candidates, references), references.captions)


def novelty(candidates: Mapping[str, str], train_captions: Iterable[str], tokenize: Tokenize = ptb.tokenize) -> float:
    """Share of candidates (0–1) that stand word for word among the training captions; punctuation and case aside.

    Raises `UserError` if there are no candidates.
    """
    texts = [tokenize(text) for text in _some(candidates).values()]
    wanted = set(texts)
    seen = wanted.intersection(map(tokenize, train_captions))
    return sum(text in seen for text in texts) / len(texts)


def variety(candidates: Mapping[str, str], tokenize: Tokenize = ptb.tokenize) -> dict[str, float]:
    """`distinct` (share of captions that differ, 0–1), `words` (mean length) and `vocabulary` (different words used).

    Raises `UserError` if there are no candidates.
    """
    texts = [tokenize(text) for text in _some(candidates).values()]
    words = [text.split() for text in texts]
    return {"distinct": len(set(texts)) / len(texts), "words": statistics.fmean(map(len, words)),
            "vocabulary": len(set().union(*words))}


def _bleu(total: BLEUScore) -> dict[str, float]:
    """`bleu1`..`bleu4` (0–100) of what was counted, with coco-caption's two small numbers: without a match a score is above 0."""
    tiny, small = 1e-15, 1e-9
    precisions = [(count + tiny) / (guesses + small) for count, guesses in zip(total.counts, total.totals)]
    brevity = math.exp(min(1 - (total.ref_len + small) / (total.sys_len + tiny), 0))
    return {f"bleu{n}": 100 * brevity * math.prod(precisions[:n]) ** (1 / n) for n in ORDERS}


def _references(references) -> References:
    return references if isinstance(references, References) else References(references)


def _tokenized(candidates: Mapping[str, str], references: References) -> dict[str, str]:
    """Tokenized candidates in the references' order, if they are of the same photos."""
    _some(candidates)
    missing = [i for i in references.captions if i not in candidates]
    if missing:
        raise UserError(f"{_listed(missing)} of the references without a caption: caption every photo of the split")
    unknown = [i for i in candidates if i not in references.captions]
    if unknown:
        raise UserError(f"{_listed(unknown)} with a caption but no reference: is this the split that was captioned?")
    return {i: references.tokenize(candidates[i]) for i in references.captions}


def _some(candidates: Mapping[str, str]) -> Mapping[str, str]:
    if not candidates:
        raise UserError("there are no captions to score: caption at least one photo")
    return candidates


def _listed(ids: Sequence[str]) -> str:
    shown = ", ".join(map(str, ids[:3])) + (", …" if len(ids) > 3 else "")
    return f"{len(ids)} photo{'s' if len(ids) > 1 else ''} ({shown})"


def _cider(texts: Mapping[str, str], references: References) -> dict[str, float]:
    """CIDEr-D of tokenized captions, in the references' order as `_tokenized` puts them."""
    ids = collections.defaultdict(lambda: len(ids) + 1, references.ids)  # words that no reference has are words too
    captions = [[ids[word] for word in text.split()] for text in texts.values()]
    return dict(zip(texts, references.cider(captions, range(len(captions))).tolist()))


def _rouge_l(text: str, references: References, image_id: str) -> float:
    """ROUGE-L of one tokenized caption: F-measure of the best precision and the best recall over the references."""
    words = text.split(" ")  # no word at all counts as one empty word, as in coco-caption
    precision = recall = 0.0
    for length, masks in references.masks[image_id]:
        common = _common_subsequence(words, length, masks)
        precision = max(precision, common / len(words))
        recall = max(recall, common / length)
    if not precision:  # then recall is 0 too
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _word_masks(text: str) -> tuple[int, dict[str, int]]:
    words = text.split(" ")
    masks = collections.defaultdict(int)
    for place, word in enumerate(words):
        masks[word] |= 1 << place
    return len(words), dict(masks)


def _common_subsequence(words: Sequence[str], length: int, masks: Mapping[str, int]) -> int:
    """Length of the longest common subsequence, a whole row of the table at a time (Hyyrö 2004, bit-parallel LCS)."""
    row = everything = (1 << length) - 1
    for word in words:
        found = row & masks.get(word, 0)
        row = ((row + found) | (row - found)) & everything
    return length - row.bit_count()
