"""Shapes, the default: a small CNN and an LSTM learn scenes of coloured shapes from nothing.

    python -m jaxcap.train configs/shapes.py          (or make demo; it is what train does without arguments)

Needs nothing: the pictures are drawn on first use. The settings live in jaxcap/config.py, so that an installed jaxcap has them.
"""

from jaxcap.config import SHAPES

CONFIG = SHAPES
