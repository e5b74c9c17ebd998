"""Speed, measured: `step_time` (training steps), `decode` (captions), `convolutions` (an encoder's layers), and what `on_gpu.sh` runs
beside them.

Records and their rules are in RECORDS.md. Nothing here but `speedrun`, `input` and `step_time --input real` needs data, weights,
grain or TensorFlow Datasets: the arithmetic is jaxcap's own, the numbers it works on are random.
"""

import jaxcap  # noqa: F401  before anything slow, so that Ctrl-C ends a benchmark that is still being imported
