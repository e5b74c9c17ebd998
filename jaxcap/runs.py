"""A run is one directory that explains itself; every command takes just that directory.

    config.json      the whole description (jaxcap.config)
    vocabulary.tsv   ids, counts and words (jaxcap.vocab)
    checkpoints/     the newest few and the best (jaxcap.checkpoints)
    metrics.jsonl    one object a line: training progress and scores;  events.*  the same for TensorBoard
    results/         captions and scores of the splits that were evaluated
    report.html      all of it to look at
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxcap import captioner as captioners
from jaxcap import checkpoints, config, vocab
from jaxcap.captioner import Captioner
from jaxcap.errors import UserError

PyTree = Any


@dataclass(frozen=True)
class Run:
    """A trained captioner, ready to write captions."""

    directory: Path
    config: config.Config
    vocab: vocab.Vocab
    captioner: Captioner
    params: PyTree
    batch_stats: PyTree
    step: int


def create(directory: Path, configuration: config.Config, vocabulary: vocab.Vocab) -> None:
    """Makes the run directory with its description. Raises `UserError` if it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", config.to_dict(configuration))
        vocabulary.save(directory / "vocabulary.tsv")
    except OSError as error:
        raise UserError(f"the run directory {directory} cannot be written: {error.strerror or error}") from error


def read_config(directory: Path) -> config.Config:
    """The config of a run. Raises `UserError` if `directory` is not one."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} is not a run directory: it has no config.json (train makes one)")
    try:
        return config.from_dict(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def load(directory: Path, *, step: int | None = None) -> Run:
    """The run's best checkpoint, or that of `step`. Raises `UserError` if anything is missing, damaged or does not fit."""
    configuration = read_config(directory)
    vocabulary = vocab.load(directory / "vocabulary.tsv")
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} has no checkpoint yet; let training reach its first one")
    keeper = checkpoints.Checkpoints(directory / "checkpoints", configuration.checkpoints)
    steps = keeper.steps()
    if not steps:
        raise UserError(f"{directory} has no checkpoint yet; let training reach its first one")
    if step is not None and step not in steps:
        raise UserError(f"{directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    chosen = keeper.best_step() if step is None else step
    words = keeper.position(chosen)["words"]
    if words != len(vocabulary):
        raise UserError(f"{directory / 'vocabulary.tsv'} has {len(vocabulary)} words, but the model of step {chosen} was "
                        f"trained with {words}; put back the vocabulary that the run was trained with")
    captioner = captioners.build(configuration, len(vocabulary))
    params, batch_stats = jax.eval_shape(lambda key: captioner.init(key, config.encoder_size(configuration)),
                                         jax.random.PRNGKey(0))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                        {"params": params, "batch_stats": batch_stats})
    model = keeper.restore_model(chosen, like)
    keeper.close()
    return Run(directory, configuration, vocabulary, captioner, model["params"], model["batch_stats"], chosen)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON for people: indented, Unicode as it is, complete or absent."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
