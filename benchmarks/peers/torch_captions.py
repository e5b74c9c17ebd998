"""jaxcap's beam search in PyTorch, from features to captions: all photos together, or one by one as im2txt's generator does it."""

import heapq
import itertools

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import torch_graph
from benchmarks.peers.torch_decoder import Decoder

NEVER = float("-inf")


class Captions:
    """Captions of one batch of photos after the other, in one form.

    form: words of `forms.TORCH`. described, arrays, inputs: what jaxcap's side left.
    """

    def __init__(self, form: frozenset[str], described: dict, arrays: dict[str, np.ndarray], inputs: dict[str, np.ndarray],
                 device: torch.device):
        self._form, self._device, self._bfloat16 = form, device, described["dtype"] == "bfloat16"
        search = described["search"]
        self._beam, self._longest, self._exponent = search["beam"], search["max_words"], search["length_normalization"]
        self._start_word, self._end = search["bos"], search["eos"]
        self._decoder = Decoder(arrays, dropout=0.0, forget_bias=described["forget_bias"], loop=False, sparse=False,
                                onednn="onednn" in form).to(device).eval().requires_grad_(False)
        if self._bfloat16:
            self._decoder.bfloat16()  # once: autocast would round what does not learn at every word
        self._forbidden_V = torch.zeros(len(arrays["params/decoder/logits_bias"]), device=device)
        self._forbidden_V[search["forbidden"]] = NEVER
        batches = [torch.from_numpy(features) for features in inputs["features_NBF"]]
        self._batches = itertools.cycle([batch.pin_memory() for batch in batches] if device.type == "cuda" else batches)
        self._static_BF = batches[0].to(device)
        self._advance = torch.compile(self._go, dynamic=False) if "compile" in form else self._go
        self._graph = None

    def agree(self) -> dict[str, float]:
        """loss: how improbable the best captions of the first batch are, in nats a caption."""
        return {"loss": float(self._search(self._static_BF))}

    def start(self) -> None:
        if "graph" in self._form:
            self._graph, self._loss = torch_graph.capture(self._search, self._static_BF, warm_up=1)

    def __call__(self) -> Tensor:
        """Captions of the next batch; returns what `agree` tells of them."""
        features_BF = next(self._batches)
        if self._graph is not None:
            self._static_BF.copy_(features_BF, non_blocking=True)
            self._graph.replay()
            return self._loss
        return self._search(features_BF.to(self._device, non_blocking=True))

    @torch.inference_mode()
    def _search(self, features_BF: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            _, log_probs_BK = (self._one_by_one if "lists" in self._form else self._together)(features_BF)
        return -log_probs_BK[:, 0].mean()

    def _cell(self, x_NE: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The LSTM's next (h, c)."""
        lstm, linear = self._decoder.lstm, self._decoder.linear
        if not {"onednn", "compile"} & self._form:
            zero = x_NE.new_zeros(len(x_NE), lstm.hidden_size)
            return torch.lstm_cell(x_NE, state or (zero, zero), lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0)
        gates_NG = linear(x_NE, lstm.weight_ih_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0)
        if state:
            gates_NG = gates_NG + linear(state[0], lstm.weight_hh_l0, None)
        i, f, j, o = gates_NG.chunk(4, dim=1)
        c = i.sigmoid() * j.tanh() + (f.sigmoid() * state[1] if state else 0)
        return o.sigmoid() * c.tanh(), c

    def _offers(self, h: Tensor, c: Tensor, last_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next state, and of every live caption the K likeliest next words with their log-probabilities, [N, K]."""
        decoder = self._decoder
        h, c = self._cell(decoder.word_embedding[last_N], (h, c))
        log_probs_NV = torch.log_softmax(decoder.linear(h, decoder.logits_kernel, decoder.logits_bias).float(), 1)
        offers_NK, words_NK = (log_probs_NV + self._forbidden_V).topk(self._beam)
        return h, c, offers_NK, words_NK

    def _score(self, log_probs: Tensor | float, length: Tensor | int) -> Tensor | float:
        return log_probs / length ** self._exponent

    def _go(self, h: Tensor, c: Tensor, tokens_BKT: Tensor, log_probs_BK: Tensor, last_BK: Tensor, done: tuple[Tensor, ...],
            t: Tensor, last: bool) -> tuple:
        """One word further: captions that end go among the finished ones; unless it is the `last` round, the others live on."""
        B, K, T = tokens_BKT.shape
        h, c, offers_NK, words_NK = self._offers(h, c, last_BK.flatten())
        totals_BKO, words_BKO = log_probs_BK[:, :, None] + offers_NK.view(B, K, K), words_NK.view(B, K, K)
        ends_BKO = words_BKO == self._end
        ended_BK = totals_BKO.masked_fill(~ends_BKO, NEVER).amax(2)
        done_tokens, done_scores, done_log_probs = (torch.cat(pair, 1) for pair in zip(
            done, (tokens_BKT, self._score(ended_BK, t + 1), ended_BK)))
        scores_BK, best_BK = done_scores.topk(K)
        done = (done_tokens.gather(1, best_BK[:, :, None].expand(-1, -1, T)), scores_BK, done_log_probs.gather(1, best_BK))
        if last:
            return h, c, tokens_BKT, log_probs_BK, last_BK, done
        log_probs_BK, picks_BK = totals_BKO.masked_fill(ends_BKO, NEVER).flatten(1).topk(K)
        parents_BK, last_BK = picks_BK // K, words_BKO.flatten(1).gather(1, picks_BK)
        tokens_BKT = tokens_BKT.gather(1, parents_BK[:, :, None].expand(-1, -1, T))
        tokens_BKT = torch.where(torch.arange(T, device=t.device) == t, last_BK[:, :, None], tokens_BKT)
        rows_N = (parents_BK + K * torch.arange(B, device=parents_BK.device)[:, None]).flatten()
        return h[rows_N], c[rows_N], tokens_BKT, log_probs_BK, last_BK, done

    def _together(self, features_BF: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, K, T] and log-probabilities [B, K] of all photos' captions."""
        B, K, T, device = len(features_BF), self._beam, self._longest, features_BF.device
        h, c = (x.repeat_interleave(K, 0) for x in self._cell(self._decoder.linear(features_BF, self._decoder.image_embedding, None),
                                                              None))
        tokens_BKT = torch.zeros(B, K, T, dtype=torch.long, device=device)
        never_BK = torch.full((B, K), NEVER, device=device)
        log_probs_BK = never_BK.clone()
        log_probs_BK[:, 0] = 0
        last_BK, done = torch.full((B, K), self._start_word, device=device), (tokens_BKT, never_BK, never_BK)
        for word, t in enumerate(torch.arange(T + 1, device=device)):
            last = word == T
            h, c, *rest, done = self._advance(h, c, tokens_BKT, log_probs_BK, last_BK, done, t, last)
            tokens_BKT, log_probs_BK, last_BK = rest
            if "graph" not in self._form:  # which must not look at what it computes
                hopeful_B = self._score(log_probs_BK[:, 0], T + 1) > done[1][:, -1]
                if not hopeful_B.any():
                    break
        nothing_B1 = (done[1][:, 0] == NEVER)[:, None]
        return torch.where(nothing_B1[:, :, None], tokens_BKT, done[0]), torch.where(nothing_B1, log_probs_BK, done[2])

    def _one_by_one(self, features_BF: Tensor) -> tuple[list[list[int]], Tensor]:
        """The best caption of every photo, and its log-probability [B, 1]."""
        K, T, found = self._beam, self._longest, []
        for features_1F in features_BF.split(1):
            h, c = self._cell(self._decoder.linear(features_1F, self._decoder.image_embedding, None), None)
            live, done = [(0.0, 0, [])], []
            for t in range(T + 1):
                last_N = torch.tensor([words[-1] if words else self._start_word for _, _, words in live], device=h.device)
                h, c, offers_NK, words_NK = self._offers(h, c, last_N)
                going = []
                for n, (offers, words) in enumerate(zip(offers_NK.tolist(), words_NK.tolist())):
                    for offer, word in zip(offers, words):
                        total = live[n][0] + offer
                        if word == self._end:
                            done.append((self._score(total, t + 1), total, live[n][2]))
                        elif total > NEVER:
                            going.append((total, n, [*live[n][2], word]))
                done = heapq.nlargest(K, done, key=lambda caption: caption[0])
                if t == T:
                    break
                live = heapq.nlargest(K, going, key=lambda caption: caption[0])
                if not live or len(done) == K and self._score(live[0][0], T + 1) <= done[-1][0]:
                    break
                parents_N = torch.tensor([n for _, n, _ in live], device=h.device)
                h, c = h[parents_N], c[parents_N]
            found.append((done[0][1], done[0][2]) if done else (live[0][0], live[0][2]))
        return [words for _, words in found], torch.tensor([[log_prob] for log_prob, _ in found])
