"""How captions are searched for or drawn: the part of a config that `caption` and `evaluate` change most."""

import math
from dataclasses import dataclass

from jaxcap.errors import UserError

MOST_BEAM = 1_000
MOST_REQUIRED = 4  # each word that a caption must contain doubles the beams


@dataclass(frozen=True)
class Search:
    """Decoding (im2txt: beam 3, at most 20 words, no length normalization). Unknown words are never written."""

    beam: int = 3  # 1 is greedy; with sample, captions drawn a photo
    max_words: int = 20
    min_words: int = 0  # a caption does not end before so many words
    length_normalization: float = 0.0  # divide a caption's log-probability by length ** this
    coverage: float = 0.0  # how much a caption of an attention model must look at everything in the photo
    no_repeat_ngram: int = 0  # no so many words in a row occur twice in a caption; 0 lets them
    forbidden: tuple[str, ...] = ()  # words that are never written
    must_contain: tuple[str, ...] = ()  # words that every caption contains, at most MOST_REQUIRED
    groups: int = 1  # of diverse beam search: beam // groups captions each
    diversity: float = 0.5  # log-probability that a word costs for every earlier group that wrote it in the same place
    consensus: bool = False  # of the beam's captions the one that the others agree with most, not the likeliest
    sample: bool = False  # draw captions instead of searching for the best
    temperature: float = 1.0  # of the draws: below 1 likely words grow likelier
    top_k: int = 0  # draw only among so many likeliest words; 0 is all
    nucleus: float = 1.0  # draw only among the fewest likeliest words that together are at least so probable
    seed: int = 0  # of the draws


def check(search: Search) -> None:
    """Raises `UserError` for decoding options that contradict each other."""
    for key in ("length_normalization", "coverage", "diversity", "temperature"):
        if not math.isfinite(getattr(search, key)):
            raise UserError(f"search.{key} must be a finite number, not {getattr(search, key)}")
    if search.beam > MOST_BEAM:
        raise UserError(f"search.beam must be at most {MOST_BEAM:,}, not {search.beam}")
    for key in ("min_words", "no_repeat_ngram", "top_k", "length_normalization", "coverage", "diversity"):
        if not getattr(search, key) >= 0:
            raise UserError(f"search.{key} must be at least 0, not {getattr(search, key)}")
    if not 0 < search.nucleus <= 1:
        raise UserError(f"search.nucleus must be above 0 and at most 1, not {search.nucleus}")
    if not 0 <= search.seed < 2**32:
        raise UserError(f"search.seed must be at least 0 and below 2 ** 32, not {search.seed}")
    if not search.temperature >= 1e-6:  # logits divided by less overflow
        raise UserError(f"search.temperature must be at least 0.000001, not {search.temperature}; search.beam=1 takes the likeliest word")
    if search.min_words > search.max_words:
        raise UserError(f"search.min_words={search.min_words} is more than search.max_words={search.max_words}")
    if search.groups < 1 or search.beam % search.groups:
        raise UserError(f"search.beam={search.beam} cannot be divided into search.groups={search.groups}")
    if len(search.must_contain) > min(MOST_REQUIRED, search.max_words):
        raise UserError(f"search.must_contain names {len(search.must_contain)} words; at most "
                        f"{min(MOST_REQUIRED, search.max_words)} are possible")
    if both := {word.lower() for word in search.must_contain} & {word.lower() for word in search.forbidden}:
        raise UserError(f"{min(both)!r} stands both in search.must_contain and in search.forbidden")
    if search.groups > 1 and search.must_contain:
        raise UserError("search.groups and search.must_contain cannot be combined: both divide the beam, each in its way")
    if search.sample and search.coverage:
        raise UserError("search.coverage changes which captions are best, so it cannot be combined with search.sample")
    if search.consensus and search.sample:
        raise UserError("search.consensus ranks what a search found, so it cannot be combined with search.sample")
    if search.sample and (search.groups > 1 or search.must_contain):
        raise UserError("search.sample cannot be combined with search.groups or search.must_contain, which are ways to search")
    drawn = [key for key, off in (("temperature", 1), ("top_k", 0), ("nucleus", 1)) if getattr(search, key) != off]
    if drawn and not search.sample:
        raise UserError(f"search.{drawn[0]} changes how words are drawn, so it needs search.sample=true")
