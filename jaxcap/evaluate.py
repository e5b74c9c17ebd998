"""Scores a run's captions on a split: `python -m jaxcap.evaluate RUN --split val`."""

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxcap import config as configs
from jaxcap import features, inference, metrics, parallel, progress, runs
from jaxcap.captioner import Captioner
from jaxcap.data import records, scenes
from jaxcap.data.records import Split
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
    """

    def __init__(self, configuration: configs.Config, captioner: Captioner, vocab: Vocab,
                 devices: parallel.Parallel, split: Split, limit: int = 0):
        self.config, self.vocab, self.devices, self.split = configuration, vocab, devices, split
        self.count = min(limit, len(split)) or len(split)
        self.references = metrics.References(dict(zip(split.image_ids[:self.count], split.captions)))
        self.batch_size = -(-configuration.eval_batch_size // devices.size) * devices.size
        self._decode = inference.decoder(captioner, configuration.search, configs.encoder_size(configuration), devices)

    def captions(self, params: PyTree, batch_stats: PyTree, features_NPF: np.ndarray | None = None) -> dict[str, Caption]:
        """The best caption of every photo by image id, from its features if they are given, else from the photo."""
        batches = (inference.rows(features_NPF[:self.count], self.batch_size) if features_NPF is not None
                   else features.photo_batches(self.split, self.batch_size))
        best = []
        with progress.bar(f"captions of {self.split.name}", self.count) as bar:
            for found in inference.captions(self._decode, params, batch_stats, self.vocab, self.devices, batches):
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
    return {**evaluator.scores(captions), "in_train": metrics.novelty(texts, train_captions), **metrics.variety(texts)}


def write_results(directory: Path, split: str, captions: dict[str, Caption], scores: dict, photos: dict) -> None:
    """Writes `results/<split>.json` (COCO's result format) and `results/<split>.scores.json` (all and per photo)."""
    results = directory / "results"
    number = int if all(i.isdecimal() for i in captions) else str  # COCO's tools want COCO's ids as numbers
    try:
        results.mkdir(exist_ok=True)
        runs.write_json(results / f"{split}.json",
                        [{"image_id": number(i), "caption": caption.text} for i, caption in captions.items()])
        runs.write_json(results / f"{split}.scores.json", {**scores, "photos": photos})
    except OSError as error:
        raise UserError(f"results cannot be written to {results}: {error.strerror or error}") from error


def table(scores: dict[str, dict[str, float]]) -> str:
    """Scores of splits as lines for a terminal."""
    shown = {"bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4", "cider": "CIDEr",
             "rouge_l": "ROUGE-L", "colours_and_shapes_right": "colours+shapes right", "in_train": "word for word in train"}
    columns = [key for key in shown if any(key in row for row in scores.values())]

    def cell(key, row):
        value = row.get(key)
        if value is None:
            return "–"
        return f"{value:.1f}" if key.startswith("bleu") else f"{value:.3f}" if key in ("cider", "rouge_l") else f"{value:.1%}"

    lines = [["split", *(shown[key] for key in columns)],
             *([name, *(cell(key, row) for key in columns)] for name, row in scores.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths)))
                     for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxcap.evaluate", description="Captions every photo of a split and scores the captions.",
        epilog="Writes RUN/results/SPLIT.json (COCO result format) and RUN/results/SPLIT.scores.json, and prints the scores. "
               "BLEU is coco-caption's to four decimals, on a 0–100 scale. The checkpoint with the best val score is used.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a directory that jaxcap.train made")
    parser.add_argument("--split", default="val", help="split to score (default: val); several joined with '+'")
    parser.add_argument("--beam", type=int, help="beam size instead of the run's; 1 is greedy")
    parser.add_argument("--length-normalization", type=float, help="exponent that divides log-probabilities by length")
    parser.add_argument("--max-words", type=int, help="longest caption")
    parser.add_argument("--step", type=int, help="checkpoint of this step instead of the best one")
    parser.add_argument("--data-dir", help="where prepared data sets are, if not where the run found them")
    parser.add_argument("--batch-size", type=int, help="photos at once")
    arguments = parser.parse_args(argv)

    parallel.initialize()
    run = runs.load(arguments.run, step=arguments.step)
    configuration = configs.change(run.config, {
        "search.beam": arguments.beam, "search.length_normalization": arguments.length_normalization,
        "search.max_words": arguments.max_words, "data.dir": arguments.data_dir,
        "eval_batch_size": arguments.batch_size})
    devices = parallel.Parallel(configuration.parallel)
    split = records.open_split(configuration.data, arguments.split)
    evaluator = Evaluator(configuration, run.captioner, run.vocab, devices, split)
    params, batch_stats = devices.replicate((run.params, run.batch_stats))
    captions = evaluator.captions(params, batch_stats, features.find(split, configuration, run.params, run.batch_stats))
    train = records.open_split(configuration.data, configuration.data.train)
    scores = full_scores(evaluator, captions, (c for cs in train.captions for c in cs))
    scores |= {"split": arguments.split, "photos_scored": len(captions), "step": run.step,
               "search": dataclasses.asdict(configuration.search)}
    texts = {image_id: caption.text for image_id, caption in captions.items()}
    write_results(arguments.run, arguments.split, captions, scores, metrics.per_photo(texts, evaluator.references))
    print(table({arguments.split: scores}))
    print(f"captions and scores: {arguments.run / 'results'}")
    return 0


if __name__ == "__main__":
    run_command(main)
