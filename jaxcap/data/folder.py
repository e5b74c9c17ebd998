"""A person's own photos and captions, or any data set of a directory and a caption file, such as Flickr30k."""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from jaxcap.data import captions, photos
from jaxcap.data.staging import File, Photo, PhotoBuilder, Plan, require_directory
from jaxcap.errors import UserError


class Folder(PhotoBuilder, skip_registration=True):
    """The builder of `plan`'s photos."""


def plan(source: Path, caption_file: Path, val_share: float = 0.05, test_share: float = 0.05) -> Plan:
    """The photos below `source` that `caption_file` (any format of `captions.read`) names, and their captions.

    Without splits in the file, a hash of each photo's path decides: the same photo always falls into the same split,
    whatever else is there. A photo's id is the one in the file, else its name there; where another photo has it too, its path.
    Raises `UserError` if no photo and caption can be paired or the shares are impossible.
    """
    require_directory(source)
    if not (0 <= val_share < 1 and 0 <= test_share < 1 and val_share + test_share < 1):
        raise UserError(f"--val-share {val_share} and --test-share {test_share} must leave a part for training")
    entries = captions.read(caption_file)
    files = _Files(source)
    paired: dict[str, captions.Entry] = {}
    named, problems = set(), []
    for entry in entries:
        paths = files.named(entry)
        named.update(paths)
        if not paths:
            problems.append(f"{entry.name}: has captions but no photo")
        elif len(paths) > 1:
            problems.append(f"{entry.name}: could be {' or '.join(paths[:3])}; write the path, not only the name")
        elif not entry.captions:
            problems.append(f"{entry.name}: has no caption that is not empty")
        elif paths[0] in paired:
            problems.append(f"{entry.name}: is the same photo as {paired[paths[0]].name}")
        else:
            paired[paths[0]] = entry
    if not paired:
        raise UserError(f"none of the {len(entries)} photos that {caption_file} names can be used; the first is "
                        f"{problems[0]}; --source is {source}")
    problems += [f"{path}: has no captions" for path in files.paths if path not in named] + files.problems
    splits = _assigned(paired, val_share, test_share)
    ids = {path: entry.image_id or entry.name for path, entry in paired.items()}
    often = Counter(ids.values())
    return Plan({split: [Photo(ids[path] if often[ids[path]] == 1 else path, entry.captions, File(source / path))
                         for path, entry in members.items()] for split, members in splits.items()}, tuple(problems))


def digest(plan: Plan) -> str:
    """SHA-256 of which photos a plan has, and of how many bytes each."""
    photos = sorted((photo.image_id, (photo.source.version() or [])[:1]) for members in plan.splits.values() for photo in members)
    return hashlib.sha256(json.dumps(photos).encode()).hexdigest()


def check_label(label: str) -> str:
    """`label` if it can be part of a directory name, else `UserError`."""
    if not re.fullmatch(r"\w[\w-]*", label):
        raise UserError(f"--label {label!r} must be made of letters, digits, _ and -")
    return label


def _assigned(paired: dict, val_share: float, test_share: float) -> dict[str, dict]:
    """Split → path → entry, by the entries' own splits or by hash."""
    splits = defaultdict(dict)
    places = {path: _place(path) for path in paired}
    for path, entry in paired.items():
        by_hash = "val" if places[path] < val_share else "test" if places[path] < val_share + test_share else "train"
        splits[entry.split or by_hash][path] = entry
    own = any(entry.split for entry in paired.values())
    if not own and val_share and "val" not in splits and len(splits["train"]) > 1:  # very few photos: one must do
        first = min(splits["train"], key=places.get)
        splits["val"][first] = splits["train"].pop(first)
    if "train" not in splits and not own:
        raise UserError(f"{len(paired)} photos are too few to split by --val-share and --test-share")
    return {split: splits[split] for split in sorted(splits, key=lambda name: (name != "train", name != "val", name))}


def _place(path: str) -> float:
    """A number in [0, 1) that depends on the photo's path alone."""
    digest = hashlib.sha256("/".join(_parts(path)).encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


class _Files:
    """The files below a directory, found by path or by as much of a path as is given."""

    def __init__(self, source: Path):
        closed = []
        below = [os.path.join(directory, name) for directory, _, names in os.walk(source, onerror=closed.append) for name in names]
        self.problems = [f"{os.path.relpath(error.filename, source)}: the folder cannot be read ({error.strerror})" for error in closed]
        paths = sorted(os.path.relpath(path, source) for path in below)
        self.paths = [path for path in paths if path.lower().endswith(photos.SUFFIXES)]
        self._by_name = defaultdict(list)
        for path in paths:
            self._by_name[_parts(path)[-1]].append(path)

    def named(self, entry: captions.Entry) -> list[str]:
        """Paths that an entry may mean, one if all is well: itself, or what ends as it does, or what it ends as."""
        wanted = [_parts(f"{entry.folder}/{entry.name}"), _parts(entry.name)]
        alike = self._by_name.get(wanted[0][-1], []) if wanted[0] else []
        if exact := [path for path in alike if _parts(path) in wanted]:
            return exact[:1]
        return [path for path in alike if any(_one_ends_as_the_other(_parts(path), parts) for parts in wanted)]


def _parts(path: str) -> tuple[str, ...]:
    """A path's names in one Unicode spelling: some systems store "é" as one character, others as two."""
    parts = unicodedata.normalize("NFC", path.replace("\\", "/")).split("/")
    return tuple(part for part in parts if part not in ("", "."))


def _one_ends_as_the_other(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    shared = min(len(a), len(b))
    return a[-shared:] == b[-shared:]
