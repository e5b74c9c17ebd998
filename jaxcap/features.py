"""Features of a frozen encoder, computed once and kept, beside the data where that can be written, under a key of weights and preprocessing."""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxcap import config as configs
from jaxcap import encoders, progress
from jaxcap.captioner import Captioner
from jaxcap.data.augment import augmentation
from jaxcap.data.records import Split
from jaxcap.errors import Stopped, UserError, free_or
from jaxcap.parallel import Parallel
from jaxcap.step import AXIS

PyTree = Any
_DAMAGE = (OSError, ValueError, tokenize.TokenError)  # what NumPy raises for a file that is not whole


@functools.lru_cache(maxsize=2)  # all splits are seen by the same program, and their distorted views by another
def encoder(captioner: Captioner, size: int, parallel: Parallel,
            augment: configs.Augment = configs.Augment()) -> Callable[..., jax.Array]:
    """A compiled function from the frozen encoder (`Captioner.folded`) and uint8 photos [B, H, W, C] to what the decoder needs of
    their features.

    That is the mean of all positions, float32 [B, 1, F], or for a decoder that attends the whole map, float16 [B, P, F].
    Where `augment` distorts photos the function takes a key too; otherwise it sees the central crop.
    """
    distort = augmentation(augment, size)

    def encode(look, image_BHWC, key):
        seen_BHWC = distort(jax.random.fold_in(key, jax.lax.axis_index(AXIS)), image_BHWC)
        features_BPF = look(seen_BHWC)
        if captioner.attends:
            return features_BPF.astype(jnp.float16)
        return features_BPF.astype(jnp.float32).mean(axis=1, keepdims=True)

    compiled = parallel.wrap(encode, in_sharded=(False, True, False), out_sharded=True, typed=False)
    nothing = jax.random.PRNGKey(0)
    return lambda look, image_BHWC, key=nothing: compiled(look, image_BHWC, key)


def photo_batches(split: Split, batch_size: int, start: int = 0) -> Iterator[tuple[np.ndarray, int]]:
    """`(uint8 [batch_size, H, W, C], number that are real)` in the split's order from `start`, read ahead."""

    class Source:
        def __len__(self):
            return -(-(len(split) - start) // batch_size)

        def __getitem__(self, k):
            first = start + int(k) * batch_size
            rows = np.arange(first, min(first + batch_size, len(split)))
            return split.images(np.resize(rows, batch_size)), len(rows)  # repeated photos fill the last batch

    dataset = grain.MapDataset.source(Source())
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def cache_path(split: Split, configuration: configs.Config, params: PyTree, batch_stats: PyTree, views: int = 1) -> Path:
    """Where features lie, or will: the name changes when weights, preprocessing, arithmetic or photos do.

    They lie beside the photos, or in ~/.cache/jaxcap/features where that place may only be read.
    """
    encoder_config = configuration.encoder
    digest = hashlib.blake2b(digest_size=12)
    digest.update(json.dumps([encoder_config.name, configs.encoder_size(configuration), encoder_config.scaling,
                              encoder_config.dtype, split.fingerprint, _kind(configuration)]).encode())
    if views > 1:
        digest.update(json.dumps(dataclasses.asdict(configuration.augment)).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path((params["encoder"], batch_stats)):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    name = f"{split.name}-{encoder_config.name}-{digest.hexdigest()}.npy"
    beside = split.path / "features" / name
    own = Path("~/.cache/jaxcap/features").expanduser().joinpath(*split.path.parts[-3:], name)  # data set, size, version
    writable = os.access(beside.parent if beside.parent.exists() else split.path, os.W_OK | os.X_OK)
    return next((path for path in (beside, own) if path.exists()), beside if writable else own)


def _kind(configuration: configs.Config) -> str:
    return "map float16" if configuration.decoder.image == "attention" else "pooled"


def find(split: Split, configuration: configs.Config, params: PyTree, batch_stats: PyTree) -> np.ndarray | None:
    """The split's features from the cache, memory-mapped, or None where these weights have not seen it yet. Raises `UserError` as `cached`."""
    path = cache_path(split, configuration, params, batch_stats)
    return _open(path, len(split), configuration) if path.exists() else None


def cached(split: Split, configuration: configs.Config, captioner: Captioner, params: PyTree, batch_stats: PyTree,
           parallel: Parallel, *, batch_size: int, views: int = 1, stopped: Callable[[], bool] = lambda: False) -> np.ndarray:
    """Features of a whole split as `encoder` gives them, from the cache or into it, memory-mapped.

    views: rows of a photo, one after another: itself, then as `configuration.augment` distorts it, anew each time.
    stopped: asked after each batch whether to end; then `Stopped` is raised.
    An interrupted computation goes on where it stopped, or begins anew where what it left is damaged. Raises `UserError` if the
    cache cannot be written, has no room or holds other features.
    """
    path = cache_path(split, configuration, params, batch_stats, views)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.exists():
                _compute(path, split, configuration, captioner, params, batch_stats, parallel, batch_size, views, stopped)
    except OSError as error:
        raise UserError(f"features cannot be cached in {path.parent}: {error.strerror or error}; "
                        f"{free_or('prepare the data where it can be written', error)}") from error
    return _open(path, len(split) * views, configuration)


def _open(path: Path, rows: int, configuration: configs.Config) -> np.ndarray:
    attends = configuration.decoder.image == "attention"
    dtype = np.dtype(np.float16 if attends else np.float32)
    try:
        features_NPF = np.lib.format.open_memmap(path, mode="r")
        shape = (rows, *(features_NPF.shape[1:2] if attends else (1,)), encoders.get(configuration.encoder.name).features)
        if (features_NPF.shape, features_NPF.dtype) != (shape, dtype):
            raise ValueError(f"{features_NPF.dtype} {features_NPF.shape} instead of {dtype} {shape}")
        return features_NPF
    except _DAMAGE as error:
        raise UserError(f"the cached features {path} cannot be read ({error}); delete the file to have them computed again") from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process, of this run or of another, computes the features of `path`."""
    if path.exists():
        yield
        return
    place = path.with_suffix(".lock")
    while True:
        with place.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that computes {path.name}", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place.exists() and os.path.samestat(os.fstat(lock.fileno()), place.stat())):
                continue  # who held it took the file away: the next one may have locked another by now
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
            return


def _compute(path: Path, split: Split, configuration, captioner, params, batch_stats, parallel, batch_size, views, stopped) -> None:
    partial, count = path.with_suffix(".partial"), path.with_suffix(".count")
    size = configs.encoder_size(configuration)
    encode = encoder(captioner, size, parallel)
    distorted = encoder(captioner, size, parallel, configuration.augment)
    look = parallel.replicate(captioner.folded({"encoder": params["encoder"]}, batch_stats))
    empty_BHWC = parallel.shard(np.zeros((batch_size, *split.images([0]).shape[1:]), np.uint8))  # placed as photos are: traced once
    one = jax.eval_shape(encode, look, empty_BHWC)
    shape = (len(split) * views, *one.shape[1:])
    done = _done(partial, count, shape, one.dtype, len(split))
    if not done:  # a count that is left would pass zeros as computed
        for left in (count, partial):
            left.unlink(missing_ok=True)
    needed, free = math.prod(shape) * one.dtype.itemsize, shutil.disk_usage(path.parent).free
    if not done and needed > free:
        raise UserError(f"features of {len(split):,} photos{f' in {views} views' if views > 1 else ''} need {needed >> 20:,} MiB in {path.parent}, "
                        f"where {free >> 20:,} MiB are free; free the disk{' or lower augment.views' if views > 1 else ''}")
    features_NPF = np.lib.format.open_memmap(partial, mode="r+" if done else "w+", dtype=one.dtype, shape=shape)
    try:
        _take_room(partial)
    except OSError:
        if not done:
            partial.unlink()
        raise
    features_NVPF = features_NPF.reshape(len(split), views, *one.shape[1:])

    def write(seen: list[jax.Array], first: int, real: int) -> None:
        for view, features_BPF in enumerate(seen):
            features_NVPF[first:first + real, view] = np.asarray(features_BPF)[:real]
        features_NPF.flush()
        count.write_text(str(first + real))
        bar.update(real)

    pending = None
    with progress.bar(f"features of {split.name}", len(split), initial=done) as bar:
        try:
            for image_BHWC, real in photo_batches(split, batch_size, done):
                image_BHWC = parallel.shard(image_BHWC)
                keys = [jax.random.fold_in(jax.random.PRNGKey(view), done) for view in range(1, views)]
                seen = [encode(look, image_BHWC), *(distorted(look, image_BHWC, key) for key in keys)]
                if pending:  # one batch late, so that the device goes on while the host writes
                    write(*pending)
                pending = seen, done, real
                done += real
                if stopped():
                    raise Stopped
        finally:
            if pending:
                write(*pending)
    os.replace(partial, path)
    count.unlink(missing_ok=True)


def _done(partial: Path, count: Path, shape: tuple[int, ...], dtype: np.dtype, photos: int) -> int:
    """How many photos an interrupted computation has seen: none where what it left does not fit."""
    try:
        done, left_NPF = int(count.read_text()), np.lib.format.open_memmap(partial, mode="r")
    except _DAMAGE:
        return 0
    return done if 0 < done <= photos and (left_NPF.shape, left_NPF.dtype) == (shape, dtype) else 0


def _take_room(path: Path) -> None:
    """Has the disk keep all of the file's blocks: a memory map that finds none for a page is killed without a word (SIGBUS)."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # other errors: a file system that cannot
                raise


def statistics(features_NPF: np.ndarray, deviations: float, part: int = 256) -> dict[str, np.ndarray]:
    """The constants of a decoder that standardizes, from the features of all training photos: mean and 1 / (deviations · σ).

    σ is that of a feature over photos and positions. The sums are taken in float64, `part` photos at a time.
    """
    positions = features_NPF.shape[0] * features_NPF.shape[1]
    total, squares = 0.0, 0.0
    for start in range(0, len(features_NPF), part):
        rows = np.asarray(features_NPF[start:start + part], np.float32).reshape(-1, features_NPF.shape[-1])
        total = total + rows.sum(axis=0, dtype=np.float64)
        squares = squares + np.square(rows).sum(axis=0, dtype=np.float64)
    mean = total / positions
    deviation = np.sqrt(np.maximum(squares / positions - np.square(mean), 0))
    return {"feature_mean": mean.astype(np.float32), "feature_scale": (1 / (deviations * (deviation + 1e-3))).astype(np.float32)}
