"""What the benchmarks run: im2txt's settings, a captioner with random weights, random photos and captions.

Nothing is zero or constant: zeros can be faster than real numbers, and hide results that were never written.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import absent
from jaxcap import captioner as captioners
from jaxcap import config as configs
from jaxcap import optim, resident
from jaxcap import step as steps
from jaxcap.captioner import Captioner
from jaxcap.config import Config
from jaxcap.data import augment
from jaxcap.parallel import Parallel
from jaxcap.step import Batch, TrainState
from jaxcap.vocab import BOS, EOS, SPECIAL

PyTree = Any
IM2TXT = Path(__file__).parents[1] / "configs" / "im2txt.py"
FROZEN, JOINT = 0, 1  # the phases of that page
FEATURE_ROWS = 8192  # of the resident table of the cached step, 64 MiB; Flickr8k has 8,000 photos


@dataclass(frozen=True)
class Settings:
    """The sizes of a workload beside the config. tokens: T, read and asked for in every caption, none of them padding."""

    config: Config
    vocabulary: int = 12_000
    tokens: int = 20


def settings(*, tiny: bool = False, dtype: str = "float32", parallel: str = "shard_map", overrides: Sequence[str] = ()) -> Settings:
    """configs/im2txt.py as it stands, or with `tiny` a miniature that shows that the code runs; and then `overrides`, key=value."""
    small = ["encoder.name=small_cnn", "encoder.size=24", "data.size=32", "decoder.embedding=16", "decoder.hidden=24",
             "batch_size=8"] if tiny else []
    config = configs.load(str(IM2TXT), [f"encoder.dtype={dtype}", f"decoder.dtype={dtype}", f"parallel={parallel}", *small, *overrides])
    return Settings(config, vocabulary=60, tokens=5) if tiny else Settings(config)


def model(of: Settings, seed: int = 0, platform: str | None = None) -> tuple[Captioner, PyTree, PyTree]:
    """A captioner with its random `(params, batch_stats)` on the host; what starts constant gets noise. platform: of `captioner.build`."""
    captioner = captioners.build(of.config, of.vocabulary, platform)
    size = configs.encoder_size(of.config)
    variables = jax.device_get(jax.jit(captioner.init, static_argnums=1)(jax.random.PRNGKey(seed), size))
    random = np.random.default_rng(seed)

    def stir(leaf):
        return leaf + 0.1 * random.standard_normal(leaf.shape, np.float32) if np.ptp(leaf) == 0 else leaf

    return captioner, *jax.tree.map(stir, variables)


def photos(random: np.random.Generator, count: int, size: int) -> np.ndarray:
    """uint8 [count, size, size, 3]."""
    return random.integers(0, 256, (count, size, size, 3), np.uint8)


def features(random: np.random.Generator, count: int, channels: int) -> np.ndarray:
    """float32 [count, 1, channels], not negative, as pooled features are."""
    return np.abs(random.standard_normal((count, 1, channels), np.float32))


def tokens(random: np.random.Generator, of: Settings, batch: int) -> np.ndarray:
    """int32 [batch, T + 1]: BOS, words, EOS."""
    tokens_BT1 = random.integers(len(SPECIAL), of.vocabulary, (batch, of.tokens + 1)).astype(np.int32)
    tokens_BT1[:, 0], tokens_BT1[:, -1] = BOS, EOS
    return tokens_BT1


@dataclass(frozen=True)
class Kind:
    """A kind of step. phase: of configs/im2txt.py. cached: it reads features that were computed before, no photos. together: steps
    a dispatch. captions: of a photo, which it looks at once for all of them."""

    name: str
    phase: int = FROZEN
    cached: bool = False
    train: bool = True
    together: int = 1
    captions: int = 1


KINDS = {kind.name: kind for kind in (
    Kind("cached", cached=True),
    Kind("eval", train=False),
    Kind("frozen"),
    Kind("joint", phase=JOINT),
)}
CACHED_8 = Kind("cached_8", cached=True, together=8)  # as training sends them to an accelerator
FIVE = {kind.name: kind for kind in (Kind("frozen_5", captions=5), Kind("joint_5", phase=JOINT, captions=5))}


class Step:
    """One kind of step on the devices, ready to be called again and again, put together as `jaxcap.train` does it.

    A call takes `kind.together` steps. The state is donated, photos or features are resident on the device, and every call
    sends it other token ids and row numbers; or, with `fed`, nothing is resident and every call sends what comes next of that
    (`benchmarks.real_input`).
    """

    def __init__(self, kind: Kind, of: Settings, captioner: Captioner, params: PyTree, batch_stats: PyTree, batch: int,
                 seed: int = 0, devices: list[jax.Device] | None = None, fed: Iterator[Batch] | None = None):
        config, phase = of.config, of.config.phases[kind.phase]
        self.devices = Parallel(config.parallel, devices)
        self.devices.check_batch(batch, "--batch")
        self._table, self._look, self._batches = None, None, fed
        if fed is None:
            random = np.random.default_rng(seed)
            rows = FEATURE_ROWS if kind.cached else 4 * batch
            table = features(random, rows, captioner.spec.features) if kind.cached else photos(random, rows, config.data.size)
            self._table = self.devices.replicate(resident.table(table, captioner.platform))
            self._batches = _batches(random, of, batch, rows, kind)
        size = configs.encoder_size(config)
        params, batch_stats = self.devices.replicate((params, batch_stats))
        if kind.train:
            optimizer = optim.optimizer(phase.optim, optim.schedule(phase.optim, phase.steps, 1000))
            opt_state = self.devices.replicate(jax.jit(optimizer.init)(optim.split_params(params, phase)[0]))
            whole = TrainState(jnp.int32(0), params, batch_stats, opt_state, jax.random.PRNGKey(seed))
            self._state, self._whole = steps.set_aside(self.devices.replicate(whole), phase, captioner)
            function = steps.train_steps if kind.together > 1 else steps.train_step
            self._function = functools.partial(function, captioner=captioner, phase=phase, optimizer=optimizer,
                                               augment=augment.augmentation(config.augment, size))
            if phase.train == "decoder" and not kind.cached:
                self._look = self.devices.replicate(captioner.folded(params, batch_stats))
            self._wrap = {"in_sharded": (False, True, False, False), "donate": (0,)}
        else:
            self._state = params, self.devices.replicate(captioner.folded(params, batch_stats))
            self._function = functools.partial(steps.eval_step, captioner=captioner,
                                               crop=functools.partial(augment.central_crop, size=size))
            self._wrap = {"in_sharded": (False, False, True, False)}
        self._train, self.together = kind.train, kind.together
        self._step = self.devices.wrap(self._function, **self._wrap)

    def lower(self, platform: str = "", devices: Sequence[jax.Device] = (), resident_rows: int = 0) -> jax.stages.Lowered:
        """The step as it is handed to the compiler; the arguments are those of `trace`."""
        return self.trace(platform, devices, resident_rows).lower(lowering_platforms=(platform,) if platform else None)

    def trace(self, platform: str = "", devices: Sequence[jax.Device] = (), resident_rows: int = 0) -> jax.stages.Traced:
        """The step as it is traced, here or, named "cpu", "cuda" or "tpu", for a platform that need not be here.

        devices: of that platform, which it is compiled for (`benchmarks.absent`), with resident_rows photos or features on each, if
        not as many as here. pmap offers no such look; shard_map's program is the same one.
        """
        wrapped = self._step
        if platform and not devices:
            wrapped = absent.anywhere(self.devices.size).wrap(self._function, **self._wrap)
        elif self.devices.mode != "shard_map" or devices:
            wrapped = Parallel("shard_map", list(devices)).wrap(self._function, **self._wrap)
        batch = next(self._batches)
        self._batches = itertools.chain([batch], self._batches)  # it is still to come
        table = self._table
        if resident_rows:
            table = replace(table, rows=jax.ShapeDtypeStruct((resident_rows, *table.rows.shape[1:]), table.rows.dtype))
        arguments = self._arguments(batch, table)
        if devices or platform:  # what arrays live on here is no matter there
            arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        return wrapped.trace(*arguments)

    def hurry(self) -> None:
        """Compiles the step without a search for the fastest algorithms, most of what compiling takes on GPUs: for a call or two
        whose time is no matter."""
        self._step = self.lower().compile(compiler_options={"xla_gpu_autotune_level": 0})

    def __call__(self) -> PyTree:
        """Dispatches one step, or those that go together, and returns what it reports."""
        arguments = self._arguments(next(self._batches), self._table)
        if self._train:
            self._state, reported = self._step(*arguments)
        else:
            reported = self._step(*arguments)
        self.devices.pace(reported)
        return reported

    @property
    def params(self) -> PyTree:
        """The parameters after the last step."""
        return self.state.params if self._train else self._state[0]

    @property
    def state(self) -> TrainState:
        """The whole training state after the last step, of kinds that train."""
        return self._whole(self._state)

    def loss(self, reported: PyTree) -> float:
        """Nats per token of a step that has been dispatched, the last one of a call."""
        return float(np.ravel(reported.loss)[-1]) if self._train else float(reported[0] / reported[1])

    def _arguments(self, batch: Batch, table: resident.Table | None) -> tuple:
        batch = self.devices.hand(batch)
        return (self._state, batch, table, self._look) if self._train else (*self._state, batch, table)


def _batches(random: np.random.Generator, of: Settings, batch: int, rows: int, kind: Kind) -> Iterator[Batch]:
    def shape(count: int) -> tuple[int, ...]:
        return (count,) if kind.together == 1 else (count, kind.together)

    captions = batch * kind.captions
    drawn = [Batch(tokens_BT1=tokens(random, of, captions * kind.together).reshape(*shape(captions), -1),
                   index_B=random.integers(0, rows, shape(batch)).astype(np.int32)) for _ in range(8)]
    return itertools.cycle(drawn)
