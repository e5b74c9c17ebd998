"""Flickr8k to BLEU-4 19.5 in the least time: the settings of `python -m benchmarks.speedrun`.

    python -m benchmarks.speedrun --source DIR

configs/flickr8k_lite2.py with a GRU and two epochs at a higher rate, scored only at its end, with the caption that ten agree on.
Products are bfloat16's where the machine has instructions for them.
"""

import dataclasses
import runpy
from pathlib import Path

from jaxcap.config import Checkpoints, Search

LITE2 = runpy.run_path(str(Path(__file__).with_name("flickr8k_lite2.py")))["CONFIG"]
(PHASE,) = LITE2.phases
CONFIG = dataclasses.replace(
    LITE2, name="flickr8k_speedrun", encoder=dataclasses.replace(LITE2.encoder, dtype="bfloat16"),
    decoder=dataclasses.replace(LITE2.decoder, name="gru", dtype="bfloat16"),
    phases=(dataclasses.replace(PHASE, epochs=2, optim=dataclasses.replace(PHASE.optim, learning_rate=2.5e-3)),),
    search=Search(beam=10, length_normalization=0.5, consensus=True), checkpoints=Checkpoints(every_epochs=100, keep=1), eval_during=False)
