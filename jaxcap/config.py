"""The one description of a run: nested frozen dataclasses, loaded from a page in `configs/` and overridden by key=value.

Nothing here has a second home: the run directory stores this description as `config.json`, and every command rebuilds
the model from it. An unknown key, a wrong type or an impossible value raises `UserError` before anything is written.
"""

import math
import os
import runpy
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxcap import search_settings, settings
from jaxcap.errors import UserError
from jaxcap.search_settings import Search


@dataclass(frozen=True)
class Data:
    """Which photos and captions, and how they are fed."""

    name: Literal["shapes", "flickr8k", "coco", "folder"] = "shapes"
    dir: str = ""  # prepared data sets; "" is $JAXCAP_DATA, or ~/.cache/jaxcap/data
    label: str = ""  # which one of a name: a folder's --label; "im2txt" for COCO in im2txt's splits
    size: int = 64  # photos are stored size × size, aspect ratio ignored (im2txt: 346)
    train: str = "train"  # split to train on; several joined with "+", as in "train+restval"
    val: str = "val"  # split that is scored while training and at the end
    max_words: int = 30  # a longer caption is cut here; the end marker is not counted
    captions_per_photo: int = 1  # captions of a photo that learn from one look at it; im2txt looks anew for every caption
    length_buckets: tuple[int, ...] = ()  # pad a batch to the next of these lengths, or to max_words
    resident: Literal["auto", "yes", "no"] = "auto"  # keep the split's photos or features on the device
    resident_gib: float = 4.0  # "auto" keeps them there up to this size
    workers: int = 0  # grain worker processes, for splits that are not resident


@dataclass(frozen=True)
class Vocabulary:
    """How words become ids (im2txt: words seen at least 4 times)."""

    min_count: int = 4
    max_size: int = 0  # keep at most this many ids, special ones included; 0 is no limit
    tokenizer: Literal["words", "characters", "whitespace"] = "words"


@dataclass(frozen=True)
class Encoder:
    """The network that turns a photo into features."""

    name: str = "small_cnn"
    weights: str = ""  # a weights file, "imagenet" for the published ones (fetched if need be), or "" for random ones
    size: int = 0  # side of the square that the network sees; 0 is data.size
    scaling: Literal["published", "unit"] = "published"  # of pixels: as the network was trained, or just [0, 1]
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the arithmetic (on CPUs: of products); parameters stay float32
    dropout: float = 0.0  # of the pooled features, in phases that train the encoder (im2txt: 0.2)
    remat: bool = False  # recompute activations in the backward pass: less memory, more time


@dataclass(frozen=True)
class Augment:
    """Distortions of training photos, on the device (im2txt §2). All off, or with views: features can be cached."""

    crop: bool = False  # random crop of encoder.size out of data.size; otherwise the central one
    flip: bool = False  # horizontally, half of the time
    color: bool = False  # brightness, saturation, hue and contrast in one of two orders
    views: int = 0  # of a photo, computed once for a frozen encoder, the first undistorted; 0: a new distortion every step

    def any(self) -> bool:
        return self.crop or self.flip or self.color

    def cacheable(self) -> bool:
        """Whether a frozen encoder sees the same again, so that its features can be cached."""
        return self.views > 0 or not self.any()


@dataclass(frozen=True)
class Attention:
    """How a decoder with image="attention" looks at the encoder's map before every word (Xu et al. 2015)."""

    size: int = 512  # width in which the hidden state and every position are compared
    project: int = 0  # a dense layer of this width with a ReLU comes before (the attention tutorial: 256); 0 is none
    start: Literal["mean", "zero"] = "mean"  # first state: from the mean of all positions, or zero (the tutorial); also image="every"
    gate: bool = False  # what is seen is scaled by β = σ(w·h)
    dropout: float = 0.0  # of the attention weights
    doubly_stochastic: float = 0.0  # weight of Σ (1 − Σ_t α)² a caption: every position should be looked at once


@dataclass(frozen=True)
class Decoder:
    """The language model that writes the caption."""

    name: Literal["lstm", "gru"] = "lstm"
    layers: int = 1
    # The photo is the step before the first word, or read with every word, or every word looks at its map.
    image: Literal["first", "every", "attention"] = "first"
    attention: Attention = field(default_factory=Attention)
    embedding: int = 512
    hidden: int = 512
    dropout: float = 0.3  # of the input and of every layer's output, the image step included (im2txt: keep 0.7)
    forget_bias: float = 1.0  # of an LSTM
    output_tanh: bool = True  # false: h = o · c, as NIC 2014 has it (arXiv 1411.4555, eq. 8)
    biases: bool = True  # of the gates; false is NIC 2014's
    deep_output: bool = False  # logits from word, hidden state and what is seen (Xu et al. 2015, eq. 7); not image="first"
    tied: bool = False  # words are written with the matrix that they are read with
    init_scale: float = 0.08  # parameters start uniform in ±init_scale
    standardize: bool = False  # features to zero mean and one scale, by the training photos' statistics
    deviations: float = 4.0  # that standardized features are divided by: so that a thousand of them do not drown the words
    unroll: int = 0  # time steps in each round of the recurrence's loop while training; 0: on GPUs and TPUs all of them, on CPUs one
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Optim:
    """An optax chain: clip → (Adam | momentum | nothing) → schedule."""

    name: Literal["sgd", "momentum", "adam", "adamw"] = "sgd"
    learning_rate: float = 2.0
    schedule: Literal["constant", "cosine", "staircase"] = "constant"
    warmup_steps: int = 0
    decay_rate: float = 0.5  # staircase: factor …
    decay_epochs: float = 8.0  # … every so many epochs
    clip_norm: float = 5.0  # of the global gradient norm; 0 is none
    weight_decay: float = 0.0  # adamw's, on matrices and filters only
    encoder_l2: float = 0.0  # L2 penalty on the encoder's filters (im2txt phase 2: 4e-5)
    encoder_learning_rate_scale: float = 1.0  # the encoder's learning rate over the decoder's
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Reward:
    """Self-critical training: how captions are drawn and what their CIDEr-D is measured against."""

    samples: int = 5  # captions drawn a photo
    baseline: Literal["others", "greedy"] = "others"  # the photo's other samples, or the caption of likeliest words


@dataclass(frozen=True)
class Phase:
    """A stretch of training: what trains, for how long, how."""

    name: str = "decoder"
    train: Literal["decoder", "all"] = "decoder"  # "all" also trains the encoder
    # "words": the photo alone predicts its caption's words, unordered; "reward": captions that it draws earn their CIDEr-D
    objective: Literal["captions", "words", "reward"] = "captions"
    reward: Reward = field(default_factory=Reward)
    epochs: float = 0.0  # passes over the training captions; or
    steps: int = 0  # optimizer steps
    batch_norm: Literal["inference", "batch", "sync"] = "inference"  # statistics that the encoder normalizes with
    sampling: Literal["none", "linear", "exponential", "inverse_sigmoid"] = "none"  # scheduled: how its own words come in
    sampling_share: float = 0.25  # of words that the decoder draws itself at the end of the phase
    optim: Optim = field(default_factory=Optim)
    from_scratch: bool = False  # allow the encoder to train together with an untrained decoder


@dataclass(frozen=True)
class Checkpoints:
    """What is kept of a run while it goes on."""

    every_epochs: float = 1.0
    every_steps: int = 0  # if set, instead of every_epochs
    keep: int = 5
    best: Literal["bleu4", "cider"] = "bleu4"


@dataclass(frozen=True)
class Config:
    """A whole run. See `configs/` for pages that can be run."""

    name: str = "shapes"
    start: str = ""  # a run that this one goes on from: its vocabulary and the parameters of its best checkpoint
    seed: int = 0
    batch_size: int = 32  # photos a step over all devices
    steps_per_dispatch: int = 0  # steps sent to the devices at once; 0: 8 where the data is resident on an accelerator, else 1
    data: Data = field(default_factory=Data)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    encoder: Encoder = field(default_factory=Encoder)
    augment: Augment = field(default_factory=Augment)
    decoder: Decoder = field(default_factory=Decoder)
    phases: tuple[Phase, ...] = (Phase(),)
    search: Search = field(default_factory=Search)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    parallel: Literal["shard_map", "pmap"] = "shard_map"
    eval_batch_size: int = 64
    eval_during: bool = True  # score a slice of the val split at every checkpoint
    eval_photos: int = 0  # photos of that slice; 0 is the whole split
    log_every: int = 10  # steps a line of metrics.jsonl


# From random weights, a network and a decoder learn colours together but never shapes: neither has anything to teach the other.
# So the network first learns to name what it sees (the part that ImageNet has in the lineage), and then both to say it.
SHAPES = Config(
    name="shapes",
    batch_size=32,
    data=Data(name="shapes", size=64, max_words=24, length_buckets=(13,)),  # nine captions in ten; each length is a program to compile
    encoder=Encoder(name="small_cnn"),
    decoder=Decoder(embedding=128, hidden=128, dropout=0.0, forget_bias=4.0),
    phases=(
        Phase(name="words", train="all", objective="words", steps=6000, batch_norm="batch", from_scratch=True,
              optim=Optim(name="adam", learning_rate=4e-3, schedule="cosine", warmup_steps=100)),
        Phase(name="captions", train="all", steps=5000, batch_norm="batch", from_scratch=True,
              optim=Optim(name="adam", learning_rate=2e-3, schedule="cosine", warmup_steps=100,
                          label_smoothing=0.1)),
    ),
    checkpoints=Checkpoints(every_steps=2000),
    eval_photos=200,
)

# --- loading -----------------------------------------------------------------------------------------------------


def load(path: str | None, overrides: typing.Sequence[str] = ()) -> Config:
    """The config of a page `path` (its `CONFIG`; None: the default one, Shapes) with `key=value` overrides applied.

    Raises `UserError` if the file or `CONFIG` is missing, or as `override`, `check` do.
    """
    if path is None:
        config = SHAPES
    else:
        if not os.path.isfile(path):
            raise UserError(f"there is no config file {path!r}; {_shipped()}")
        try:
            config = runpy.run_path(path).get("CONFIG")
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"config file {path!r} does not run: {type(error).__name__}: {error}") from error
        if not isinstance(config, Config):
            raise UserError(f"config file {path!r} must set CONFIG = jaxcap.config.Config(...)")
        try:
            config = settings.build(Config, config)
        except UserError as error:
            raise UserError(f"config file {path!r}: {error}") from error
    return check(override(config, overrides))


def _shipped() -> str:
    """Where the pages that ship are."""
    folder = Path(__file__).parents[1] / "configs"
    if (folder / "im2txt.py").exists():
        return f"{os.path.relpath(folder)}/ holds the ones that ship"
    return "the ones that ship are in configs/ of a clone of the repository, which pip does not install"


def page_and_settings(words: typing.Sequence[str]) -> tuple[str | None, list[str]]:
    """What a command line's free words name: a page first, perhaps, and then key=value settings."""
    return (None, list(words)) if not words or "=" in words[0] else (words[0], list(words[1:]))


def override(config: Config, assignments: typing.Sequence[str]) -> Config:
    """`config` with every `a.b.c=value` applied; tuple items are reached by index (`phases.0.steps=100`).

    Raises `UserError` on an unknown key (naming the nearest valid one) or a value of the wrong type.
    """
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"{assignment!r} is neither a config file nor key=value")
        config = settings.assign(config, key, text)
    return config


def change(config: Config, options: dict[str, typing.Any]) -> Config:
    """`config` with the options of a command line put in, by dotted key; None leaves a setting as it is."""
    return check(override(config, [f"{key}={value}" for key, value in options.items() if value is not None]))


def flat(config: Config) -> dict:
    """Every setting by its dotted key, as `override` takes it."""
    return settings.flat(config)


def to_dict(config: Config) -> dict:
    """The config as plain JSON types (tuples as lists)."""
    return settings.to_dict(config)


def from_dict(values: dict) -> Config:
    """The inverse of `to_dict`, as strict about keys and types as `override`. Missing keys take their default."""
    return check(settings.build(Config, values))


def differences(one: Config, other: Config) -> list[str]:
    """Lines `key: a → b` for every setting in which two configs differ."""
    a, b = flat(one), flat(other)
    return [f"{k}: {a.get(k, 'absent')!r} → {b.get(k, 'absent')!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]


MOST_STEPS = 2**31 - 1  # they are counted in 32 bits
_MOST = {"batch_size": 2**20, "eval_batch_size": 2**20, "steps_per_dispatch": 2**20, "data.size": 2**14, "data.max_words": 2**20,
         "data.captions_per_photo": 2**20, "data.workers": 1_000, "augment.views": 2**20, "decoder.layers": 1_000, "decoder.embedding": 2**16,
         "decoder.hidden": 2**16, "decoder.attention.size": 2**16, "decoder.attention.project": 2**16, "decoder.unroll": 2**20,
         "search.max_words": 2**20}


def check(config: Config) -> Config:
    """Returns `config`, or raises `UserError` for combinations that cannot run."""
    positive = ("batch_size", "eval_batch_size", "data.size", "data.max_words", "data.captions_per_photo", "decoder.embedding",
                "decoder.hidden", "decoder.layers", "decoder.attention.size", "search.beam", "search.max_words",
                "vocabulary.min_count", "checkpoints.keep", "log_every")
    values = flat(config)
    for key in positive:
        if values[key] < 1:
            raise UserError(f"{key} must be at least 1, not {values[key]}")
    for key, most in _MOST.items():
        if values[key] > most:
            raise UserError(f"{key} must be at most {most:,}, not {values[key]}")
    for key in [k for k in values if k.endswith("dropout") or k.endswith("label_smoothing")]:
        if not 0 <= values[key] < 1:
            raise UserError(f"{key} must be in [0, 1), not {values[key]}")
    for key in [k for k in values if not k.startswith("search.") and k != "decoder.forget_bias"]:
        if isinstance(values[key], int | float) and not 0 <= values[key] < math.inf:
            raise UserError(f"{key} must be a finite number that is not negative, not {values[key]}")
    if not config.decoder.deviations:
        raise UserError("decoder.deviations must be above 0: standardized features are divided by it")
    if config.seed >= 2**32:
        raise UserError(f"seed must be below 2 ** 32, not {config.seed}")
    if config.steps_per_dispatch > 1 and any(phase.objective == "reward" for phase in config.phases):
        raise UserError("steps_per_dispatch must be 0 or 1 where a phase's objective is 'reward': its captions are drawn step by step")
    if config.encoder.size > config.data.size:
        raise UserError(f"encoder.size {config.encoder.size} is larger than data.size {config.data.size}: "
                        "photos are stored at data.size and cropped to encoder.size")
    if not config.phases:
        raise UserError("phases is empty: a run needs at least one")
    if "/" in config.name:
        raise UserError(f"name {config.name!r} names a directory below runs/, so it must not hold a /; --run-dir takes any path")
    if config.augment.views and (config.augment.views < 2 or not config.augment.any()):
        raise UserError(f"augment.views={config.augment.views} would be the photo alone: use 2 or more, with crop, flip or color")
    if config.decoder.standardize and not config.start and (config.phases[0].train != "decoder" or not config.augment.cacheable()):
        raise UserError("decoder.standardize=true takes its statistics from cached features, so phases.0 must train only "
                        "the decoder, without augmentation or with augment.views; or go on from a run that has them (start=RUN)")
    decoder = config.decoder
    if decoder.image == "first" and (decoder.deep_output or decoder.attention != Attention()):
        raise UserError("decoder.attention and decoder.deep_output need decoder.image=attention (or, deep_output and attention.start, "
                        "every); with 'first' words see no photo")
    if decoder.image == "every" and decoder.attention != Attention(start=decoder.attention.start):
        raise UserError("decoder.image=every attends to nothing: of decoder.attention only start means something to it; "
                        "use decoder.image=attention for the rest")
    if decoder.tied and not decoder.deep_output and decoder.embedding != decoder.hidden:
        raise UserError(f"decoder.tied writes words with the matrix they are read with, so decoder.embedding {decoder.embedding} and "
                        f"decoder.hidden {decoder.hidden} must be equal (or decoder.deep_output=true)")
    if decoder.name == "gru" and not decoder.output_tanh:
        raise UserError("decoder.output_tanh=false is about an LSTM's output; a GRU has none")
    decoder_trained = bool(config.start)
    for i, phase in enumerate(config.phases):
        if max(phase.epochs, phase.steps) > MOST_STEPS:
            raise UserError(f"phases.{i} has more epochs or steps than {MOST_STEPS:,}")
        if (phase.epochs > 0) == (phase.steps > 0):
            raise UserError(f"phases.{i} needs either epochs or steps (one of them above 0)")
        if phase.train == "decoder" and phase.batch_norm != "inference":
            raise UserError(f"phases.{i} trains only the decoder, so its batch_norm must be 'inference', "
                            f"not {phase.batch_norm!r}")
        if phase.objective == "words" and decoder.image != "first":
            raise UserError(f"phases.{i}.objective=words needs decoder.image=first: it trains the photo's embedding, which "
                            f"{decoder.image!r} does not have")
        if phase.objective == "reward":
            if not decoder_trained:
                raise UserError(f"phases.{i}.objective=reward learns from captions that the decoder draws, so a phase with "
                                "objective=captions must come before it, or a trained run (start=RUN)")
            if phase.sampling != "none" or phase.optim.label_smoothing:
                raise UserError(f"phases.{i}.objective=reward takes neither sampling nor optim.label_smoothing: all its words "
                                "are its own already")
            if phase.reward.samples < 1 + (phase.reward.baseline == "others"):
                raise UserError(f"phases.{i}.reward.samples={phase.reward.samples} is too few: a caption alone needs "
                                "baseline=greedy, and baseline=others needs 2")
            if phase.reward.samples > search_settings.MOST_BEAM:
                raise UserError(f"phases.{i}.reward.samples must be at most {search_settings.MOST_BEAM:,}, not {phase.reward.samples}")
        if not 0 <= phase.sampling_share <= 1:
            raise UserError(f"phases.{i}.sampling_share must be in [0, 1], not {phase.sampling_share}")
        if phase.train == "all" and not decoder_trained and not phase.from_scratch:
            raise UserError(
                f"phases.{i} trains the encoder together with an untrained decoder, which damages the encoder for good; "
                f"train the decoder in a phase before it, go on from a run (start=RUN), or set phases.{i}.from_scratch=true "
                "for an encoder that is itself untrained")
        decoder_trained |= phase.objective == "captions"
    buckets = config.data.length_buckets
    if list(buckets) != sorted(set(buckets)) or min(buckets, default=1) < 1:
        raise UserError(f"data.length_buckets {buckets} must rise from at least 1")
    search_settings.check(config.search)
    return config


def encoder_size(config: Config) -> int:
    """Side in pixels of the square that the encoder sees."""
    return config.encoder.size or config.data.size


def decoder_name(config: Config) -> str:
    """The decoder in a few words, as in "2-layer gru with attention"."""
    image = {"first": "", "every": " with the photo at every word", "attention": " with attention"}[config.decoder.image]
    layers = f"{config.decoder.layers}-layer " if config.decoder.layers > 1 else ""
    return f"{layers}{config.decoder.name}{image}"
