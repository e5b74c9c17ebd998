"""The announcement of im2txt makes claims about captioners; here they are measurements of a run: docs/CLAIMS.md.

(a) It writes captions that it has read and captions that are new: how many of each, and how good (`familiarity`).
(b) Fine-tuning makes it better at colours: precision and recall of colour words (`colours`).
(c) Fine-tuning with an untrained decoder damages the encoder: what a linear probe can read from its features (`probe`).
"""

import collections
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcap import captioner as captioners
from jaxcap import checkpoints, evaluate, features, inference, metrics, parallel, ptb, runs, session
from jaxcap import config as configs
from jaxcap.data import records
from jaxcap.errors import UserError
from jaxcap.metrics import Tokenize

PyTree = Any
Captions = Mapping[str, str]
References = Mapping[str, Sequence[str]]

# Colours by the words for them: the eleven basic terms of English (Berlin and Kay 1969) and what photos' captions add.
COLOURS = {
    "black": ("black",), "white": ("white",), "red": ("red",), "green": ("green",), "yellow": ("yellow",), "blue": ("blue",),
    "brown": ("brown",), "orange": ("orange",), "pink": ("pink",), "purple": ("purple", "violet"), "gray": ("gray", "grey"),
    "tan": ("tan",), "beige": ("beige",), "blond": ("blond", "blonde"), "gold": ("gold", "golden"), "silver": ("silver",),
    "maroon": ("maroon",), "teal": ("teal",), "turquoise": ("turquoise",),
}  # fmt: skip
_COLOUR_OF = {word: colour for colour, words in COLOURS.items() for word in words}

PROBE_WORDS = 100  # the commonest content words of the captions
PROBE_PHOTOS = 10_000  # of the train split, its first ones, are enough for a linear probe
_RIDGE = 10.0 ** np.arange(-4, 3)  # penalties over the number of photos
_FUNCTION_WORDS = frozenset("""
    a about above across after against all along also among an and another are around as at away be before behind being
    below beneath beside between both but by can do down each for from front has have he her him his in inside into is it
    its itself like more near next no not of off on one onto other out outside over past she side sit sits sitting so some
    someone something stand standing stands than that the their them there they this three through to together toward
    towards two under underneath up very was were what where which while who whose with without""".split())


def familiarity(candidates: Captions, references: References, train_captions: Iterable[str],
                tokenize: Tokenize = ptb.tokenize) -> dict[str, dict | float]:
    """Captions that stand word for word in the training captions ("in_train"), and the others ("new").

    Each has `photos`, `share` (0–1), `cider` (the mean of its photos', document frequencies those of the whole split) and
    `bleu4` (0–100, of this part as a corpus); None where there are no photos. `first_reference_in_train` is the share of the
    photos' first references that stand there: how often a person's caption does. Punctuation and case do not count. Raises
    as `metrics.score` does.
    """
    photos = metrics.per_photo(candidates, metrics.References(references, tokenize))
    seen = set(map(tokenize, train_captions))
    parts = {"in_train": [], "new": []}
    for i in references:
        parts["in_train" if tokenize(candidates[i]) in seen else "new"].append(i)
    found = {}
    for name, ids in parts.items():
        bleu = None
        if ids:
            bleu = metrics.score({i: candidates[i] for i in ids}, metrics.References({i: references[i] for i in ids}, tokenize))["bleu4"]
        found[name] = {"photos": len(ids), "share": len(ids) / len(references), "bleu4": bleu,
                       "cider": statistics.fmean(photos[i]["cider"] for i in ids) if ids else None}
    by_people = [tokenize(texts[0]) in seen for texts in references.values()]
    return {**found, "first_reference_in_train": statistics.fmean(by_people)}


def colours_in(caption: str) -> set[str]:
    """The colours that a caption names, whatever has them; "grey" is "gray", and "black-and-white" is both."""
    return {_COLOUR_OF[word] for word in re.findall(r"[a-z]+", caption.lower()) if word in _COLOUR_OF}


def colours(candidates: Captions, references: References) -> dict[str, Any]:
    """How well captions name colours.

    A colour in a caption is *right* if at least one reference of the photo names it, and *wanted* if more than half of the
    photo's references do. `precision` = right / named, `recall` = wanted ones that are named / wanted, both 0–1 over all photos
    together, `f1` their harmonic mean; None where nothing is named or wanted. `colours` has the counts of each colour, and
    `shuffled_precision` is the precision of the same captions set beside other photos' references: what guessing gives.
    """
    ids = list(references)
    named = {i: colours_in(candidates[i]) for i in ids}
    told = {i: [colours_in(text) for text in references[i]] for i in ids}
    counts = {colour: {"named": 0, "right": 0, "wanted": 0, "found": 0} for colour in COLOURS}
    for i in ids:
        said = collections.Counter(colour for colours in told[i] for colour in colours)
        for colour in named[i]:
            counts[colour]["named"] += 1
            counts[colour]["right"] += colour in said
        for colour, times in said.items():
            if 2 * times > len(told[i]):
                counts[colour]["wanted"] += 1
                counts[colour]["found"] += colour in named[i]
    total = {key: sum(count[key] for count in counts.values()) for key in ("named", "right", "wanted", "found")}
    others = ids[len(ids) // 2:] + ids[:len(ids) // 2]  # not the next photo, which may be of the same scene
    shuffled = sum(len(named[i] & set().union(*told[other])) for i, other in zip(ids, others))
    return {**_measures(total), "shuffled_precision": _ratio(shuffled, total["named"]), **total,
            "colours": {colour: {**_measures(count), **count} for colour, count in counts.items() if any(count.values())}}


def _measures(count: Mapping[str, int]) -> dict[str, float | None]:
    precision, recall = _ratio(count["right"], count["named"]), _ratio(count["found"], count["wanted"])
    both = None if precision is None or recall is None else precision + recall
    f1 = None if both is None else 2 * precision * recall / both if both else 0.0
    return {"precision": precision, "recall": recall, "f1": f1}


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def content_words(captions: Sequence[Sequence[str]], count: int = PROBE_WORDS, tokenize: Tokenize = ptb.tokenize) -> list[str]:
    """The content words that stand in the captions of the most photos, commonest first; ties in alphabetical order."""
    photos = collections.Counter(word for texts in captions for word in _words(texts, tokenize) - _FUNCTION_WORDS
                                 if len(word) > 1 or word.isalpha() and not word.isascii())  # 犬 is a word
    return [word for word, _ in sorted(photos.items(), key=lambda item: (-item[1], item[0]))[:count]]


def probe(train_NF: np.ndarray, train_captions: Sequence[Sequence[str]], val_MF: np.ndarray,
          val_captions: Sequence[Sequence[str]], words: int = PROBE_WORDS, tokenize: Tokenize = ptb.tokenize) -> dict[str, Any]:
    """What a linear map can read from features: the mean average precision (0–1) with which it finds the val photos of a word.

    A word is in a photo if one of its captions has it. For each of the commonest content words of the train captions that are
    in some but not all val photos, ridge regression from standardized features to its presence, in closed form, ranks the val
    photos; average precision is the mean precision at the ranks of those that have it. The penalty is the one of `_RIDGE` with
    the best `map` on the last fifth of the train photos; val is only scored. `chance` is the share of photos that have a word,
    mean over words: what features that say nothing get, or a little more. Raises `UserError` if there are fewer than 10 train
    photos, or no such word.
    """
    if len(train_NF) < 10:
        raise UserError(f"a probe of the encoder needs at least 10 train photos, not {len(train_NF)}")
    chosen = content_words(train_captions, words, tokenize)
    val_MW = _presence(val_captions, chosen, tokenize)
    kept_W = val_MW.any(axis=0) & ~val_MW.all(axis=0)
    chosen, val_MW = [word for word, kept in zip(chosen, kept_W) if kept], val_MW[:, kept_W]
    if not chosen:
        raise UserError("a probe of the encoder needs a content word that some val photos have and others lack")
    train_NW = _presence(train_captions, chosen, tokenize)
    fitted = len(train_NF) * 4 // 5
    held_NW = train_NW[fitted:]
    usable_W = held_NW.any(axis=0)
    ridge = _RIDGE[len(_RIDGE) // 2]
    if usable_W.any():
        tried = _ridge(train_NF[:fitted], train_NW[:fitted], train_NF[fitted:], _RIDGE)
        ridge = max(zip((_average_precision(scores_NW, held_NW)[usable_W].mean() for scores_NW in tried), _RIDGE))[1]
    (scores_MW,) = _ridge(train_NF, train_NW, val_MF, [ridge])
    precision_W = _average_precision(scores_MW, val_MW)
    return {"map": float(precision_W.mean()), "chance": float(val_MW.mean()), "ridge": float(ridge),
            "train_photos": len(train_NF), "val_photos": len(val_MF),
            "words": {word: float(p) for word, p in zip(chosen, precision_W)}}


def _words(texts: Sequence[str], tokenize: Tokenize) -> set[str]:
    return set(word for text in texts for word in tokenize(text).split())


def _presence(captions: Sequence[Sequence[str]], words: Sequence[str], tokenize: Tokenize) -> np.ndarray:
    """bool [photos, words]"""
    present = np.zeros((len(captions), len(words)), bool)
    columns = {word: column for column, word in enumerate(words)}
    for row, texts in zip(present, captions):
        row[[columns[word] for word in _words(texts, tokenize) if word in columns]] = True
    return present


def _ridge(x_NF: np.ndarray, y_NW: np.ndarray, other_MF: np.ndarray, penalties: Iterable[float]) -> list[np.ndarray]:
    """Predictions [M, W] for `other_MF` for each penalty, all from one eigendecomposition of the features' covariance."""
    mean_F, scale_F = x_NF.mean(axis=0, dtype=np.float64), x_NF.std(axis=0, dtype=np.float64)
    scale_F[scale_F <= 1e-6 * max(scale_F.max(), 1e-30)] = np.inf  # a feature that never changes says nothing
    x_NF, other_MF = (x_NF - mean_F) / scale_F, (other_MF - mean_F) / scale_F
    values_F, vectors_FF = np.linalg.eigh(x_NF.T @ x_NF / len(x_NF))
    target_FW = vectors_FF.T @ (x_NF.T @ (y_NW - y_NW.mean(axis=0)) / len(x_NF))
    rotated_MF = other_MF @ vectors_FF
    return [rotated_MF @ (target_FW / (np.maximum(values_F, 0)[:, None] + penalty)) for penalty in penalties]


def _average_precision(scores_MW: np.ndarray, present_MW: np.ndarray) -> np.ndarray:
    """Average precision of every column, 0 where none is present; equal scores rank in the order of the rows."""
    order_MW = np.argsort(-scores_MW, axis=0, kind="stable")
    hit_MW = np.take_along_axis(present_MW, order_MW, axis=0)
    precision_MW = np.cumsum(hit_MW, axis=0) / np.arange(1, len(hit_MW) + 1)[:, None]
    return (precision_MW * hit_MW).sum(axis=0) / np.maximum(hit_MW.sum(axis=0), 1)


# --- of a run ----------------------------------------------------------------------------------------------------


def measure(run: runs.Run, configuration: configs.Config, devices: parallel.Parallel, split: records.Split,
            captions: Captions) -> dict[str, Any]:
    """All three claims for the run's loaded checkpoint, whose captions of `split` are given, as JSON takes them.

    `colours` also has the ends of earlier phases whose checkpoint is still there, and the run that this one went on from if that
    is still there, captioned for that, and `colours_of_first_references` what people do: each photo's first reference beside its
    others. `probe` reads the features of `split` with what the train split teaches, and where the encoder was trained, also those
    of its first weights.
    """
    train_split = records.open_split(configuration.data, configuration.data.train)
    references = dict(zip(split.image_ids, split.captions))
    names = [phase.name for phase in configuration.phases]
    tokenize = metrics.tokenizer(run.vocab)
    now, earlier = _phases(run)
    by_phase = {}
    begun = None
    if configuration.start and (Path(configuration.start) / "config.json").exists():
        begun = runs.load(Path(configuration.start))
        by_phase[f"start, step {begun.step}"] = colours(_captions(begun, configuration, devices, split), references)
    for number, step in earlier.items():
        before = runs.load(run.directory, step=step)
        by_phase[f"{names[number]}, step {step}"] = colours(_captions(before, configuration, devices, split), references)
    by_phase[f"{names[now]}, step {run.step}"] = colours(captions, references)
    several = {i: texts for i, texts in references.items() if len(texts) > 1}
    people = colours({i: texts[0] for i, texts in several.items()}, {i: texts[1:] for i, texts in several.items()})

    def look(params, batch_stats):
        looked = [_pooled(part, configuration, run.captioner, params, batch_stats, devices) for part in (train_split, split)]
        return probe(looked[0], train_split.captions[:len(looked[0])], looked[1], split.captions, tokenize=tokenize)

    probes = {}
    if any(phase.train == "all" for phase in configuration.phases[:now + 1]):
        if begun:
            probes[f"start, step {begun.step}"] = look(begun.params, begun.batch_stats)
        elif not configuration.start:
            first = session.initial_state(configuration, run.captioner, devices)
            kind = "first weights" if configuration.encoder.weights else "first weights (random)"
            probes[kind] = look(first.params, first.batch_stats)
    probes[f"step {run.step}"] = look(run.params, run.batch_stats)
    return {"split": split.name, "step": run.step,
            "familiarity": familiarity(captions, references, (text for texts in train_split.captions for text in texts), tokenize),
            "colours": by_phase, "colours_of_first_references": people, "probe": probes}


def write(directory: Path, name: str, measured: Mapping[str, Any]) -> Path:
    """Writes `results/NAME.claims.json`, beside the captions of that name, and returns its path. Raises `UserError` if that is not possible."""
    path = directory / "results" / f"{name}.claims.json"
    with runs.writing_results(directory):
        path.parent.mkdir(exist_ok=True)
        runs.write_json(path, measured)
    return path


def table(measured: Mapping[str, Any]) -> str:
    """What was measured, for a terminal."""
    known = measured["familiarity"]
    parts = {"in_train": "word for word in train", "new": "new"}
    lines = [["captions", "photos", "share", "BLEU-4", "CIDEr"],
             *([text, str(known[key]["photos"]), _percent(known[key]["share"]), _number(known[key]["bleu4"], 1),
                _number(known[key]["cider"], 3)] for key, text in parts.items()),
             ["first references in train", "", _percent(known["first_reference_in_train"]), "", ""]]
    writers = {**measured["colours"], "first references, beside the others": measured["colours_of_first_references"]}
    several = [["colours", "named", "precision", "shuffled", "wanted", "recall", "F1"],
               *([writer, str(c["named"]), _percent(c["precision"]), _percent(c["shuffled_precision"]), str(c["wanted"]),
                  _percent(c["recall"]), _percent(c["f1"])] for writer, c in writers.items())]
    each = [["colour", "named", "precision", "wanted", "recall"],
            *([colour, str(c["named"]), _percent(c["precision"]), str(c["wanted"]), _percent(c["recall"])]
              for colour, c in list(measured["colours"].values())[-1]["colours"].items())]
    probes = [["linear probe of the encoder", "words", "mAP", "chance"],
              *([name, str(len(p["words"])), _number(p["map"], 3), _number(p["chance"], 3)]
                for name, p in measured["probe"].items())]
    return "\n\n".join(evaluate.aligned(some) for some in (lines, several, each, probes))


def _phases(run: runs.Run) -> tuple[int, dict[int, int]]:
    """The number of the checkpoint's phase, and by number the last steps of earlier ones that can write captions."""
    keeper = checkpoints.Checkpoints(run.directory / "checkpoints", run.config.checkpoints, read_only=True)
    phase_of = {step: keeper.position(step)["phase"] for step in keeper.steps() if step <= run.step}
    keeper.close()
    now = phase_of[run.step]
    last = {number: step for step, number in phase_of.items()}  # steps rise
    return now, {number: step for number, step in last.items()
                 if number < now and run.config.phases[number].objective != "words"}


def _captions(run: runs.Run, configuration: configs.Config, devices: parallel.Parallel, split: records.Split) -> Captions:
    evaluator = evaluate.Evaluator(configuration, run.captioner, run.vocab, devices, split)
    found = evaluator.captions(run.params, run.batch_stats, features.find(split, configuration, run.params, run.batch_stats))
    return {i: caption.text for i, caption in found.items()}


def _pooled(split: records.Split, configuration: configs.Config, captioner: captioners.Captioner, params: PyTree,
            batch_stats: PyTree, devices: parallel.Parallel) -> np.ndarray:
    """Features float32 [N, F], the mean over positions, of a split's first `PROBE_PHOTOS` photos; cached ones are used."""
    found = features.find(split, configuration, params, batch_stats)
    encode = features.encoder(captioner, configs.encoder_size(configuration), devices)
    look = devices.replicate(inference.look(captioner, {"encoder": params["encoder"]}, batch_stats, found))
    size = -(-configuration.eval_batch_size // devices.size) * devices.size
    parts = []
    for rows, real in inference.rows(np.arange(min(len(split), PROBE_PHOTOS)), size):
        features_BPF = encode(look, devices.shard(split.images(rows))) if found is None else found[rows]
        parts.append(np.asarray(features_BPF)[:real].mean(axis=1, dtype=np.float32))
    return np.concatenate(parts)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
