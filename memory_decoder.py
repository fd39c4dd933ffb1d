"""The MemoryDecoder and its loss.

Letters: B sequences, T positions, H width of the base model's hidden states, C width of the decoder,
V vocabulary, K neighbours, P positions in a flat row.
"""

import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path

import faiss
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
    """What decoding one position after another keeps: each block's last context-1 keys and values, the topic's sum of tokens."""

    def __init__(self):
        self.stored, self.total = {}, 0

    def append(self, block, k, v):
        """Keys and values (B, heads, S, C/heads) that the new positions may look at, themselves last."""
        if block in self.stored:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.stored[block], (k, v), strict=True))
        keep = block.context - 1
        self.stored[block] = tuple(x[:, :, max(0, x.shape[2] - keep):] for x in (k, v))
        return k, v


class Topic(nn.Module):
    """Which stored text a text is most like, from the tokens read so far; each of them has a learned vector.

    A network fitted to a few hundred questions tells them apart word by word, and is lost before the same question in other
    words. So every token has a fixed vector here, fitted in closed form such that the sum over a text's beginning points to how
    the rest goes on; the nearest of `count` centres, one a stored text or a cluster of them, is the text's topic so far. Vector
    quantisation as in van den Oord et al. 2017 (arXiv 1711.00937), the codes given by the data instead of learned.
    """

    RANK = 128  # of the map; numbers in a centre
    WINDOW = 32  # tokens that a window needs to have a topic
    SPLITS = 32  # places at which each is parted
    FITTED = 2_500  # windows, at most, that the map is fitted to

    def __init__(self, vocab_size, count, width):
        super().__init__()
        self.register_buffer("table", torch.zeros(vocab_size, self.RANK))
        self.register_buffer("centres", torch.zeros(count, self.RANK))
        self.register_buffer("entry", torch.zeros(count, dtype=torch.long))  # first one of the window nearest to the centre
        self.out = nn.Embedding(count, width)

    def forward(self, tokens, cache=None):
        """(B, T, C) for tokens (B, T), each place seeing itself and those before."""
        return self.out(self.nearest(tokens, cache))

    def nearest(self, tokens, cache=None):
        """The number (B, T) of each place's topic."""
        total = self.table[tokens].cumsum(1)
        if cache is not None:
            total = total + cache.total
            cache.total = total[:, -1:]
        with torch.autocast(total.device.type, enabled=False):
            return (total @ self.centres.T).argmax(-1)

    @classmethod
    def windows(cls, offsets):
        """(start, end) of the windows that are long enough; raises UserError when none is."""
        found = [(start, end) for start, end in pairwise(offsets) if end - start >= cls.WINDOW]
        if not found:
            raise UserError(f"Topics are fitted to texts of at least {cls.WINDOW} entries, and there are none; leave --topic at 0.")
        return found

    @classmethod
    def splits(cls, length):
        """Numbers of tokens (SPLITS,) after which a window of so many is parted."""
        return torch.linspace(cls.WINDOW // 4, length - cls.WINDOW // 4, cls.SPLITS).long()

    @torch.no_grad()
    def fit(self, embeddings, tokens, windows, seed=0):
        """Fit table and centres to the windows tokens[start:end], given the base model's embeddings (V, H), on the CPU.

        A centre is the mean direction over a window's beginnings, or a cluster of those.
        """
        centre, projection = fit_map(embeddings, tokens, windows, seed)
        r = projection.shape[1]  # less than RANK for a very narrow base model
        for rows, part in zip(self.table.split(16_384), embeddings.split(16_384), strict=True):
            rows[:, :r] = (part.float() - centre) @ projection
        sums = (self.table[tokens[start:end]].cumsum(0) for start, end in windows)
        begun = torch.stack([F.normalize(total[self.splits(len(total)) - 1], dim=-1).mean(0) for total in sums])
        begun = F.normalize(begun, dim=-1)
        self.centres.copy_(cluster(begun, len(self.centres), seed))
        nearest = torch.cat([(part @ begun.T).argmax(1) for part in self.centres.split(4096)])
        self.entry.copy_(torch.tensor([start for start, _ in windows])[nearest])
        # Like topics start alike, and small, so that training soon tells them apart.
        mix = torch.randn(self.RANK, self.out.embedding_dim, generator=torch.Generator().manual_seed(seed))
        self.out.weight.copy_(0.3 * self.centres @ mix)


def fit_map(embeddings, tokens, windows, seed):
    """(centre (H,), projection (H, R)) by which the mean embedding of a window's beginning tells that of its rest.

    Ridge regression of reduced rank (Izenman 1975) of the rest's mean on the beginning's; both are whitened by the covariance
    of single tokens, since that is their noise, and the rest's then by its own. How much ridge, and SPLITS, were chosen by
    questions held out with their answers (benchmarks/topics.py).
    """
    rng, first, rest = np.random.default_rng(seed), [], []
    for i in np.sort(rng.permutation(len(windows))[:Topic.FITTED]):
        start, end = windows[i]
        n, total = Topic.splits(end - start), embeddings[tokens[start:end]].float().cumsum(0)
        first.append(total[n - 1] / n[:, None]), rest.append((total[-1] - total[n - 1]) / (end - start - n)[:, None])
    first, rest = torch.cat(first), torch.cat(rest)
    sample = embeddings[tokens[np.sort(rng.permutation(len(tokens))[:20_000])]].float()
    centre, white = first.mean(0), whitening(sample, 1e-3)
    first, rest = (first - centre) @ white, (rest - rest.mean(0)) @ white
    rest = rest @ whitening(rest, 0.03)
    gram = first.T @ first
    ridge = (0.3 * gram.trace() / len(gram) + 1e-12) * torch.eye(len(gram))
    solved = torch.linalg.solve(gram + ridge, first.T @ rest)
    _, axes = torch.linalg.eigh(solved.T @ gram @ solved)  # of what is predicted
    return centre, white @ solved @ axes[:, -Topic.RANK:]


def cluster(x, count, seed):
    """count directions (count, R) for unit rows x (P, R): the rows themselves, or spherical k-means of them when there are more."""
    if len(x) == count:
        return x
    kmeans = faiss.Kmeans(x.shape[1], count, seed=seed, spherical=True, min_points_per_centroid=1)
    kmeans.train(x.numpy())
    return torch.from_numpy(kmeans.centroids)


def whitening(x, share):
    """The map (H, H) that gives rows x (P, H) the identity as covariance, once `share` of its mean variance is added."""
    covariance = torch.cov(x.T)
    values, vectors = torch.linalg.eigh(covariance + (share * covariance.trace() / len(covariance) + 1e-12) * torch.eye(x.shape[1]))
    return vectors * values**-0.5


class MemoryDecoder(nn.Module):
    """Reads the base model's hidden states in sequence and says what a search of the datastore would say.

    hidden states (B, T, H) -> input projection -> LayerNorm -> encoder layers -> output projection -> logits (B, T, V).
    With context=1 and without topics every position is read alone, as in the original demo. topic: number of topics, one of
    which, named by the tokens read, every layer reads too (Topic); 0: none.
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
        self.topic = Topic(vocab_size, topic, decoder_dim) if topic else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(decoder_dim, num_heads, context, norm_first, dropout) for _ in range(num_layers))
        self.output_norm = nn.LayerNorm(decoder_dim) if norm_first else nn.Identity()
        self.output_projection = nn.Linear(decoder_dim, vocab_size)

    def features(self, hidden, read=None, cache=None):
        """What the output projection reads (B, T, C), for hidden states (B, T, H) in float32.

        read (B, T): the tokens whose states they are; a decoder without topics does not ask for them.
        """
        topic = self.topic(read, cache) if self.topic else 0
        x = self.dropout(self.input_norm(self.input_projection(hidden)))
        for block in self.blocks:
            x = block(x, topic, cache)
        return self.output_norm(x)

    def forward(self, hidden, read=None, cache=None):
        return self.output_projection(self.features(hidden, read, cache))

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

    def forward(self, hidden, read, real, tokens, weights, targets):
        """hidden (B, T, H), read (B, T), real (B, T) bool with P true; tokens, weights (P, K) and targets (P,) in that order."""
        features = self.decoder.features(hidden, read)[real]
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
