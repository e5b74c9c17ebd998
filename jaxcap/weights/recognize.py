"""Which network a weights file is of, and whose names its tensors have."""

import numpy as np
from flax.traverse_util import flatten_dict

from jaxcap import encoders
from jaxcap.weights import Entry, PyTree

_OURS = ("params/", "batch_stats/")


def table(tensors: dict[str, np.ndarray], spec: encoders.EncoderSpec, variables: PyTree) -> dict[str, Entry]:
    """The table of `spec` that knows the most of the tensors' names; `variables` stand for our own names."""
    own = {path: Entry(path) for path in (*flatten_dict(variables, sep="/"), "classifier/kernel", "classifier/bias")}
    tables = [make() for make in spec.tables.values()] + [own]
    return max(tables, key=lambda table: len(table.keys() & tensors.keys()))


def network(tensors: dict[str, np.ndarray]) -> str | None:
    """The name of the encoder whose published names and shapes, or ours, these tensors have, None if there is none."""
    likeness = {name: _likeness(tensors, encoders.get(name)) for name in encoders.names()}
    likeliest = sorted(likeness, key=likeness.get, reverse=True)[:3]
    if likeness[likeliest[0]][1] == 0:
        likeliest = likeliest[:1]  # shapes take half a second, so of the others only if something is missing
    best, best_share = None, 0.0
    for name in likeliest:
        variables = shapes(encoders.get(name))
        sizes = {path: leaf.size for path, leaf in flatten_dict(variables, sep="/").items()}
        fitting = sum(their_name in tensors and tensors[their_name].size == sizes.get(entry.path)
                      for their_name, entry in table(tensors, encoders.get(name), variables).items())
        share = fitting / (len(sizes) + len(tensors) - fitting)
        if fitting > 0.5 * len(sizes) and share > best_share:
            best, best_share = name, share
    return best


def _likeness(tensors: dict[str, np.ndarray], spec: encoders.EncoderSpec) -> tuple[float, int]:
    """Two measures, the more the likelier: the share of names in common, and minus the difference in number of values."""
    ours = {name: Entry(name) for name in tensors if name.startswith(_OURS)}
    tables = [make() for make in spec.tables.values()] + [ours]
    known = max(tables, key=lambda table: len(table.keys() & tensors.keys()))
    values = sum(tensors[name].size for name, entry in known.items() if name in tensors and entry.path.startswith(_OURS))
    return len(known.keys() & tensors.keys()) / (len(known.keys() | tensors.keys()) or 1), -abs(values - spec.parameters)


def shapes(spec: encoders.EncoderSpec) -> PyTree:
    """Shapes of an encoder's variables, as `jaxcap.weights.load` takes them."""
    return encoders.shapes(spec.module(), spec.image_size)
