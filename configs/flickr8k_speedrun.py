"""Flickr8k to BLEU-4 19.5 in the least time: the settings of `python -m benchmarks.speedrun`.

    python -m benchmarks.speedrun --source DIR

configs/flickr8k_attention.py, scored only at its end.
"""

from jaxcap.config import Attention, Checkpoints, Config, Data, Decoder, Encoder, Optim, Phase, Search

CONFIG = Config(
    name="flickr8k_speedrun",
    batch_size=64,
    data=Data(name="flickr8k", size=260, max_words=24, length_buckets=(8, 10, 12, 15)),
    encoder=Encoder(name="efficientnet_lite2", weights="imagenet"),
    decoder=Decoder(image="attention", attention=Attention(size=256, dropout=0.3), deep_output=True, embedding=512, hidden=512,
                    dropout=0.5, standardize=True),
    phases=(Phase(name="decoder", train="decoder", epochs=3,
                  optim=Optim(name="adam", learning_rate=2e-3, schedule="cosine", warmup_steps=100, label_smoothing=0.1)),),
    search=Search(beam=3, length_normalization=0.5),
    checkpoints=Checkpoints(every_epochs=100, keep=1),
    eval_during=False,
)
