"""What all phases of a training run share, and the state that a run begins with."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxcap import config as configs
from jaxcap import evaluate, journal, parallel, resident, runs, weights
from jaxcap.captioner import Captioner
from jaxcap.checkpoints import Checkpoints
from jaxcap.config import Config
from jaxcap.data import pipeline, records
from jaxcap.step import TrainState


@dataclass
class Session:
    """What all phases of a run share.

    devices: all of the run's, over all hosts: they train. own: those of this host, on which each host computes for itself what is
    not a training step, cached features and captions, all alike. photos: the train split's, where they stay on the devices for all
    phases that see them.
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
    photos: resident.Table | None = None


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
                  begun: runs.Run | None = None, *, restored: bool = False) -> TrainState:
    """The state before the first step, without an optimizer: the parameters of `begun`, or published encoder weights and
    random ones. Zeros where a checkpoint will be `restored` over it, which needs no weights then."""
    key = jax.random.PRNGKey(configuration.seed)
    size = configs.encoder_size(configuration)
    params, batch_stats = captioner.shapes(size)
    if restored:
        params, batch_stats = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (params, batch_stats))
    elif begun:
        params, batch_stats = runs.take_over(begun, params, batch_stats)
    elif configuration.encoder.weights:
        loaded = weights.load(configuration.encoder.weights, captioner.spec,
                              {"params": params["encoder"], "batch_stats": batch_stats})
        params = {"encoder": loaded["params"], "decoder": jax.jit(captioner.init_decoder)(key)}
        batch_stats = loaded.get("batch_stats", {})
    else:
        params, batch_stats = jax.jit(captioner.init, static_argnums=1)(key, size)
    return devices.replicate(TrainState(jnp.int32(0), params, batch_stats, (), jax.random.fold_in(key, 1)))
