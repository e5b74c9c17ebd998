"""A whole im2txt checkpoint, with its vocabulary, into a run of jaxcap's own that captions photos.

The gates of its LSTM stand in the order i, j, f, o, as ours do; its forget bias of 1 is added when the step is computed.
"""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxcap import captioner as captioners
from jaxcap import encoders, runs, vocab, weights
from jaxcap.checkpoints import Checkpoints
from jaxcap.config import Augment, Config, Data, Decoder, Encoder, Optim, Phase, Search, Vocabulary
from jaxcap.errors import UserError
from jaxcap.step import TrainState
from jaxcap.vocab import PAD
from jaxcap.weights import PyTree, recognize

_LSTM = ("lstm/basic_lstm_cell", "lstm/BasicLSTMCell/Linear", "lstm/basic_lstm_cell/Linear")  # by age, the newest first
_TENSORS = {  # ours → theirs, by age
    "image_embedding": ("image_embedding/weights",),
    "word_embedding": ("seq_embedding/map",),
    "lstm_kernel": tuple(f"{scope}/{name}" for scope in _LSTM for name in ("kernel", "weights", "Matrix")),
    "lstm_bias": tuple(f"{scope}/{name}" for scope in _LSTM for name in ("bias", "biases", "Bias")),
    "logits_kernel": ("logits/weights",),
    "logits_bias": ("logits/biases",),
}
_START, _END, _UNKNOWN = "<S>", "</S>", "<UNK>"
_NEVER = 30.0  # nats by which the logit of padding, which im2txt does not have, is below all others


def import_run(checkpoint: Path, word_counts: Path, directory: Path) -> runs.Run:
    """Makes the run `directory` from a checkpoint of im2txt and its word_counts.txt, and returns it.

    Raises `UserError` if either cannot be read, they do not belong together, or `directory` holds something already.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already; name a new directory with --run")
    tensors = weights.read(checkpoint)
    vocabulary, their_ids = read_word_counts(word_counts)
    decoder = _decoder(tensors, their_ids, checkpoint, word_counts)
    spec = encoders.get("inception_v3")
    encoder = weights.assign(tensors, spec.tables["tf_slim"](), recognize.shapes(spec),
                             f"{checkpoint} does not hold the weights of {spec.name}")
    configuration = _config(directory.name, embedding=decoder["word_embedding"].shape[1], hidden=decoder["lstm_bias"].size // 4)
    captioner = captioners.build(configuration, len(vocabulary))
    wanted, _ = captioner.shapes(spec.image_size)
    problems = [f"{name} {list(decoder[name].shape)}" for name, leaf in wanted["decoder"].items() if decoder[name].shape != leaf.shape]
    if problems:
        raise UserError(f"{checkpoint} holds a decoder whose parts do not fit each other: {', '.join(problems)}")
    step = int(tensors.get("global_step", 0))
    state = TrainState(jnp.int32(step), {"encoder": encoder["params"], "decoder": jax.tree.map(jnp.asarray, decoder)},
                       encoder["batch_stats"], (), jax.random.PRNGKey(0))
    runs.create(directory, configuration, vocabulary)
    keeper = Checkpoints(directory / "checkpoints", configuration.checkpoints)
    keeper.save(state, {"step": step, "phase": 1, "phase_step": 0, "data": None, "smoothed": None, "words": len(vocabulary)})
    keeper.close()
    return runs.load(directory)


def read_word_counts(path: Path) -> tuple[vocab.Vocab, np.ndarray]:
    """The vocabulary of a word_counts.txt, and im2txt's id of each of our words (-1 for padding, which it does not have).

    A line is `word count`, or `b'word' count` where Python 3 wrote it; im2txt's id of a word is the number of its line, and that
    of unknown words comes after the last one. Raises `UserError` naming the line that is wrong.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    ids, counts = {}, {}
    for number, line in enumerate(lines):
        word, _, count = line.strip().rpartition(" ")
        try:
            word = ast.literal_eval(word).decode() if word.startswith(("b'", 'b"')) and len(word) > 3 else word
            counts[word] = int(count)
        except (ValueError, SyntaxError, AttributeError):
            word = ""
        if not word or word in ids:
            raise UserError(f"{path}, line {number + 1}: expected `word count`, each word once, as im2txt's word_counts.txt has "
                            f"it, found {line[:60]!r}")
        ids[word] = number
    missing = [word for word in (_START, _END) if word not in ids]
    if missing:
        raise UserError(f"{path} is no word_counts.txt of im2txt: it has no {' and no '.join(missing)}")
    unknown = ids.get(_UNKNOWN, len(ids))
    words = [word for word in ids if word not in (_START, _END, _UNKNOWN)]
    clash = [word for word in words if word in vocab.SPECIAL]
    if clash:
        raise UserError(f"{path} has the word {clash[0]}, which jaxcap uses for itself")
    special = (0, counts[_START], counts[_END], counts.get(_UNKNOWN, 0))
    vocabulary = vocab.Vocab((*vocab.SPECIAL, *words), (*special, *(counts[word] for word in words)))
    return vocabulary, np.array([-1, ids[_START], ids[_END], unknown, *(ids[word] for word in words)])


def _decoder(tensors: dict[str, np.ndarray], their_ids: np.ndarray, checkpoint: Path, word_counts: Path) -> PyTree:
    """The decoder's parameters, rows and columns of words in our order; ids that no word has are left out."""
    found = {ours: next((tensors[name] for name in names if name in tensors), None) for ours, names in _TENSORS.items()}
    missing = [" or ".join(_TENSORS[ours]) for ours, tensor in found.items() if tensor is None]
    if missing:
        raise UserError(f"{checkpoint} is no checkpoint of im2txt: missing: {', '.join(missing)}")
    theirs = min(found["word_embedding"].shape[0], found["logits_bias"].shape[0])
    if their_ids.max() >= theirs:
        raise UserError(f"{word_counts} needs {their_ids.max() + 1} ids, and {checkpoint} was trained with {theirs}; they do not "
                        "belong together")
    decoder = {name: np.asarray(tensor, np.float32) for name, tensor in found.items()}
    lowest = decoder["logits_bias"].min()
    for name, axis in (("word_embedding", 0), ("logits_kernel", 1), ("logits_bias", 0)):
        decoder[name] = decoder[name].take(their_ids, axis=axis, mode="clip")
    decoder["word_embedding"][PAD] = 0
    decoder["logits_kernel"][:, PAD] = 0
    decoder["logits_bias"][PAD] = lowest - _NEVER
    return decoder


def _config(name: str, embedding: int, hidden: int) -> Config:
    """How im2txt trains and decodes; see configs/im2txt.py."""
    return Config(
        name=name,
        data=Data(name="coco", label="im2txt", size=346, max_words=40, workers=4),
        vocabulary=Vocabulary(min_count=4, max_size=12_000),
        encoder=Encoder(name="inception_v3", size=299, dropout=0.2),
        augment=Augment(crop=True, flip=True, color=True),
        decoder=Decoder(embedding=embedding, hidden=hidden, dropout=0.3, forget_bias=1.0),
        phases=(Phase("decoder", "decoder", steps=1_000_000,
                      optim=Optim("sgd", learning_rate=2.0, schedule="staircase", decay_rate=0.5, decay_epochs=8.0)),
                Phase("everything", "all", steps=2_000_000, batch_norm="batch",
                      optim=Optim("sgd", learning_rate=0.0005, encoder_l2=4e-5))),
        search=Search(beam=3, max_words=20, length_normalization=0.0),
    )
