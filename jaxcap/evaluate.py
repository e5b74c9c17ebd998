"""Scores a run's captions on a split: `python -m jaxcap.evaluate RUN --split val`."""

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcap import config as configs
from jaxcap import features, inference, java, metrics, options, parallel, progress, runs, settings
from jaxcap.captioner import Captioner
from jaxcap.data import records, scenes
from jaxcap.data.records import Split
from jaxcap.ensemble import Ensemble
from jaxcap.errors import UserError, run_command
from jaxcap.inference import Caption
from jaxcap.vocab import Vocab

PyTree = Any
SCORES = ("bleu1", "bleu2", "bleu3", "bleu4", "cider", "rouge_l")


class Evaluator:
    """Captions a split and scores the captions, as often as asked; references are tokenized and code compiled once.

    Args:
      split: the photos and their references.
      limit: score only the first so many photos; 0 is all of them.
      others: for an `Ensemble`, config and split of its members after the first. Raises `UserError` where a split holds other
        photos than the first one's.
    """

    def __init__(self, configuration: configs.Config, captioner: Captioner | Ensemble, vocab: Vocab,
                 devices: parallel.Parallel, split: Split, limit: int = 0, others: Sequence[tuple[configs.Config, Split]] = ()):
        self._splits = [split, *(other for _, other in others)]
        for other in self._splits:
            if other.image_ids != split.image_ids:
                raise UserError(f"{other.path} and {split.path} hold different photos in split {split.name}; prepare both from "
                                "the same source")
        sizes = tuple(configs.encoder_size(one) for one in (configuration, *(other for other, _ in others)))
        self.config, self.vocab, self.devices, self.split = configuration, vocab, devices, split
        self.count = min(limit, len(split)) or len(split)
        self.references = metrics.References(dict(zip(split.image_ids[:self.count], split.captions)), metrics.tokenizer(vocab))
        self.batch_size = -(-configuration.eval_batch_size // devices.size) * devices.size
        self._captioner = captioner
        self._decode = inference.decoder(captioner, configuration.search, sizes if others else sizes[0], devices, vocab,
                                         places=self.batch_size)

    def captions(self, params: PyTree, batch_stats: PyTree,
                 features_NPF: np.ndarray | tuple[np.ndarray | None, ...] | None = None) -> dict[str, Caption]:
        """The best caption of every photo by image id, from its features if they are given, else from the photo.

        Parameters and statistics may lie anywhere. For an ensemble all three are tuples with an item a member.
        """
        params, batch_stats = self.devices.replicate((params, batch_stats))
        look = self.devices.replicate(inference.look(self._captioner, params, batch_stats, features_NPF))
        given = features_NPF if isinstance(features_NPF, tuple) else (features_NPF,)
        given = [None if array is None else array[:self.count] for array in given]
        size = inference.in_line(self.batch_size, self.config.search, self.devices, *given)
        batches = [features.photo_batches(split, size) if array is None else inference.rows(array, size)
                   for split, array in zip(self._splits, given, strict=True)]
        batches = inference.together(batches) if len(batches) > 1 else batches[0]
        best = []
        with progress.bar(f"captions of {self.split.name}", self.count) as bar:
            for found in inference.captions(self._decode, params, look, self.vocab, self.devices, batches):
                best.append(found[0])
                bar.update()
                if len(best) == self.count:
                    break
        return dict(zip(self.split.image_ids, best))

    def scores(self, captions: dict[str, Caption]) -> dict[str, float]:
        """BLEU-1..4 (0–100), CIDEr, ROUGE-L; for Shapes also the shares of captions with the right colours and shapes."""
        texts = {image_id: caption.text for image_id, caption in captions.items()}
        scores = metrics.score(texts, self.references)
        if "objects" in self.split.extra:
            right = np.array([scenes.correct(texts[i], json.loads(objects))
                              for i, objects in zip(self.split.image_ids[:self.count], self.split.extra["objects"])])
            names = ("colours_right", "shapes_right", "colours_and_shapes_right")  # the last: every pair as it is
            scores |= dict(zip(names, (float(share) for share in right.mean(axis=0))))
        return scores


def full_scores(evaluator: Evaluator, captions: dict[str, Caption], train_captions: Iterable[str]) -> dict[str, float]:
    """`Evaluator.scores`, and how much of the captions stands word for word in the training captions, and variety."""
    texts = {image_id: caption.text for image_id, caption in captions.items()}
    tokenize = evaluator.references.tokenize
    return {**evaluator.scores(captions), "in_train": metrics.novelty(texts, train_captions, tokenize), **metrics.variety(texts, tokenize)}


def write_results(directory: Path, name: str, captions: dict[str, Caption], scores: dict, photos: dict) -> None:
    """Writes `results/<name>.json` (COCO's result format) and `results/<name>.scores.json` (all and per photo)."""
    results = directory / "results"
    number = int if all(i.isdecimal() for i in captions) else str  # COCO's tools want COCO's ids as numbers
    with runs.writing_results(directory):
        results.mkdir(exist_ok=True)
        runs.write_json(results / f"{name}.json",
                        [{"image_id": number(i), "caption": caption.text} for i, caption in captions.items()])
        runs.write_json(results / f"{name}.scores.json", {**scores, "photos": photos})


def results_name(run: Path, split: str, others: Sequence[Path], changed: Sequence[str], search: dict) -> str:
    """SPLIT+RUN2+RUN3.CHANGED, the split, the last parts of the other runs' paths and what is not as the run's own settings are
    (`options.changed`); numbered where other runs or other words of `search` left results under that name."""
    first = name = ".".join(filter(None, ("+".join([split, *(other.resolve().name for other in others)]), "-".join(changed))))
    number = 1
    while True:
        try:
            there = json.loads((run / "results" / f"{name}.scores.json").read_text("utf-8"))
            same = [Path(other).resolve() for other in there["with"]] == [other.resolve() for other in others]
            if same and (not changed or there["search"] == search):
                return name
        except (OSError, ValueError, LookupError, TypeError):
            return name
        number += 1
        name = f"{first}-{number}"


def table(scores: dict[str, dict[str, float]]) -> str:
    """Scores of splits as lines for a terminal."""
    shown = {"bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4", "cider": "CIDEr",
             "rouge_l": "ROUGE-L", "meteor": "METEOR", "spice": "SPICE", "colours_and_shapes_right": "colours+shapes right",
             "in_train": "word for word in train"}
    columns = [key for key in shown if any(key in row for row in scores.values())]

    def cell(key, row):
        value = row.get(key)
        if value is None:
            return "–"
        unit = key in ("cider", "rouge_l", "meteor", "spice")
        return f"{value:.1f}" if key.startswith("bleu") else f"{value:.3f}" if unit else f"{value:.1%}"

    lines = [["split", *(shown[key] for key in columns)],
             *([name, *(cell(key, row) for key in columns)] for name, row in scores.items())]
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths)))
                     for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxcap.evaluate", description="Captions every photo of a split and scores the captions.",
        epilog="Writes RUN/results/SPLIT.json (COCO result format) and RUN/results/SPLIT.scores.json, and prints the scores; "
               "runs that write together leave theirs with the first one, as results/SPLIT+RUN2+RUN3.json, and other settings "
               "than the run's own have names of their own, as results/SPLIT.beam10-consensus.json. "
               "BLEU is coco-caption's to 1e-6, on a 0–100 scale; captions of a run with vocabulary.tokenizer=characters are "
               "scored by characters.")
    options.add(parser)
    parser.add_argument("--split", default="val", help="split to score (default: val); several joined with '+'")
    parser.add_argument("--data-dir", help="where prepared data sets are, if not where the run found them")
    parser.add_argument("--batch-size", type=int, help="photos at once")
    parser.add_argument("--metrics", nargs="+", default=[], choices=(*java.NAMES, "all"), metavar="NAME",
                        help="also meteor, spice, or all: they need Java and pycocoevalcap (pip install 'jaxcap[metrics]')")
    parser.add_argument("--claims", action="store_true",
                        help="also measure what im2txt's announcement claims: captions read before and new ones, colour words, "
                             "what the encoder's features tell; writes RUN/results/SPLIT.claims.json (docs/CLAIMS.md)")
    arguments = parser.parse_args(argv)

    with_java = java.NAMES if "all" in arguments.metrics else tuple(dict.fromkeys(arguments.metrics))
    java.check(with_java)
    parallel.initialize()
    parallel.one_host()
    run = options.load(arguments)
    runs.try_results(arguments.run)  # before a whole split is captioned
    if arguments.claims and run.joined:
        raise UserError("--claims measures one run, so it cannot be combined with --with")
    configuration = configs.change(options.search(run.config, arguments), {
        "data.dir": arguments.data_dir, "eval_batch_size": arguments.batch_size})
    devices = parallel.Parallel(configuration.parallel)
    # Every member sees the same photos, as its own run stores them.
    split, *others = [
        records.open_split(dataclasses.replace(configuration.data, size=member.config.data.size), arguments.split)
        for member in run.members]
    evaluator = Evaluator(configuration, run.captioner, run.vocab, devices, split,
                          others=[(member.config, other) for member, other in zip(run.members[1:], others)])
    captions = evaluator.captions(run.params, run.batch_stats, run.pack([
        features.find(seen, member.config, member.params, member.batch_stats)
        for member, seen in zip(run.members, (split, *others))]))
    train = records.open_split(configuration.data, configuration.data.train)
    scores = full_scores(evaluator, captions, (c for cs in train.captions for c in cs))
    scores |= {"split": arguments.split, "photos_scored": len(captions), "step": run.step, "average": arguments.average,
               "with": list(map(str, arguments.others)), "search": dataclasses.asdict(configuration.search)}
    texts = {image_id: caption.text for image_id, caption in captions.items()}
    photos = metrics.per_photo(texts, evaluator.references)
    for name in with_java:
        scores[name], by_photo = metrics.with_java(name, texts, evaluator.references)
        for image_id, value in by_photo.items():
            photos[image_id][name] = value
    name = results_name(arguments.run, arguments.split, arguments.others,
                        options.changed(arguments, run.config.search, configuration.search), settings.to_dict(configuration.search))
    print(table({name: scores}), flush=True)
    write_results(arguments.run, name, captions, scores, photos)
    print(f"captions and scores: {arguments.run / 'results' / name}.json and .scores.json")
    if arguments.claims:
        from jaxcap import claims  # it knows training, which knows this module

        measured = claims.measure(run, configuration, devices, split, texts)
        path = claims.write(arguments.run, name, measured)
        print(f"\n{claims.table(measured)}\nclaims: {path}")
    return 0


if __name__ == "__main__":
    run_command(main)
