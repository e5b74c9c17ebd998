"""What all phases of a training run share, and the state that a run begins with."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxcap import config as configs
from jaxcap import evaluate, journal, parallel, runs, weights
from jaxcap.captioner import Captioner
from jaxcap.checkpoints import Checkpoints
from jaxcap.config import Config
from jaxcap.data import pipeline, records
from jaxcap.step import TrainState


@dataclass
class Session:
    """What all phases of a run share.

    devices: all of the run's, over all hosts: they train. own: those of this host, on which each host computes for itself what is
    not a training step, cached features and captions, all alike.
    """

    config: Config
    directory: Path
    devices: parallel.Parallel
    own: parallel.Parallel
    captioner: Captioner
    train_split: records.Split
    val_split: records.Split
    examples: pipeline.Examples
    evaluator: evaluate.Evaluator
    keeper: Checkpoints
    journal: journal.Journal
    stop: "StopSignal"


class StopSignal:
    """True once SIGTERM or Ctrl-C arrived, for a run of several processes once they have agreed; a second one kills at once."""

    def __init__(self):
        self.number = self._heard = 0

    def __bool__(self) -> bool:
        return bool(self.number)

    def agree(self) -> None:
        """Tells the other processes of the run and hears from them; they must all ask at the same step."""
        if jax.process_count() > 1:
            self.number = parallel.largest(self._heard)

    @contextmanager
    def listen(self) -> Iterator[None]:
        def note(number, frame):
            if self._heard:
                os._exit(128 + number)
            self._heard = number
            if jax.process_count() == 1:
                self.number = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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
