"""What the steps of a phase are fed: photos, features of a frozen encoder, or row numbers of what stays on the device."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import grain
import jax
import numpy as np

from jaxcap import config as configs
from jaxcap import features, parallel, resident, reward
from jaxcap import step as steps
from jaxcap.config import Config
from jaxcap.data import pipeline
from jaxcap.session import Session
from jaxcap.step import Batch, TrainState

TOGETHER = 8  # steps that an accelerator is sent at once where nothing but row numbers is sent with them


class Feed(NamedTuple):
    """What batches hold beside tokens, and what is known of the features before a phase begins.

    kind: its name in a `Batch`. fetch: rows of the split → it. table: what row numbers point to on the devices.
    look: the frozen encoder that sees photos. views: rows of a photo. val_features: those of the val split. statistics: the
    decoder's constants, where it standardizes.
    """

    kind: str
    fetch: Callable[[np.ndarray], np.ndarray]
    table: resident.Table | None
    look: Callable[[jax.Array], jax.Array] | None
    views: int
    val_features: np.ndarray | None
    statistics: dict[str, np.ndarray]


def prepare(session: Session, state: TrainState, phase: configs.Phase) -> Feed:
    """What `phase` is fed from `state` on.

    A frozen encoder without distortions is run once over both splits, or with `augment.views` several times over the
    training photos; otherwise photos are read. What fits stays on the device, photos for the phases to come too, and a batch then
    holds only row numbers.
    """
    config, devices, split = session.config, session.devices, session.train_split
    array, val_features, statistics, views, look = None, None, {}, 1, None
    if phase.train == "decoder" and config.augment.cacheable():
        session.photos = None
        take = functools.partial(features.cached, configuration=config, captioner=session.captioner,
                                 params=state.params, batch_stats=state.batch_stats, parallel=session.own,
                                 batch_size=session.evaluator.batch_size, stopped=lambda: bool(session.stop))
        views = max(config.augment.views, 1)
        array, val_features = take(split, views=views), take(session.val_split)
        session.journal.pause()
        kind, fetch, size = "features_BPF", array.__getitem__, array.nbytes
        if config.decoder.standardize and int(state.step) == 0 and not config.start:
            statistics = features.statistics(array, config.decoder.deviations)
    else:
        kind, fetch, size = "image_BHWC", split.images, len(split) * config.data.size**2 * 3
        if phase.train == "decoder":
            look = devices.replicate(session.captioner.folded(state.params, state.batch_stats))
    asked, table = config.data.resident, None
    if asked == "yes" or (asked == "auto" and size <= config.data.resident_gib * 2**30):
        place = lambda whole: devices.replicate(resident.table(whole, session.captioner.platform))
        if array is None and session.photos is None:
            session.photos = place(split.images(range(len(split))))
        kind, fetch, table = "index_B", np.asarray, session.photos if array is None else place(np.asarray(array))
    return Feed(kind, fetch, table, look, views, val_features, statistics)


def batches(session: Session, fed: Feed, number: int, total: int, together: int) -> grain.DatasetIterator:
    """The `total` batches of phase `number`, `together` at a time."""
    config = session.config
    objective = config.phases[number].objective
    source = pipeline.Batches(
        session.examples, batch_size=config.batch_size, seed=config.seed * 1000 + number, total=total, kind=fed.kind,
        fetch=fed.fetch, buckets=config.data.length_buckets if objective == "captions" else (), views=fed.views,
        together=together, numbered=objective == "reward", host=jax.process_index(), hosts=jax.process_count())
    return pipeline.iterate(source, workers=config.data.workers if fed.kind == "image_BHWC" else 0)


def steps_per_dispatch(config: Config, devices: parallel.Parallel, phase: configs.Phase, examples: pipeline.Examples, *,
                       resident: bool) -> int:
    """Steps that go to the devices at once. Few data go in fewer, so that most batches still find others of their length."""
    if config.steps_per_dispatch or phase.objective == "reward":
        return max(config.steps_per_dispatch, 1)
    if not resident or devices.platform == "cpu":
        return 1
    buckets = len(config.data.length_buckets) + 1
    return max(min(TOGETHER, pipeline.per_epoch(examples, config.batch_size) // (4 * buckets)), 1)


def drawer(session: Session, fed: Feed, phase: configs.Phase, distort: Callable) -> Callable[[TrainState, Batch], Batch]:
    """`steps.draw_step` on the devices, with the references of all training photos: for self-critical training."""
    devices, words = session.devices, session.evaluator.vocab
    encoded = [[words.encode(caption, reward.LONGEST) for caption in captions] for captions in session.train_split.captions]
    references = devices.replicate(reward.references(encoded, words.words))
    step = functools.partial(steps.draw_step, captioner=session.captioner, phase=phase, augment=distort,
                             max_words=session.config.data.max_words)

    def draw_item(state, item, *rest):  # of one batch [B, 1, …], as `train_steps` takes them
        drawn = step(state, jax.tree.map(lambda x: x[:, 0], item), *rest)
        return jax.tree.map(lambda x: x[:, None], drawn)

    draw = devices.wrap(draw_item, in_sharded=(False, True, False, False, False), out_sharded=True, typed=False)
    return lambda state, item: draw(state, item, fed.table, references, fed.look)
