"""jaxcap: train image captioners fast. Show and Tell (2014 → 2016) in JAX and Flax.

Dimensions are written as suffixes of array names, one letter each, everywhere in the package:

    B batch    T time (tokens)    H W C image height, width, channels
    P feature positions           F feature channels
    E embedding    D hidden units    V vocabulary    K beam
    N photos of a data set that is resident on the device

so `image_BHWC`, `features_BPF`, `tokens_BT`, `logits_BTV`.
"""

from pathlib import Path
from typing import Any

from jaxcap import errors

__version__ = "0.1.0"

errors.end_at_interrupt()


def load(directory: str | Path, **search: Any):
    """A trained run to call with photos, from its best checkpoint: a `jaxcap.caption.Writer`.

        write = jaxcap.load("runs/flickr8k", beam=10)
        for caption in write("beach.jpg", "dog.jpg"):
            print(caption.text, caption.log_prob)

    search: settings of the search that are not to be as the run's config.json says. Compiled programs are kept as commands keep
    them. Raises `errors.UserError` for what is missing, damaged, or no setting.
    """
    from jaxcap import caption, config, parallel, runs  # which import jax

    parallel.keep_programs()
    run = runs.load(Path(directory))
    described = config.to_dict(run.config)
    return caption.Writer(run, config.from_dict({**described, "search": {**described["search"], **search}}).search)
