"""Trains a captioner: `python -m jaxcap.train [configs/x.py] [key=value …]`.

Reads top to bottom: `main` makes or reopens a run directory, `train` goes through the phases, `run_phase` is the loop.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import shlex
import time
from pathlib import Path

import jax
import numpy as np

from jaxcap import captioner as captioners
from jaxcap import config as configs
from jaxcap import encoders, errors, evaluate, feed, finish, journal, optim, parallel, runs, vocab
from jaxcap import step as steps
from jaxcap.checkpoints import Checkpoints
from jaxcap.config import Config
from jaxcap.data import augment, pipeline, records
from jaxcap.errors import Stopped, UserError, run_command
from jaxcap.session import Session, StopSignal, initial_state
from jaxcap.step import Batch, TrainState

# Where a run, or a phase of it, begins; `save` writes such a position into every checkpoint.
BEGINNING = {"step": 0, "phase": 0, "phase_step": 0, "data": None, "smoothed": None, "words": 0, "together": 0}


def train(configuration: Config, directory: Path, *, resume: bool = False) -> int:
    """Trains the run in `directory` from its start or, with `resume`, from its newest checkpoint.

    Returns 0, or 128 + the number of the signal that stopped it after a last checkpoint. Raises `UserError` for anything
    that the user can mend: data, weights, batch size, disk, a loss that is not a number.
    """
    devices = parallel.Parallel(configuration.parallel)
    own = parallel.Parallel(configuration.parallel, jax.local_devices()) if jax.process_count() > 1 else devices
    with parallel.all_or_none():
        devices.check_batch(configuration.batch_size)
        encoders.get(configuration.encoder.name)  # this and what follows before a data set is drawn or opened
        position = BEGINNING
        if resume:
            vocabulary = vocab.load(directory / "vocabulary.tsv")
            keeper = Checkpoints(directory / "checkpoints", configuration.checkpoints)
            if keeper.steps():
                position = {**BEGINNING, **keeper.position(keeper.steps()[-1])}
                runs.check_words(directory, vocabulary, position, keeper.steps()[-1])
        begun = runs.load(Path(configuration.start)) if configuration.start and position is BEGINNING else None
        train_split = records.open_split(configuration.data, configuration.data.train)
        val_split = records.open_split(configuration.data, configuration.data.val)
        if begun and not resume:
            vocabulary = begun.vocab
        elif not resume:
            vocabulary = vocab.build((c for captions in train_split.captions for c in captions),
                                     **dataclasses.asdict(configuration.vocabulary))
        examples = pipeline.encode(train_split, vocabulary, configuration.data.max_words, configuration.data.captions_per_photo)
        captioner = captioners.build(configuration, len(vocabulary))
        state = initial_state(configuration, captioner, devices, begun, restored=position["step"] > 0)
        evaluator = evaluate.Evaluator(configuration, captioner, vocabulary, own, val_split, configuration.eval_photos)
        lengths = [phase_steps(phase, examples, configuration.batch_size) for phase in configuration.phases]
    if not resume:
        with parallel.all_or_none():
            if parallel.first():
                runs.create(directory, configuration, vocabulary)
        keeper = Checkpoints(directory / "checkpoints", configuration.checkpoints)
    log = journal.Journal(directory, total=sum(lengths), step=position["step"], smoothed=position["smoothed"])
    stop = StopSignal()
    session = Session(configuration, directory, devices, own, captioner, train_split, val_split, examples, evaluator,
                      keeper, log, stop)
    log.say(introduction(session, vocabulary, state, position["step"]))
    for line in warm_throughout(configuration, lengths):
        log.say(line)
    try:
        with stop.listen():
            for number in range(position["phase"], len(configuration.phases)):
                at = position if number == position["phase"] else BEGINNING
                with contextlib.suppress(Stopped):  # before the phase's first step
                    state = run_phase(session, state, number, lengths[number], at)
                if stop:
                    log.say(f"stopped at step {max(keeper.steps(), default=0)}; continue with: "
                            f"python -m jaxcap.train --resume={shlex.quote(str(directory))}")
                    return 128 + stop.number
    finally:
        log.close()
        keeper.close()
        session.photos = None  # the end of a run sees others
    finish.finish(directory, own)
    return 0


def phase_steps(phase: configs.Phase, examples: pipeline.Examples, batch_size: int) -> int:
    """Optimizer steps of a phase. Raises `UserError` where they cannot be counted."""
    count = phase.steps or max(round(phase.epochs * pipeline.per_epoch(examples, batch_size)), 1)
    if count > configs.MOST_STEPS:
        raise UserError(f"{phase.epochs:g} epochs of these data are {count:,} steps; at most {configs.MOST_STEPS:,} can be counted")
    return count


def run_phase(session: Session, state: TrainState, number: int, total: int, position: dict) -> TrainState:
    """Trains one phase from `position` on and returns the state after it, or after the step at which it was stopped."""
    config, devices, keeper, log = session.config, session.devices, session.keeper, session.journal
    phase = config.phases[number]
    per_epoch = pipeline.per_epoch(session.examples, config.batch_size)
    learning_rate = optim.schedule(phase.optim, total, per_epoch)
    optimizer, rates = optim.optimizer(phase.optim, learning_rate), optim.rates(learning_rate, total)
    trainable, _ = optim.split_params(state.params, phase)
    state = state._replace(opt_state=devices.replicate(jax.jit(optimizer.init)(trainable)))
    if position["step"]:
        state = keeper.restore(position["step"], like=state)
        if position["phase_step"] >= total:
            return state
    log.phase(f"phase {number + 1}/{len(config.phases)} {phase.name}", new=position["phase_step"] == 0)
    fed = feed.prepare(session, state, phase)
    if fed.statistics:
        decoder = {**state.params["decoder"], **devices.replicate(fed.statistics)}
        state = state._replace(params={**state.params, "decoder": decoder})
    together = position["together"] or feed.steps_per_dispatch(
        config, devices, phase, session.examples, resident=fed.table is not None)
    iterator = feed.batches(session, fed, number, total, together)
    if position["data"] is not None:
        iterator.set_state(position["data"])
    distort = augment.augmentation(config.augment, configs.encoder_size(config))
    step_fn = devices.wrap(
        functools.partial(steps.train_steps, captioner=session.captioner, phase=phase, optimizer=optimizer, augment=distort,
                          own=optim.own_words(phase, int(state.step) - position["phase_step"], total)),
        in_sharded=(False, True, False, False), donate=(0,))
    draw = feed.drawer(session, fed, phase, distort) if phase.objective == "reward" else lambda state, item: item
    every = config.checkpoints.every_steps or max(round(config.checkpoints.every_epochs * per_epoch), 1)
    first = int(state.step) - position["phase_step"]  # the run's step at which this phase began
    waiting: list[steps.Metrics] = []

    def report(done: int) -> None:
        # `waiting` are the metrics of the steps up to `done`; reading them waits for the device, so it is one dispatch late.
        read = [jax.tree.map(lambda x: x[i], part) for part in jax.device_get(waiting) for i in range(len(part.loss))]
        waiting.clear()
        check_finite(read, first + done, session)
        log.training(first + done, [float(m.loss) for m in read], epoch=round(done / per_epoch, 4), phase=phase.name,
                     learning_rate=float(rates[done - 1]), grad_norm=float(read[-1].norm),
                     **({"reward": float(np.mean([m.reward for m in read]))} if phase.objective == "reward" else {}))

    done = reported = begun = position["phase_step"]
    part, whole = steps.set_aside(state, phase, session.captioner)
    del state  # where it was packed, what the optimizer keeps would be there twice
    for item in iterator:
        part, metrics = step_fn(part, draw(part, devices.hand(Batch(**item))), fed.table, fed.look)
        if done == begun:
            log.pause()  # reading photos and tracing the step are no step
        devices.pace(metrics)
        before, done = done, done + item["tokens_BT1"].shape[1]
        if before // config.log_every != done // config.log_every:
            session.stop.agree()
        due = done // every > before // every or done == total
        if before // config.log_every > reported // config.log_every:
            report(before)
            reported = before
        waiting.append(metrics)
        if due or session.stop:
            report(done)
            reported = done
            save(session, whole(part), done, first, fed.val_features, {"phase": number, "data": iterator.get_state(), "together": together},
                 score=due)  # one that a stop falls on too, for it would stay without
        if session.stop:
            break
    keeper.wait()
    return whole(part)


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
    each = f" photos × {config.data.captions_per_photo} captions" if config.data.captions_per_photo > 1 else ""
    lines = [
        f"{config.name}: {config.encoder.name} + {configs.decoder_name(config)}, {count:,} parameters, "
        f"on {len(devices)} × {devices[0].device_kind}"
        + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        f"{len(session.train_split):,} photos, {examples.captions:,} captions{dropped}; {len(vocabulary):,} words; "
        f"batch {config.batch_size}{each}",
        f"run directory: {session.directory}",
    ]
    return "\n".join(lines + ([f"resumed at step {resumed_at}"] if resumed_at else []))


def warm_throughout(config: Config, lengths: list[int]) -> list[str]:
    """A line for every phase of so few steps that its learning rate only rises."""
    return [f"beware: phase {phase.name} ends with step {steps:,} of warmup_steps={phase.optim.warmup_steps:,}: its learning rate never "
            f"reaches {phase.optim.learning_rate:g}; set phases.{i}.optim.warmup_steps lower or phases.{i}.{'epochs' if phase.epochs else 'steps'} higher"
            for i, (phase, steps) in enumerate(zip(config.phases, lengths)) if 0 < phase.optim.warmup_steps >= steps]


def located(config: Config) -> dict[str, str]:
    """The settings that name places, as they are named from any directory."""
    named = {"data.dir": config.data.dir, "start": config.start}
    if os.path.exists(config.encoder.weights):
        named["encoder.weights"] = config.encoder.weights
    return {key: os.path.abspath(os.path.expanduser(place)) for key, place in named.items() if place}


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

    if not arguments.resume or path is not None:
        configuration = configs.change(configuration, located(configuration))
    if arguments.resume and arguments.run_dir and arguments.resume.absolute() != arguments.run_dir.absolute():
        raise UserError(f"--resume goes on in {arguments.resume}, so --run-dir {arguments.run_dir} has no meaning; leave one of them out")
    parallel.initialize()
    directory = arguments.resume or arguments.run_dir or Path(parallel.same(
        str(runs.new_directory(f"{configuration.name}-{time.strftime('%Y%m%d-%H%M%S')}")) if parallel.first() else ""))
    errors.require_text(**{"--run-dir": directory, "name": configuration.name, "data.dir": configuration.data.dir})
    there = (directory / "config.json").exists()
    changed = configs.differences(runs.read_config(directory), configuration) if there else []
    changed = [line for line in changed if not line.startswith("data.dir: ")]  # the same data may lie elsewhere now
    begun = any(path.name.isdecimal() for path in directory.glob("checkpoints/*"))
    parallel.largest(0)  # no process writes before all have looked
    if arguments.resume and not there:
        raise UserError(f"there is no run to resume in {directory}")
    if changed and (begun or arguments.resume):  # without a checkpoint, what is changed may be what made it fail
        raise UserError(f"the run in {directory} was made with another config: {'; '.join(changed)}; "
                        "resume it without these changes, or name another --run-dir")
    with contextlib.ExitStack() as held:
        with parallel.all_or_none():
            if parallel.first():
                held.enter_context(runs.alone(directory))
        return train(configuration, directory, resume=there and not changed)


if __name__ == "__main__":
    run_command(main)
