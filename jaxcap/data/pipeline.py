"""Batches of a split: shuffled pairs of photo and caption, cut and padded, served by grain with a position to save.

Every (photo, caption) pair is one example, as in im2txt, or a photo with several of its captions. What is served k-th is a
function of the seed and k alone, so the position in the data is one number and any host can make its own rows.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags

from jaxcap.data.records import Split
from jaxcap.errors import UserError
from jaxcap.vocab import PAD, UNK, Vocab, pad


@dataclass(frozen=True)
class Examples:
    """The examples of a split: photos, each with C captions as ids.

    tokens_NCT1: int32 [N, C, max_words + 2], BOS … EOS PAD, or PAD alone where a photo has no further caption.
    photo_N: row of the photo in the split. length_N: words of the longest caption.
    cut, empty, unknown: captions that were cut at max_words, and that were left out for having no (known) word.
    """

    tokens_NCT1: np.ndarray
    photo_N: np.ndarray
    length_N: np.ndarray
    cut: int
    empty: int
    unknown: int

    @property
    def captions(self) -> int:
        """How many captions there are."""
        return int((self.tokens_NCT1[..., 0] != PAD).sum())


def encode(split: Split, vocab: Vocab, max_words: int, captions_per_photo: int = 1) -> Examples:
    """All captions of `split` as ids, as many as told of a photo in one example, those of like length together.

    Raises `UserError` when none is left to train on.
    """
    rows, photos = [], []
    cut = empty = unknown = 0
    for photo, captions in enumerate(split.captions):
        known = []
        for caption in captions:
            ids = vocab.encode(caption, max_words + 1)
            if len(ids) - 2 > max_words:
                cut += 1
                ids = [*ids[:max_words + 1], ids[-1]]
            if len(ids) == 2:
                empty += 1
            elif all(i == UNK for i in ids[1:-1]):
                unknown += 1
            else:
                known.append(ids)
        if captions_per_photo > 1:
            known.sort(key=len)
        known += [[]] * (-len(known) % captions_per_photo)
        rows += known
        photos += [photo] * (len(known) // captions_per_photo)
    if not rows:
        raise UserError(f"split {split.name!r} has no caption with a word of the vocabulary "
                        f"({empty} empty, {unknown} of unknown words only); check its captions")
    tokens_NCT1 = pad(rows, max_words + 2).reshape(len(photos), captions_per_photo, -1)
    length_N = (tokens_NCT1 != PAD).sum(axis=2).max(axis=1) - 2
    return Examples(tokens_NCT1, np.array(photos, np.int32), length_N, cut, empty, unknown)


class Batches:
    """What goes to the device at once, by number: `together` batches, or fewer. A random-access source for grain.

    An epoch is a new permutation of all examples. With `buckets`, batches that go together hold captions of similar length and are
    padded to the next bucket only; without, to the longest caption allowed. What does not fill a batch at the end of an
    epoch is left to the next permutation, so that every epoch has the same number of batches.

    An item has arrays [B, K, …]: K batches side by side, their rows first, as the devices share them out; tokens have C rows
    for every one of what is seen, the captions of a photo side by side. Only the last item of an epoch's longest bucket, and the
    last of all, may have a smaller K.

    Args:
      examples: what is shuffled.
      batch_size: examples a batch, over all hosts.
      seed: of the permutations.
      total: number of batches that the source offers.
      kind: name of what is fed beside `tokens_BT1`: "index_B", "image_BHWC" or "features_BPF".
      fetch: rows of the split → that array.
      buckets: caption lengths in words, rising; the longest allowed is one by itself.
      views: features of a photo are rows photo · views … photo · views + views − 1; one of them is drawn for every example.
      together: batches an item.
      numbered: also give the photos' numbers, `photo_B`.
      host, hosts: which rows of a batch are made here.
    """

    def __init__(self, examples: Examples, *, batch_size: int, seed: int, total: int, kind: str,
                 fetch: Callable[[np.ndarray], np.ndarray], buckets: Sequence[int] = (), views: int = 1,
                 together: int = 1, numbered: bool = False, host: int = 0, hosts: int = 1):
        self.examples, self.batch_size, self.seed, self.views, self.together = examples, batch_size, seed, views, together
        self.kind, self.fetch, self.numbered, self.host, self.hosts = kind, fetch, numbered, host, hosts
        longest = examples.tokens_NCT1.shape[2] - 2
        self.buckets = np.array([*(length for length in buckets if length < longest), longest])
        self.bucket_N = np.searchsorted(self.buckets, examples.length_N)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
        # Every epoch cuts as many captions of each bucket into items, so all have the same number of items.
        self.items_per_epoch = len(self._epoch(0))
        epochs, rest = divmod(total, self.per_epoch)
        sizes = np.cumsum([len(rows_KB) for rows_KB, _ in self._epoch(epochs)])
        last = int(np.searchsorted(sizes, rest))  # the item of the last epoch that has its last batch
        self._left = rest - int(sizes[last - 1]) if last else rest  # batches in it
        self._items = epochs * self.items_per_epoch + last + (rest > 0)

    def __len__(self) -> int:
        return self._items

    @property
    def per_epoch(self) -> int:
        """Batches in a pass over the examples."""
        return per_epoch(self.examples, self.batch_size)

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        epoch, number = divmod(int(k), self.items_per_epoch)
        rows_KB, length = self._epoch(epoch)[number]
        seen_KB = self.examples.photo_N[rows_KB] * self.views  # rows of what is fetched
        if self.views > 1:
            seen_KB += np.random.default_rng([self.seed, int(k), 1]).integers(self.views, size=rows_KB.shape, dtype=np.int32)
        share = self.batch_size // self.hosts
        here = (slice(self._left if k == self._items - 1 and self._left else None),
                slice(self.host * share, (self.host + 1) * share))
        rows_BK, seen_BK = rows_KB[here].T, seen_KB[here].T
        seen = self.fetch(seen_BK.reshape(-1))
        tokens_BCKT1 = self.examples.tokens_NCT1[rows_BK, :, :length + 2].swapaxes(1, 2)
        return {"tokens_BT1": tokens_BCKT1.reshape(-1, *tokens_BCKT1.shape[2:]),
                self.kind: seen.reshape(*seen_BK.shape, *seen.shape[1:]),
                **({"photo_B": self.examples.photo_N[rows_BK]} if self.numbered else {})}

    def _make_epoch(self, epoch: int) -> list[tuple[np.ndarray, int]]:
        """Items, each as the numbers of its examples [K, B] and the words that they are padded to."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.bucket_N))
        if len(order) < self.batch_size:  # a handful of examples still makes a batch
            order = np.resize(order, self.batch_size)
        items, left = [], order[:0]
        for bucket, length in enumerate(self.buckets):
            # What a shorter bucket has over goes into the next longer one, so that nothing but the last rest waits.
            rows = np.concatenate([left, order[self.bucket_N[order] == bucket]])
            size = self.together * self.batch_size
            full = len(rows) // size
            items += [(part.reshape(self.together, -1), int(length)) for part in rows[:full * size].reshape(full, size)]
            left = rows[full * size:]
        if len(left) >= self.batch_size:
            left = left[:len(left) // self.batch_size * self.batch_size]
            items.append((left.reshape(-1, self.batch_size), int(self.buckets[-1])))
        return [items[i] for i in random.permutation(len(items))]

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_epoch"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)


def per_epoch(examples: Examples, batch_size: int) -> int:
    """Whole batches in a pass over the examples, at least one."""
    return max(len(examples.photo_N) // batch_size, 1)


def iterate(batches: Batches, *, workers: int = 0) -> grain.DatasetIterator:
    """grain's iterator over the items of `batches`: prefetching, and with a position (`get_state`, `set_state`).

    `workers` processes decode records; it only pays where photos are read from records, not for resident data.
    """
    dataset = grain.MapDataset.source(batches).to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers ask absl for its flags, which only absl's own main() parses
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)
