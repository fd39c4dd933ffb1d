"""The MemoryDecoder and its loss.

Letters: B sequences, T positions, H width of the base model's hidden states, C width of the decoder,
V vocabulary, V' tokens of it that the datastore has seen, K neighbours, P positions in a flat row.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from base_model import file_checksum
from support.command import UserError
from support.sealed import unsealed
from support.shards import new_file

LOGITS_AT_ONCE = 2**25  # numbers in one block of logits: 128 MiB in float32
SCORES_AT_ONCE = 2**25  # attention scores of one layer up to which a CPU keeps them all in memory
LEAST_BLOCK = 16  # fewest positions in a block of attention


class Block(nn.Module):
    """One Transformer encoder layer. Its causal mask reaches back `context` positions, the current one included."""

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

    def forward(self, x, cache=None):
        """x (B, T, C) -> (B, T, C)."""
        if self.norm_first:
            x = x + self.dropout(self.attend(self.attention_norm(x), cache))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attend(x, cache)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


def local_attention(q, k, v, context):
    """Attention of queries (B, heads, T, C/heads) over the last `context` of keys and values (B, heads, S, C/heads).

    Query t is at position S - T + t and attends to itself too. Returns q's shape. A long sequence is cut into blocks. Each
    block attends to itself and to the earlier blocks within reach, so scores grow with T and not with T x S. Beltagy et al.
    2020 (arXiv 2004.05150), section 3.1.
    """
    B, heads, T, D = q.shape
    if T == 1 and k.shape[2] <= context:  # decoding token by token: every key is within reach
        return F.scaled_dot_product_attention(q, k, v)
    before, size = k.shape[2] - T, block_size(context)
    reach = -(-(context - 1) // size)  # earlier blocks that a block attends to
    count, absent = -(-T // size), 0  # absent: padded positions in front of the first key
    if count == 1 or (reach + 1) * size >= k.shape[2]:
        count = 1
        q, k, v = (x.reshape(B * heads, 1, -1, D) for x in (q, k, v))
    else:
        absent, before, after = reach * size - before, reach * size, count * size - T
        q = F.pad(q, (0, 0, 0, after)).reshape(B * heads, count, size, D)
        k, v = (F.pad(x, (0, 0, absent, after)).reshape(B * heads, reach + count, size, D) for x in (k, v))
        k, v = (torch.cat([x[:, i:i + count] for i in range(reach + 1)], 2) for x in (k, v))
    key = torch.arange(k.shape[2], device=q.device)
    ago = before + torch.arange(q.shape[2], device=q.device)[:, None] - key
    start = size * torch.arange(count, device=q.device)[:, None, None]
    seen = (ago >= 0) & (ago < context) & (start + key >= absent)  # (count, queries of a block, keys)
    return attend(q, k, v, seen).reshape(B, heads, -1, D)[:, :, :T]


def block_size(context):
    """Positions in a block of attention. They are few, since a block reads up to one block more than `context`."""
    return max(context // 4, LEAST_BLOCK)


def attend(q, k, v, seen):
    """Attention of queries (..., T, D) over keys and values (..., S, D) where seen (..., T, S) is true."""
    if q.device.type == "cpu" and q[..., 0].numel() * k.shape[-2] <= SCORES_AT_ONCE:
        # For heads as narrow as these, PyTorch's fused attention takes twice as long on a CPU, but for a single query.
        bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -math.inf)
        return torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + bias, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class DecoderCache:
    """Every block's keys and values, kept for decoding one position after another. The last positions can be taken back."""

    def __init__(self):
        self.stored, self.lengths = {}, {}  # block -> keys and values (2, B, heads, room, C/heads), and how much of room is used

    def append(self, block, k, v):
        """Keys and values (B, heads, S, C/heads) that the new positions may attend to, their own last."""
        old = self.lengths.get(block, 0)
        here = self.lengths[block] = old + k.shape[2]
        if block not in self.stored or here > self.stored[block].shape[3]:  # room for twice as many
            grown = k.new_empty((2, *k.shape[:2], 2 * here, k.shape[3]))
            if old:
                grown[:, :, :, :old] = self.stored[block][:, :, :, :old]
            self.stored[block] = grown
        kept = self.stored[block]
        kept[0, :, :, old:here], kept[1, :, :, old:here] = k, v
        first = max(0, old - block.context + 1)
        return kept[0, :, :, first:here], kept[1, :, :, first:here]

    def cut(self, length):
        """Take back all positions from `length` on."""
        self.lengths = {block: min(length, old) for block, old in self.lengths.items()}


class MemoryDecoder(nn.Module):
    """Reads the base model's hidden states in sequence and predicts what a search of the datastore would find.

    hidden states (B, T, H) -> input projection -> LayerNorm -> encoder layers -> features (B, T, C) -> output
    projection -> logits (B, T, V') of the seen tokens. seen: ids (V',) of the tokens that are some entry's value.
    backoff: the probability of all unseen tokens together, if there are any. The base's probabilities divide it among them.
    With context=1 every position is read alone, as in the original demo.
    """

    def __init__(self, hidden_size, vocab_size, seen, backoff=0.0, decoder_dim=256, num_layers=6, num_heads=32,
                 context=128, norm_first=True, dropout=0.0):
        super().__init__()
        check_heads(decoder_dim, num_heads)
        self.sizes = {"hidden_size": hidden_size, "vocab_size": vocab_size, "decoder_dim": decoder_dim,
                      "num_layers": num_layers, "num_heads": num_heads, "context": context, "norm_first": norm_first}
        self.register_buffer("seen", torch.as_tensor(seen, dtype=torch.long))
        self.register_buffer("scale", torch.ones(()))  # of the logits; evaluation.calibrate chooses it after training
        self.register_buffer("backoff", torch.tensor(float(backoff)))
        self.input_projection = nn.Linear(hidden_size, decoder_dim)
        self.input_norm = nn.LayerNorm(decoder_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(decoder_dim, num_heads, context, norm_first, dropout) for _ in range(num_layers))
        self.output_norm = nn.LayerNorm(decoder_dim) if norm_first else nn.Identity()
        self.output_projection = nn.Linear(decoder_dim, len(self.seen))

    def features(self, hidden, cache=None):
        """The input (B, T, C) of the output projection, from hidden states (B, T, H) in float32."""
        x = self.dropout(self.input_norm(self.input_projection(hidden)))
        for block in self.blocks:
            x = block(x, cache)
        return self.output_norm(x)

    def log_probabilities(self, features, base_logits):
        """The memory's log probabilities (..., V), from features (..., C) and the base's logits (..., V).

        Seen tokens share 1 - backoff in the proportions of softmax(scale * z). Unseen tokens, which no kNN distribution has,
        share backoff in the base's proportions. N-gram models back off to a smaller model in this way (Katz 1987).
        """
        own = torch.log_softmax(self.scale * self.output_projection(features), -1)
        if len(self.seen) == self.sizes["vocab_size"]:
            return torch.empty_like(base_logits).index_copy_(-1, self.seen, own)
        unseen = torch.log_softmax(base_logits.index_fill(-1, self.seen, -math.inf), -1) + self.backoff.log()
        return unseen.index_copy_(-1, self.seen, own + torch.log1p(-self.backoff))

    @torch.no_grad()
    def start_from_head(self, head, keys):
        """Start as the best copy, of width decoder_dim, of the base's head: from hidden states to logits of the seen tokens.

        head: the base's output weights W of these tokens (V', H). keys: a sample of hidden states (P, H). Among all rank-C
        maps M the start minimises E|W(h - mean) - M(h - mean)|^2. W is centred over the vocabulary, since softmax
        ignores a common offset. M keeps the C largest eigenvectors of S W'W S, where S is the square root of
        the keys' covariance. The blocks add nothing at first, so attention and MLP learn corrections. The two
        LayerNorms fix the length of the projected state, so the start is M up to scale.
        """
        keys = keys.float().to(head.device)
        mean, C = keys.mean(0), self.sizes["decoder_dim"]
        centre = head.mean(0, dtype=torch.float32)
        gram = sum((part.float() - centre).T @ (part.float() - centre) for part in head.split(16_384))  # W'W, in little memory
        covariance = torch.cov(keys.T)
        covariance, gram = covariance.cpu(), gram.cpu()  # not every accelerator has eigh
        # A small multiple of the identity keeps directions that are rare in the sample from being scaled up too far.
        values, vectors = torch.linalg.eigh(covariance + 1e-3 * covariance.trace() / len(mean) * torch.eye(len(mean)))
        root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
        _, Q = torch.linalg.eigh(root @ gram @ root)
        root, inverse, Q = (x.to(head.device) for x in (root, inverse, Q[:, -C:]))  # Q (H, C), or (H, H) if H is less
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

    @torch.no_grad()
    def grown(self, seen, backoff, head, dropout=0.0):
        """This decoder with more seen tokens. seen: ids (V''). head: the base's output weights (V'', H).

        A new token's output row is predicted from its row in the head: least squares, fitted on the tokens learned so far.
        """
        decoder = MemoryDecoder(seen=seen, backoff=backoff, dropout=dropout, **self.sizes).to(head.device)
        kept = {name: value for name, value in self.state_dict().items()
                if name not in ("seen", "scale", "backoff", "output_projection.weight", "output_projection.bias")}
        decoder.load_state_dict(kept, strict=False)
        places = torch.searchsorted(decoder.seen, self.seen.to(head.device))
        x = F.pad(head.float(), (0, 1), value=1.0)
        learned = torch.cat([self.output_projection.weight, self.output_projection.bias[:, None]], 1).to(head.device)
        gram = (x[places].T @ x[places]).cpu()  # not every accelerator has solve
        ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
        rows = x @ torch.linalg.solve(gram + ridge, (x[places].T @ learned).cpu()).to(head.device)
        rows[places] = learned
        decoder.output_projection.weight.copy_(rows[:, :-1]), decoder.output_projection.bias.copy_(rows[:, -1])
        return decoder

    def save(self, path):
        """Write tensors and plain numbers, in float32, to one file."""
        with new_file(path) as file:
            torch.save({"sizes": self.sizes, "weights": {k: v.cpu() for k, v in self.state_dict().items()}}, file)

    @classmethod
    def load(cls, path):
        """Read a file that `save` wrote: only tensors and plain numbers. Raises UserError for a file of another version."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        try:
            decoder = cls(seen=saved["weights"]["seen"], **saved["sizes"])
            decoder.load_state_dict(saved["weights"])
        except (KeyError, RuntimeError, TypeError):
            raise UserError(f"The memory {path} was made by another version of this project; train again.") from None
        return decoder.eval()


def check_heads(decoder_dim, num_heads=32):
    """Raise UserError if the number of heads does not divide the width."""
    if decoder_dim % num_heads:
        raise UserError(f"The decoder's {num_heads} heads do not divide its width {decoder_dim}; "
                        f"choose a --decoder_dim that is a multiple of {num_heads}.")


def merge_votes(tokens, weights):
    """(tokens, weights) (P, K) of the same sparse distributions with every token once. Places left over have weight 0."""
    order = torch.argsort(tokens, dim=1, stable=True)
    tokens, weights = tokens.gather(1, order), weights.gather(1, order)
    run = torch.cumsum(F.pad((tokens[:, 1:] != tokens[:, :-1]).long(), (1, 0)), dim=1)
    merged = torch.zeros_like(weights).scatter_add_(1, run, weights)
    first = torch.zeros_like(tokens).scatter_(1, run, tokens)
    return first, merged


class _SparseCrossEntropy(torch.autograd.Function):
    """Sums over P positions of -sum(p log q) and -log q[target], and the gradient of a mixture of both.

    The gradient with respect to the logits has a closed form. So the forward pass makes each block of logits once,
    turns it into its gradient in place and drops it.
    """

    @staticmethod
    def forward(ctx, features, weight, bias, tokens, weights, targets, kl_weight, rows):
        total = kl_weight * weights.sum(1) + (1 - kl_weight)  # the factor of q in the gradient; 1 unless neighbours are missing
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

    features (P, C); projection maps them to logits (V'). tokens, weights (P, K): the sparse kNN distributions. targets (P,):
    the next tokens. All tokens are places among the seen ones. No (P, V') target exists, and logits exist for one block of
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
        """hidden (B, T, H), real (B, T) bool with P true. tokens, weights (P, K) and targets (P,) of these P, in order."""
        features = self.decoder.features(hidden)[real]
        return memory_loss(features, self.decoder.output_projection, tokens, weights, targets, self.kl_weight)


def read_manifest(folder):
    """The manifest (config.json) of a folder of artefacts, after checking every file against its checksum.

    Returns None if nothing has been trained there. Raises UserError for a damaged or missing file.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        return None
    try:
        manifest = unsealed(folder / "config.json")
        files = dict(manifest["files"])
        if not files or not {"base_model", "base_fingerprint", "dtype", "sources", "chosen"} <= set(manifest):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"The manifest {folder / 'config.json'} is damaged; train again.") from None
    for name, checksum in files.items():
        if not (folder / name).exists():
            raise UserError(f"The file {folder / name} is missing; train again.")
        if file_checksum(folder / name) != checksum:
            raise UserError(f"The file {folder / name} is damaged or from another training; train again.")
    return manifest
