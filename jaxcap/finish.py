"""The end of a run: its best checkpoint scored on what the data offers, a table, samples and the report page."""

from pathlib import Path

import numpy as np

from jaxcap import claims, evaluate, explain, features, journal, metrics, parallel, report, runs, vocab, wording
from jaxcap.data import records

SAMPLES = 8  # captions printed
SHOWN = 12  # photos of each kind in the report: best, median, worst
MAPPED = 2  # of each kind with what the captioner looked at


def finish(directory: Path, devices: parallel.Parallel) -> dict[str, dict[str, float]]:
    """Scores the run's best checkpoint on val (and `novel` where there is one), prints and writes what there is to see.

    devices: of this host. Returns the scores of each split.
    """
    run = runs.load(directory)
    configuration = run.config
    train = records.open_split(configuration.data, configuration.data.train)
    train_captions = [c for captions in train.captions for c in captions]
    names = [configuration.data.val, *(name for name in records.splits(configuration.data) if name == "novel")]
    scores, shown = {}, {"samples": []}
    for name in names:
        split = records.open_split(configuration.data, name)
        evaluator = evaluate.Evaluator(configuration, run.captioner, run.vocab, devices, split)
        captions = evaluator.captions(run.params, run.batch_stats, features.find(split, configuration, run.params, run.batch_stats))
        scores[name] = evaluate.full_scores(evaluator, captions, train_captions)
        texts = {image_id: caption.text for image_id, caption in captions.items()}
        photos = metrics.per_photo(texts, evaluator.references)
        if parallel.first():
            evaluate.write_results(directory, name, captions, {**scores[name], "split": name, "step": run.step}, photos)
        if name == configuration.data.val:
            times = wording.times_in_train(texts.values(), train_captions, evaluator.references.tokenize)
            samples = _samples(split, captions, photos, times)
            words = _words(split, texts, train_captions, times, run.vocab)
            shown = {"samples": samples, "words": words, "maps": _maps(run, samples)}
    if not parallel.first():  # it has scored too, so that none waits for another for long
        return scores
    print(evaluate.table(scores))
    print("\n" + "\n".join(f"  {sample.image_id}: {sample.caption}" for sample in shown["samples"][:SAMPLES]))
    page = report.write(directory, title=configuration.name, scores=scores, history=journal.read(directory), **shown)
    print(f"\nrun directory: {directory}\nreport: {page}")
    return scores


def _samples(split: records.Split, captions, photos, times) -> list[report.Sample]:
    """The best, the median and the worst photos by CIDEr, in no order."""
    order = sorted(range(len(split)), key=lambda i: -photos[split.image_ids[i]]["cider"])
    chosen = _spread(order, SHOWN)
    np.random.default_rng(0).shuffle(chosen)
    ids = [split.image_ids[i] for i in chosen]
    return [report.Sample(split.image(i), image_id, captions[image_id].text, captions[image_id].log_prob, split.captions[i],
                          photos[image_id], times[captions[image_id].text]) for i, image_id in zip(chosen, ids)]


def _words(split: records.Split, texts: dict[str, str], train_captions: list[str], times: dict[str, int],
           vocabulary: vocab.Vocab) -> report.Words:
    """What the split's captions are made of; `times` is how often each stands in train."""
    references = dict(zip(split.image_ids, split.captions))
    written = {"captions": texts.values(), "references": (text for several in split.captions for text in several)}
    return report.Words(
        split=split.name, train_captions=len(train_captions),
        familiarity=claims.familiarity(texts, references, train_captions, metrics.tokenizer(vocabulary)),
        colours=claims.colours(texts, references),
        repeated=[(text, photos, times[text]) for text, photos in wording.repeated(texts)],
        lengths={writer: wording.lengths(some, vocabulary) for writer, some in written.items()},
        usage=wording.usage(texts, references, vocabulary))


def _maps(run: runs.Run, samples: list[report.Sample]) -> list[tuple[report.Sample, explain.Explanation]]:
    """What a captioner that attends looked at, for a few of the samples, best first."""
    if not run.captioner.attends:
        return []
    explainer = explain.Explainer(run)
    chosen = _spread(sorted(samples, key=lambda sample: -sample.scores["cider"]), MAPPED)
    return [(sample, explainer.explain(sample.image, sample.caption)) for sample in chosen if sample.caption]


def _spread(items: list, count: int) -> list:
    """The first, the middle and the last `count` of a list; all of a short one."""
    middle = max((len(items) - count) // 2, 0)
    places = range(len(items))
    return [items[i] for i in dict.fromkeys([*places[:count], *places[middle:middle + count], *places[-count:]])]
