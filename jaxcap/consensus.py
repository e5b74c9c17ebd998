"""Of the captions that a search found, the one with which the others agree most.

The likeliest caption of a wide beam is short and says little. What many of the beam's captions say in one form or another is
more likely still: the caption nearest to all of them has the least expected loss (minimum Bayes risk, Kumar and Byrne 2004;
for captions of photos Devlin et al. 2015, arXiv 1505.04467).
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxcap import cider
from jaxcap.search import NEVER, Captions, ordered
from jaxcap.vocab import EOS, PAD


def rank(found: Captions) -> Captions:
    """The captions of each photo in the order of their expected agreement with a caption of the beam, best first.

    A caption counts as often as its score says: softmax of log-probability / length ** normalization over the beam.
    """
    exists_BK = found.scores_BK > NEVER
    share_BK = jax.nn.softmax(found.scores_BK)
    expected_BK = jnp.einsum("bij,bj->bi", agreement(found.tokens_BKT, found.finished_BK), share_BK)
    return ordered(found, jnp.argsort(-jnp.where(exists_BK, expected_BK, NEVER), axis=1, stable=True))


def agreement(tokens_BKT: Array, finished_BK: Array) -> Array:
    """How alike a photo's captions are, [B, K, K] from 0 to 1: the F-measure of their n-grams, mean over n = 1 … 4.

    An n-gram that stands several times in both counts as often as in the one that has it less often. The end is a word.
    """
    B, K, T = tokens_BKT.shape
    words_BKT = jnp.pad(tokens_BKT, ((0, 0), (0, 0), (0, 1)))
    length_BK1 = (words_BKT != PAD).sum(axis=2, keepdims=True)
    words_BKT = jnp.where((jnp.arange(T + 1) == length_BK1) & finished_BK[:, :, None], EOS, words_BKT)
    one_BKT, other_BKT = (jnp.where(words_BKT == PAD, fill, words_BKT) for fill in (cider.NO_WORD, cider.OTHER))

    def pairs(x, axis):
        return jnp.repeat(jnp.expand_dims(x, axis), K, axis).reshape(B * K * K, -1)

    own = cider.same_ngrams(one_BKT.reshape(B * K, -1), other_BKT.reshape(B * K, -1))
    shared = cider.same_ngrams(pairs(one_BKT, 2), pairs(other_BKT, 1))
    total_BKK = jnp.zeros((B, K, K))
    for own_NTT, shared_PTT in zip(own, shared):
        count_BKT = own_NTT.sum(axis=2).reshape(B, K, -1)
        ngrams_BK = (count_BKT > 0).sum(axis=2)
        count_PT = pairs(count_BKT, 2)
        both_BKK = (jnp.minimum(count_PT, shared_PTT.sum(axis=2)) / jnp.maximum(count_PT, 1)).sum(axis=1).reshape(B, K, K)
        total_BKK += 2 * both_BKK / jnp.maximum(ngrams_BK[:, :, None] + ngrams_BK[:, None], 1)
    return total_BKK / cider.ORDERS
