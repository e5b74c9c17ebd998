"""Flickr8k to BLEU-4 19.5 in the least time: the settings of `python -m benchmarks.speedrun`.

    python -m benchmarks.speedrun --source DIR

configs/flickr8k_attention.py, scored only at its end.
"""

import dataclasses
import runpy
from pathlib import Path

from jaxcap.config import Checkpoints

ATTENTION = runpy.run_path(str(Path(__file__).with_name("flickr8k_attention.py")))["CONFIG"]
CONFIG = dataclasses.replace(ATTENTION, name="flickr8k_speedrun", checkpoints=Checkpoints(every_epochs=100, keep=1), eval_during=False)
