"""A run is one directory that explains itself; every command takes just that directory.

    config.json      the whole description (jaxcap.config)
    vocabulary.tsv   ids, counts and words (jaxcap.vocab)
    checkpoints/     the newest few and the best (jaxcap.checkpoints)
    metrics.jsonl    one object a line: training progress and scores;  events.*  the same for TensorBoard
    results/         captions and scores of the splits that were evaluated
    report.html      all of it to look at
"""

import contextlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcap import captioner as captioners
from jaxcap import checkpoints, config, locks, vocab
from jaxcap.captioner import Captioner
from jaxcap.ensemble import Ensemble
from jaxcap.errors import UserError, free_or

PyTree = Any


@dataclass(frozen=True)
class Run:
    """A trained captioner, ready to write captions; or several that write together (`join`), described by the first."""

    directory: Path
    config: config.Config
    vocab: vocab.Vocab
    captioner: Captioner | Ensemble
    params: PyTree
    batch_stats: PyTree
    step: int  # of the checkpoint, or the newest one of an average
    joined: tuple["Run", ...] = ()

    @property
    def members(self) -> tuple["Run", ...]:
        """The runs that write together, or this one."""
        return self.joined or (self,)

    def pack(self, items: Sequence[Any]) -> Any:
        """One item a member as the captioner takes them: a tuple for an ensemble, else the item itself."""
        return tuple(items) if self.joined else items[0]


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the run directory {directory} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def writing_results(directory: Path) -> Iterator[None]:
    """Raises `UserError` where something cannot be written to the run's `results/`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"results cannot be written to {directory / 'results'}: {error.strerror or error}; "
                        f"{free_or('copy the run to where they can', error)}") from error


def try_results(directory: Path) -> None:
    """Raises `UserError` where no results of the run could be written; nothing is left."""
    results = directory / "results"
    with writing_results(directory), tempfile.TemporaryFile(dir=results if results.exists() else directory):
        pass


def new_directory(name: str) -> Path:
    """Makes `runs/NAME`, or `runs/NAME-2` and so on where it is there, perhaps another process's of the same second."""
    for number in itertools.count(1):
        directory = Path("runs", name if number == 1 else f"{name}-{number}")
        with _writing(directory), contextlib.suppress(FileExistsError):
            directory.mkdir(parents=True)
            return directory


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keeps other trainings out of a run's directory, which is made, and taken away again if it stays empty.

    Raises `UserError` if another process is training in it.
    """
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    try:
        locks.hold(handle, f"another process is training in {directory}; wait for it, or name another --run-dir")
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            directory.rmdir()


def create(directory: Path, configuration: config.Config, vocabulary: vocab.Vocab) -> None:
    """Makes the run directory with its description. Raises `UserError` if it cannot be written."""
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        vocabulary.save(directory / "vocabulary.tsv")
        write_json(directory / "config.json", config.to_dict(configuration))  # last: it is what makes the directory a run


def read_config(directory: Path) -> config.Config:
    """The config of a run. Raises `UserError` if `directory` is not one."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} is not a run directory: it has no config.json (train makes one)")
    try:
        return config.from_dict(json.loads(path.read_text("utf-8")))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load(directory: Path, *, step: int | None = None, average: int | None = None) -> Run:
    """The run's best checkpoint, or that of `step`, or the mean of the parameters and statistics of its `average` newest ones,
    which must be of one phase: models of two have too little in common.

    Raises `UserError` if anything is missing, damaged or does not fit.
    """
    configuration = read_config(directory)
    vocabulary = vocab.load(directory / "vocabulary.tsv")
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} has no checkpoint yet; let training reach its first one")
    keeper = checkpoints.Checkpoints(directory / "checkpoints", configuration.checkpoints, read_only=True)
    steps = keeper.steps()
    if not steps:
        raise UserError(f"{directory} has no checkpoint yet; let training reach its first one")
    if step is not None and step not in steps:
        raise UserError(f"{directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    if average is not None:
        last = keeper.position(steps[-1])["phase"]
        alike = [one for one in steps if keeper.position(one)["phase"] == last]
        if not 1 <= average <= len(alike):
            raise UserError(f"{directory} keeps {len(alike)} checkpoints of its last phase ({', '.join(map(str, alike))}); "
                            f"{average} of them cannot be averaged")
    chosen = alike[-average:] if average else [keeper.best_step() if step is None else step]
    for one in chosen:
        check_words(directory, vocabulary, keeper.position(one), one)
    captioner = captioners.build(configuration, len(vocabulary))
    params, batch_stats = captioner.shapes(config.encoder_size(configuration))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                        {"params": params, "batch_stats": batch_stats})
    model = _mean([keeper.restore_model(one, like) for one in chosen])
    keeper.close()
    return Run(directory, configuration, vocabulary, captioner, model["params"], model["batch_stats"], chosen[-1])


def check_words(directory: Path, vocabulary: vocab.Vocab, position: dict, step: int) -> None:
    """Raises `UserError` where the run's vocabulary is not the one that its checkpoint of `step`, at `position`, was trained with."""
    if position["words"] != len(vocabulary):
        raise UserError(f"{directory / 'vocabulary.tsv'} has {len(vocabulary)} words, but the model of step {step} was "
                        f"trained with {position['words']}; put back the vocabulary that the run was trained with")


def take_over(begun: Run, params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
    """The parameters and statistics of another run. Raises `UserError` where they do not fit this one's."""
    theirs = {"params": begun.params, "batch_stats": begun.batch_stats}
    if found := checkpoints.difference(theirs, {"params": params, "batch_stats": batch_stats}):
        name, there, here = found
        raise UserError(f"start={begun.directory} does not fit this config: {name} is {there} there and {here} here; "
                        "encoder and decoder must be the same")
    return begun.params, begun.batch_stats


def join(members: Sequence[Run]) -> Run:
    """The ensemble of `members` as a run; one alone stays as it is. Raises `UserError` where their vocabularies differ."""
    first, *others = members
    for other in others:
        refusal = f"{other.directory} cannot write together with {first.directory}: "
        if other.vocab.tokenizer != first.vocab.tokenizer:
            raise UserError(f"{refusal}its tokenizer is {other.vocab.tokenizer!r}, not {first.vocab.tokenizer!r}")
        for i, (word, expected) in enumerate(itertools.zip_longest(other.vocab.words, first.vocab.words)):
            if word != expected:
                word, expected = ("absent" if w is None else repr(w) for w in (word, expected))
                raise UserError(f"{refusal}id {i} of its vocabulary is {word}, not {expected}")
    if not others:
        return first
    return Run(first.directory, first.config, first.vocab, Ensemble(tuple(m.captioner for m in members)),
               tuple(m.params for m in members), tuple(m.batch_stats for m in members), first.step, tuple(members))


def _mean(models: list[PyTree]) -> PyTree:
    if len(models) == 1:
        return models[0]
    # In float64, so that the mean of equal numbers is that number: a frozen encoder stays the one whose features are cached.
    return jax.tree.map(lambda *xs: jnp.asarray(np.mean([np.asarray(x, np.float64) for x in xs], axis=0).astype(xs[0].dtype)),
                        *models)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON for people: indented, Unicode as it is, complete or absent."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
