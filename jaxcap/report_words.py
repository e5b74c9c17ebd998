"""The report on a split's captions as a whole: read before or new, colour words, lengths, words used and never used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from jaxcap import plots

_UNNAMED = {"blond": "#e6cf8b"}  # the other colours are called in CSS as in `claims.COLOURS`


@dataclass(frozen=True)
class Words:
    """What is known of the captions of a split, measured by `claims` and `wording`.

    repeated: (caption, photos that have it, training captions that are the same).
    lengths: by writer, how many captions have how many words.
    """

    split: str
    train_captions: int
    familiarity: Mapping[str, Any]  # of claims
    colours: Mapping[str, Any]  # of claims
    repeated: Sequence[tuple[str, int, int]]
    lengths: Mapping[str, Mapping[int, int]]
    usage: Mapping[str, Any]  # of wording


def sections(words: Words | None) -> str:
    """All of it; what the captions have nothing of is left out."""
    if words is None:
        return ""
    return f'<div class="pair" id="words">{_novelty(words)}{_colours(words)}</div>{_vocabulary(words)}'


def _novelty(words: Words) -> str:
    known, split = words.familiarity, escape(words.split)
    rows = [[title, f"{part['photos']:,}", _percent(part["share"]), _number(part["cider"], 3), _number(part["bleu4"], 1)]
            for title, part in (("in train", known["in_train"]), ("new", known["new"]))]
    note = (f"In train: word for word one of the {words.train_captions:,} training captions. Of the photos’ first references, "
            f"{_percent(known['first_reference_in_train'])} are.")
    repeated = [[f'<span dir="auto">{escape(text)}</span>', f"{photos:,}", f"{times:,} ×" if times else "new"]
                for text, photos, times in words.repeated]
    again = f'<div class="box scroll">{_table(["Written most often", "photos", "in train"], repeated)}</div>' if repeated else ""
    return (f"<section><h2>Novelty <small>of the captions of {split}</small></h2>"
            f'<div class="box scroll">{_table(["Captions", "photos", "share", "CIDEr", "BLEU-4"], rows)}</div>'
            f'<p class="note">{note}</p>{again}</section>')


def _colours(words: Words) -> str:
    found = words.colours
    if not found["colours"]:
        return ""
    ranked = sorted(found["colours"].items(), key=lambda item: (-item[1]["named"], -item[1]["wanted"], item[0]))
    rows = [[_colour(colour), *_counts(count)] for colour, count in ranked]
    table = _table(["Colour", "written", "right", "wanted", "found"], [*rows, ["all", *_counts(found)]])
    note = ("Right: a reference of the photo names the colour too. Wanted: more than half of the photo’s references name it. "
            f"Found: wanted, and written. Precision is {_percent(found['precision'])} (beside other photos’ references, which is "
            f"what guessing gives, {_percent(found['shuffled_precision'])}), recall {_percent(found['recall'])}.")
    return (f"<section><h2>Colours <small>that the captions of {escape(words.split)} name</small></h2>"
            f'<div class="box scroll">{table}</div><p class="note">{note}</p></section>')


def _colour(colour: str) -> str:
    return f'<span class="colour"><i class="swatch" style="background:{_UNNAMED.get(colour, colour)}"></i>{colour}</span>'


def _counts(count: Mapping[str, Any]) -> list[str]:
    def of(part, whole):
        return f"{count[part]:,} <small>{count[part] / count[whole]:.0%}</small>" if count[whole] else "–"

    return [f"{count['named']:,}", of("right", "named"), f"{count['wanted']:,}", of("found", "wanted")]


def _vocabulary(words: Words) -> str:
    usage = words.usage
    written = [[_word(word), _percent(own), _percent(people)] for word, own, people in usage["written"]]
    unwritten = [[_word(word) + ("" if known else "<small>not in the vocabulary</small>"), _percent(people)]
                 for word, people, known in usage["unwritten"]]
    tables = (_table(["Most written", "captions", "references"], written) if written else "",
              _table(["Never written", "references"], unwritten) if unwritten else "")
    boxes = "".join(f'<div class="box scroll">{table}</div>' for table in tables if table)
    share = f" ({usage['used'] / usage['vocabulary']:.1%})" if usage["vocabulary"] else ""
    means = ", ".join(f"{writer} {plots.mean(counts):.1f}" for writer, counts in words.lengths.items())
    note = (f"The captions use {usage['used']:,}{share} of the vocabulary’s {usage['vocabulary']:,} words; the photos’ first "
            f"references, as many captions, use {usage['used_by_references']:,}. Mean number of words: {means}. Beside a "
            "word stands the share of the captions, or of the references, that have it.")
    chart = plots.histogram("Length", words.lengths, "words")
    return (f"<section><h2>Length and vocabulary <small>of the captions of {escape(words.split)}</small></h2>"
            f'<p class="note">{note}</p><div class="thirds">{chart}{boxes}</div></section>')


def _word(word: str) -> str:
    return f'<span dir="auto">{escape(word)}</span>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f'<th scope="col">{title}</th>' for title in head)
    body = "".join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
                   for first, *rest in rows)
    return f'<table class="figures"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
