"""Times the scoring of captions beside pycocoevalcap, on the same tokens: `python -m benchmarks.metrics FILE`."""

import argparse
import collections
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import timing
from benchmarks.timing import short
from jaxcap import metrics, ptb
from jaxcap.errors import UserError, run_command

REFERENCES = 4  # a photo; the caption that is left over, shuffled every other time, is the candidate


def captions(path: Path | None, photos: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Candidates and references by image id, tokenized: real ones of Flickr8k's token file, or drawn at random."""
    random_ = random.Random(0)
    found = collections.defaultdict(list)
    if path is None:
        words = [f"word{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(600)]
        for n in range(photos):
            found[str(n)] = [" ".join(words[int(600 * random_.random() ** 3)] for _ in range(random_.randint(6, 16)))
                             for _ in range(REFERENCES + 1)]
    else:
        try:
            for line in path.read_text("utf-8").splitlines():
                name, caption = line.split("\t")
                found[name.split("#")[0]].append(ptb.tokenize(caption))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no file of lines 'photo.jpg#0<TAB>caption', as Flickr8k.token.txt: {error}") from error
    chosen = [i for i, texts in found.items() if len(texts) == REFERENCES + 1][:photos]
    if not chosen:
        raise UserError(f"{path} has no photo with {REFERENCES + 1} captions")
    candidates = {i: found[i][0] for i in chosen}
    for i in chosen[::2]:
        words = candidates[i].split()
        candidates[i] = " ".join(random_.sample(words, len(words)))
    return candidates, {i: found[i][1:] for i in chosen}


def cpu_s(call: Callable, repeats: int) -> list[float]:
    """Processor seconds of every call: other work on the machine does not count, waiting neither."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return seconds


def peers(candidates: dict, references: dict) -> dict[str, Callable]:
    """pycocoevalcap's scorers, as its own evaluation calls them."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise UserError("pycocoevalcap is not installed: pip install 'jaxcap[metrics]'") from error
    ours = {i: [text] for i, text in candidates.items()}
    bleu, cider, rouge = (lambda: Bleu(4).compute_score(references, ours, verbose=0),
                          lambda: Cider().compute_score(references, ours), lambda: Rouge().compute_score(references, ours))
    return {"BLEU, CIDEr-D, ROUGE-L": lambda: (bleu(), cider(), rouge()), "CIDEr-D": cider}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.metrics",
        description="Captions scored a second of one core's time, ours and pycocoevalcap's, on tokens made before. Ours also "
                    "once the references are counted, as when a run is scored again and again, or rewarded.")
    parser.add_argument("file", nargs="?", type=Path, help="Flickr8k.token.txt; without it, captions of random words")
    parser.add_argument("--photos", type=timing.count, default=1000, help="captions to score (default: 1000)")
    parser.add_argument("--repeats", type=timing.count, default=5, help="timings of each (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    arguments = parser.parse_args(argv)
    candidates, references = captions(arguments.file, arguments.photos)
    file = timing.ResultFile(arguments.json, "metrics")
    print(f"{len(candidates):,} captions, {REFERENCES} references each, {arguments.file or 'random words'}\n"
          f"{timing.describe(file.result['machine'])}", flush=True)
    counted = metrics.References(references)
    reward = counted.cider
    captions_ids = [[counted.ids.get(word, len(counted.ids) + 1) for word in text.split()] for text in candidates.values()]
    metrics.score(candidates, counted)
    calls = {"BLEU, CIDEr-D, ROUGE-L": (lambda: metrics.score(candidates, references),
                                        lambda: metrics.score(candidates, counted)),
             "CIDEr-D": (lambda: metrics.References(references).cider(captions_ids, range(len(captions_ids))),
                         lambda: reward(captions_ids, range(len(captions_ids))))}
    rows = [["scores", "pycocoevalcap, captions/s", "ours", "×", "ours, references counted", "×"]]
    for name, peer in peers(candidates, references).items():
        print(f"  {name} …", file=sys.stderr)
        per_s = [len(candidates) / statistics.median(cpu_s(call, arguments.repeats)) for call in (peer, *calls[name])]
        file.result["results"].append({"scores": name, "captions": len(candidates), "peer_per_s": per_s[0],
                                       "ours_per_s": per_s[1], "ours_counted_per_s": per_s[2]})
        rows.append([name, short(per_s[0]), short(per_s[1]), short(per_s[1] / per_s[0]), short(per_s[2]),
                     short(per_s[2] / per_s[0])])
        file.save(rows)
    print("\n" + timing.table(rows))
    file.save(rows, finished=True)
    return 0


if __name__ == "__main__":
    run_command(main)
