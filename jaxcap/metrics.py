"""Caption scores: BLEU-1..4, CIDEr-D and ROUGE-L equal to coco-caption's, and how new and varied the captions are.

Candidates are `{image_id: caption}`, references `{image_id: [caption, …]}`, both as people write them; `ptb.tokenize`
is applied here. BLEU is on the scale 0–100, ROUGE-L 0–1, CIDEr as coco-caption reports it (10 × the cosine similarity).
"""

import collections
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from sacrebleu.metrics import BLEU

from jaxcap import ptb
from jaxcap.errors import UserError

ORDERS = (1, 2, 3, 4)  # n-grams that BLEU and CIDEr look at
CIDER_SIGMA = 6.0  # words; width of CIDEr-D's penalty on a difference in length (arXiv 1411.5726, equation 4)
ROUGE_BETA = 1.2  # weight of recall over precision in coco-caption's ROUGE-L


class References:
    """The references of one split, tokenized and counted once, so that scoring it again and again is cheap.

    Raises `UserError` if there is no photo or a photo without a reference.
    """

    def __init__(self, captions: Mapping[str, Sequence[str]]):
        if not captions:
            raise UserError("there are no references to score against: the split holds no photo")
        bare = [image_id for image_id, texts in captions.items() if not texts]
        if bare:
            raise UserError(f"{_listed(bare)} without a reference caption: every photo needs at least one")
        self.captions = {image_id: tuple(map(ptb.tokenize, texts)) for image_id, texts in captions.items()}

    @cached_property
    def bleu(self) -> BLEU:
        """sacrebleu with coco-caption's settings and these references' n-grams inside."""
        most = max(map(len, self.captions.values()))
        padded = [list(texts) + [None] * (most - len(texts)) for texts in self.captions.values()]
        return BLEU(tokenize="none", lowercase=False, smooth_method="none", effective_order=False, force=True,
                    references=list(zip(*padded)))

    @cached_property
    def ngrams(self) -> dict[str, list[collections.Counter]]:
        return {image_id: [_ngrams(text) for text in texts] for image_id, texts in self.captions.items()}

    @cached_property
    def idf(self) -> dict[tuple[str, ...], float]:
        """Natural log of (photos / photos one of whose references holds the n-gram), for every n-gram seen."""
        photos_with = collections.Counter(ngram for counts in self.ngrams.values() for ngram in set().union(*counts))
        return {ngram: math.log(len(self.captions) / n) for ngram, n in photos_with.items()}

    @cached_property
    def tfidf(self) -> dict[str, list["_Tfidf"]]:
        return {image_id: [self.vector(count) for count in counts] for image_id, counts in self.ngrams.items()}

    @cached_property
    def masks(self) -> dict[str, list[tuple[int, dict[str, int]]]]:
        """Per reference: its length in words and, for each word, the bits of the places where it stands."""
        return {image_id: [_word_masks(text) for text in texts] for image_id, texts in self.captions.items()}

    def vector(self, ngrams: collections.Counter) -> "_Tfidf":
        """TF-IDF vector of a caption; an n-gram that no reference holds weighs as one that a single photo's hold."""
        unseen = math.log(len(self.captions))
        weights, squares, length = {}, [0.0] * len(ORDERS), 0
        for ngram, count in ngrams.items():
            weight = weights[ngram] = count * self.idf.get(ngram, unseen)
            squares[len(ngram) - 1] += weight * weight
            if len(ngram) == 2:  # coco-caption measures a caption's length in bigrams
                length += count
        return _Tfidf(weights, [math.sqrt(square) for square in squares], length)


class _Tfidf(NamedTuple):
    weights: dict[tuple[str, ...], float]
    norms: list[float]  # one per order
    length: int


def score(candidates: Mapping[str, str], references: References | Mapping[str, Sequence[str]]) -> dict[str, float]:
    """`bleu1`..`bleu4` (0–100), `cider` and `rouge_l` of a split, as coco-caption scores it.

    Raises `UserError` if candidates and references are not of the same photos, or there are none.
    """
    references = _references(references)
    texts = _tokenized(candidates, references)
    total = references.bleu.corpus_score(list(texts.values()), None)
    bleu = {f"bleu{n}": BLEU.compute_bleu(total.counts[:n], total.totals[:n], total.sys_len, total.ref_len,
                                          smooth_method="none", max_ngram_order=n).score for n in ORDERS}
    return bleu | {"cider": statistics.fmean(_cider(texts[i], references, i) for i in texts),
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
    return {i: {"cider": _cider(text, references, i), "rouge_l": _rouge_l(text, references, i),
                "bleu4": sentence.sentence_score(text, references.captions[i]).score} for i, text in texts.items()}


def novelty(candidates: Mapping[str, str], train_captions: Iterable[str]) -> float:
    """Share of candidates (0–1) that stand word for word among the training captions; punctuation and case aside.

    Raises `UserError` if there are no candidates.
    """
    texts = [ptb.tokenize(text) for text in _some(candidates).values()]
    wanted = set(texts)
    seen = wanted.intersection(map(ptb.tokenize, train_captions))
    return sum(text in seen for text in texts) / len(texts)


def variety(candidates: Mapping[str, str]) -> dict[str, float]:
    """`distinct` (share of captions that differ, 0–1), `words` (mean length) and `vocabulary` (different words used).

    Raises `UserError` if there are no candidates.
    """
    texts = [ptb.tokenize(text) for text in _some(candidates).values()]
    words = [text.split() for text in texts]
    return {"distinct": len(set(texts)) / len(texts), "words": statistics.fmean(map(len, words)),
            "vocabulary": len(set().union(*words))}


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
    return {i: ptb.tokenize(candidates[i]) for i in references.captions}


def _some(candidates: Mapping[str, str]) -> Mapping[str, str]:
    if not candidates:
        raise UserError("there are no captions to score: caption at least one photo")
    return candidates


def _listed(ids: Sequence[str]) -> str:
    shown = ", ".join(map(str, ids[:3])) + (", …" if len(ids) > 3 else "")
    return f"{len(ids)} photo{'s' if len(ids) > 1 else ''} ({shown})"


def _ngrams(text: str) -> collections.Counter:
    words = text.split()
    return collections.Counter(tuple(words[i:i + n]) for n in ORDERS for i in range(len(words) - n + 1))


def _cider(text: str, references: References, image_id: str) -> float:
    """CIDEr-D of one tokenized caption (arXiv 1411.5726, section 4): clipped cosine, Gaussian length penalty, × 10."""
    one = references.vector(_ngrams(text))
    total = 0.0
    for other in references.tfidf[image_id]:
        dots = dict.fromkeys(ORDERS, 0.0)
        for ngram, weight in one.weights.items():
            in_other = other.weights.get(ngram, 0.0)
            dots[len(ngram)] += min(weight, in_other) * in_other
        penalty = math.exp(-((one.length - other.length) ** 2) / (2 * CIDER_SIGMA**2))
        total += penalty * sum(dot / (a * b) for dot, a, b in zip(dots.values(), one.norms, other.norms) if a and b)
    return 10 * total / len(ORDERS) / len(references.tfidf[image_id])


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
