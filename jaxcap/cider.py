"""CIDEr-D (arXiv 1411.5726, section 4) of thousands of captions a second: the metric, and a reward for training.

It is what coco-caption's class `Cider` computes: n-grams of 1 to 4 words, TF-IDF over photos, clipped cosine, Gaussian
penalty on a difference in length, × 10. Captions are token ids, so that what a search or a sampler writes is scored as it is.
No n-gram is ever hashed or kept in a dictionary: how often one stands in a caption, or in a reference, is counted by
comparing places, and its document frequency is found in sorted tables.
"""

from collections.abc import Sequence

import numpy as np

ORDERS = 4  # n-grams of 1 to so many words
SIGMA = 6.0  # words; width of the penalty on a difference in length (equation 4)
_BLOCK = 1 << 15  # pairs of places compared at once, times 4: what stays in a processor's cache
NO_WORD, OTHER = -1, -2  # fill captions and references, and never equal one another


class CiderD:
    """Scores captions against references that were counted once.

    Args:
      references: for every photo its references, each a sequence of token ids ≥ 1; 0 is padding and left out. The document
        frequencies are those of these photos. An end marker that they hold is a word like any other: in a reward it belongs
        into references and captions alike, or a caption that breaks off costs nothing.

    Raises `ValueError` if there is no photo, or a photo without a reference.
    """

    def __init__(self, references: Sequence[Sequence[Sequence[int]]]):
        if not len(references) or not all(len(texts) for texts in references):
            raise ValueError("CIDEr-D needs at least one photo, and at least one reference for each")
        self._photos = len(references)
        self.unseen = np.log(self._photos)  # weight of an n-gram that no reference holds, as if one photo's did
        counts_N = np.array([len(texts) for texts in references])
        self.first_N, self.count_N = np.cumsum(counts_N) - counts_N, counts_N
        captions = [np.asarray(text, np.int64) for texts in references for text in texts]
        tokens_RT = _rows(captions)
        self.base = int(tokens_RT.max(initial=0)) + 1
        self.tokens_RT = tokens_RT.astype(np.int32)
        self.length_R = (tokens_RT != NO_WORD).sum(axis=1)
        self.keys, self.idf = [], []
        photo_R = np.repeat(np.arange(self._photos), counts_N)
        ids_RT = np.zeros_like(tokens_RT)
        for n in range(1, ORDERS + 1):
            keys_RT = self._join(ids_RT, tokens_RT, n)
            known_RT = keys_RT >= 0
            keys, ids = np.unique(keys_RT[known_RT], return_inverse=True)
            pairs = np.unique(ids * self._photos + np.broadcast_to(photo_R[:, None], keys_RT.shape)[known_RT])
            self.keys.append(keys)
            self.idf.append(self.unseen - np.log(np.bincount(pairs // self._photos, minlength=len(keys))))
            ids_RT = np.full_like(keys_RT, -1)
            ids_RT[known_RT] = ids
        self.norm_RO = np.concatenate([np.sqrt(self._squares(block)[0])
                                        for block in np.array_split(tokens_RT, -(-len(tokens_RT) // 1024))])

    def __call__(self, captions: np.ndarray | Sequence[Sequence[int]], photos: Sequence[int]) -> np.ndarray:
        """Scores float64 [N], 0 to 10, of captions: ids [N, T] padded with 0, or sequences of ids.

        photos: for every caption the number of its photo, in the order of `references`; as many captions a photo as one likes.
        """
        photos_N = np.asarray(photos, np.int64)
        tokens_NT = _rows(captions)
        if len(tokens_NT) != len(photos_N):
            raise ValueError(f"{len(tokens_NT)} captions of {len(photos_N)} photos: each needs its photo's number")
        places = max(tokens_NT.shape[1], 1) * max(self.tokens_RT.shape[1], 1) * max(int(self.count_N.max()), 1)
        block = max(_BLOCK * 4 // places, 1)
        scores = [self._score(tokens_NT[start:start + block], photos_N[start:start + block])
                  for start in range(0, len(tokens_NT), block)]
        return np.concatenate(scores) if scores else np.zeros(0)

    def _score(self, tokens_NT: np.ndarray, photos_N: np.ndarray) -> np.ndarray:
        squares_NO, weights, counts = self._squares(tokens_NT)
        # A row a pair of caption and reference: n is the caption's row, r the reference's.
        count_N = self.count_N[photos_N]
        n_P = np.repeat(np.arange(len(tokens_NT)), count_N)
        r_P = np.arange(len(n_P)) - np.repeat(np.cumsum(count_N) - count_N, count_N) + self.first_N[photos_N][n_P]
        length_N, length_P = (tokens_NT != NO_WORD).sum(axis=1), self.length_R[r_P]
        other_PT = self.tokens_RT[r_P, :length_P.max(initial=1)].astype(np.int32)
        other_PT[other_PT == NO_WORD] = OTHER
        dots_PO = np.zeros((len(n_P), ORDERS))
        for n, same_PTT in enumerate(same_ngrams(tokens_NT.astype(np.int32)[n_P], other_PT)):
            in_other_PT = same_PTT.sum(axis=2, dtype=np.int16).astype(np.float64)
            # Σ over n-grams of min(g, h) · h with g, h = TF-IDF here and there, spread over the places where one stands.
            clipped_PT = np.minimum(counts[n][n_P], in_other_PT)
            dots_PO[:, n] = (clipped_PT * in_other_PT * weights[n][n_P]).sum(axis=1)
        norms_PO = np.sqrt(squares_NO)[n_P] * self.norm_RO[r_P]
        similar_P = np.divide(dots_PO, norms_PO, out=np.zeros_like(dots_PO), where=norms_PO > 0).mean(axis=1)
        # coco-caption measures length in bigrams, so that no word and one word are equally long.
        difference_P = np.maximum(length_N[n_P], 1) - np.maximum(length_P, 1)
        similar_P *= np.exp(-(difference_P**2) / (2 * SIGMA**2))
        return 10 * np.bincount(n_P, similar_P, minlength=len(tokens_NT)) / count_N

    def _squares(self, tokens_NT: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Squared TF-IDF norms [N, order]; and for each order, by place, idf² / count of the n-gram there, and its count."""
        N, T = tokens_NT.shape
        squares_NO, weights, counts = np.zeros((N, ORDERS)), [], []
        ids_NT = np.zeros_like(tokens_NT)
        other_NT = np.where(tokens_NT == NO_WORD, OTHER, tokens_NT)
        for n, same_NTT in enumerate(same_ngrams(tokens_NT, other_NT), start=1):
            ids_NT, idf_NT = self._find(self._join(ids_NT, tokens_NT, n), n)
            count_NT = same_NTT.sum(axis=2, dtype=np.int16).astype(np.float64)
            idf2_NT = idf_NT[:, :count_NT.shape[1]] ** 2
            squares_NO[:, n - 1] = (count_NT * idf2_NT).sum(axis=1)
            weights.append(idf2_NT / np.maximum(count_NT, 1))
            counts.append(count_NT)
        return squares_NO, weights, counts

    def _join(self, ids_NT: np.ndarray, tokens_NT: np.ndarray, n: int) -> np.ndarray:
        """Keys of the n-grams that begin at each place, from the ids of those a word shorter; -1 where there is none."""
        last_NT = np.full_like(tokens_NT, NO_WORD)
        last_NT[:, :max(tokens_NT.shape[1] - n + 1, 0)] = tokens_NT[:, n - 1:]
        return np.where((ids_NT >= 0) & (last_NT >= 0) & (last_NT < self.base), ids_NT * self.base + last_NT, -1)

    def _find(self, keys_NT: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and idf of n-grams by their keys; -1 and the most where no reference holds one."""
        keys, idf = self.keys[n - 1], self.idf[n - 1]
        if not len(keys):
            return np.full_like(keys_NT, -1), np.full(keys_NT.shape, self.unseen)
        ids_NT = np.minimum(np.searchsorted(keys, keys_NT), len(keys) - 1)
        found_NT = keys[ids_NT] == keys_NT
        return np.where(found_NT, ids_NT, -1), np.where(found_NT, idf[ids_NT], self.unseen)


def _rows(captions: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
    """int64 [N, T] of ids, padding turned to `NO_WORD`; words stand at the front of each row."""
    texts = [row[row != 0] for row in (np.asarray(text, np.int64) for text in captions)]
    rows_NT = np.full((len(texts), max(map(len, texts), default=0)), NO_WORD, np.int64)
    for row, text in zip(rows_NT, texts):
        row[:len(text)] = text
    return rows_NT


def same_ngrams(one_NT: np.ndarray, other_NT: np.ndarray):
    """For n = 1 … `ORDERS`, bool [N, T - n + 1, T' - n + 1]: is the n-gram at this place the one at that place?

    Of NumPy's or JAX's arrays, with any axes before T that broadcast; padding is `NO_WORD` in one of them and `OTHER` in the other.
    """
    words_NTT = same_NTT = one_NT[..., :, None] == other_NT[..., None, :]
    yield same_NTT
    for n in range(1, ORDERS):
        same_NTT = same_NTT[..., :-1, :-1] & words_NTT[..., n:, n:]
        yield same_NTT
