"""What `benchmarks.input` times: every part of the way from a JPEG to the device, by the clock and by processor time.

Packages that read and decode photos are imported where they are used: a machine without them still times its device.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import workload
from jaxcap import config as configs
from jaxcap.config import Config
from jaxcap.data import augment
from jaxcap.parallel import Parallel
from jaxcap.step import Batch
from jaxcap.vocab import Vocab

SIDES, TINY_SIDES = (500, 375), (60, 45)  # of the drawn JPEGs: a common size of Flickr8k's photos
QUALITY, OCTAVES = 90, 8
FEATURES = 2048  # channels of cached features, Inception V3's
FEWEST_CALLS = 3


@dataclass(frozen=True)
class Rate:
    """What some photos took. cpu_s: of this process and its workers, all cores together."""

    photos: int
    wall_s: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        return self.photos / self.wall_s

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of a core for a photo."""
        return 1000 * self.cpu_s / self.photos

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "photos_per_s": self.per_s, "cpu_ms_per_photo": self.cpu_ms}


def cpu_s() -> float:
    """Seconds of processor time that this process and its living workers have used so far (the workers' on Linux only)."""
    ticks = 0
    for worker in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # user and system time
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def rate(call: Callable[[], Any], photos: int, seconds: float) -> Rate:
    """Calls `call`, which is about `photos` photos, again and again for that long; the device may be one call behind."""
    for _ in range(2):
        waiting = jax.block_until_ready(call())
    before, start, done = cpu_s(), time.perf_counter(), 0
    while done < FEWEST_CALLS or time.perf_counter() - start < seconds:
        waiting, last = call(), waiting
        jax.block_until_ready(last)
        done += 1
    jax.block_until_ready(waiting)
    return Rate(done * photos, time.perf_counter() - start, cpu_s() - before)


def draw(random: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of smooth noise, coarse to fine, which takes about as many bytes as a photo."""
    import cv2
    import simplejpeg

    image_HWC = np.full((height, width, 3), 128, np.float32)
    for octave in range(1, OCTAVES + 1):
        noise_HWC = random.standard_normal((3 * 2**octave // 4 + 1, 2**octave + 1, 3), np.float32)
        image_HWC += 60 * 0.85**octave * cv2.resize(noise_HWC, (width, height), interpolation=cv2.INTER_CUBIC)
    return simplejpeg.encode_jpeg(image_HWC.clip(0, 255).astype(np.uint8), QUALITY, colorsubsampling="420")


def prepare(jpegs: Sequence[bytes], data: configs.Data, directory: Path) -> tuple[configs.Data, Rate]:
    """The data set that `jaxcap.prepare` makes in `directory` of these photos, each with five captions of random words."""
    from jaxcap import prepare as command

    source, random = directory / "photos", np.random.default_rng(1)
    source.mkdir()
    with open(directory / "captions.jsonl", "w", encoding="utf-8") as captions:
        for number, jpeg in enumerate(jpegs):
            (source / f"{number}.jpg").write_bytes(jpeg)
            texts = [" ".join(f"word{i}" for i in random.integers(0, 50, random.integers(6, 16))) for _ in range(5)]
            captions.write(json.dumps({"image": f"{number}.jpg", "captions": texts, "split": "train"}) + "\n")
    options = ["folder", "--source", source, "--captions", directory / "captions.jsonl", "--label", "drawn", "--size", data.size,
               "--data-dir", directory / "data"]
    before, start = cpu_s(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        command.main([str(option) for option in options])
    took = Rate(len(jpegs), time.perf_counter() - start, cpu_s() - before)
    return dataclasses.replace(data, name="folder", label="drawn", dir=str(directory / "data"), train="train", val="train"), took


def decoding(jpegs: Sequence[bytes], size: int, seconds: float) -> Rate:
    """Decoding and resizing as `jaxcap.prepare` does it, in one thread."""
    import cv2

    from jaxcap.data import photos

    threads, numbers = cv2.getNumThreads(), itertools.cycle(range(len(jpegs)))
    cv2.setNumThreads(1)
    try:
        return rate(lambda: photos.load(jpegs[next(numbers)], size), 1, seconds)
    finally:
        cv2.setNumThreads(threads)


def reading(split, batch: int, seconds: float) -> Rate:
    """Records of a prepared split, a batch of random ones at a time, in one thread."""
    random = np.random.default_rng(2)
    return rate(lambda: split.images(random.integers(0, len(split), batch)), batch, seconds)


def on_device(config: Config, devices: Parallel, seconds: float) -> Iterator[tuple[str, Rate]]:
    """`(stage, rate)` of what the devices do: photos are sent to them, and distorted there, or cropped."""
    image_BHWC = workload.photos(np.random.default_rng(2), config.batch_size, config.data.size)
    yield "send to the device", rate(lambda: devices.shard(image_BHWC), config.batch_size, seconds)
    distort = devices.wrap(augment.augmentation(config.augment, configs.encoder_size(config)), in_sharded=(False, True),
                           out_sharded=True, typed=False)
    key, there_BHWC = devices.replicate(jax.random.PRNGKey(0)), devices.shard(image_BHWC)
    name = "distort on the device" if config.augment.any() else "crop on the device"
    yield name, rate(lambda: distort(key, there_BHWC), config.batch_size, seconds)


def feeds(config: Config, devices: Parallel, split, words: Vocab, workers: Sequence[int],
          seconds: float) -> Iterator[tuple[str, str, Rate]]:
    """`(kind, where from, rate)` of whole pipelines: batches made by grain as training has them, sent to the devices."""
    from jaxcap.data import pipeline

    examples = pipeline.encode(split, words, config.data.max_words)
    features_NPF = workload.features(np.random.default_rng(3), len(split), FEATURES)
    for kind, where, field, fetch, processes in (
            ("row numbers", "resident data", "index_B", np.asarray, 0),
            ("features", "host memory", "features_BPF", features_NPF.__getitem__, 0),
            *(("photos", f"records, {n} worker{'s' * (n != 1)}", "image_BHWC", split.images, n) for n in workers)):
        batches = pipeline.Batches(examples, batch_size=config.batch_size, seed=0, total=1 << 30, kind=field, fetch=fetch,
                                   buckets=config.data.length_buckets)
        iterator = pipeline.iterate(batches, workers=processes)
        yield kind, where, rate(lambda: devices.shard(Batch(**next(iterator))), config.batch_size, seconds)
        if hasattr(iterator, "close"):  # ends the workers
            iterator.close()


def plain_feeds(config: Config, devices: Parallel, photos: int, seconds: float) -> Iterator[tuple[str, str, Rate]]:
    """The same where grain is not installed: random rows of the host's memory, sent to the devices. It costs less."""
    random, size = np.random.default_rng(3), config.batch_size
    tokens_NT1 = random.integers(0, 100, (photos, config.data.max_words + 2)).astype(np.int32)
    for kind, where, field, table in (
            ("row numbers", "resident data", "index_B", np.arange(photos, dtype=np.int32)),
            ("features", "host memory, no grain", "features_BPF", workload.features(random, photos, FEATURES)),
            ("photos", "host memory, no grain", "image_BHWC", workload.photos(random, photos, config.data.size))):

        def send():
            rows = random.integers(0, photos, size)
            return devices.shard(Batch(**{"tokens_BT1": tokens_NT1[rows], field: table[rows]}))

        yield kind, where, rate(send, size, seconds)
