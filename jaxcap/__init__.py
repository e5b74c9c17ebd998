"""jaxcap: train image captioners fast. Show and Tell (2014 → 2016) in JAX and Flax.

Dimensions are written as suffixes of array names, one letter each, everywhere in the package:

    B batch    T time (tokens)    H W C image height, width, channels
    P feature positions           F feature channels
    E embedding    D hidden units    V vocabulary    K beam
    N photos of a data set that is resident on the device

so `image_BHWC`, `features_BPF`, `tokens_BT`, `logits_BTV`.
"""

from jaxcap import errors

__version__ = "0.1.0"

errors.end_at_interrupt()
