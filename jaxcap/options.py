"""The flags that `caption` and `evaluate` share: which runs write, and how they search."""

import argparse
import dataclasses
from pathlib import Path

from jaxcap import config as configs
from jaxcap import runs
from jaxcap.errors import UserError
from jaxcap.search_settings import MOST_REQUIRED, Search

# Flags by the setting of `config.Search` that they stand for: its type, how its value is called, what it does.
_SEARCH = {
    "beam": (int, "K", "captions that are followed at once; 1 is greedy"),
    "max_words": (int, "N", "longest caption"),
    "min_words": (int, "N", "a caption does not end before so many words"),
    "length_normalization": (float, "A", "rank captions by log-probability / length ** A; 0 favours short ones, 1 is the mean"),
    "coverage": (float, "C", "attention models: how much a caption must look at everything in the photo; 0 is off"),
    "no_repeat_ngram": (int, "N", "never the same N words in a row twice in a caption; 0 is off"),
    "forbidden": (str, "WORD", "a word that is never written; may be given several times"),
    "must_contain": (str, "WORD", f"a word that every caption contains; up to {MOST_REQUIRED}, each doubles the work"),
    "groups": (int, "G", "diverse beam search: G groups of beam / G captions that avoid each other's words"),
    "diversity": (float, "D", "log-probability that a word costs for every earlier group that wrote it in the same place"),
}
_SAMPLING = {
    "temperature": (float, "T", "below 1 likely words grow likelier, above 1 less likely"),
    "top_k": (int, "N", "only among the N likeliest words; 0 is all"),
    "nucleus": (float, "P", "only among the fewest words that together are at least so probable; 1 is all"),
    "seed": (int, "N", "another seed, other captions; the same seed, the same"),
}
_NAMES = {"forbidden": "forbid"}  # settings whose flag has another name


def add(parser: argparse.ArgumentParser) -> None:
    """Adds RUN and the flags to `parser`, in groups."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a directory that jaxcap.train made")
    who = parser.add_argument_group("who writes", "The run's checkpoint with the best val score, unless said otherwise.")
    who.add_argument("--with", dest="others", type=Path, action="append", default=[], metavar="RUN",
                     help="another run that writes together with RUN: at every word the mean of their probabilities. May be "
                          "given several times. Encoders and decoders may differ, the vocabulary may not; settings are RUN's")
    who.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step, of every run")
    who.add_argument("--average", type=int, metavar="N", help="the mean of the newest N checkpoints, all of the last phase, of every run")
    how = parser.add_argument_group("how it searches", "What is not given is as the run's config.json says.")
    for key, (kind, metavar, meaning) in _SEARCH.items():
        action = "append" if kind is str else "store"
        how.add_argument(_flag(key), dest=key, type=kind, metavar=metavar, help=meaning, action=action)
    how.add_argument("--consensus", action=argparse.BooleanOptionalAction, default=None,
                     help="of the beam's captions write the one that the others agree with most instead of the likeliest; "
                          "best with --beam 10")
    draws = parser.add_argument_group("drawing captions instead of searching")
    draws.add_argument("--sample", action=argparse.BooleanOptionalAction, default=None,
                       help="draw --beam captions a photo at random; the first of them is as good as any")
    for key, (kind, metavar, meaning) in _SAMPLING.items():
        draws.add_argument(_flag(key), dest=key, type=kind, metavar=metavar, help=meaning)


def load(arguments: argparse.Namespace) -> runs.Run:
    """The run, or the ensemble, that the flags name. Raises `UserError` as `runs.load` and `runs.join` do."""
    if arguments.step is not None and arguments.average is not None:
        raise UserError("--step takes one checkpoint and --average several; give one of the two")
    return runs.join([runs.load(directory, step=arguments.step, average=arguments.average)
                      for directory in (arguments.run, *arguments.others)])


def search(configuration: configs.Config, arguments: argparse.Namespace) -> configs.Config:
    """`configuration` with the flags' search settings. Raises `UserError` for settings that contradict each other."""
    given = {key: getattr(arguments, key) for key in (*_SEARCH, *_SAMPLING, "consensus", "sample")}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items() if value is not None}
    settings = dataclasses.replace(configuration.search, **given)
    for key, needed, there in (("diversity", "--groups of at least 2", settings.groups > 1), ("seed", "--sample", settings.sample),
                               ("consensus", "a --beam of at least 2", settings.beam > 1)):
        if given.get(key) and not there:
            raise UserError(f"{_flag(key)} does nothing without {needed}; give both or neither")
    return configs.check(dataclasses.replace(configuration, search=settings))


def changed(arguments: argparse.Namespace, own: Search, used: Search) -> list[str]:
    """What the flags make other than the run's own settings, as parts of a file's name: ["step200", "beam10", "consensus"]."""
    parts = [f"{key}{getattr(arguments, key)}" for key in ("step", "average") if getattr(arguments, key) is not None]
    for key, value in dataclasses.asdict(used).items():
        if value != getattr(own, key):
            parts.append(key if value is True or isinstance(value, tuple) else f"no_{key}" if value is False else f"{key}{value}")
    return parts


def _flag(key: str) -> str:
    return "--" + _NAMES.get(key, key).replace("_", "-")
