"""Script 1: text -> datastore -> neighbours -> MemoryDecoder -> held-out report.

    python train_memory_decoder.py --demo        # embedded model and data, no network
    python train_memory_decoder.py               # google/gemma-2b and the legal Q&A dataset of the hub

Every stage keeps its result under <output_dir>/stages, so a run that was stopped goes on where it was, and
a stage whose inputs have not changed is not run again. Artefacts are replaced only when all is done.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import datasets
import faiss
import numpy as np
import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import evaluation
from datastore import (
    FLAT_LIMIT,
    PROBED,
    BaseLM,
    Datastore,
    Template,
    UserError,
    build_index,
    choose_index,
    default_temperature,
    entries_of,
    find_neighbours,
    keep_freed_memory,
    knn_weights,
    one_line,
    open_keys,
    parse_dataclass,
    pick_device,
    windows_of,
    write_atomically,
    write_keys,
)
from memory_decoder import LEAST_BLOCK, LOGITS_AT_ONCE, SCORES_AT_ONCE, MemoryDecoder, Topic, TrainingLoss, file_checksum

HERE = Path(__file__).resolve().parent
DEMO = {"base_model": str(HERE / "demo/base_model"), "dataset": str(HERE / "demo/legal_qa.jsonl"),
        "output_dir": str(HERE / "demo/trained_models"), "template": "Question: {Question}\nAnswer: {Answer}",
        "max_length": 512, "batch_size": 4,
        # Attention over a few states falls back on stored sentences when a question is new; over many it loses its way.
        # Topics, one a stored text, lead a question in other words to it.
        "context": 16, "topic": 1024,
        # A chat asks about what is remembered: more passes at a higher rate, nothing dropped and less KL remember it word for word.
        "num_epochs": 4, "decoder_lr": 2.5e-3, "dropout": 0.0, "kl_weight": 0.1}
ORIGINAL = {"decoder_lr": 1e-4, "context": 1, "topic": 0, "norm": "post", "head_init": "random", "knn_temperature": math.inf,
            "positions": "last", "num_epochs": 3, "dropout": 0.1, "kl_weight": 0.5}
MOST_VALIDATION_ROWS = 200
LONG_ANSWER = 100  # characters from which two equal answers are one answer to two questions
CHECKPOINT_SECONDS = 120


def option(default, text, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass
class Options:
    base_model: str = option("google/gemma-2b", "causal language model: hub id or folder")
    dataset: str = option("ibunescu/qa_legal_dataset_train", "hub id (split train), or a JSON, JSONL, CSV or Parquet file")
    template: str = option("Title: {Title}\nQuestion: {Question}\nAnswer: {Answer}",
                           "text of one row; the last field is the answer, the one before it what a user asks")
    validation_dataset: str | None = option(None, "held-out rows, given as --dataset is; default: a share of the dataset")
    validation_fraction: float = option(0.05, "share of the different answers held out (at least 2 rows, at most 200)")
    max_examples: int | None = option(None, "use only so many training rows")
    max_length: int = option(128, "tokens the base model reads at once; longer texts are read in several windows")
    positions: str = option("all", "'all' positions become entries, or the 'last' of each row", choices=["all", "last"])
    k: int = option(32, "neighbours per entry (the original's K)")
    index: str = option("auto", "faiss factory string, e.g. Flat or IVF1024,SQfp16; auto chooses by size")
    knn_temperature: float | None = option(None, "of the kNN weights, in squared distance; inf: equal votes; "
                                                 "default: half the median distance")
    decoder_dim: int = option(256, "width of the MemoryDecoder (DECODER_DIM); 32 must divide it")
    context: int = option(128, "query states that attention reaches back; 1 reads each alone, but for topics")
    topic: int = option(0, "number of topics, one a stored text where there are enough, of which every layer reads the nearest to "
                           "the tokens so far; 0: none. For a chat that answers each question alone (app.py --max_turns 0)")
    norm: str = option("pre", "LayerNorm before or after attention and MLP", choices=["pre", "post"])
    head_init: str = option("base", "output projection starts as the base model's head or at random", choices=["base", "random"])
    dropout: float = option(0.1, "share of the first layer's input and of each layer's output dropped in training")
    num_epochs: int = option(3, "passes over all entries (NUM_EPOCHS)")
    decoder_lr: float = option(1e-3, "peak learning rate of AdamW (DECODER_LR)")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    batch_size: int = option(16, "windows a step")
    kl_weight: float = option(0.5, "share of KL in the loss, 0 to 1; the rest is cross-entropy")
    output_dir: str = option("trained_models", "where the artefacts go")
    dtype: str = option("auto", "of the base model", choices=["auto", "float32", "bfloat16", "float16"])
    device: str = option("auto", "auto, cpu, cuda or mps")
    seed: int = option(0, "seed of weights, order and the held-out share")
    demo: bool = option(False, "train on the embedded model and data: no network, no account")
    original: bool = option(False, "the original demo's recipe as defaults: lr 1e-4, context 1, post-norm, random head, "
                                   "equal votes, one entry a row; goes before --demo's")

    def check(self):
        """Raise UserError for a value that cannot work, before anything is loaded."""
        for name in ("k", "decoder_dim", "context", "num_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        if self.topic < 0:
            raise UserError(f"--topic must be at least 0, not {self.topic}.")
        if self.topic and self.positions == "last":
            raise UserError("Topics are fitted to whole texts; with --positions last leave --topic at 0.")
        if self.max_length < 8:
            raise UserError(f"--max_length must be at least 8, not {self.max_length}.")
        if not 0 < self.decoder_lr < math.inf or not 0 <= self.weight_decay < math.inf or not 0 <= self.kl_weight <= 1 \
                or not 0 <= self.dropout < 1 or not 0 < self.validation_fraction < 1:
            raise UserError("--decoder_lr must be above 0, --weight_decay at least 0, --kl_weight from 0 to 1, --dropout from 0 "
                            "to below 1, and --validation_fraction between 0 and 1.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2**63 - 1, not {self.seed}.")
        pick_device(self.device)
        if self.knn_temperature is not None and not self.knn_temperature > 0:
            raise UserError(f"--knn_temperature must be above 0, not {self.knn_temperature}.")
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError(f"--max_examples must be at least 1, not {self.max_examples}.")
        MemoryDecoder(1, 1, self.decoder_dim, num_layers=0)


def parse_options(arguments=None):
    return parse_dataclass(Options, __doc__.split("\n")[0], arguments, {"demo": DEMO, "original": ORIGINAL})


def read_rows(source, template):
    """The rows of a hub dataset or local file as dicts of the template's fields; rows that lack a value are left out."""
    path = Path(source)
    kind = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix.lower())
    try:
        if path.is_file() and kind:
            if path.stat().st_size == 0:
                raise UserError(f"The dataset file {source} is empty.")
            plain = {"keep_default_na": False} if kind == "csv" else {}  # an answer may well read "None"
            data = datasets.load_dataset(kind, data_files=str(path), split="train", **plain)
        elif path.is_file() or path.suffix.lower() in (".json", ".jsonl", ".csv", ".parquet"):
            raise UserError(f"There is no JSON, JSONL, CSV or Parquet file {source}; check the path.")
        else:
            data = datasets.load_dataset(source, split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(explain_dataset_error(source, kind, error)) from None
    missing = [name for name in template.fields if name not in data.column_names]
    if missing:
        raise UserError(f"The dataset {source} has no field {', '.join(missing)}; it has {', '.join(data.column_names)}. "
                        "Name those you want with --template.")
    rows = [{name: row[name] for name in template.fields} for row in data.select_columns(template.fields)]
    rows = [row for row in rows if all(str(value if value is not None else "").strip() for value in row.values())]
    if not rows:
        raise UserError(f"The dataset {source} holds no row in which all of {', '.join(template.fields)} are filled.")
    return rows


def explain_dataset_error(source, local, error):
    text = f"{error} {error.__cause__ or ''}".lower()
    if local:
        return f"The dataset file {source} cannot be read: {one_line(error.__cause__ or error)}"
    if "doesn't exist" in text and "connect" not in text and "offline" not in text:
        return f"There is no dataset {source} on the hub and no file of that name; check --dataset."
    return (f"The dataset {source} is not on this machine and cannot be fetched from the hub; check its name and the network, "
            f"or name a local file. ({one_line(error)[:120]})")


def telltale(row, template):
    """What must not stand on both sides of the split: the text (data repeat rows), and an answer too long to be chance."""
    answer = str(row[template.fields[-1]]).strip()
    return [template.render(row), *([answer] if len(answer) >= LONG_ANSWER else [])]


def split_rows(options, template):
    """(training rows, validation rows); those held out never enter the datastore.

    Rows with one text or one long answer are drawn as one: the first is held out and its twins are left out.
    """
    rows = read_rows(options.dataset, template)
    if options.validation_dataset:
        held = read_rows(options.validation_dataset, template)[:MOST_VALIDATION_ROWS]
        known = {part for row in held for part in telltale(row, template)}
        order = np.random.default_rng(options.seed).permutation(len(rows))
        order = [i for i in order if not known & set(telltale(rows[i], template))]
    else:
        groups = {}
        for i, row in enumerate(rows):
            groups.setdefault(telltale(row, template)[-1], []).append(i)
        groups = list(groups.values())
        drawn = [groups[i] for i in np.random.default_rng(options.seed).permutation(len(groups))]
        count = min(MOST_VALIDATION_ROWS, max(2, round(options.validation_fraction * len(groups))))
        held, order = [rows[group[0]] for group in drawn[:count]], [i for group in drawn[count:] for i in group]
        if len(held) + len(order) < len(rows):
            print(f"left out: {len(rows) - len(held) - len(order)} rows whose text or long answer is held out too", flush=True)
    kept = np.sort(order[:options.max_examples])
    if len(kept) < 2 or len(held) < 2:
        raise UserError(f"The dataset {options.dataset} is too small: {len(kept)} rows to train on and {len(held)} held out; "
                        "at least 2 of each are needed, since an example never learns from itself.")
    return [rows[i] for i in kept], held


class Stage:
    """The files of one step, in a folder named by all that they depend on; done.json is written last."""

    def __init__(self, root, name, inputs, parent=None):
        text = json.dumps([parent.key if parent else None, inputs], sort_keys=True)
        self.name, self.key = name, hashlib.sha256(text.encode()).hexdigest()[:12]
        self.path = root / f"{name}-{self.key}"

    def __truediv__(self, name):
        return self.path / name

    def begin(self):
        """Whether there is work to do; makes the folder and starts the clock."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        return not (self / "done.json").exists()

    @property
    def facts(self):
        return json.loads((self / "done.json").read_text())

    def finish(self, **facts):
        facts["seconds"] = round(time.monotonic() - self.began, 3)
        write_atomically(self / "done.json", json.dumps(facts))


class Stages:
    """The five stages of one run, each keyed by its own inputs and by the stage before it."""

    def __init__(self, root, options, base, template, texts, held_texts):
        def digest(parts):
            return hashlib.sha256("\0".join(parts).encode()).hexdigest()

        def values(*names):
            return {name: str(getattr(options, name)) for name in names}

        self.datastore = Stage(root, "datastore", [base.fingerprint, str(base.model.dtype), digest(texts), template.pattern,
                                                   values("max_length", "positions")])
        self.index = Stage(root, "index", values("index", "seed"), self.datastore)
        self.neighbours = Stage(root, "neighbours", values("k"), self.index)
        learning = values("decoder_dim", "context", "norm", "head_init", "dropout", "num_epochs", "decoder_lr",
                          "weight_decay", "batch_size", "kl_weight", "knn_temperature", "seed")
        if options.topic:
            learning["topics of tokens, with entries"] = options.topic  # once they were of hidden states, then without
        self.decoder = Stage(root, "decoder", learning, self.neighbours)
        # A report from before there were gates is made anew.
        self.report = Stage(root, "report", [digest(held_texts), "gate"], self.decoder)

    def __iter__(self):
        return iter((self.datastore, self.index, self.neighbours, self.decoder, self.report))


def plan(options, base, windows, entries, stages, is_main=True):
    """Print what will be made and what it takes; raise UserError where it does not fit. Returns the faiss factory string.

    What auto chose depends on the memory that was free, so the choice is kept with the stage. Files that an earlier run
    left for this one are not asked for again, and only the main process asks.
    """
    output = stages.index.path.parent
    free_memory, free_disk = psutil.virtual_memory().available, shutil.disk_usage(output).free
    factory = choose_index(entries, base.width, free_memory // 2) if options.index == "auto" else options.index
    if (stages.index / "factory.txt").exists():
        factory = (stages.index / "factory.txt").read_text()
    if not is_main:
        return factory
    weights = options.decoder_dim * (base.vocabulary + base.width + 75 * options.decoder_dim)
    disk, memory = estimate_bytes(options, base, windows, entries, weights, factory)
    disk = max(0, disk - sum(file.stat().st_size for stage in stages for file in stage.path.glob("*")))
    seconds = estimate_seconds(options, base, windows, entries, weights)
    print(f"plan: {entries:,} entries of width {base.width}; index {factory}; disk {disk / 2**30:.2f} GiB of "
          f"{free_disk / 2**30:.1f} free; memory {memory / 2**30:.2f} GiB beside the model of {free_memory / 2**30:.1f} free; "
          f"about {max(1, round(seconds / 60))} min", flush=True)
    if disk > free_disk:
        raise UserError(f"The datastore needs {disk / 2**30:.2f} GiB of disk and {output} has {free_disk / 2**30:.2f}; lower "
                        "--max_examples or --k, or name another --output_dir.")
    if memory > free_memory:
        raise UserError(f"Training needs about {memory / 2**30:.2f} GiB of memory and {free_memory / 2**30:.2f} are free; lower "
                        "--max_examples or --decoder_dim, or choose a smaller --index such as PCA64,IVF1024,SQ8.")
    return factory


def estimate_bytes(options, base, windows, entries, weights, factory):
    """(bytes of disk, bytes of memory beside the base model) that all stages take."""
    reduced = re.search(r"(?:PCA|OPQ\d+_)(\d+)", factory)
    width = {"Flat": 4, "SQfp16": 2}.get(factory.split(",")[-1], 1) * (int(reduced[1]) if reduced else base.width)
    index, keys = entries * (width + 8), entries * base.width * 2
    reach = min(options.max_length, 2 * max(options.context, LEAST_BLOCK))  # keys that a block of attention scores
    scores = min(SCORES_AT_ONCE, options.batch_size * 32 * options.max_length * reach)  # of one layer; six are kept
    topics = 4 * Topic.RANK * (base.vocabulary + min(options.topic, len(windows))) if options.topic else 0
    memory = index + 20 * weights + topics + 3 * 4 * LOGITS_AT_ONCE + 9 * 4 * scores
    return keys + 2 * index + entries * options.k * 8, memory  # an index is written in its stage, then published


def estimate_seconds(options, base, windows, entries, weights):
    """Seconds for all stages, by the pace of one measured forward pass and counts of multiplications."""
    ids = torch.tensor([windows[0].ids])
    base.hidden(ids).sum().item()
    began = time.monotonic()
    base.hidden(ids).sum().item()  # a number, so that an accelerator has finished
    parameters, tokens = sum(p.numel() for p in base.decoder.parameters()), sum(len(w.ids) for w in windows)
    pace = 2 * parameters * ids.numel() / max(time.monotonic() - began, 1e-4)
    searched = entries if entries <= FLAT_LIMIT else entries / PROBED
    return (2 * parameters * tokens + 6 * weights * entries * options.num_epochs + 2 * base.width * entries * searched) / pace


def build_datastore(options, base, texts, windows, entries, stage):
    """Stage 1: keys.f16, values and the texts. Returns the keys (N, H), memory-mapped."""
    if stage.begin():
        np.save(stage / "datastore_values.npy", entries.values)
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (stage / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_keys(base, windows, entries.offsets, stage / "keys.f16", options.batch_size)
        stage.finish()
    return open_keys(stage / "keys.f16", base.width)


def build_neighbours(options, keys, entries, texts, factory, stages):
    """Stages 2 and 3: the index, then every entry's neighbours. Returns the Datastore."""
    if stages.index.begin():
        write_atomically(stages.index / "factory.txt", factory)
        index, mean = build_index(keys, factory, options.seed)
        faiss.write_index(index, str(stages.index / "faiss_index.bin"))
        np.savez(stages.index / "datastore_entries.npz", example=entries.example, position=entries.position, mean=mean)
        stages.index.finish()
    index = faiss.read_index(str(stages.index / "faiss_index.bin"))
    mean = np.load(stages.index / "datastore_entries.npz", allow_pickle=False)["mean"]
    store = Datastore(index, mean, entries.values, entries.example, entries.position, texts)
    if stages.neighbours.begin():
        find_neighbours(store, keys, options.k, stages.neighbours.path)
        stages.neighbours.finish(recall=store.recall(keys, options.k))
    print(f"neighbours: recall@{options.k} against exact search {stages.neighbours.facts['recall']:.3f}", flush=True)
    return store


def epoch_batches(lengths, batch_size, seed, epoch):
    """Lists of window numbers for one epoch: shuffled, yet with windows of like length together to save padding."""
    rng = np.random.default_rng([seed, epoch])
    order, pool = rng.permutation(len(lengths)), 32 * batch_size
    batches = []
    for i in range(0, len(order), pool):
        part = order[i:i + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[j:j + batch_size] for j in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


class Batches:
    """Training tensors by window numbers, from the memory-mapped keys and neighbours."""

    def __init__(self, keys, entries, neighbours, temperature):
        self.keys, self.entries, self.temperature = keys, entries, temperature
        self.D = np.load(neighbours / "neighbours_D.npy", mmap_mode="r")
        self.I = np.load(neighbours / "neighbours_I.npy", mmap_mode="r")

    def __call__(self, numbers, device):
        """hidden (B, T, H), read (B, T), real (B, T) bool, and for the P real positions: tokens, weights (P, K), targets (P,)."""
        values, offsets = self.entries.values, self.entries.offsets
        spans = [slice(offsets[b], offsets[b + 1]) for b in numbers]
        hidden, read = (pad_sequence([torch.from_numpy(x[s].astype(kind)) for s in spans], batch_first=True)
                        for x, kind in ((self.keys, np.float32), (self.entries.read, np.int64)))
        lengths = torch.tensor([s.stop - s.start for s in spans])
        rows = np.concatenate([np.arange(s.start, s.stop) for s in spans])
        weights = knn_weights(self.D[rows], self.temperature).astype(np.float32)
        arrays = (values[self.I[rows]].astype(np.int64), weights, values[rows].astype(np.int64))
        real = torch.arange(hidden.shape[1]) < lengths[:, None]
        return tuple(x.to(device) for x in (hidden, read, real, *map(torch.from_numpy, arrays)))


def make_decoder(options, base, keys, entries):
    """A MemoryDecoder as it is before training."""
    torch.manual_seed(options.seed)
    windows = Topic.windows(entries.offsets) if options.topic else []
    decoder = MemoryDecoder(base.width, base.vocabulary, options.decoder_dim, context=options.context,
                            topic=min(options.topic, len(windows)), norm_first=options.norm == "pre", dropout=options.dropout)
    if windows:
        decoder.topic.fit(base.head.weight.detach().cpu(), entries.read, windows, options.seed)
    if options.head_init == "base":
        picks = np.sort(np.random.default_rng(options.seed).permutation(len(keys))[:20_000])
        decoder.to(base.device).start_from_head(base.head.weight.detach(), torch.from_numpy(keys[picks]))
    return decoder


def train_decoder(options, base, keys, entries, stages, accelerator):
    """Stage 4: fit the MemoryDecoder; a checkpoint every two minutes and at each epoch's end."""
    stage = stages.decoder
    batches = Batches(keys, entries, stages.neighbours, training_temperature(options, stages.neighbours))
    decoder = make_decoder(options, base, keys, entries)
    lengths, world = np.diff(entries.offsets), accelerator.num_processes
    per_epoch = -(-len(epoch_batches(lengths, options.batch_size, options.seed, 0)) // world)
    model = TrainingLoss(decoder, options.kl_weight)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=options.decoder_lr, weight_decay=options.weight_decay, fused=True)
    total = per_epoch * options.num_epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, total // 20), total)
    model, optimizer = accelerator.prepare(model, optimizer)
    step, losses = load_checkpoint(stage, decoder, optimizer, schedule, total)
    saved_at = time.monotonic()
    with tqdm(total=total, initial=step, desc="decoder", unit="step", disable=not accelerator.is_main_process) as bar:
        while step < total:
            epoch, number = divmod(step, per_epoch)
            if number == 0 or step == bar.initial:
                order = epoch_batches(lengths, options.batch_size, options.seed, epoch)
            drawn = step * world + accelerator.process_index
            torch.manual_seed((options.seed + drawn) % 2**63)  # dropout, the same after a restart
            numbers = order[(number * world + accelerator.process_index) % len(order)]
            loss, kl, ce = model(*batches(numbers, accelerator.device))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step(), schedule.step(), optimizer.zero_grad()
            step += 1
            bar.update()
            if step % 10 == 0 or step == total:
                losses.append([step, loss.item(), kl.item(), ce.item()])
                bar.set_postfix(loss=f"{losses[-1][1]:.3f}", kl=f"{losses[-1][2]:.3f}", ce=f"{losses[-1][3]:.3f}", refresh=False)
            if accelerator.is_main_process and (step % per_epoch == 0 or time.monotonic() - saved_at > CHECKPOINT_SECONDS):
                save_checkpoint(stage, decoder, optimizer, schedule, step, losses, total)
                saved_at = time.monotonic()
    if accelerator.is_main_process:
        decoder.save(stage / "memory_decoder.pt")
        stage.finish(losses=losses)
        (stage / "checkpoint.pt").unlink(missing_ok=True)


def training_temperature(options, neighbours):
    if options.knn_temperature is not None:
        return options.knn_temperature
    return default_temperature(np.load(neighbours / "neighbours_D.npy", mmap_mode="r"))


def save_checkpoint(stage, decoder, optimizer, schedule, step, losses, total):
    state = {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
             "step": step, "losses": losses, "total": total}
    torch.save(state, stage / "checkpoint.part")
    os.replace(stage / "checkpoint.part", stage / "checkpoint.pt")


def load_checkpoint(stage, decoder, optimizer, schedule, total):
    """(steps done, losses so far) after restoring a checkpoint, if there is one of a run with as many steps.

    Another number of processes makes another number of steps; the decoder then starts afresh.
    """
    if not (stage / "checkpoint.pt").exists():
        return 0, []
    state = torch.load(stage / "checkpoint.pt", map_location="cpu", weights_only=True)
    if state["total"] != total:
        return 0, []
    decoder.load_state_dict(state["decoder"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"], state["losses"]


def make_report(options, base, store, held_windows, stages, factory):
    """Stage 5: score the held-out rows; writes metrics.json, report.md and the plots, prints the table, returns the metrics."""
    if stages.report.begin():
        decoder = MemoryDecoder.load(stages.decoder / "memory_decoder.pt")
        trained_with = temperature = training_temperature(options, stages.neighbours)
        if math.isinf(temperature):  # equal votes have no temperature to vary: compare with kNN-LM at the usual one
            temperature = default_temperature(np.load(stages.neighbours / "neighbours_D.npy", mmap_mode="r"))
        scores = evaluation.score_positions(base, decoder, held_windows, options.batch_size, store, options.k, temperature)
        samples = evaluation.sample_windows(base, min(256, options.max_length), options.seed)
        samples = evaluation.score_positions(base, decoder, samples, options.batch_size)
        seconds = {stage.name: stage.facts["seconds"] for stage in list(stages)[:-1]}
        seconds["report"] = round(time.monotonic() - stages.report.began, 3)
        metrics = evaluation.summarise(scores, samples, temperature) | {
            "entries": len(store), "k": options.k, "index": factory, "index_recall": stages.neighbours.facts["recall"],
            "training_knn_temperature": str(trained_with) if math.isinf(trained_with) else trained_with, "seconds": seconds,
            "peak_memory_bytes": evaluation.peak_memory()}
        evaluation.write_report(metrics, stages.decoder.facts["losses"], stages.report.path)
        stages.report.finish()
    metrics = json.loads((stages.report / "metrics.json").read_text())
    print("\n" + evaluation.report_table(metrics), flush=True)
    return metrics


def publish(options, base, template, metrics, stages, output):
    """Put the artefacts in place and the manifest last; stage folders of other settings are then removed."""
    sources = {"memory_decoder.pt": stages.decoder, "faiss_index.bin": stages.index, "datastore_entries.npz": stages.index,
               "datastore_values.npy": stages.datastore, "examples.jsonl": stages.datastore,
               **dict.fromkeys(("metrics.json", "report.md", "loss_curve.png", "alpha_sweep.png"), stages.report)}
    checksums = {}
    for name, stage in sources.items():
        part = output / f"{name}.part"
        shutil.copyfile(stage / name, part)
        checksums[name] = file_checksum(part)
    manifest = {
        "base_model": base.name, "base_fingerprint": base.fingerprint, "dtype": options.dtype, "template": template.pattern,
        "base_revision": getattr(base.model.config, "_commit_hash", None), "chosen": metrics["chosen"],
        "entries": metrics["entries"], "k": options.k, "files": checksums,
        "options": {name: str(value) if value == math.inf else value for name, value in dataclasses.asdict(options).items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "faiss-cpu", "numpy")},
    }
    (output / "config.json").unlink(missing_ok=True)  # a kill between two replacements must not look whole
    for name in sources:
        os.replace(output / f"{name}.part", output / name)
    write_atomically(output / "config.json", json.dumps(manifest, indent=2) + "\n")
    for folder in output.joinpath("stages").iterdir():
        if folder.is_dir() and folder not in [stage.path for stage in stages]:
            shutil.rmtree(folder)


def count_entries(options, entries):
    """N, after checking that K neighbours exist outside every example."""
    total = len(entries.values)
    outside = total - int(np.bincount(entries.example).max()) if total else 0
    if options.k > outside:
        raise UserError(f"K is {options.k}, but only {outside} of the {total} entries lie outside the longest example; "
                        "lower --k or use more rows.")
    return total


def training_precision(device):
    """bf16 where the hardware multiplies it faster than float32, else no mixed precision."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if device == "cpu" and torch.cpu._is_avx512_bf16_supported() else "no"


def run(options):
    """All stages; raises UserError for whatever the user can mend."""
    options.check()
    keep_freed_memory()
    template, device = Template(options.template), pick_device(options.device)
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))  # other processes wait while the first builds the datastore
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=training_precision(device), kwargs_handlers=[patience])
    rows, held = split_rows(options, template)
    base = BaseLM.load(options.base_model, options.dtype, str(accelerator.device) if device == "cuda" else device)
    if options.max_length > base.max_positions:
        raise UserError(f"--max_length {options.max_length} is more than the {base.max_positions} positions of {base.name}.")
    texts, held_texts = ([template.render(row) for row in part] for part in (rows, held))
    windows = windows_of(base, texts, template, options.max_length, options.positions)
    held_windows = windows_of(base, held_texts, template, options.max_length)
    entries = entries_of(windows)
    total = count_entries(options, entries)

    output = Path(options.output_dir)
    stages = Stages(output / "stages", options, base, template, texts, held_texts)
    try:
        (output / "stages").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Nothing can be written to the folder {output}: {error.strerror}.") from None
    with accelerator.main_process_first():
        factory = plan(options, base, windows, total, stages, accelerator.is_main_process)
        keys = build_datastore(options, base, texts, windows, entries, stages.datastore)
        store = build_neighbours(options, keys, entries, texts, factory, stages)
    if stages.decoder.begin():
        train_decoder(options, base, keys, entries, stages, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        metrics = make_report(options, base, store, held_windows, stages, factory)
        publish(options, base, template, metrics, stages, output)
        flags = "" if options.output_dir == "trained_models" else f" --model_dir {output}"
        print(f"\nsaved in {output}; chat with it: python app.py{' --demo' if options.output_dir == DEMO['output_dir'] else flags}")


def main():
    options = parse_options()
    try:
        run(options)
    except UserError as error:
        sys.exit(fail(str(error)))
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(fail(f"A file could not be read or written: {one_line(error)}; the same command goes on from here."))
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error):
            raise
        sys.exit(fail("There is not enough memory; lower --batch_size, then --max_length, --max_examples or --decoder_dim."))


def fail(sentence):
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
