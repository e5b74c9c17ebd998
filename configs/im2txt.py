"""im2txt, 2016: Inception V3 and LSTM 512 on COCO, both phases, every setting as released (arXiv 1609.06647 and its code).

    python -m jaxcap.prepare coco --source DIR --splits im2txt --size 346     (--download fetches COCO, about 20 GB)
    python -m jaxcap.train configs/im2txt.py

Published: BLEU-4 +2 over Inception V2; 0.7 s a step of 32 photos on a K20. im2txt's split is not Karpathy's, so scores do not
compare with his. Phase 1 is 1M steps with a frozen encoder, phase 2 2M steps of everything.
"""

from jaxcap.config import Augment, Checkpoints, Config, Data, Decoder, Encoder, Optim, Phase, Search, Vocabulary

CONFIG = Config(
    name="im2txt",
    batch_size=32,
    data=Data(name="coco", label="im2txt", size=346, max_words=40, workers=4),
    vocabulary=Vocabulary(min_count=4, max_size=12_000),
    encoder=Encoder(name="inception_v3", weights="imagenet", size=299, dropout=0.2),
    augment=Augment(crop=True, flip=True, color=True),
    decoder=Decoder(embedding=512, hidden=512, dropout=0.3, init_scale=0.08),
    phases=(
        Phase("decoder", "decoder", steps=1_000_000,
              optim=Optim("sgd", learning_rate=2.0, schedule="staircase", decay_rate=0.5, decay_epochs=8.0)),
        Phase("everything", "all", steps=2_000_000, batch_norm="batch",
              optim=Optim("sgd", learning_rate=0.0005, encoder_l2=4e-5)),
    ),
    search=Search(beam=3, max_words=20),
    checkpoints=Checkpoints(every_steps=10_000, keep=5),
    eval_photos=1_000,
)
