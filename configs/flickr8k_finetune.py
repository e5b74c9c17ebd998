"""Flickr8k, the second phase of flickr8k_attention.py: EfficientNet-Lite2 learns too, from a run in which it was frozen.

    python -m jaxcap.train configs/flickr8k_attention.py --run-dir runs/attention
    python -m jaxcap.train configs/flickr8k_finetune.py start=runs/attention

Every photo is looked at once for its five captions, which makes fine-tuning possible without an accelerator.
"""

import dataclasses
import runpy
from pathlib import Path

from jaxcap.config import Augment, Optim, Phase

ATTENTION = runpy.run_path(str(Path(__file__).with_name("flickr8k_attention.py")))["CONFIG"]
CONFIG = dataclasses.replace(
    ATTENTION, name="flickr8k_finetune", batch_size=32, augment=Augment(flip=True),
    data=dataclasses.replace(ATTENTION.data, captions_per_photo=5, length_buckets=(14, 18)),
    phases=(Phase(name="everything", train="all", epochs=2,
                  optim=Optim(name="adam", learning_rate=5e-4, encoder_learning_rate_scale=0.1, schedule="cosine", warmup_steps=50,
                              label_smoothing=0.1)),))
