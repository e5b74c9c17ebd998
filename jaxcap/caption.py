"""Writes captions for photos: `python -m jaxcap.caption RUN photo … | folder`."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ImageFont

from jaxcap import config as configs
from jaxcap import explain, inference, options, parallel, runs
from jaxcap.data import photos
from jaxcap.errors import UserError, run_command
from jaxcap.inference import Caption

EXPLAINED = ".explained.png"  # how the pictures of --explain end: they are no photos
LETTERS = 20  # that the font lacks are named


def find(paths: list[Path]) -> list[Path]:
    """The photos that `paths` name, those of a folder (and the folders in it) in alphabetical order, but for pictures that --explain left;
    folders that cannot be listed are among them, to be named as what cannot be read.

    Raises `UserError` where a path does not exist or a folder holds no photo.
    """
    found = []
    for path in paths:
        try:
            path.stat()
        except OSError as error:
            if re.match(r"-$|\w+:/", str(path)):  # what pathlib makes of a ://
                raise UserError(f"{str(path).replace(':/', '://', 1)} is no file, as photos must be; download it first and name the file") from None
            if isinstance(error, FileNotFoundError):
                raise UserError(f"there is no photo or folder {path}") from None
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if not path.is_dir():
            found.append(path)
            continue
        closed = []
        inside = [Path(folder, name) for folder, _, names in os.walk(path, onerror=lambda error: closed.append(Path(error.filename)))
                  for name in names]
        inside = [file for file in inside if file.suffix.lower() in photos.SUFFIXES and not file.name.endswith(EXPLAINED)
                  and (os.path.isfile(file) or not os.path.exists(file))]
        if not inside and not closed:
            raise UserError(f"folder {path} holds no photo ({', '.join(photos.SUFFIXES)})")
        found += sorted(inside + closed)
    return found


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a photo or a folder")
    return Path(text)


class Writer:
    """A run that writes captions for photos, compiled once for all that come (`jaxcap.load`).

    Args:
      settings: how it searches. Raises `UserError` where they do not fit the run.
      batch_size: the most photos that are looked at together.
    """

    def __init__(self, run: runs.Run, settings: configs.Search, batch_size: int = 32):
        self.run = run
        self._devices, self._most = parallel.Parallel(run.config.parallel), batch_size
        self._decode = inference.decoder(run.captioner, settings, run.pack([configs.encoder_size(m.config) for m in run.members]),
                                         self._devices, run.vocab)
        self._model = self._devices.replicate((run.params, inference.look(run.captioner, run.params, run.batch_stats)))
        self._sizes = [member.config.data.size for member in run.members]

    def __call__(self, *paths: str | Path) -> list[Caption]:
        """The best caption of each photo. Raises `UserError` for one that cannot be read."""
        best = []
        for path, found in self.captions([Path(path) for path in paths]):
            if isinstance(found, str):
                raise UserError(f"{path} cannot be read: {found}")
            best.append(found[0])
        return best

    def captions(self, paths: Sequence[Path]) -> Iterator[tuple[Path, list[Caption] | str]]:
        """For every photo, in order, its captions, best first (drawn ones as drawn), or why it could not be read."""
        # A power of two, so that calls with other numbers of photos find their program compiled.
        batch_size = min(self._most, 1 << max(len(paths) - 1, 0).bit_length())
        batch_size = -(-batch_size // self._devices.size) * self._devices.size
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), batch_size):
                part = paths[start:start + batch_size]
                images = list(pool.map(self._read, part))
                good = [image for image in images if not isinstance(image, str)]
                written = iter(())
                if good:
                    image_BHWC = {size: np.resize([image[size] for image in good], (batch_size, size, size, 3)) for size in self._sizes}
                    seen = self.run.pack([image_BHWC[size] for size in self._sizes])
                    written = inference.captions(self._decode, *self._model, self.run.vocab, self._devices, [(seen, len(good))], start)
                for path, image in zip(part, images):
                    yield path, image if isinstance(image, str) else next(written)

    def _read(self, path: Path) -> dict[int, np.ndarray] | str:
        try:
            return {size: photos.load(path, size) for size in set(self._sizes)}
        except photos.DamagedPhoto as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)


def explained(explainer: explain.Explainer, path: Path, size: int, caption: str, written: Path, font: ImageFont.FreeTypeFont) -> list[str]:
    """Writes the picture of a caption's maps and returns the letters that the font lacks. Raises `UserError` if it cannot be written."""
    explanation = explainer.explain(photos.load(path, size), caption)
    picture = explain.picture(explanation, font=font)
    try:
        written.parent.mkdir(parents=True, exist_ok=True)
        picture.save(written)
    except OSError as error:
        with contextlib.suppress(OSError):
            written.unlink(missing_ok=True)
        raise UserError(f"{written} cannot be written: {error.strerror or error}") from error
    return explain.lacking(explanation.words, font)


def explained_names(paths: Sequence[Path]) -> list[str]:
    """A name for each photo's picture, NAME.explained.png; photos of one name, from several folders, are numbered: NAME-2, NAME-3."""
    names, taken = [], set()
    for path in paths:
        name, number = path.stem, 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name)
        names.append(f"{name}{EXPLAINED}")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxcap.caption", description="Writes captions for photos, best first, with their probabilities.",
        epilog="Photos may have any size and be grey, transparent, rotated by EXIF, JPEG, PNG, WebP, GIF, BMP, TIFF or, "
               "where Pillow decodes it, AVIF. One that cannot be read is named on stderr and skipped; the exit status is "
               "then 1. Bad usage exits with 2.")
    options.add(parser)
    parser.add_argument("photos", type=_path, nargs="+", metavar="photo", help="photos, or folders of photos, with their subfolders")
    parser.add_argument("--top", type=int, default=1, metavar="N", help="captions a photo, at most the beam size (default: 1)")
    parser.add_argument("--batch-size", type=int, default=32, help="photos at once (default: 32)")
    parser.add_argument("--explain", action="store_true",
                        help="write NAME.explained.png for each photo: a map for every word of the best caption, of where it "
                             "looked, or, without attention, of what it needed to see")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where --explain writes (default: here)")
    parser.add_argument("--font", metavar="FILE",
                        help="TrueType or OpenType file for the words of --explain (default: a font with English letters only)")
    parser.add_argument("--json", action="store_true",
                        help='one JSON object a line: {"photo": …, "captions": [{"text", "log_prob", "finished"}, …]}')
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1 or arguments.top < 1:
        raise UserError("--batch-size and --top must be at least 1")
    for option, given in (("--font", arguments.font), ("--out", arguments.out)):
        if given is not None and not arguments.explain:
            raise UserError(f"{option} does nothing without --explain; give both or neither")
    font = explain.word_font(arguments.font) if arguments.explain else None

    paths = find(arguments.photos)
    parallel.initialize()
    parallel.one_host()
    run = options.load(arguments)
    settings = options.search(run.config, arguments).search
    if arguments.top > settings.beam:
        settings = dataclasses.replace(settings, beam=-(-arguments.top // settings.groups) * settings.groups)
    explainer = explain.Explainer(run) if arguments.explain else None
    skipped, lacking = 0, {}
    for name, (path, found) in zip(explained_names(paths), Writer(run, settings, arguments.batch_size).captions(paths)):
        if isinstance(found, str):
            skipped += 1
            print(f"skipped {path}: {found}", file=sys.stderr)
            continue
        best = found[:arguments.top]
        if arguments.explain:
            written = (arguments.out or Path()) / name
            lacking |= dict.fromkeys(explained(explainer, path, run.config.data.size, best[0].text, written, font))
        if arguments.json:
            line = {"photo": str(path), "captions": [dataclasses.asdict(caption) for caption in best]}
            print(json.dumps(line, ensure_ascii=(sys.stdout.encoding or "").lower() != "utf-8"), flush=True)
        elif arguments.top == 1:
            print(f"{path}: {best[0].text} (p = {math.exp(best[0].log_prob):.3g})", flush=True)
        else:
            print(f"{path}:")
            for number, caption in enumerate(best, start=1):
                print(f"  {number}. {caption.text} (p = {math.exp(caption.log_prob):.3g})", flush=True)
        if arguments.explain:
            print(f"  {written}", file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if lacking:
        letters = " ".join(list(lacking)[:LETTERS]) + (" …" if len(lacking) > LETTERS else "")
        print(f"the font lacks {letters}; name another with --font", file=sys.stderr)
    if skipped:
        print(f"{skipped} of {len(paths)} photos could not be read", file=sys.stderr)
    return 1 if skipped else 0


if __name__ == "__main__":
    run_command(main)
