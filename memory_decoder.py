"""The MemoryDecoder and its loss.

Letters: B sequences, T positions, H width of the base model's hidden states, C width of the decoder,
V vocabulary, K neighbours, P positions in a flat row.
"""

import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from datastore import UserError

LOGITS_AT_ONCE = 2**25  # numbers in one block of logits: 128 MiB in float32
SCORES_AT_ONCE = 2**25  # numbers in one layer's attention scores up to which a CPU writes them out
LEAST_BLOCK = 16  # positions in a block of attention, however short the context


class Block(nn.Module):
    """One Transformer encoder layer under a causal mask that reaches back `context` positions, itself included."""

    def __init__(self, width, heads, context, norm_first, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.heads, self.context, self.norm_first = heads, context, norm_first
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, x, cache):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, T, C/heads)
        if cache is not None:
            k, v = cache.append(self, k, v)
        return self.out(local_attention(q, k, v, self.context).transpose(1, 2).reshape(B, T, C))

    def forward(self, x, topic=0, cache=None):
        """x (B, T, C); topic, added to what attention and MLP read, likewise or 0."""
        if self.norm_first:
            x = x + self.dropout(self.attend(self.attention_norm(x) + topic, cache))
            return x + self.dropout(self.mlp(self.mlp_norm(x) + topic))
        x = self.attention_norm(x + self.dropout(self.attend(x + topic, cache)))
        return self.mlp_norm(x + self.dropout(self.mlp(x + topic)))


def local_attention(q, k, v, context):
    """Attention of queries (B, heads, T, D) over the last `context` of keys and values (B, heads, S, D), themselves included.

    Query t stands at position S - T + t; returns q's shape. A long sequence is cut into blocks, each of which looks at
    itself and the block before, so scores grow with T and not with T x S. Beltagy et al. 2020 (arXiv 2004.05150), section 3.1.
    """
    B, heads, T, D = q.shape
    before, size = k.shape[2] - T, max(context, LEAST_BLOCK)
    count, absent = -(-T // size), 0  # absent: positions in front of the first block that hold no key
    if count == 1:
        q, k, v = (x.reshape(B * heads, 1, -1, D) for x in (q, k, v))
    else:
        absent, before, after = size - before, size, count * size - T
        q = F.pad(q, (0, 0, 0, after)).reshape(B * heads, count, size, D)
        k, v = (F.pad(x, (0, 0, absent, after)).reshape(B * heads, count + 1, size, D) for x in (k, v))
        k, v = (torch.cat([x[:, :-1], x[:, 1:]], 2) for x in (k, v))
    key = torch.arange(k.shape[2], device=q.device)
    ago = before + torch.arange(q.shape[2], device=q.device)[:, None] - key
    start = size * torch.arange(count, device=q.device)[:, None, None]
    seen = (ago >= 0) & (ago < context) & (start + key >= absent)  # (count, queries of a block, keys)
    return attend(q, k, v, seen).reshape(B, heads, -1, D)[:, :, :T]


def attend(q, k, v, seen):
    """Attention of queries (..., T, D) over keys and values (..., S, D) where seen (..., T, S) is true."""
    if q.device.type == "cpu" and q[..., 0].numel() * k.shape[-2] <= SCORES_AT_ONCE:
        # For heads as narrow as these, PyTorch's fused attention takes twice as long on a CPU.
        bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -math.inf)
        return torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class DecoderCache:
    """What decoding one position after another keeps: each block's last context-1 keys and values, the sum of all states."""

    def __init__(self):
        self.stored, self.total, self.count = {}, 0, 0

    def append(self, block, k, v):
        """Keys and values (B, heads, S, C/heads) that the new positions may look at, themselves last."""
        if block in self.stored:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.stored[block], (k, v), strict=True))
        keep = block.context - 1
        self.stored[block] = tuple(x[:, :, max(0, x.shape[2] - keep):] for x in (k, v))
        return k, v


class Topic(nn.Module):
    """Says what a text is about, from the mean of its hidden states so far: a fixed map fitted in closed form, then a learned one.

    A network fitted to a few hundred questions tells them apart word by word; the mean of their states, mapped to where such
    texts go on, is far nearer for the same question in other words than for another. Mikolov and Zweig 2012 feed a
    recurrent language model with a topic vector in this way.
    """

    WINDOW = 32  # states that a window needs to be fitted to
    WINDOWS = 20_000  # of them at most
    SPLITS = 4  # places at which each is parted

    def __init__(self, hidden_size, rank, width):
        super().__init__()
        self.register_buffer("centre", torch.zeros(hidden_size))
        self.register_buffer("map", torch.zeros(hidden_size, min(rank, hidden_size)))
        self.out = nn.Linear(self.map.shape[1], width, bias=False)
        nn.init.normal_(self.out.weight, std=self.map.shape[1] ** -0.5)

    def forward(self, hidden, cache=None):
        """(B, T, C) for hidden states (B, T, H) in float32, each seeing itself and those before."""
        total, count = hidden.cumsum(1), torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        if cache is not None:
            total, count = total + cache.total, count + cache.count
            cache.total, cache.count = total[:, -1:], cache.count + hidden.shape[1]
        return self.out(F.normalize((total / count - self.centre) @ self.map, dim=-1) * self.map.shape[1] ** 0.5)

    @torch.no_grad()
    def fit(self, keys, offsets, seed=0):
        """Fit the fixed map to the windows keys[offsets[i]:offsets[i + 1]] of hidden states (N, H).

        Ridge regression of reduced rank (Izenman 1975) of the mean state of a window's rest on the mean state before it;
        both means are whitened by the covariance of single states, since that is their noise, and the second then by its own.
        Raises UserError when no window has WINDOW states.
        """
        rng = np.random.default_rng(seed)
        windows = [(start, end) for start, end in pairwise(offsets) if end - start >= self.WINDOW]
        if not windows:
            raise UserError(f"A topic vector is fitted to texts of at least {self.WINDOW} entries, and there are none; "
                            "leave --topic at 0.")
        first, rest = [], []
        for i in np.sort(rng.permutation(len(windows))[:self.WINDOWS]):
            start, end = windows[i]
            total = torch.from_numpy(keys[start:end].astype(np.float32)).cumsum(0)
            for n in rng.integers(self.WINDOW // 4, (end - start) // 2 + 1, self.SPLITS):
                first.append(total[n - 1] / n), rest.append((total[-1] - total[n - 1]) / (end - start - n))
        first, rest = torch.stack(first), torch.stack(rest)
        states = torch.from_numpy(keys[np.sort(rng.permutation(len(keys))[:20_000])].astype(np.float32))
        centre, white = first.mean(0), whitening(states, 1e-3)
        first, rest = (first - centre) @ white, (rest - rest.mean(0)) @ white
        rest = rest @ whitening(rest, 0.03)
        gram = first.T @ first
        ridge = (gram.trace() / len(gram) + 1e-12) * torch.eye(len(gram))
        solved = torch.linalg.solve(gram + ridge, first.T @ rest)
        _, axes = torch.linalg.eigh(solved.T @ gram @ solved)  # of what is predicted
        self.centre.copy_(centre), self.map.copy_(white @ solved @ axes[:, -self.map.shape[1]:])


def whitening(x, share):
    """The map (H, H) that gives rows x (P, H) the identity as covariance, once `share` of its mean variance is added."""
    covariance = torch.cov(x.T)
    values, vectors = torch.linalg.eigh(covariance + (share * covariance.trace() / len(covariance) + 1e-12) * torch.eye(x.shape[1]))
    return vectors * values**-0.5


class MemoryDecoder(nn.Module):
    """Reads the base model's hidden states in sequence and says what a search of the datastore would say.

    hidden states (B, T, H) -> input projection -> LayerNorm -> encoder layers -> output projection -> logits (B, T, V).
    With context=1 and without a topic every position is read alone, as in the original demo. topic: rank of the Topic that
    every layer also reads; 0: none.
    """

    def __init__(self, hidden_size, vocab_size, decoder_dim=256, num_layers=6, num_heads=32, context=128, norm_first=True,
                 topic=0, dropout=0.0):
        super().__init__()
        if decoder_dim % num_heads:
            raise UserError(f"The decoder's {num_heads} heads do not divide its width {decoder_dim}; "
                            f"choose a --decoder_dim that is a multiple of {num_heads}.")
        self.sizes = {"hidden_size": hidden_size, "vocab_size": vocab_size, "decoder_dim": decoder_dim,
                      "num_layers": num_layers, "num_heads": num_heads, "context": context, "norm_first": norm_first,
                      "topic": topic}
        self.input_projection = nn.Linear(hidden_size, decoder_dim)
        self.input_norm = nn.LayerNorm(decoder_dim)
        self.topic = Topic(hidden_size, topic, decoder_dim) if topic else None
        self.dropout = dropout
        self.blocks = nn.ModuleList(Block(decoder_dim, num_heads, context, norm_first, dropout) for _ in range(num_layers))
        self.output_norm = nn.LayerNorm(decoder_dim) if norm_first else nn.Identity()
        self.output_projection = nn.Linear(decoder_dim, vocab_size)

    def features(self, hidden, cache=None):
        """What the output projection reads (B, T, C), for hidden states (B, T, H) in float32."""
        topic = self.topic(hidden, cache) if self.topic else 0
        if self.training and self.sizes["context"] > 1:  # whole states go, so that a part of a question is cue enough
            hidden = hidden * (torch.rand_like(hidden[..., :1]) >= self.dropout)
        x = self.input_norm(self.input_projection(hidden))
        for block in self.blocks:
            x = block(x, topic, cache)
        return self.output_norm(x)

    def forward(self, hidden, cache=None):
        return self.output_projection(self.features(hidden, cache))

    @torch.no_grad()
    def start_from_head(self, head, keys):
        """Start as the best decoder_dim-wide copy of the base model: its logits, from its hidden states.

        head: the base's output weight (V, H). keys: a sample of hidden states (P, H). Among all rank-C maps M
        the start minimises E|W(h - mean) - M(h - mean)|^2, with W centred over the vocabulary since softmax
        ignores a common offset: M keeps the C largest eigenvectors of S W'W S, where S is the square root of
        the keys' covariance. The blocks add nothing at first, so attention and MLP learn corrections; the two
        LayerNorms fix the length of the projected state, so the start is that map up to scale.
        """
        keys = keys.float().to(head.device)
        mean, C = keys.mean(0), self.sizes["decoder_dim"]
        centre = head.mean(0, dtype=torch.float32)
        gram = sum((part.float() - centre).T @ (part.float() - centre) for part in head.split(16_384))  # W'W, in little memory
        covariance = torch.cov(keys.T)
        # A little of the identity keeps directions that the sample hardly shows from being blown up.
        covariance, gram = covariance.cpu(), gram.cpu()  # not every accelerator has eigh
        values, vectors = torch.linalg.eigh(covariance + 1e-3 * covariance.trace() / len(mean) * torch.eye(len(mean)))
        root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
        _, Q = torch.linalg.eigh(root @ gram @ root)
        root, inverse, Q = (x.to(head.device) for x in (root, inverse, Q[:, -C:]))  # Q (H, C), fewer if H is less
        r = Q.shape[1]
        project = self.input_projection
        project.weight[:r], project.bias[:r] = Q.T @ inverse, -(Q.T @ inverse @ mean)
        project.weight[r:], project.bias[r:] = project.weight[r:] * 0.1, 0
        self.output_projection.weight.zero_()
        for rows, part in zip(self.output_projection.weight.split(16_384), head.split(16_384), strict=True):
            rows[:, :r] = (part.float() - centre) @ (root @ Q)
        self.output_projection.bias.copy_(head @ mean.to(head.dtype) - centre @ mean)
        for block in self.blocks:
            for layer in (block.out, block.mlp[-1]):
                nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def save(self, path):
        torch.save({"sizes": self.sizes, "weights": {k: v.cpu() for k, v in self.state_dict().items()}}, path)

    @classmethod
    def load(cls, path):
        """Read a file that `save` wrote: tensors and plain numbers, nothing else; raises UserError for weights of other shapes."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        decoder = cls(**saved["sizes"])
        try:
            decoder.load_state_dict(saved["weights"])
        except RuntimeError:
            raise UserError(f"The memory {path} was made by another version of this project; train again.") from None
        return decoder.eval()


def merge_votes(tokens, weights):
    """The same sparse distributions with every token once: weights (P, K) summed into one of its places, 0 in the rest."""
    order = torch.argsort(tokens, dim=1, stable=True)
    tokens, weights = tokens.gather(1, order), weights.gather(1, order)
    run = torch.cumsum(F.pad((tokens[:, 1:] != tokens[:, :-1]).long(), (1, 0)), dim=1)
    merged = torch.zeros_like(weights).scatter_add_(1, run, weights)
    first = torch.zeros_like(tokens).scatter_(1, run, tokens)
    return first, merged


class _SparseCrossEntropy(torch.autograd.Function):
    """Sums over P positions of -sum(p log q) and -log q[target], and the gradient of a mixture of both.

    The gradient with respect to the logits is known in closed form, so each block of logits is made once, turned into
    its gradient in place and dropped, in the forward pass already.
    """

    @staticmethod
    def forward(ctx, features, weight, bias, tokens, weights, targets, kl_weight, rows):
        total = kl_weight * weights.sum(1) + (1 - kl_weight)  # what multiplies q in the gradient; 1 but for lost neighbours
        grads = [torch.empty_like(features), torch.zeros_like(weight), torch.zeros_like(bias)]
        cross, ce = weights.new_zeros(()), weights.new_zeros(())
        head = weight.to(features.dtype)
        for i in range(0, len(targets), rows):
            block = slice(i, i + rows)
            f, p, t, y = features[block], weights[block], tokens[block], targets[block, None]
            z = F.linear(f, head, bias.to(f.dtype)).float()
            z.sub_(z.amax(1, keepdim=True))
            z_t, z_y = z.gather(1, t), z.gather(1, y)
            mass = z.exp_().sum(1, keepdim=True)
            lse = mass.log()
            cross += (lse * p - p * z_t).sum()
            ce += (lse - z_y).sum()
            g = z.mul_(total[block, None] / mass)
            g.scatter_add_(1, t, -kl_weight * p).scatter_add_(1, y, torch.full_like(lse, kl_weight - 1))
            grads[0][block] = g.to(f.dtype) @ head
            grads[1] += g.to(f.dtype).T @ f
            grads[2] += g.sum(0)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(cross, ce)
        return kl_weight * cross + (1 - kl_weight) * ce, cross, ce

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        return *(grad * g for g in ctx.saved_tensors), None, None, None, None, None


def memory_loss(features, projection, tokens, weights, targets, kl_weight=0.5):
    """(loss, kl, ce) in nats a position: loss = kl_weight * KL(kNN || memory) + (1 - kl_weight) * CE(next token).

    features (P, C); projection maps them to logits (V); tokens and weights (P, K) are the sparse kNN
    distributions; targets (P,) the next tokens. No (P, V) target exists, and logits exist for one block of
    positions at a time. Cao et al. 2025 (arXiv 2508.09874), equation 4.
    """
    P, rows = len(targets), max(1, LOGITS_AT_ONCE // projection.out_features)
    if torch.is_autocast_enabled(features.device.type):
        features = features.to(torch.get_autocast_dtype(features.device.type))
    loss, cross, ce = _SparseCrossEntropy.apply(features, projection.weight, projection.bias, tokens, weights, targets,
                                                kl_weight, rows)
    _, merged = merge_votes(tokens, weights)
    entropy = -torch.xlogy(merged, merged).sum()
    return (loss - kl_weight * entropy) / P, (cross - entropy) / P, ce / P


class TrainingLoss(nn.Module):
    """memory_loss as a module, so that several processes can share its gradients."""

    def __init__(self, decoder, kl_weight):
        super().__init__()
        self.decoder, self.kl_weight = decoder, kl_weight

    def forward(self, hidden, real, tokens, weights, targets):
        """hidden (B, T, H), real (B, T) bool with P true; tokens, weights (P, K) and targets (P,) in that order."""
        features = self.decoder.features(hidden)[real]
        return memory_loss(features, self.decoder.output_projection, tokens, weights, targets, self.kl_weight)


def file_checksum(path):
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder):
    """The manifest (config.json) of a folder of artefacts, after checking every file against its checksum.

    Returns None if nothing has been trained there. Raises UserError for a damaged or missing file.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        return None
    try:
        manifest = json.loads((folder / "config.json").read_text())
        files = dict(manifest["files"])
        if not files or not {"base_model", "base_fingerprint", "dtype", "template", "chosen"} <= set(manifest):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"The manifest {folder / 'config.json'} is damaged; train again.") from None
    for name, checksum in files.items():
        if not (folder / name).exists():
            raise UserError(f"The file {folder / name} is missing; train again.")
        if file_checksum(folder / name) != checksum:
            raise UserError(f"The file {folder / name} is damaged or from another training; train again.")
    return manifest
