"""Other ways to use a trained memory: a correction of the base's logits, and a learned router in place of the gate."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import evaluation
from datastore import hidden_batches
from memory_decoder import LOGITS_AT_ONCE
from texts import entries_of

WEIGHTS = np.linspace(0, 2, 21)  # of the correction
EPOCHS, ROUTER_BATCH = 60, 1024  # at most; the best by examples that the router does not learn from is kept


def batches_of(base, windows, batch_size, *decoders):
    """Yield (slice of positions, hidden states (n, H), next tokens (n, 1), features (n, C) of each decoder)."""
    values, _, _, offsets = entries_of(windows)
    for first, hidden in hidden_batches(base, windows, batch_size):
        here = slice(offsets[first], offsets[first] + len(hidden))
        counts = np.diff(offsets[first:first + batch_size + 1])
        y = torch.from_numpy(values[here]).long().to(base.device)[:, None]
        yield here, hidden, y, [evaluation.features_of(decoder, hidden, counts) for decoder in decoders]


@torch.no_grad()
def base_scores(base, windows, batch_size):
    """Log probability (P,) of the next tokens under the base."""
    parts = []
    for _, hidden, y, _ in batches_of(base, windows, batch_size):
        parts += [torch.log_softmax(base.logits(h), -1).gather(1, t)[:, 0].cpu().numpy()
                  for h, t in zip(hidden.split(512), y.split(512), strict=True)]
    return np.concatenate(parts)


@torch.no_grad()
def correction_table(base, decoder, fresh, windows, batch_size):
    """Log probability (P, WEIGHTS) of the next token under base + weight * (memory - memory before training), on logits.

    Liu et al. 2024 (Tuning language models by proxy, arXiv 2401.08565). Both memories give unseen tokens the same share, so only
    seen tokens change.
    """
    decoder, fresh = (d.to(base.device).eval() for d in (decoder, fresh))
    rows, seen, parts = max(1, LOGITS_AT_ONCE // 8 // base.vocabulary), decoder.seen, []
    for _, hidden, y, (new, old) in batches_of(base, windows, batch_size, decoder, fresh):
        for block in (slice(i, i + rows) for i in range(0, len(hidden), rows)):
            z = base.logits(hidden[block])
            b = torch.log_softmax(z, -1)
            change = decoder.log_probabilities(new[block], z) - fresh.log_probabilities(old[block], z)
            unseen = b.index_fill(-1, seen, -math.inf).logsumexp(-1)
            columns = []
            for weight in WEIGHTS.tolist():
                total = torch.logaddexp((b[:, seen] + weight * change[:, seen]).logsumexp(-1), unseen)
                columns.append((b + weight * change).gather(1, y[block])[:, 0] - total)
            parts.append(torch.stack(columns, 1).cpu().numpy())
    return np.concatenate(parts)


@torch.no_grad()
def states(base, decoder, windows, batch_size):
    """The base's hidden states and the memory's features (P, H + C), each normalised."""
    parts = []
    for _, hidden, _, (features,) in batches_of(base, windows, batch_size, decoder):
        parts.append(torch.cat([F.layer_norm(x.float(), x.shape[-1:]) for x in (hidden, features)], 1).cpu())
    return torch.cat(parts)


class Router(nn.Module):
    """Chooses alpha at every position with a small network over both models' states, their opinions and the evidence.

    A simplified form of the routers of MemSFT (arXiv 2607.25614) and Intern-S2 (arXiv 2608.13505).
    """

    def __init__(self, width, mean, deviation):
        super().__init__()
        self.mean, self.deviation = mean, deviation
        self.layers = nn.Sequential(nn.Dropout(0.1), nn.Linear(width + len(mean), 128), nn.GELU(), nn.Linear(128, 1))

    def forward(self, states, opinions):
        """Logit of alpha (P,)."""
        return self.layers(torch.cat([states, (opinions - self.mean) / self.deviation], 1))[:, 0]

    def loss(self, part, picks=slice(None)):
        states, opinions, base, memory = (x[picks] for x in part)
        z = self(states, opinions)
        return -torch.logaddexp(base + F.logsigmoid(-z), memory + F.logsigmoid(z)).mean()

    @torch.no_grad()
    def mixed(self, part):
        """Log probability (P,) of the mixture under the router's alphas."""
        self.eval()
        states, opinions, base, memory = part
        z = self(states, opinions)
        return torch.logaddexp(base + F.logsigmoid(-z), memory + F.logsigmoid(z)).numpy()


def router_part(states, scores, evidence):
    """What a Router is fitted to: states (P, H + C), opinions and evidence (P, 8), base (P,), memory (P,)."""
    seen = np.concatenate([scores["opinions"], evidence], 1)
    return (states, *(torch.from_numpy(np.asarray(x, np.float32)) for x in (seen, scores["base"], scores["memory"])))


def fit_router(part, example, own, own_weight, seed=0):
    """A Router fitted to a part and, with a weight, to the base's own texts.

    example (P,): a fifth of the examples takes no part in the fit. It chooses the epoch.
    """
    torch.manual_seed(seed)
    numbers = np.random.default_rng(seed).permutation(np.unique(example))
    aside = torch.from_numpy(np.isin(example, numbers[:max(1, len(numbers) // 5)]))
    learn, check = (tuple(x[picks] for x in part) for picks in (~aside, aside))
    router = Router(part[0].shape[1], part[1].mean(0), part[1].std(0) + 1e-6)
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-3, weight_decay=0.1)
    best = (math.inf, None)
    for _ in range(EPOCHS):
        router.train()
        for picks in torch.randperm(len(learn[0])).split(ROUTER_BATCH):
            loss = router.loss(learn, picks) + own_weight * router.loss(own, torch.randperm(len(own[0]))[:ROUTER_BATCH])
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        router.eval()
        with torch.no_grad():
            found = float(router.loss(check) + own_weight * router.loss(own))
        if found < best[0]:
            best = (found, {name: value.clone() for name, value in router.state_dict().items()})
    router.load_state_dict(best[1])
    return router
