"""Trains a captioner: `python -m jaxcap.train [configs/x.py] [key=value …]`.

Reads top to bottom: `main` makes or reopens a run directory, `train` goes through the phases, `run_phase` is the loop.
"""

import argparse
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcap import captioner as captioners
from jaxcap import evaluate, features, finish, journal, optim, parallel, reward, runs, vocab, weights
from jaxcap import config as configs
from jaxcap import step as steps
from jaxcap.captioner import Captioner
from jaxcap.checkpoints import Checkpoints
from jaxcap.config import Config
from jaxcap.data import augment, pipeline, records
from jaxcap.errors import UserError, run_command
from jaxcap.step import Batch, TrainState

PyTree = Any
TOGETHER = 8  # steps that an accelerator is sent at once where nothing but row numbers is sent with them
# Where a run, or a phase of it, begins; `save` writes such a position into every checkpoint.
BEGINNING = {"step": 0, "phase": 0, "phase_step": 0, "data": None, "smoothed": None, "words": 0, "together": 0}


@dataclasses.dataclass
class Session:
    """What all phases of a run share."""

    config: Config
    directory: Path
    devices: parallel.Parallel
    captioner: Captioner
    train_split: records.Split
    val_split: records.Split
    examples: pipeline.Examples
    evaluator: evaluate.Evaluator
    keeper: Checkpoints
    journal: journal.Journal
    stop: "StopSignal"


class StopSignal:
    """True once SIGTERM or Ctrl-C arrived; a second one kills at once."""

    def __init__(self):
        self.number = 0

    def __bool__(self) -> bool:
        return bool(self.number)

    @contextmanager
    def listen(self) -> Iterator[None]:
        def note(number, frame):
            if self.number:
                os._exit(128 + number)
            self.number = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(configuration: Config, directory: Path, *, resume: bool = False) -> int:
    """Trains the run in `directory` from its start or, with `resume`, from its newest checkpoint.

    Returns 0, or 128 + the number of the signal that stopped it after a last checkpoint. Raises `UserError` for anything
    that the user can mend: data, weights, batch size, disk, a loss that is not a number.
    """
    devices = parallel.Parallel(configuration.parallel)
    devices.check_batch(configuration.batch_size)
    train_split = records.open_split(configuration.data, configuration.data.train)
    val_split = records.open_split(configuration.data, configuration.data.val)
    begun = runs.load(Path(configuration.start)) if configuration.start and not resume else None
    if resume:
        vocabulary = vocab.load(directory / "vocabulary.tsv")
    elif begun:
        vocabulary = begun.vocab
    else:
        vocabulary = vocab.build((c for captions in train_split.captions for c in captions),
                                 **dataclasses.asdict(configuration.vocabulary))
    examples = pipeline.encode(train_split, vocabulary, configuration.data.max_words)
    captioner = captioners.build(configuration, len(vocabulary))
    state = initial_state(configuration, captioner, devices, begun)
    evaluator = evaluate.Evaluator(configuration, captioner, vocabulary, devices, val_split, configuration.eval_photos)
    if not resume:
        runs.create(directory, configuration, vocabulary)
    keeper = Checkpoints(directory / "checkpoints", configuration.checkpoints)
    position = keeper.position(keeper.steps()[-1]) if resume and keeper.steps() else BEGINNING
    lengths = [phase_steps(phase, examples, configuration.batch_size) for phase in configuration.phases]
    log = journal.Journal(directory, total=sum(lengths), step=position["step"], smoothed=position["smoothed"])
    stop = StopSignal()
    session = Session(configuration, directory, devices, captioner, train_split, val_split, examples, evaluator,
                      keeper, log, stop)
    log.say(introduction(session, vocabulary, state, position["step"]))
    try:
        with stop.listen():
            for number in range(position["phase"], len(configuration.phases)):
                at = position if number == position["phase"] else BEGINNING
                state = run_phase(session, state, number, lengths[number], at)
                if stop:
                    log.say(f"stopped at step {int(state.step)}; continue with: "
                            f"python -m jaxcap.train --resume {directory}")
                    return 128 + stop.number
    finally:
        log.close()
        keeper.close()
    finish.finish(directory, devices)
    return 0


def initial_state(configuration: Config, captioner: Captioner, devices: parallel.Parallel,
                  begun: runs.Run | None = None) -> TrainState:
    """The state before the first step, without an optimizer: the parameters of `begun`, or published encoder weights and
    random ones."""
    key = jax.random.PRNGKey(configuration.seed)
    init = jax.jit(captioner.init, static_argnums=1)
    params, batch_stats = init(key, configs.encoder_size(configuration))
    if begun:
        params, batch_stats = runs.take_over(begun, params, batch_stats)
    elif configuration.encoder.weights and not configuration.start:
        loaded = weights.load(configuration.encoder.weights, captioner.spec,
                              {"params": params["encoder"], "batch_stats": batch_stats})
        params, batch_stats = {**params, "encoder": loaded["params"]}, loaded.get("batch_stats", {})
    return devices.replicate(TrainState(jnp.int32(0), params, batch_stats, (), jax.random.fold_in(key, 1)))


def phase_steps(phase: configs.Phase, examples: pipeline.Examples, batch_size: int) -> int:
    """Optimizer steps of a phase."""
    return phase.steps or max(round(phase.epochs * pipeline.per_epoch(examples, batch_size)), 1)


def steps_per_dispatch(config: Config, devices: parallel.Parallel, phase: configs.Phase, examples: pipeline.Examples, *,
                       resident: bool) -> int:
    """Steps that go to the devices at once. Few data go in fewer, so that most batches still find others of their length."""
    if config.steps_per_dispatch or phase.objective == "reward":
        return max(config.steps_per_dispatch, 1)
    if not resident or devices.platform == "cpu":
        return 1
    buckets = len(config.data.length_buckets) + 1
    return max(min(TOGETHER, pipeline.per_epoch(examples, config.batch_size) // (4 * buckets)), 1)


def run_phase(session: Session, state: TrainState, number: int, total: int, position: dict) -> TrainState:
    """Trains one phase from `position` on and returns the state after it, or after the step at which it was stopped."""
    config, devices, keeper, log = session.config, session.devices, session.keeper, session.journal
    phase = config.phases[number]
    per_epoch = pipeline.per_epoch(session.examples, config.batch_size)
    learning_rate = optim.schedule(phase.optim, total, per_epoch)
    optimizer = optim.optimizer(phase.optim, learning_rate)
    trainable, _ = optim.split_params(state.params, phase)
    state = state._replace(opt_state=devices.replicate(jax.jit(optimizer.init)(trainable)))
    if position["step"]:
        state = keeper.restore(position["step"], like=state)
        if position["phase_step"] >= total:
            return state
    log.phase(f"phase {number + 1}/{len(config.phases)} {phase.name}", new=position["phase_step"] == 0)
    kind, fetch, table, val_features, statistics = feed(session, state, phase)
    if statistics:
        decoder = {**state.params["decoder"], **devices.replicate(statistics)}
        state = state._replace(params={**state.params, "decoder": decoder})
    together = position["together"] or steps_per_dispatch(config, devices, phase, session.examples, resident=table is not None)
    batches = pipeline.Batches(
        session.examples, batch_size=config.batch_size, seed=config.seed * 1000 + number, total=total, kind=kind,
        fetch=fetch, buckets=config.data.length_buckets if phase.objective == "captions" else (),
        views=max(config.augment.views, 1) if val_features is not None else 1, together=together,
        numbered=phase.objective == "reward", host=jax.process_index(), hosts=jax.process_count())
    iterator = pipeline.iterate(batches, workers=config.data.workers if kind == "image_BHWC" else 0)
    if position["data"] is not None:
        iterator.set_state(position["data"])
    distort = augment.augmentation(config.augment, configs.encoder_size(config))
    step_fn = devices.wrap(
        functools.partial(steps.train_steps, captioner=session.captioner, phase=phase, optimizer=optimizer, augment=distort,
                          own=optim.own_words(phase, int(state.step) - position["phase_step"], total)),
        in_sharded=(False, True, False), donate=(0,))
    draw = drawer(session, phase, distort) if phase.objective == "reward" else lambda state, item, table: item
    every = config.checkpoints.every_steps or max(round(config.checkpoints.every_epochs * per_epoch), 1)
    first = int(state.step) - position["phase_step"]  # the run's step at which this phase began
    waiting: list[steps.Metrics] = []

    def report(done: int) -> None:
        # `waiting` are the metrics of the steps up to `done`; reading them waits for the device, so it is one dispatch late.
        read = [jax.tree.map(lambda x: x[i], part) for part in jax.device_get(waiting) for i in range(len(part.loss))]
        waiting.clear()
        check_finite(read, first + done, session)
        log.training(first + done, [float(m.loss) for m in read], epoch=round(done / per_epoch, 4), phase=phase.name,
                     learning_rate=float(learning_rate(done - 1)), grad_norm=float(read[-1].norm),
                     **({"reward": float(np.mean([m.reward for m in read]))} if phase.objective == "reward" else {}))

    done = reported = position["phase_step"]
    for item in iterator:
        state, metrics = step_fn(state, draw(state, devices.shard(Batch(**item)), table), table)
        devices.pace(metrics)
        before, done = done, done + item["tokens_BT1"].shape[1]
        saving = done // every > before // every or done == total or session.stop
        if before // config.log_every > reported // config.log_every:
            report(before)
            reported = before
        waiting.append(metrics)
        if saving:
            report(done)
            reported = done
            save(session, state, done, first, val_features, {"phase": number, "data": iterator.get_state(), "together": together},
                 score=not session.stop)
        if session.stop:
            break
    keeper.wait()
    return state


def drawer(session: Session, phase: configs.Phase, distort: Callable) -> Callable[[TrainState, Batch, Any], Batch]:
    """`steps.draw_step` on the devices, with the references of all training photos: for self-critical training."""
    devices, words = session.devices, session.evaluator.vocab
    encoded = [[words.encode(caption, reward.LONGEST) for caption in captions] for captions in session.train_split.captions]
    references = devices.replicate(reward.references(encoded, words.words))
    step = functools.partial(steps.draw_step, captioner=session.captioner, phase=phase, augment=distort,
                             max_words=session.config.data.max_words)

    def draw_item(state, item, table, references):  # of one batch [B, 1, …], as `train_steps` takes them
        drawn = step(state, jax.tree.map(lambda x: x[:, 0], item), table, references)
        return jax.tree.map(lambda x: x[:, None], drawn)

    draw = devices.wrap(draw_item, in_sharded=(False, True, False, False), out_sharded=True, typed=False)
    return lambda state, item, table: draw(state, item, table, references)


def feed(session: Session, state: TrainState, phase: configs.Phase):
    """What a phase's batches hold beside tokens, and what is known of the features before it begins.

    Returns `(kind, fetch, resident table or None, val features or None, the decoder's feature statistics or {})`.

    A frozen encoder without distortions is run once over both splits, or with `augment.views` several times over the
    training photos; otherwise photos are read. What fits stays on the device, and a batch then holds only row numbers.
    """
    config, devices, split = session.config, session.devices, session.train_split
    val_features, statistics = None, {}
    if phase.train == "decoder" and config.augment.cacheable():
        log = session.journal
        take = functools.partial(features.cached, configuration=config, captioner=session.captioner,
                                 params=state.params, batch_stats=state.batch_stats, parallel=devices,
                                 batch_size=session.evaluator.batch_size)
        array, kind, val_features = take(split, views=max(config.augment.views, 1)), "features_BPF", take(session.val_split)
        log.pause()
        fetch, size = array.__getitem__, array.nbytes
        if config.decoder.standardize and int(state.step) == 0 and not config.start:
            statistics = features.statistics(array)
    else:
        kind, fetch, size = "image_BHWC", split.images, len(split) * config.data.size**2 * 3
        array = None
    resident = config.data.resident
    if resident == "yes" or (resident == "auto" and size <= config.data.resident_gib * 2**30):
        whole = split.images(range(len(split))) if array is None else np.asarray(array)
        return "index_B", np.asarray, devices.replicate(whole), val_features, statistics
    return kind, fetch, None, val_features, statistics


def save(session: Session, state: TrainState, done: int, first: int, val_features: np.ndarray | None, position: dict, *,
         score: bool) -> None:
    """Scores the val split, unless told not to, and writes a checkpoint in the background; `position` goes into it."""
    config, log = session.config, session.journal
    scores = None
    if score and config.eval_during and config.phases[position["phase"]].objective != "words":
        captions = session.evaluator.captions(state.params, state.batch_stats, val_features)
        scores = session.evaluator.scores(captions)
        per_epoch = pipeline.per_epoch(session.examples, config.batch_size)
        log.scores(first + done, round(done / per_epoch, 4), config.data.val, scores)
        shown = " ".join(f"{name} {scores[name]:.2f}" for name in ("bleu4", "cider"))
        log.say(f"step {first + done}: loss {log.smoothed:.3f}, {config.data.val} {shown}  “{next(iter(captions.values())).text}”")
    session.keeper.save(state, {**position, "step": first + done, "phase_step": done, "smoothed": log.smoothed,
                                "words": len(session.evaluator.vocab)}, scores)
    log.pause()


def check_finite(read: list[steps.Metrics], last: int, session: Session) -> None:
    """Raises `UserError` naming the first step, and the parameters, whose loss or gradient is not a finite number."""
    for step, metrics in enumerate(read, start=last - len(read) + 1):
        groups = [name for name, norm in metrics.norms.items() if not math.isfinite(norm)]
        if groups or not math.isfinite(metrics.loss):
            kept = session.keeper.steps()
            where = f"the gradient of {', '.join(groups)}" if groups else "the loss alone"
            raise UserError(
                f"training stopped: at step {step} the loss is {float(metrics.loss):g} and {where} is not finite; "
                + (f"the last good checkpoint is step {kept[-1]}; " if kept else "no checkpoint was written before; ")
                + "lower the learning rate or optim.clip_norm")


def introduction(session: Session, vocabulary: vocab.Vocab, state: TrainState, resumed_at: int) -> str:
    """What is about to happen, in a few lines."""
    config, examples = session.config, session.examples
    count = sum(leaf.size for leaf in jax.tree.leaves((state.params, state.batch_stats)))
    devices = jax.devices()
    dropped = "".join(f", {n} {what}" for n, what in (
        (examples.cut, f"cut at {config.data.max_words} words"), (examples.empty, "empty ones left out"),
        (examples.unknown, "of unknown words only left out")) if n)
    lines = [
        f"{config.name}: {config.encoder.name} + {configs.decoder_name(config)}, {count:,} parameters, "
        f"on {len(devices)} × {devices[0].device_kind}",
        f"{len(session.train_split):,} photos, {len(examples.photo_N):,} captions{dropped}; {len(vocabulary):,} words; "
        f"batch {config.batch_size}",
        f"run directory: {session.directory}",
    ]
    return "\n".join(lines + ([f"resumed at step {resumed_at}"] if resumed_at else []))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxcap.train", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains a captioner, scores it, and writes one run directory that every other command takes.\n"
                    "Without arguments it learns Shapes, a data set that it draws itself, in a few minutes on a laptop.",
        epilog="examples:\n"
               "  python -m jaxcap.train\n"
               "  python -m jaxcap.train configs/flickr8k_lite2.py phases.0.optim.learning_rate=5e-4 seed=1\n"
               "  python -m jaxcap.train --resume runs/shapes-20250101-120000\n"
               "  python -m jaxcap.train --keys        every setting and its default\n\n"
               "Ctrl-C and SIGTERM save a checkpoint and stop (exit status 130, 143); bad input exits with 2.")
    parser.add_argument("config", nargs="?", help="a page of configs/ (default: Shapes)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--run-dir", type=Path, help="where the run is written (default: runs/NAME-DATE-TIME)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run from its newest checkpoint")
    parser.add_argument("--keys", action="store_true", help="list every setting with its value, and stop")
    arguments = parser.parse_intermixed_args(argv)
    path, overrides = configs.page_and_settings([w for w in (arguments.config, *arguments.overrides) if w is not None])
    if arguments.resume and path is None:
        configuration = configs.check(configs.override(runs.read_config(arguments.resume), overrides))
    else:
        configuration = configs.load(path, overrides)
    if arguments.keys:
        for key, value in configs.flat(configuration).items():
            print(f"{key} = {value}")
        return 0

    parallel.initialize()
    directory = arguments.resume or arguments.run_dir or Path("runs") / f"{configuration.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (directory / "config.json").exists():
        before = runs.read_config(directory)
        changed = configs.differences(before, configuration)
        if changed:
            raise UserError(f"the run in {directory} was made with another config: {'; '.join(changed)}; "
                            "resume it without these changes, or name another --run-dir")
        return train(configuration, directory, resume=True)
    if arguments.resume:
        raise UserError(f"there is no run to resume in {directory}")
    return train(configuration, directory)


if __name__ == "__main__":
    run_command(main)
