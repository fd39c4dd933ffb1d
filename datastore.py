"""Text -> entries -> FAISS index -> neighbours -> kNN distributions.

An entry is one (key, value) pair: the base model's hidden state at one position of one example, and
the token that comes next. Letters: N entries, H key width, K neighbours, Q queries, B windows,
T positions, V vocabulary. D and I are distances and entry ids, as faiss names them.
"""

import ctypes
import hashlib
import json
import os
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

SMALL_MODEL = 1_000_000_000  # parameters below which a CPU computes in float32
FLAT_LIMIT = 50_000  # entries up to which exact search is quick enough on two cores
PROBED = 64  # a search looks into one of so many inverted lists
SEARCH_CHUNK = 8192  # queries a faiss call


class UserError(Exception):
    """Something the user can mend; the message is one sentence that says how."""


def parse_dataclass(options, description, arguments, presets):
    """An `options` dataclass from command-line arguments (None: the process's own).

    presets: {flag: {name: default}}; a flag that is set changes defaults, so that what is given beside it wins.
    """
    parser = HfArgumentParser(options, description=description, allow_abbrev=False)
    for _ in range(2):
        parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if unknown:
            parser.error(f"unknown: {' '.join(unknown)} (--help lists the options)")
        for flag, defaults in presets.items():
            if getattr(parsed, flag):
                parser.set_defaults(**defaults)
    return parsed


class Template:
    """How one row of the dataset becomes text, and a chat message the beginning of such a text."""

    def __init__(self, pattern):
        try:
            parts = list(string.Formatter().parse(pattern))
        except ValueError as error:
            raise UserError(f"The template {pattern!r} cannot be read: {error}.") from None
        if any(field == "" or spec or conversion for _, field, spec, conversion in parts):
            raise UserError(f"The template {pattern!r} cannot be read: braces hold the name of a field and nothing else.")
        self.segments = [(literal, field) for literal, field, _, _ in parts if field]
        if not self.segments:
            raise UserError(f"The template {pattern!r} names no field; write fields in braces, e.g. {{Question}}.")
        self.pattern, self.fields = pattern, [field for _, field in self.segments]

    @property
    def prefix(self):
        """The text before the first field: the same in every example."""
        return self.segments[0][0].rstrip()

    @property
    def header(self):
        """What every prompt begins with."""
        return self.segments[-2:][0][0].strip()

    def render(self, row):
        """The whole text of one row (a dict that has every field)."""
        return self.pattern.format(**{field: str(row[field]).strip() for field in self.fields})

    def prompt(self, message, turns=()):
        """The text that an answer continues; turns are earlier (message, answer) pairs.

        The last field is the answer and the one before it the message; fields before those (a title,
        say) have no counterpart in a chat and are left out with their headers.
        """
        if len(self.segments) == 1:
            return "\n".join([*(text for turn in turns for text in turn), message])
        (ask, _), (reply, _) = self.segments[-2:]
        said = "".join(f"{ask.lstrip()}{question}{reply}{answer}\n" for question, answer in turns)
        return f"{said}{ask.lstrip()}{message}{reply.rstrip()}"

    @property
    def stops(self):
        """Texts that begin a next field, example or turn, where an answer therefore ends."""
        headers = {literal.strip() for literal, _ in self.segments}
        return sorted("\n" + header for header in headers if header)


class BaseLM:
    """A frozen causal language model and its tokenizer: text -> ids -> hidden states -> logits."""

    def __init__(self, model, tokenizer, name=""):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        if self.head is None:
            raise UserError(f"The model {name} has no output embeddings, so it is not a causal language model.")
        config = model.config.get_text_config()
        self.width, self.vocabulary = self.head.weight.shape[1], self.head.weight.shape[0]
        self.max_positions = getattr(config, "max_position_embeddings", None) or 2048
        self.eos = tokenizer.eos_token_id
        if self.eos is None:
            raise UserError(f"The tokenizer of {name} has no end-of-sequence token, so answers would never end.")
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.eos
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self._check_logits()

    @classmethod
    def load(cls, name, dtype="auto", device="auto"):
        """Load from the hub or a folder; dtype auto is float32 for a small model on a CPU, else as saved on disk."""
        device = pick_device(device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            wanted = dtype if dtype == "auto" else getattr(torch, dtype)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=wanted).to(device)
        except (OSError, ValueError) as error:
            raise UserError(explain_load_error(name, error)) from None
        if dtype == "auto" and device == "cpu" and model.num_parameters() < SMALL_MODEL:
            model = model.float()
        return cls(model, tokenizer, str(name))

    @property
    def device(self):
        return self.head.weight.device

    @property
    def fingerprint(self):
        """A checksum of the vocabulary and a sample of every weight: the same for float32 and bfloat16."""
        digest = hashlib.sha256()
        for name, weight in self.model.named_parameters():
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 512)][:512].to("cpu", torch.bfloat16)
            digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
        digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        return digest.hexdigest()[:16]

    def encode(self, text, end=False):
        """Token ids of text with BOS in front and, if `end`, EOS behind; names of special tokens in it are plain text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return [self.bos, *ids, *([self.eos] if end else [])]

    @torch.no_grad()
    def hidden(self, ids, cache=None):
        """Hidden states after the final norm (B, T, H) of ids (B, T), whose padding, if any, is on the right."""
        out = self.decoder(ids.to(self.device), past_key_values=cache, use_cache=cache is not None)
        return out.last_hidden_state

    @torch.no_grad()
    def logits(self, hidden):
        """Logits (..., V) in float32 of hidden states (..., H)."""
        z = self.head(hidden.to(self.device, self.head.weight.dtype)).float()
        return torch.tanh(z / self.softcap) * self.softcap if self.softcap else z

    @torch.no_grad()
    def _check_logits(self):
        # Some architectures scale their logits after the head; better to refuse than to blend wrong ones.
        ids = torch.tensor([[self.bos, self.bos]], device=self.device)
        expected = self.model(ids, use_cache=False).logits.float()
        if not torch.allclose(self.logits(self.hidden(ids)), expected, atol=1e-2, rtol=1e-2):
            raise UserError(f"The logits of {self.name} are not its output embeddings applied to its last hidden "
                            "state, so its memory would be wrong; choose another base model.")


def keep_freed_memory():
    """Let glibc keep large freed blocks for the next step; asking the kernel for new ones is a third of a step on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4  # as malloc.h numbers them
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def pick_device(device):
    """The device to use; raises UserError for one that this machine does not have."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, there in present.items() if there)
    if not present.get(device.split(":")[0]):
        raise UserError(f"There is no device {device} here; present: {', '.join(n for n, there in present.items() if there)}.")
    return device


def explain_load_error(name, error):
    """One sentence for a model that could not be loaded."""
    text = str(error).lower()
    if "gated" in text or "401 client error" in text or "403 client error" in text:
        return (f"The model {name} is gated: accept its terms at https://huggingface.co/{name}, run `hf auth login`, "
                "then try again; or name an ungated model, e.g. --base_model Qwen/Qwen2.5-0.5B.")
    if Path(name).is_absolute() and not Path(name).exists():
        return f"There is no folder {name}; check --base_model."
    if Path(name).is_dir():
        return f"The folder {name} does not hold a causal language model that transformers can load: {one_line(error)}"
    if "not a valid model identifier" in text or "404" in text:
        return f"There is no model {name} on the hub and no folder of that name; check --base_model."
    if "connect" in text or "offline" in text or "couldn't reach" in text:
        return (f"The model {name} is not on this machine and the hub cannot be reached; check the network, "
                "or train the embedded default with --demo.")
    return f"The model {name} could not be loaded: {one_line(error)}"


def one_line(error):
    return " ".join(str(error).split())[:300]


def write_atomically(path, text):
    """Write a small text file so that it is either the old one or the new one, never half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@dataclass
class Window:
    """A stretch of one example that the base model reads at once.

    Its first `skip` positions only give context; every later one but the last is the key of an entry.
    """

    example: int
    ids: list
    skip: int
    position: int  # of the first entry's key, in the example's ids


def make_windows(example, ids, max_length, skip):
    """Windows of at most max_length ids that together make an entry of every position from `skip` on.

    Each window after the first starts with BOS and repeats a quarter of a window for context.
    """
    windows, position, overlap = [], skip, max_length // 4
    if skip < min(max_length, len(ids)) - 1:
        windows.append(Window(example, ids[:max_length], skip, position))
    position = max(position, max_length - 1)
    while position < len(ids) - 1:
        start = max(1, position - overlap)
        piece = [ids[0], *ids[start:start + max_length - 1]]
        windows.append(Window(example, piece, position - start + 1, position))
        position = start + max_length - 2
    return windows


def shared_prefix(ids, template_ids):
    """How many leading ids are template and nothing else."""
    count = 0
    while count < min(len(ids), len(template_ids)) and ids[count] == template_ids[count]:
        count += 1
    return count


def windows_of(base, texts, template, max_length, positions="all"):
    """All windows of all texts, longest first (so that what does not fit in memory shows at once)."""
    template_ids = base.encode(template.prefix)
    windows = []
    for example, text in enumerate(texts):
        ids = base.encode(text, end=True)
        if positions == "last":  # the original demo: one entry a row, after cutting at max_length
            ids = ids[:max_length]
            windows += make_windows(example, ids, max_length, len(ids) - 2)
        else:
            windows += make_windows(example, ids, max_length, shared_prefix(ids, template_ids))
    return sorted(windows, key=lambda window: len(window.ids), reverse=True)


class Entries(NamedTuple):
    """What is known of N entries beside their keys, window after window."""

    values: np.ndarray  # (N,) int32, the next token
    example: np.ndarray  # (N,) int32, which text
    position: np.ndarray  # (N,) int32, the key's place in that text's ids
    read: np.ndarray  # (N,) int32, the token there
    offsets: np.ndarray  # (B+1,) int64: window b holds entries offsets[b]:offsets[b+1]


def entries_of(windows):
    """The Entries of all windows, in their order."""
    values = [token for w in windows for token in w.ids[w.skip + 1:]]
    read = [token for w in windows for token in w.ids[w.skip:-1]]
    counts = [len(w.ids) - 1 - w.skip for w in windows]
    example = np.repeat(np.array([w.example for w in windows], np.int32), counts)
    position = [w.position + i for w, count in zip(windows, counts, strict=True) for i in range(count)]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Entries(np.array(values, np.int32), example, np.array(position, np.int32), np.array(read, np.int32), offsets)


def hidden_batches(base, windows, batch_size):
    """Yield (first window, entries' hidden states (n, H)) for batch_size windows at a time."""
    for first in range(0, len(windows), batch_size):
        batch = windows[first:first + batch_size]
        longest = max(len(w.ids) for w in batch)
        # Right padding changes nothing before it under a causal mask, so no attention mask is needed.
        ids = torch.tensor([w.ids + [base.eos] * (longest - len(w.ids)) for w in batch])
        hidden = base.hidden(ids)
        yield first, torch.cat([h[w.skip:len(w.ids) - 1] for h, w in zip(hidden, batch, strict=True)])


def write_keys(base, windows, offsets, path, batch_size):
    """Append the keys (N, H) fp16 of all windows to the file `path`, going on behind the whole batches it holds."""
    row = 2 * base.width
    done = path.stat().st_size // row if path.exists() else 0
    starts = offsets[:-1][::batch_size]
    first = batch_size * max(0, int(np.searchsorted(starts, done, side="right")) - 1) if done < offsets[-1] else len(windows)
    with open(path, "ab") as file, tqdm(total=int(offsets[-1]), initial=int(offsets[first]), desc="keys",
                                        unit="entry", mininterval=1) as bar:
        file.truncate(int(offsets[first]) * row)
        for _, hidden in hidden_batches(base, windows[first:], batch_size):
            keys = hidden.to("cpu", torch.float16).numpy()
            if not np.isfinite(keys).all():
                raise UserError(f"Some hidden states of {base.name} are not finite or above 65504, the most that keys hold; "
                                "try another --dtype or base model.")
            file.write(keys.tobytes())
            bar.update(len(keys))


def open_keys(path, width):
    return np.memmap(path, dtype=np.float16, mode="r").reshape(-1, width)


def choose_index(entries, width, memory):
    """A faiss factory string: exact while that is quick, then inverted lists, then fewer and smaller numbers.

    `memory` is what the index may take, in bytes.
    """
    if entries <= FLAT_LIMIT:
        return "Flat"
    lists = int(4 * entries**0.5)
    if 2 * entries * width <= memory:
        return f"IVF{lists},SQfp16"
    return f"PCA{min(width, 256)},IVF{lists},SQ8"


def build_index(keys, factory, seed=0):
    """(index, mean): a faiss index over keys (N, H) minus their mean.

    Without the common offset, faiss's batched |q|^2 - 2qx + |x|^2 stays exact in float32, and L2 distances
    are the same. Raises UserError for a factory string that faiss does not know or cannot train.
    """
    chunks = range(0, len(keys), 65536)
    mean = sum(keys[i:i + 65536].astype(np.float32).sum(0, dtype=np.float64) for i in chunks) / len(keys)
    mean = mean.astype(np.float32)
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        index = faiss.index_factory(keys.shape[1], factory)
        lists = 256
        if "IVF" in factory:
            ivf = faiss.extract_index_ivf(index)
            lists, ivf.cp.niter = ivf.nlist, 8
            ivf.nprobe = max(8, lists // PROBED)
        if not index.is_trained:
            picks = np.sort(np.random.default_rng(seed).permutation(len(keys))[:max(40 * lists, 20_000)])
            sample = keys[picks].astype(np.float32)
            sample -= mean
            index.train(sample)
        for i in tqdm(chunks, desc="index", unit="chunk"):
            index.add(keys[i:i + 65536].astype(np.float32) - mean)
    except RuntimeError as error:
        raise UserError(f"faiss cannot build the index {factory!r}: {one_line(error)}") from None
    return index, mean


class Datastore:
    """The entries and their index: search by hidden state, and trace what was found back to its text."""

    def __init__(self, index, mean, values, example, position, texts):
        self.index, self.mean, self.values = index, mean, values
        self.example, self.position, self.texts = example, position, texts

    @classmethod
    def open(cls, folder):
        """Open what training wrote; the caller has checked the files against the manifest."""
        folder = Path(folder)
        with np.load(folder / "datastore_entries.npz", allow_pickle=False) as entries:
            example, position, mean = entries["example"], entries["position"], entries["mean"]
        values = np.load(folder / "datastore_values.npy", allow_pickle=False)
        index = faiss.read_index(str(folder / "faiss_index.bin"), faiss.IO_FLAG_MMAP)
        with open(folder / "examples.jsonl", encoding="utf-8") as lines:  # str.splitlines would also cut at U+2028
            texts = [json.loads(line)["text"] for line in lines]
        return cls(index, mean, values, example, position, texts)

    def __len__(self):
        return len(self.values)

    def search(self, queries, k):
        """Squared L2 distances D (Q, K), ascending, and entry ids I (Q, K) of the nearest entries.

        queries (Q, H). Where an approximate index finds fewer than k, D is inf and I is -1.
        """
        queries = np.asarray(queries, np.float32) - self.mean
        # One thread answers a few queries sooner than several that first have to meet.
        faiss.omp_set_num_threads(1 if len(queries) < 16 else torch.get_num_threads())
        D, I = self.index.search(queries, k)
        D = np.where(I < 0, np.inf, np.maximum(D, 0))
        order = np.argsort(D, axis=1, kind="stable")  # some builds return unsorted lists
        return np.take_along_axis(D, order, 1), np.take_along_axis(I, order, 1)

    def search_others(self, queries, example, k):
        """As search, leaving out for each query the entries of its own example (Q,)."""
        D = np.full((len(queries), k), np.inf, np.float32)
        I = np.full((len(queries), k), -1, np.int64)
        left, fetch = np.arange(len(queries)), min(len(self), k + k // 2 + 8)
        while len(left):
            found_D, found_I = self.search(queries[left], fetch)
            other = (found_I >= 0) & (self.example[found_I] != example[left, None])
            rank = np.cumsum(other, axis=1)
            enough = (rank[:, -1] >= k) | (found_I[:, -1] < 0) | (fetch == len(self))
            row, column = np.nonzero(other & (rank <= k) & enough[:, None])
            D[left[row], rank[row, column] - 1] = found_D[row, column]
            I[left[row], rank[row, column] - 1] = found_I[row, column]
            left, fetch = left[~enough], min(len(self), 4 * fetch)
        return D, I

    def recall(self, keys, k, sample=200, seed=0):
        """Share of the exact k nearest entries that the index finds, over a sample of the stored keys (N, H)."""
        picks = np.sort(np.random.default_rng(seed).permutation(len(keys))[:sample])
        queries = keys[picks].astype(np.float32)
        exact = faiss.ResultHeap(len(queries), k)
        for i in range(0, len(keys), 65536):
            chunk = keys[i:i + 65536].astype(np.float32) - self.mean
            D, I = faiss.knn(queries - self.mean, chunk, min(k, len(chunk)))
            exact.add_result(D, I + i)
        exact.finalize()
        _, I = self.search(queries, k)
        return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(exact.I, I, strict=True)]))


def find_neighbours(store, keys, k, folder):
    """Write D fp32 and I int32 (N, K) of every entry, its own example left out, going on where a run stopped."""
    shape, done_file = (len(keys), k), folder / "neighbours_done.json"
    done = json.loads(done_file.read_text()) if done_file.exists() else 0
    mode = "r+" if done else "w+"
    D = np.lib.format.open_memmap(folder / "neighbours_D.npy", mode=mode, dtype=np.float32, shape=shape)
    I = np.lib.format.open_memmap(folder / "neighbours_I.npy", mode=mode, dtype=np.int32, shape=shape)
    with tqdm(total=len(keys), initial=done, desc="neighbours", unit="entry") as bar:
        for i in range(done, len(keys), SEARCH_CHUNK):
            rows = slice(i, i + SEARCH_CHUNK)
            D[rows], I[rows] = store.search_others(keys[rows], store.example[rows], k)
            D.flush(), I.flush()
            write_atomically(done_file, json.dumps(min(i + SEARCH_CHUNK, len(keys))))
            bar.update(len(keys[rows]))


def knn_weights(D, temperature):
    """Weights (Q, K) of neighbours at squared distances D (Q, K): softmax(-D / temperature); inf gives equal votes.

    Khandelwal et al. 2020, equation 2. An infinite distance has weight 0.
    """
    found = np.isfinite(D)
    nearest = D.min(axis=1, keepdims=True, initial=np.finfo(np.float32).max)  # subtracted so that exp cannot underflow
    weights = np.exp(-(np.where(found, D, nearest) - nearest) / temperature) * found
    return weights / np.maximum(weights.sum(1, keepdims=True), 1e-12)


def default_temperature(D):
    """Half the median squared distance of a sample: the best of those tried for kNN-LM on legal text."""
    sample = D[:: max(1, len(D) // 10_000)]
    return max(float(np.median(sample[np.isfinite(sample)])) / 2, 1e-6)
