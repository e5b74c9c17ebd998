"""Flickr8k, EfficientNet-Lite2 frozen, LSTM 512 with soft attention over its 9 × 9 map (Show, Attend and Tell).

    python -m jaxcap.prepare flickr8k --source DIR --size 260
    python -m jaxcap.train configs/flickr8k_attention.py

BLEU-4 20.8 ± 0.3 on val (three seeds); see docs/RESULTS.md. The maps are computed once and kept in float16: 1.5 GB for
train and val.
"""

from jaxcap.config import Attention, Config, Data, Decoder, Encoder, Optim, Phase, Search

CONFIG = Config(
    name="flickr8k_attention",
    batch_size=64,
    data=Data(name="flickr8k", size=260, max_words=24, length_buckets=(8, 10, 12, 15)),
    encoder=Encoder(name="efficientnet_lite2", weights="imagenet"),
    decoder=Decoder(image="attention", attention=Attention(size=256, dropout=0.3), deep_output=True, embedding=512, hidden=512,
                    dropout=0.5, standardize=True),
    phases=(Phase(name="decoder", train="decoder", epochs=3,
                  optim=Optim(name="adam", learning_rate=2e-3, schedule="cosine", warmup_steps=100, label_smoothing=0.1)),),
    search=Search(beam=3, length_normalization=0.5),
)
