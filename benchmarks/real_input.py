"""Real input for a timed step: photos that grain reads from records, sent to the devices batch by batch, as training has them.

It is what training does with a split that is too large to stay on the device. Captions are drawn as for synthetic input, as
many tokens of the same vocabulary and none of them padding, so that only what the step looks at comes another way.

Packages that read and decode photos are imported where they are used: a machine without them still times its device.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import feed, workload
from benchmarks.workload import FEATURE_ROWS, Kind, Settings
from jaxcap import config as configs
from jaxcap.errors import UserError
from jaxcap.step import Batch

PHOTOS, TINY_PHOTOS = 128, 24  # that are drawn
CAPTIONS = 5  # a photo
READ_AHEAD = 5  # batches that grain has ready at most in a process: four, and one on its way out of a worker


@dataclass(frozen=True)
class Source:
    """What the steps of one benchmark read. split: of prepared photos, None where no step looks at photos."""

    of: Settings
    split: Any
    directory: Path
    workers: int  # processes that read photos; features are read by threads
    about: dict  # what a result file says of it

    def open(self, kind: Kind, batch: int, channels: int) -> "Feed":
        """Begins to read for a step of `kind`, and waits until it does. channels: F of cached features, which stay in a file."""
        from jaxcap.data import pipeline

        if kind.cached:
            path = self.directory / "features.npy"
            if not path.exists():
                np.save(path, workload.features(np.random.default_rng(2), FEATURE_ROWS, channels))
            features_NPF = np.load(path, mmap_mode="r")
            name, fetch, count, workers = "features_BPF", features_NPF.__getitem__, len(features_NPF), 0
        else:
            name, fetch, count, workers = "image_BHWC", self.split.images, len(self.split), self.workers
        tokens_NCT1 = workload.tokens(np.random.default_rng(3), self.of, count * CAPTIONS).reshape(
            -1, kind.captions, self.of.tokens + 1)
        examples = pipeline.Examples(tokens_NCT1, np.repeat(np.arange(count, dtype=np.int32), CAPTIONS // kind.captions),
                                     np.full(len(tokens_NCT1), self.of.tokens - 1), cut=0, empty=0, unknown=0)
        batches = pipeline.Batches(examples, batch_size=batch, seed=0, total=1 << 30, kind=name, fetch=fetch,
                                   together=kind.together)
        fed = Feed(pipeline.iterate(batches, workers=workers), workers)
        next(fed)  # workers take seconds to start
        return fed


class Feed:
    """An endless iterator of `Batch`es in the host's memory, read ahead by threads or processes until it is closed."""

    def __init__(self, iterator: Any, workers: int):
        self._iterator, self.workers = iterator, workers

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = next(self._iterator)
        alone = item["tokens_BT1"].shape[1] == 1
        return Batch(**{name: array[:, 0] if alone else array for name, array in item.items()})

    def use_up(self) -> None:
        """Drops what was read ahead while nobody took it, so that a slow feed does not look fast for its first steps."""
        for _ in range(READ_AHEAD * max(self.workers, 1)):
            next(self._iterator)

    def close(self) -> None:
        """Ends the workers."""
        if hasattr(self._iterator, "close"):
            self._iterator.close()


@contextlib.contextmanager
def opened(of: Settings, kinds: Sequence[Kind], *, workers: int, page: str = "", tiny: bool = False) -> Iterator[Source]:
    """The real input of steps of `kinds`: photos drawn and prepared in a directory that goes with it, or those of a config page.

    Raises `UserError` where a package is missing, and where the page's data set is not prepared at the size of the benchmark.
    """
    with tempfile.TemporaryDirectory() as directory:
        try:
            from jaxcap.data import pipeline, records  # noqa: F401

            split, about = None, {}
            if any(kind.cached for kind in kinds):
                about["features"] = f"{FEATURE_ROWS:,} random features in a memory-mapped file, read by threads"
            if not all(kind.cached for kind in kinds):
                if page:
                    data = dataclasses.replace(configs.load(page).data, size=of.config.data.size)
                    name = data.name
                else:
                    data, name = drawn(of.config.data, Path(directory), tiny)
                split = records.open_split(data, data.train)
                about["photos"] = f"{len(split):,} photos ({name}) at {data.size} px in records, read by {processes(workers, of)}"
        except ImportError as error:
            name = str(error.name).partition(".")[0]
            raise UserError(f"--input real needs {name}, which is not installed here; install jaxcap with all that it needs: "
                            "pip install .") from error
        yield Source(of, split, Path(directory), workers, about)


def processes(workers: int, of: Settings) -> str:
    usual = of.config.data.workers
    said = "threads" if not workers else "1 process" if workers == 1 else f"{workers} processes"
    return said + (f" (in training {usual} processes)" if workers != usual else "")


def drawn(data: configs.Data, directory: Path, tiny: bool) -> tuple[configs.Data, str]:
    """A data set of drawn JPEGs that `jaxcap.prepare` has prepared in `directory`, and what they are."""
    width, height = feed.TINY_SIDES if tiny else feed.SIDES
    jpegs = [feed.draw(np.random.default_rng(seed), width, height) for seed in range(TINY_PHOTOS if tiny else PHOTOS)]
    prepared, _ = feed.prepare(jpegs, data, directory)
    return prepared, f"drawn JPEGs of {width} × {height}, {np.mean([len(jpeg) for jpeg in jpegs]) / 1000:.0f} kB each"
