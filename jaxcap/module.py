"""The base of modules with parameters."""

from typing import Any

from flax import linen as nn


class Module(nn.Module):
    """flax's, that takes a parameter which is there as it is.

    flax traces its initializer to compare shapes: a third to two thirds of the time in which an encoder is traced. Here shapes are compared
    where weights and checkpoints are read.
    """

    @nn.nowrap
    def param(self, name: str, *initializer: Any, **options: Any) -> Any:
        there = self.get_variable("params", name)
        return super().param(name, *initializer, **options) if there is None else there
