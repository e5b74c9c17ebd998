"""Flickr8k, EfficientNet-Lite2 frozen, LSTM 512 that reads the photo's mean feature with every word.

    python -m jaxcap.prepare flickr8k --source DIR --size 260
    python -m jaxcap.train configs/flickr8k_every.py

With beam 3 as good as attention (BLEU-4 20.9 ± 0.4 on val, three seeds) at the cost of an image-first step: two minutes of
training on two CPU cores; see docs/RESULTS.md. Products are bfloat16's where the machine has instructions for them.
"""

from jaxcap.config import Config, Data, Decoder, Encoder, Optim, Phase, Search

CONFIG = Config(
    name="flickr8k_every",
    batch_size=64,
    data=Data(name="flickr8k", size=260, max_words=24, length_buckets=(8, 10, 12, 15)),
    encoder=Encoder(name="efficientnet_lite2", weights="imagenet"),
    decoder=Decoder(image="every", deep_output=True, embedding=512, hidden=512, dropout=0.5, standardize=True, deviations=12.0,
                    dtype="bfloat16"),
    phases=(Phase(name="decoder", train="decoder", epochs=3,
                  optim=Optim(name="adam", learning_rate=2e-3, schedule="cosine", warmup_steps=100, label_smoothing=0.1)),),
    search=Search(beam=3, length_normalization=0.5),
)
