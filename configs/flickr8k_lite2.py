"""Flickr8k, EfficientNet-Lite2 frozen + LSTM 512 (Show and Tell), from cached features."""

from jaxcap.config import Checkpoints, Config, Data, Decoder, Encoder, Optim, Phase, Search

CONFIG = Config(
    name="flickr8k_lite2",
    batch_size=64,
    data=Data(name="flickr8k", size=260, max_words=24, length_buckets=(8, 10, 12, 15, 24)),
    encoder=Encoder(name="efficientnet_lite2", weights="package"),
    decoder=Decoder(embedding=512, hidden=512, dropout=0.5),
    phases=(Phase(name="decoder", train="decoder", epochs=10,
                  optim=Optim(name="adam", learning_rate=1e-3, schedule="cosine", warmup_steps=100)),),
    search=Search(beam=3),
)
