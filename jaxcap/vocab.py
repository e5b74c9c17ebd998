"""Words to ids and back, as im2txt builds its vocabulary, for captions in any language.

A vocabulary lives in one readable file, `vocabulary.tsv`: a comment line with its settings, then `id <TAB> count <TAB> word`.
"""

import collections
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex

from jaxcap.errors import UserError

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")

# Letters with their combining marks, joined by inner apostrophes, hyphens ("dog's", "t-shirt") and the joiners that Persian and
# Indian languages spell with; any other visible character stands alone, so that im2txt's "." survives as a word, with what is
# drawn as one with it (\X: emoji with their variants, flags).
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]+(?:['’\-\u200c\u200d]+[\p{L}\p{M}\p{N}_]+)*|(?![\s\p{L}\p{M}\p{N}_])\X")
_NO_SPACE_BEFORE = regex.compile(r"\s+([.,!?;:%)\]}。，！？；：])")


def _characters(text: str) -> list[str]:
    return [c for c in regex.findall(r"\X", text) if not c.isspace()]  # \X: a grapheme, its accents included


@dataclass(frozen=True)
class Tokenizer:
    """How a language is cut into tokens and put together again. Add one per language to `TOKENIZERS`."""

    split: Callable[[str], list[str]]
    join: Callable[[Sequence[str]], str]


TOKENIZERS: dict[str, Tokenizer] = {
    "words": Tokenizer(lambda text: _WORD.findall(text.lower()),
                       lambda tokens: _NO_SPACE_BEFORE.sub(r"\1", " ".join(tokens))),
    "whitespace": Tokenizer(lambda text: text.split(), " ".join),
    "characters": Tokenizer(_characters, "".join),
}


@dataclass(frozen=True)
class Vocab:
    """Words by id, the four special ones first, then by falling count (ties in alphabetical order)."""

    words: tuple[str, ...]
    counts: tuple[int, ...]
    tokenizer: str = "words"
    min_count: int = 4

    def __post_init__(self):
        object.__setattr__(self, "_ids", {word: i for i, word in enumerate(self.words) if word not in SPECIAL})

    def __len__(self) -> int:
        return len(self.words)

    def tokenize(self, caption: str) -> list[str]:
        return TOKENIZERS[self.tokenizer].split(caption)

    def encode(self, caption: str, max_words: int) -> list[int]:
        """Ids `[BOS, w1 … wn, EOS]` of a caption cut at `max_words`; a word that is not known is UNK."""
        words = self.tokenize(caption)[:max_words]
        return [BOS, *(self._ids.get(word, UNK) for word in words), EOS]

    def decode(self, ids: Iterable[int]) -> str:
        """The caption that `ids` spell: everything up to the first EOS, without padding and start marker."""
        tokens = []
        for i in ids:
            if i == EOS:
                break
            if i not in (PAD, BOS):
                tokens.append(self.words[i])
        return TOKENIZERS[self.tokenizer].join(tokens)

    def save(self, path: Path) -> None:
        """Writes the vocabulary; the file is complete or absent."""
        lines = [f"# jaxcap vocabulary: tokenizer={self.tokenizer} min_count={self.min_count}",
                 *(f"{i}\t{count}\t{word}" for i, (word, count) in enumerate(zip(self.words, self.counts)))]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def build(captions: Iterable[str], *, min_count: int = 4, max_size: int = 0, tokenizer: str = "words") -> Vocab:
    """The vocabulary of `captions`: every token seen at least `min_count` times, at most `max_size` ids (0: no limit).

    Raises `UserError` when no word is left, or no room for one beside the special tokens.
    """
    split = TOKENIZERS[tokenizer].split
    counter = collections.Counter(token for caption in captions for token in split(caption))
    ranked = sorted(((w, n) for w, n in counter.items() if n >= min_count and w not in SPECIAL),
                    key=lambda item: (-item[1], item[0]))
    if max_size:
        if max_size <= len(SPECIAL):
            raise UserError(f"vocabulary.max_size={max_size} leaves no room for words: {len(SPECIAL)} ids are special")
        ranked = ranked[:max_size - len(SPECIAL)]
    if not ranked:
        raise UserError(f"no word of the {sum(counter.values())} in the training captions occurs "
                        f"{min_count} times; lower vocabulary.min_count or check the captions")
    unknown = sum(counter.values()) - sum(n for _, n in ranked)
    return Vocab(words=(*SPECIAL, *(w for w, _ in ranked)), counts=(0, 0, 0, unknown, *(n for _, n in ranked)),
                 tokenizer=tokenizer, min_count=min_count)


def load(path: Path) -> Vocab:
    """Reads what `Vocab.save` wrote. Raises `UserError` naming the line that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"vocabulary {path} cannot be read: {error}") from error
    header, *rows = text.removesuffix("\n").split("\n")
    settings = dict(part.split("=", 1) for part in header.split() if "=" in part)
    if not header.startswith("# jaxcap vocabulary") or settings.get("tokenizer") not in TOKENIZERS:
        raise UserError(f"{path} is not a jaxcap vocabulary: its first line is {header[:60]!r}")
    words, counts = [], []
    for number, row in enumerate(rows):
        parts = row.split("\t", 2)
        if len(parts) != 3 or parts[0] != str(number) or not parts[1].isdigit():
            raise UserError(f"{path}, line {number + 2}: expected '{number}<TAB>count<TAB>word', found {row[:60]!r}")
        counts.append(int(parts[1]))
        words.append(parts[2])
    if tuple(words[:4]) != SPECIAL or len(set(words)) != len(words):
        raise UserError(f"{path} must begin with {' '.join(SPECIAL)} and hold every word once")
    return Vocab(tuple(words), tuple(counts), settings["tokenizer"], int(settings.get("min_count", 4)))


def pad(sequences: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """int32 [len(sequences), length], each row padded with PAD on the right."""
    tokens_BT = np.full((len(sequences), length), PAD, np.int32)
    for row, sequence in zip(tokens_BT, sequences):
        row[:len(sequence)] = sequence
    return tokens_BT
