"""The forms of PyTorch's step: words that may be combined, as in channels_last+fused. Nothing here imports torch."""

from jaxcap.errors import UserError

EAGER = "eager"
WORDS = {
    "channels_last": "photos and filters with the channels last in memory",
    "unfolded": "batch norm of a frozen network computed, not folded into its filters",
    "merged": "the 1×1 convolutions that start a block's branches computed as one, as jaxcap does",
    "loop": "the LSTM step by step, its gradient written out, in place of nn.LSTM",
    "onednn": "products outside the LSTM by oneDNN (PyTorch's own are MKL's); a frozen network's ReLUs in its convolutions",
    "sparse": "a sparse gradient of the word embedding",
    "fused": "torch.optim.SGD(fused=True) in place of foreach operations",
    "compile": "torch.compile of everything up to the loss, and so of the backward pass",
    "overhead": 'compile with mode="reduce-overhead": CUDA graphs of forward and backward',
    "graph": "the whole step, update included, captured as one CUDA graph",
}
# Words that mean something only on one platform, with photos, in training, in a network that is frozen.
_CPU, _CUDA = {"onednn"}, {"overhead", "graph"}
_PHOTOS, _TRAIN, _FROZEN = {"channels_last", "unfolded", "merged"}, {"sparse", "fused"}, {"unfolded"}
_APART = (("sparse", "graph"), ("sparse", "overhead"), ("sparse", "compile"), ("onednn", "compile"), ("overhead", "graph"),
          ("overhead", "compile"))
CPU = {
    "cached": ("eager", "loop", "onednn", "onednn+sparse", "onednn+sparse+fused", "compile", "compile+loop"),
    "eval": ("eager", "channels_last", "channels_last+unfolded", "channels_last+onednn", "channels_last+merged+onednn"),
    "frozen": ("eager", "channels_last", "channels_last+unfolded", "channels_last+onednn", "channels_last+merged+onednn",
               "channels_last+compile"),
    "joint": ("eager", "channels_last", "channels_last+onednn", "channels_last+merged+onednn", "channels_last+compile"),
}
CUDA = {
    "cached": ("eager", "sparse", "fused", "graph+fused", "compile+fused", "compile+loop+fused", "overhead+fused",
               "compile+graph+fused", "compile+loop+graph+fused"),
    "eval": ("eager", "channels_last", "channels_last+graph", "channels_last+compile", "channels_last+compile+graph",
             "channels_last+merged+compile+graph"),
    "frozen": ("eager", "channels_last", "channels_last+fused", "channels_last+graph+fused", "channels_last+compile+fused",
               "channels_last+overhead+fused", "channels_last+compile+graph+fused", "channels_last+merged+compile+graph+fused"),
    "joint": ("eager", "channels_last", "channels_last+fused", "channels_last+graph+fused", "channels_last+compile+fused",
              "channels_last+overhead+fused", "channels_last+compile+graph+fused"),
}


def parse(form: str) -> frozenset[str]:
    """The words of a form; "eager" is none. Raises `UserError` for words that are unknown or exclude each other."""
    words = [word for word in form.split("+") if word != EAGER]
    for word in words:
        if word not in WORDS:
            raise UserError(f"--forms {form}: there is no {word!r}; a form is eager or some of {', '.join(WORDS)}, joined by +")
    for one, other in _APART:
        if {one, other} <= set(words):
            raise UserError(f"--forms {form}: {one} and {other} do not go together")
    return frozenset(words)


def wanted(kind: str, platform: str, dtype: str, given: list[str] | None = None) -> list[str]:
    """The forms to try of a kind of step on "cpu" or "gpu": the given ones, else the tables', as far as they mean something."""
    without = _CUDA if platform == "cpu" else _CPU
    if dtype == "bfloat16":
        without = without | _CPU  # PyTorch's own products in it are oneDNN's
    without = without | {"cached": _PHOTOS, "eval": _TRAIN, "joint": _FROZEN}.get(kind, set())
    return [form for form in given or (CUDA if platform == "gpu" else CPU)[kind] if not parse(form) & without]
