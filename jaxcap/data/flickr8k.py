"""Flickr8k (Hodosh, Young and Hockenmaier 2013) in the layout that it is distributed in."""

import os
from collections import defaultdict
from pathlib import Path

from jaxcap.data.staging import File, Photo, PhotoBuilder, Plan, require_directory
from jaxcap.errors import UserError

_PHOTOS = ("Flicker8k_Dataset", "Flickr8k_Dataset")  # the first, misspelt, is the official one
_TEXT = "Flickr8k_text"
_TOKENS = "Flickr8k.token.txt"
_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


class Flickr8k(PhotoBuilder, skip_registration=True):
    """The builder of `plan`'s photos."""


def plan(source: Path) -> Plan:
    """The photos and captions of a directory with `Flicker8k_Dataset/` and `Flickr8k_text/`.

    A split is offered if its list is there with at least one of its photos. Raises `UserError` if the directory is not
    in this layout or nothing can be paired.
    """
    require_directory(source)
    folder = next((source / name for name in _PHOTOS if (source / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{source} has no directory {_PHOTOS[0]}: --source must hold the photos in {_PHOTOS[0]}/ "
                        f"and the captions in {_TEXT}/")
    captions = _read_tokens(source / _TEXT / _TOKENS)
    names = set(os.listdir(folder))
    problems = [f"{name}: has captions but no photo" for name in captions if name not in names]
    splits = {}
    for split, file in _LISTS.items():
        listed = _read_list(source / _TEXT / file)
        there = [name for name in listed if name in names and name in captions]
        if there:
            splits[split] = [Photo(name, tuple(captions[name]), File(folder / name)) for name in there]
            problems += [f"{name}: is listed in {file} but has no captions" for name in listed if name not in captions]
    if not splits:
        raise UserError(f"none of the photos in {folder} is listed in {source / _TEXT} with a caption")
    return Plan(splits, tuple(problems))


def _read_tokens(path: Path) -> dict[str, list[str]]:
    """Photo name → captions, from lines `name#k<TAB>caption`."""
    captions = defaultdict(list)
    for number, line in enumerate(_lines(path), start=1):
        name, tab, caption = line.partition("\t")
        if not tab:
            raise UserError(f"line {number} of {path} is not `name#number<TAB>caption`: {line[:60]!r}")
        if caption.strip():
            captions[name.rpartition("#")[0] or name].append(caption.strip())
    if not captions:
        raise UserError(f"{path} holds no captions")
    return captions


def _read_list(path: Path) -> list[str]:
    return list(dict.fromkeys(_lines(path))) if path.exists() else []


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip("\r\n") for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
