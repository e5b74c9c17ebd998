"""The forms of a peer's step: words that may be combined, as in channels_last+fused. Nothing here imports a peer's library."""

from dataclasses import dataclass

from jaxcap.errors import UserError

EAGER = "eager"
BEAM = "beam"  # beside the kinds of step of `benchmarks.workload`: captions from features


@dataclass(frozen=True)
class Library:
    """A library to compare with. words: what a form is made of, each with its meaning. senseless: those that mean nothing on a
    platform, in a kind of step or in a dtype. apart: pairs that exclude each other. forms: those worth trying, by platform and kind.
    """

    name: str
    package: str
    words: dict[str, str]
    senseless: dict[str, set[str]]
    apart: tuple[tuple[str, str], ...]
    forms: dict[str, dict[str, tuple[str, ...]]]


TORCH = Library(
    "PyTorch", "torch",
    words={
        "channels_last": "photos and filters with the channels last in memory",
        "unfolded": "batch norm of a frozen network computed, not folded into its filters",
        "merged": "the 1×1 convolutions that start a block's branches computed as one, as jaxcap does",
        "loop": "the LSTM step by step, its gradient written out, in place of nn.LSTM",
        "onednn": "products outside the LSTM by oneDNN (PyTorch's own are MKL's); a frozen network's ReLUs in its convolutions",
        "sparse": "a sparse gradient of the word embedding",
        "fused": "torch.optim.SGD(fused=True) in place of foreach operations",
        "compile": "torch.compile of everything up to the loss, and so of the backward pass",
        "overhead": 'compile with mode="reduce-overhead": CUDA graphs of forward and backward',
        "graph": "the whole step, update included, or the whole search captured as one CUDA graph",
        "lists": "captions photo by photo, the beam in Python's lists, as im2txt's generator does it; otherwise all together",
    },
    senseless={
        "cpu": {"overhead", "graph"}, "gpu": {"onednn"}, "bfloat16": {"onednn"},  # PyTorch's own products in it are oneDNN's
        "cached": {"channels_last", "unfolded", "merged", "lists"}, "eval": {"sparse", "fused", "lists"}, "frozen": {"lists"},
        "joint": {"unfolded", "lists"}, BEAM: {"channels_last", "unfolded", "merged", "loop", "sparse", "fused", "overhead"},
    },
    apart=(("sparse", "graph"), ("sparse", "overhead"), ("sparse", "compile"), ("onednn", "compile"), ("overhead", "graph"),
           ("overhead", "compile"), ("lists", "compile"), ("lists", "graph")),
    forms={
        "cpu": {
            "cached": ("eager", "loop", "onednn", "onednn+sparse", "onednn+sparse+fused", "compile", "compile+loop"),
            "eval": ("eager", "channels_last", "channels_last+unfolded", "channels_last+onednn", "channels_last+merged+onednn"),
            "frozen": ("eager", "channels_last", "channels_last+unfolded", "channels_last+onednn", "channels_last+merged+onednn",
                       "channels_last+compile"),
            "joint": ("eager", "channels_last", "channels_last+onednn", "channels_last+merged+onednn", "channels_last+compile"),
            BEAM: ("lists", "eager", "onednn", "compile"),
        },
        "gpu": {
            "cached": ("eager", "sparse", "fused", "graph+fused", "compile+fused", "compile+loop+fused", "overhead+fused",
                       "compile+graph+fused", "compile+loop+graph+fused"),
            "eval": ("eager", "channels_last", "channels_last+graph", "channels_last+compile", "channels_last+compile+graph",
                     "channels_last+merged+compile+graph"),
            "frozen": ("eager", "channels_last", "channels_last+fused", "channels_last+graph+fused", "channels_last+compile+fused",
                       "channels_last+overhead+fused", "channels_last+compile+graph+fused",
                       "channels_last+merged+compile+graph+fused"),
            "joint": ("eager", "channels_last", "channels_last+fused", "channels_last+graph+fused", "channels_last+compile+fused",
                      "channels_last+overhead+fused", "channels_last+compile+graph+fused"),
            BEAM: ("lists", "eager", "graph", "compile+graph"),
        },
    })

_KERAS = {
    "cached": ("eager", "function", "function+unroll", "function+sparse", "function+unroll+sparse", "xla", "xla+unroll"),
    "eval": ("eager", "function", "function+unfolded", "function+unroll", "xla"),
    "frozen": ("eager", "function", "function+unfolded", "function+unroll", "function+unroll+sparse", "xla"),
    "joint": ("eager", "function", "function+unroll", "function+fused_norm", "function+unroll+fused_norm+sparse", "xla"),
}
KERAS = Library(
    "Keras", "tensorflow",
    words={
        "function": "the whole step one tf.function, as Keras's fit() makes it",
        "xla": "the same, compiled by XLA (jit_compile=True)",
        "unfolded": "batch norm of a frozen network computed, not folded into its filters",
        "unroll": "keras.layers.LSTM(unroll=True): step after step in place of a loop",
        "fused_norm": "batch norm of a network that learns by TensorFlow's one operation for it, in place of Keras's own",
        "sparse": "a sparse gradient of the word embedding",
    },
    senseless={
        "cached": {"unfolded", "fused_norm"}, "eval": {"sparse", "fused_norm"}, "frozen": {"fused_norm"}, "joint": {"unfolded"},
    },
    apart=(("function", "xla"), ("sparse", "xla")),
    forms={"cpu": _KERAS, "gpu": _KERAS})

LIBRARIES = {"torch": TORCH, "keras": KERAS}


def parse(library: str, form: str) -> frozenset[str]:
    """The words of a form; "eager" is none, and KIND: before them is passed over.

    Raises `UserError` for words that are unknown or exclude each other.
    """
    of = LIBRARIES[library]
    words = [word for word in form.rpartition(":")[2].split("+") if word != EAGER]
    for word in words:
        if word not in of.words:
            raise UserError(f"--forms {form}: there is no {word!r} for {of.name}; a form is eager or some of "
                            f"{', '.join(of.words)}, joined by +")
    for one, other in of.apart:
        if {one, other} <= set(words):
            raise UserError(f"--forms {form}: {one} and {other} do not go together")
    return frozenset(words)


def wanted(library: str, kind: str, platform: str, dtype: str, given: list[str] | None = None) -> list[str]:
    """The forms to try of a kind of step on "cpu" or "gpu": the given ones, else the tables', as far as they mean something.

    A given form may be KIND:FORM, for that kind alone. None where the library has nothing to compare with: Keras no search.
    """
    of = LIBRARIES[library]
    without = set().union(*(of.senseless.get(where, set()) for where in (kind, platform, dtype)))
    if kind not in of.forms[platform]:
        return []
    forms = [form.rpartition(":") for form in given or of.forms[platform][kind]]
    return [form for only, _, form in forms if only in ("", kind) and not parse(library, form) & without]
