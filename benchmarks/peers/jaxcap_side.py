"""jaxcap's side: the step of `benchmarks.step_time` and what another library needs to take the same one.

Parameters, photos, features and captions go to the other side as .npz files in the directory that both are given.
"""

import dataclasses
import functools
import itertools
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from benchmarks import timing, workload
from benchmarks.peers.forms import BEAM
from benchmarks.workload import CACHED_8, KINDS
from jaxcap import captioner as captioners
from jaxcap import config as configs
from jaxcap import inference, search
from jaxcap.encoders import EncoderSpec
from jaxcap.encoders.inception import Conv, Fork, Inception, MaxPool, Mixed, Step, preprocess
from jaxcap.parallel import Parallel
from jaxcap.vocab import BOS, EOS, PAD, UNK

BATCHES = 8  # of captions and row numbers, which `workload.Step` goes round in
TINY = EncoderSpec("tiny", functools.partial(Inception, (  # --tiny: a few channels, but every kind of layer of Inception V3
    Conv(4, 3, 3, 2, "VALID"), Conv(6, 3, 3), MaxPool(padding="VALID"),
    Mixed(((Conv(4),), (Conv(4), Conv(6, 1, 7), Conv(6, 7, 1))), 4),
    Mixed(((Conv(6), Conv(6, 3, 3)), (Conv(4), Conv(4, 3, 3))), stride=2, padding="VALID"),
    Mixed(((Conv(4),), (Conv(6), Fork(6)), (Conv(4), Conv(6, 3, 3), Fork(6))), 4),
)), image_size=31, features=32, preprocess=preprocess)


class Served(workload.Step):
    """The benchmarks' step, which also tells what it reads."""

    def inputs(self) -> dict[str, np.ndarray]:
        """table: photos [N, H, W, C] or features [N, 1, F]; tokens_NBT1 and index_NB of every batch that it goes round in."""
        batches = [next(self._batches) for _ in range(BATCHES)]  # once round: the next is the first again
        return {"table": np.asarray(self._table[jnp.arange(len(self._table.rows))]), "tokens_NBT1": np.stack([b.tokens_BT1 for b in batches]),
                "index_NB": np.stack([b.index_B for b in batches])}


class Searched:
    """Captions from features by beam search, one batch after the other, as `benchmarks.decode` times them."""

    together = 1

    def __init__(self, of: workload.Settings, captioner: captioners.Captioner, params, batch_stats, batch: int):
        devices = Parallel(of.config.parallel, jax.local_devices()[:1])
        random = np.random.default_rng(0)
        self._features = [workload.features(random, batch, captioner.spec.features) for _ in range(2)]
        self._drawn, self._shard = itertools.cycle(self._features), devices.shard
        self._params = devices.replicate(params)
        self._decode = inference.decoder(captioner, of.config.search, configs.encoder_size(of.config), devices)

    def inputs(self) -> dict[str, np.ndarray]:
        """features_NBF of the batches that it goes round in."""
        return {"features_NBF": np.stack(self._features)[:, :, 0]}

    def __call__(self) -> search.Captions:
        return self._decode(self._params, None, self._shard(next(self._drawn)))


class Side:
    """Answers to what `__main__` asks, each a JSON object."""

    def __init__(self, directory: Path):
        self._directory, self._step = directory, None

    def hello(self) -> dict:
        timing.initialize()
        return {"version": jax.__version__, "platform": jax.devices()[0].platform}

    def settings(self, *, tiny: bool, dtype: str) -> dict:
        """Builds the captioner, and leaves its parameters and its description for the other side."""
        self._of = workload.settings(tiny=tiny, dtype=dtype)
        if tiny:
            sizes = {"encoder.size": TINY.image_size, "data.size": TINY.image_size + 5}
            self._of = dataclasses.replace(self._of, config=configs.change(self._of.config, sizes))
        self._model = _tiny_model(self._of) if tiny else workload.model(self._of)
        captioner, config = self._model[0], self._of.config
        arrays = {f"{name}/{path}": leaf for name, tree in zip(("params", "batch_stats"), self._model[1:], strict=True)
                  for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
        np.savez(self._directory / "model.npz", **arrays)
        optims = {name: config.phases[kind.phase].optim for name, kind in KINDS.items()}
        (self._directory / "model.json").write_text(json.dumps({
            "network": [described(step) for step in captioner.encoder.steps], "size": configs.encoder_size(config),
            "dropout": config.decoder.dropout, "feature_dropout": config.encoder.dropout,
            "forget_bias": config.decoder.forget_bias, "dtype": dtype,
            "search": {"bos": BOS, "eos": EOS, "forbidden": [PAD, BOS, UNK], **{key: getattr(config.search, key)
                                                        for key in ("beam", "max_words", "length_normalization")}},
            "optim": {name: {"learning_rate": optim.learning_rate, "clip_norm": optim.clip_norm, "encoder_l2": optim.encoder_l2}
                      for name, optim in optims.items()}}), "utf-8")
        return {"encoder": captioner.spec.name, "size": configs.encoder_size(config), "batch": config.batch_size,
                "hidden": config.decoder.hidden, "vocabulary": self._of.vocabulary, "tokens": self._of.tokens}

    def agree(self, *, kind: str, batch: int) -> dict:
        """Loss and gradient norms of a first step in full float32 with nothing random: what the other side must reproduce.

        Of captions, in place of a loss, how improbable the best ones are, in nats a caption.
        """
        off = {"decoder.dropout": 0.0, "encoder.dropout": 0.0, "encoder.dtype": "float32", "decoder.dtype": "float32",
               "augment.crop": False, "augment.flip": False, "augment.color": False}
        of = dataclasses.replace(self._of, config=configs.change(self._of.config, off))
        captioner = _tiny(of) if self._model[0].spec is TINY else captioners.build(of.config, of.vocabulary)
        with jax.default_matmul_precision("highest"):
            if kind == BEAM:
                searched = Searched(of, captioner, *self._model[1:], batch)
                np.savez(self._directory / f"{kind}-{batch}.npz", **searched.inputs())
                return {"loss": -float(searched().log_probs_BK[:, 0].mean())}
            step = Served(KINDS[kind], of, captioner, *self._model[1:], batch, devices=jax.local_devices()[:1])
            np.savez(self._directory / f"{kind}-{batch}.npz", **step.inputs())
            step.hurry()
            reported = step()
            found = {"loss": step.loss(reported)}
        if KINDS[kind].train:
            found |= {"gradient": float(reported.norm), **{name: float(norm) for name, norm in reported.norms.items()}}
        return found

    def prepare(self, *, kind: str, batch: int) -> dict:
        """Gets a step ready to be timed. ready_s: all of that, compilation and first run included. together: steps a dispatch, as
        training has them."""
        self._step = None  # its memory goes before the next one comes
        start = time.perf_counter()
        if kind == BEAM:
            self._step = Searched(self._of, *self._model, batch)
        else:
            taken = CACHED_8 if kind == "cached" and jax.default_backend() != "cpu" else KINDS[kind]
            self._step = Served(taken, self._of, *self._model, batch, devices=jax.local_devices()[:1])
        jax.block_until_ready(self._step())
        return {"ready_s": time.perf_counter() - start, "together": self._step.together}

    def time(self, *, calls: int) -> dict:
        """Milliseconds a step, of about `calls` that are dispatched without waiting in between, and of all cores' work in them."""
        start, cpu = time.perf_counter(), time.process_time()
        dispatches = -(-calls // self._step.together)
        for _ in range(dispatches):
            reported = self._step()
        jax.block_until_ready(reported)
        calls = dispatches * self._step.together
        return {"ms": 1000 * (time.perf_counter() - start) / calls, "cpu_ms": 1000 * (time.process_time() - cpu) / calls}


def _tiny(of: workload.Settings) -> captioners.Captioner:
    captioner = captioners.build(of.config, of.vocabulary)
    return dataclasses.replace(captioner, spec=TINY, encoder=TINY.module(dtype=jnp.dtype(of.config.encoder.dtype)),
                               decoder=captioner.decoder.clone(features=TINY.features))


def _tiny_model(of: workload.Settings) -> tuple:
    """As `workload.model`, but without compiling anything, and so that hardly a channel of its few is dead."""
    captioner, random = _tiny(of), np.random.default_rng(0)

    def draw(path, leaf):
        noise = random.standard_normal(leaf.shape, np.float32)
        if leaf.ndim > 1:
            return noise / np.float32(math.sqrt(math.prod(leaf.shape[:-1])))
        return 0.1 * noise if path[-1].key == "mean" else np.abs(noise) + 0.5

    return captioner, *jax.tree_util.tree_map_with_path(draw, captioner.shapes(TINY.image_size))


def described(step: Step | Fork) -> dict:
    """A step of an Inception network as a JSON object."""
    fields = step._asdict()
    if isinstance(step, Mixed):
        fields["branches"] = [[described(conv) for conv in branch] for branch in step.branches]
    return {"type": type(step).__name__, **fields}
