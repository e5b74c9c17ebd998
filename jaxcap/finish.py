"""The end of a run: its best checkpoint scored on what the data offers, a table, samples and the report page."""

from pathlib import Path

import numpy as np

from jaxcap import evaluate, features, journal, metrics, parallel, report, runs
from jaxcap.data import records

SAMPLES = 8  # captions printed
SHOWN = 12  # photos of each kind in the report


def finish(directory: Path, devices: parallel.Parallel) -> dict[str, dict[str, float]]:
    """Scores the run's best checkpoint on val (and `novel` where there is one), prints and writes what there is to see.

    Returns the scores of each split.
    """
    run = runs.load(directory)
    configuration = run.config
    params, batch_stats = devices.replicate((run.params, run.batch_stats))
    train = records.open_split(configuration.data, configuration.data.train)
    train_captions = [c for captions in train.captions for c in captions]
    names = [configuration.data.val, *(name for name in records.splits(configuration.data) if name == "novel")]
    scores, samples = {}, []
    for name in names:
        split = records.open_split(configuration.data, name)
        evaluator = evaluate.Evaluator(configuration, run.captioner, run.vocab, devices, split)
        captions = evaluator.captions(params, batch_stats, features.find(split, configuration, run.params, run.batch_stats))
        scores[name] = evaluate.full_scores(evaluator, captions, train_captions)
        texts = {image_id: caption.text for image_id, caption in captions.items()}
        photos = metrics.per_photo(texts, evaluator.references)
        evaluate.write_results(directory, name, captions, {**scores[name], "split": name, "step": run.step}, photos)
        if name == configuration.data.val:
            samples = _samples(split, captions, photos)
    print(evaluate.table(scores))
    print("\n" + "\n".join(f"  {sample.image_id}: {sample.caption}" for sample in samples[:SAMPLES]))
    page = report.write(directory, title=configuration.name, scores=scores, samples=samples,
                        history=journal.read(directory))
    print(f"\nrun directory: {directory}\nreport: {page}")
    return scores


def _samples(split: records.Split, captions, photos) -> list[report.Sample]:
    """The best, the median and the worst photos by CIDEr."""
    order = sorted(range(len(split)), key=lambda i: -photos[split.image_ids[i]]["cider"])
    middle = max((len(order) - SHOWN) // 2, 0)
    chosen = dict.fromkeys([*order[:SHOWN], *order[middle:middle + SHOWN], *order[-SHOWN:]])
    chosen = list(chosen)
    np.random.default_rng(0).shuffle(chosen)
    ids = [split.image_ids[i] for i in chosen]
    return [report.Sample(split.image(i), image_id, captions[image_id].text, captions[image_id].log_prob,
                          split.captions[i], photos[image_id]) for i, image_id in zip(chosen, ids)]
