"""Script 1: text -> datastore -> neighbours -> MemoryDecoder -> held-out report.

    python train_memory_decoder.py --demo        # embedded model and data, no network
    python train_memory_decoder.py               # google/gemma-2b and the legal Q&A dataset of the hub

Every stage keeps its result under <output_dir>/stages. So a stopped run goes on where it was, and a stage
whose inputs have not changed is not run again. Artefacts are replaced only when all stages are done.
"""

import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import faiss
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import evaluation
from base_model import DEMO_MODEL, BaseLM, fast_bfloat16, pick_device
from corpus import HELD_OUT, Corpus
from datastore import (
    Datastore,
    copy_keys,
    default_temperature,
    find_neighbours,
    knn_weights,
    open_keys,
    seen_tokens,
    write_atomically,
    write_examples,
    write_keys,
)
from earlier import Claim, Earlier, earlier_options
from index import build_index, grow_index, inverted_lists, is_exact
from memory_decoder import MemoryDecoder, TrainingLoss, check_heads
from stages import Stages, load_checkpoint, plan, publish, save_checkpoint
from support import command
from support.command import UserError, fail, one_line, option
from texts import entries_of, windows_of_sources

HERE = Path(__file__).resolve().parent
DEMO = {"base_model": DEMO_MODEL, "dataset": str(HERE / "demo/legal_qa.jsonl"), "template": "chat {Question} {Answer}",
        "output_dir": str(HERE / "demo/trained_models"), "max_length": 512, "batch_size": 4, "context": 64,
        # A chat asks about stored text. Many epochs, a high learning rate, no dropout and little KL teach it word for word.
        "num_epochs": 5, "decoder_lr": 2e-3, "dropout": 0.0, "kl_weight": 0.15}
ORIGINAL = {"decoder_lr": 1e-4, "context": 1, "norm": "post", "head_init": "random", "knn_temperature": math.inf,
            "positions": "last", "num_epochs": 3, "dropout": 0.1, "kl_weight": 0.5}
CHECKPOINT_SECONDS = 120
# Added text is learned at half the learning rate, with four windows of old text for each new one. At the full learning rate,
# with one window of old text, a small memory forgets much of what it knew.
REPLAYED, GROWING_RATE = 4, 0.5


@dataclass
class Options:
    base_model: str = option("google/gemma-2b", "causal language model: hub id, folder or .gguf file")
    dataset: str = option("ibunescu/qa_legal_dataset_train", "hub id, hub id:configuration, a JSON, CSV or Parquet file, a text, "
                                                             "Markdown or PDF document, or a folder of them")
    split: str | None = option(None, "split of the dataset; default: train")
    template: str | None = option(None, "text of one row: words and {fields}; the last field is the answer, the one before it the "
                                        "question; or 'chat {question} {answer}' or 'chat {messages}': the model's own chat "
                                        "template; or 'document {text}'; default: chosen by the names of the fields")
    validation_dataset: str | None = option(None, "held-out rows, named like --dataset; default: a share of the dataset")
    validation_split: str | None = option(None, "split with the held-out rows, of --validation_dataset or of the dataset itself")
    validation_fraction: float = option(0.05, "share of the different answers held out (at least 2 rows, at most 200)")
    max_examples: int | None = option(None, "use at most this many training rows")
    max_length: int = option(128, "tokens the base model reads at once; longer texts are read in several windows")
    positions: str = option("all", "'all' positions become entries, or the 'last' of each row", choices=["all", "last"])
    k: int = option(32, "neighbours per entry (the original's K)")
    index: str = option("auto", "faiss factory string, e.g. Flat or IVF1024,SQfp16; auto chooses by size")
    recall: float = option(0.95, "share of the K nearest that a search in inverted lists must find; 1 reads all lists")
    knn_temperature: float | None = option(None, "temperature of the kNN weights, in squared distance; inf: equal votes; "
                                                 "default: half the median distance")
    decoder_dim: int = option(256, "width of the MemoryDecoder (DECODER_DIM); 32 must divide it")
    context: int = option(128, "hidden states that attention reaches back; 1 reads each alone")
    norm: str = option("pre", "LayerNorm before or after attention and MLP", choices=["pre", "post"])
    head_init: str = option("base", "output projection starts as the base model's head, for tokens that some entry holds ('base'), "
                                    "or at random, for all tokens ('random')", choices=["base", "random"])
    dropout: float = option(0.1, "share of the first layer's input and of each layer's output dropped in training")
    num_epochs: int = option(3, "passes over all entries (NUM_EPOCHS)")
    decoder_lr: float = option(1e-3, "peak learning rate of AdamW (DECODER_LR)")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    batch_size: int = option(16, "windows in a training step")
    kl_weight: float = option(0.5, "share of KL in the loss, 0 to 1; the rest is cross-entropy")
    output_dir: str = option("trained_models", "where the artefacts go")
    add: str | None = option(None, "file, folder or dataset to add to the memory in --output_dir")
    forget: str | None = option(None, "document, table, or row (table:number) to remove from the memory in --output_dir")
    dtype: str = option("auto", "number format of the base model", choices=["auto", "float32", "bfloat16", "float16"])
    device: str = option("auto", "auto, cpu, cuda, cuda:1 and so on, or mps")
    seed: int = option(0, "seed of weights, order and the held-out share")
    demo: bool = option(False, "train on the embedded model and data: no network, no account")
    original: bool = option(False, "the original demo's recipe as defaults: lr 1e-4, context 1, post-norm, random head, "
                                   "equal votes, one entry a row; these win over --demo's")

    def check(self):
        """Raise UserError for a value that cannot work, before anything is loaded."""
        for name in ("k", "decoder_dim", "context", "num_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        if self.max_length < 8:
            raise UserError(f"--max_length must be at least 8, not {self.max_length}.")
        if not 0 < self.decoder_lr < math.inf or not 0 <= self.weight_decay < math.inf or not 0 <= self.kl_weight <= 1 \
                or not 0 <= self.dropout < 1 or not 0 < self.validation_fraction < 1:
            raise UserError("--decoder_lr must be above 0, --weight_decay at least 0, --kl_weight from 0 to 1, --dropout from 0 "
                            "to below 1, and --validation_fraction between 0 and 1.")
        if not 0 < self.recall <= 1:
            raise UserError(f"--recall must be above 0 and at most 1, not {self.recall}.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2**63 - 1, not {self.seed}.")
        pick_device(self.device)
        if self.knn_temperature is not None and not self.knn_temperature > 0:
            raise UserError(f"--knn_temperature must be above 0, not {self.knn_temperature}.")
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError(f"--max_examples must be at least 1, not {self.max_examples}.")
        check_heads(self.decoder_dim)


def parse_options(arguments=None):
    presets = {"demo": DEMO, "original": ORIGINAL, "add": earlier_options, "forget": earlier_options}
    return command.parse_options(Options, __doc__.split("\n")[0], arguments, presets)


def build_datastore(options, base, corpus, windows, entries, stage, earlier):
    """Stage 1: keys.f16, values and the examples. Returns the keys (N, H), memory-mapped."""
    if stage.begin():
        known = 0
        if earlier and (found := earlier.found("datastore")):
            copy_keys(found[0] / "keys.f16", earlier.entries_in(corpus), stage / "keys.f16", base.width)
            known = len(windows) - len(earlier.new(windows, corpus))
        np.save(stage / "datastore_values.npy", entries.values)
        write_examples(corpus.examples, stage / "examples.jsonl")
        write_keys(base, windows, entries.offsets, stage / "keys.f16", options.batch_size, known)
        stage.finish()
    return open_keys(stage / "keys.f16", base.width)


def make_index(options, keys, entries, factory, stage, grown, earlier):
    """Stage 2: the index with a number of probed lists that reaches --recall, and the entries."""
    if stage.begin():
        write_atomically(stage / "factory.txt", factory)
        if grown and (grown[0] / "factory.txt").read_text() == factory:
            index, mean = grow_index(grown[0] / "faiss_index.bin", keys, len(earlier.example), earlier.mean), earlier.mean
        else:
            index, mean = build_index(keys, factory, options.seed)
        np.savez(stage / "datastore_entries.npz", example=entries.example, position=entries.position, mean=mean)
        found, most = store_of(index, keys, entries, None, factory, stage).tune(keys, options.k, options.recall, options.seed)
        faiss.write_index(index, str(stage / "faiss_index.bin"))
        lists = inverted_lists(index)
        stage.finish(recall=found, most=most, nprobe=lists and lists.nprobe, lists=lists and lists.nlist)
    facts, more = stage.facts, ""
    if facts["lists"]:
        more = f", reads {facts['nprobe']} of {facts['lists']} inverted lists"
        more += f"; all find {facts['most']:.3f}, less than --recall {options.recall:g}" * (facts["most"] < options.recall)
    print(f"index: recall@{options.k} against exact search {facts['recall']:.3f}{more}", flush=True)


def store_of(index, keys, entries, examples, factory, stage):
    """The Datastore of an index. One that does not hold whole keys gets those on disk."""
    mean = np.load(stage / "datastore_entries.npz", allow_pickle=False)["mean"]
    keys = None if is_exact(factory) else keys
    return Datastore(index, mean, entries.values, entries.example, entries.position, examples, keys)


def build_neighbours(options, keys, entries, examples, factory, stages, earlier=None):
    """Stages 2 and 3: the index, then every entry's neighbours. Returns the Datastore.

    earlier: the memory whose entries come first among these.
    """
    grown = earlier.found("index", "neighbours") if earlier else None
    make_index(options, keys, entries, factory, stages.index, grown, earlier)
    store = store_of(faiss.read_index(str(stages.index / "faiss_index.bin")), keys, entries, examples, factory, stages.index)
    if stages.neighbours.begin():
        find_neighbours(store, keys, options.k, stages.neighbours.path, grown and grown[1])
        stages.neighbours.finish()
    return store


def epoch_batches(lengths, batch_size, seed, epoch, known=0):
    """Lists of window numbers for one epoch: shuffled, but with windows of similar length together to save padding.

    The first `known` windows are learned already. REPLAYED of them take part for each new window, drawn anew each epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order, pool = rng.permutation(len(lengths)), 32 * batch_size
    if known:
        again = order[order < known][:REPLAYED * (len(lengths) - known)]
        order = rng.permutation(np.concatenate([again, order[order >= known]]))
    batches = []
    for i in range(0, len(order), pool):
        part = order[i:i + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[j:j + batch_size] for j in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


class Batches:
    """Training tensors by window numbers, from the memory-mapped keys and neighbours."""

    def __init__(self, keys, entries, neighbours, temperature, seen):
        """seen: token ids (V',), ascending. Values and neighbours are given as places among them."""
        self.keys, self.offsets, self.temperature = keys, entries.offsets, temperature
        self.places = np.searchsorted(seen, entries.values)
        self.D = np.load(neighbours / "neighbours_D.npy", mmap_mode="r")
        self.I = np.load(neighbours / "neighbours_I.npy", mmap_mode="r")

    def __call__(self, numbers, device):
        """hidden (B, T, H), real (B, T) bool, and for the P real positions: tokens, weights (P, K), targets (P,)."""
        spans = [slice(self.offsets[b], self.offsets[b + 1]) for b in numbers]
        hidden = pad_sequence([torch.from_numpy(self.keys[s].astype(np.float32)) for s in spans], batch_first=True)
        lengths = torch.tensor([s.stop - s.start for s in spans])
        rows = np.concatenate([np.arange(s.start, s.stop) for s in spans])
        weights = knn_weights(self.D[rows], self.temperature).astype(np.float32)
        arrays = (self.places[self.I[rows]], weights, self.places[rows])
        real = torch.arange(hidden.shape[1]) < lengths[:, None]
        return tuple(x.to(device) for x in (hidden, real, *map(torch.from_numpy, arrays)))


def make_decoder(options, base, keys, entries, earlier=None):
    """The MemoryDecoder before training. earlier: the one that goes on learning, if there is one."""
    torch.manual_seed(options.seed)
    known = options.head_init == "base"
    seen, share = seen_tokens(entries) if known else (np.arange(base.vocabulary), 0.0)
    if earlier:
        return earlier.grown(seen, share, base.head.weight.detach()[torch.as_tensor(seen, device=base.device)], options.dropout)
    decoder = MemoryDecoder(base.width, base.vocabulary, seen, share, options.decoder_dim, context=options.context,
                            norm_first=options.norm == "pre", dropout=options.dropout)
    if known:
        picks = np.sort(np.random.default_rng(options.seed).permutation(len(keys))[:20_000])
        decoder.to(base.device).start_from_head(base.head.weight.detach()[decoder.seen.to(base.device)],
                                                torch.from_numpy(keys[picks]))
    return decoder


def train_decoder(options, base, keys, entries, stages, accelerator, earlier=None, known=0):
    """Stage 4: train the MemoryDecoder. Saves a checkpoint every two minutes and at the end of each epoch.

    earlier: a MemoryDecoder that has learned the first `known` windows and goes on learning.
    """
    stage = stages.decoder
    decoder = make_decoder(options, base, keys, entries, earlier)
    batches = Batches(keys, entries, stages.neighbours, training_temperature(options, stages.neighbours),
                      decoder.seen.cpu().numpy())
    lengths, world = np.diff(entries.offsets), accelerator.num_processes
    per_epoch = -(-len(epoch_batches(lengths, options.batch_size, options.seed, 0, known)) // world)
    model = TrainingLoss(decoder, options.kl_weight)
    rate = options.decoder_lr * (GROWING_RATE if earlier else 1)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=rate, weight_decay=options.weight_decay, fused=True)
    total = per_epoch * options.num_epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, total // 20), total)
    model, optimizer = accelerator.prepare(model, optimizer)
    step, losses = load_checkpoint(stage, decoder, optimizer, schedule, total)
    saved_at = time.monotonic()
    with tqdm(total=total, initial=step, desc="decoder", unit="step", disable=not accelerator.is_main_process) as bar:
        while step < total:
            epoch, number = divmod(step, per_epoch)
            if number == 0 or step == bar.initial:
                order = epoch_batches(lengths, options.batch_size, options.seed, epoch, known)
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


def make_report(options, base, store, held, held_windows, stages, factory, changed=None):
    """Stage 5: score the held-out rows. Writes metrics.json, report.md and the plots, prints the table, returns the metrics.

    changed: a function of the new decoder that returns what the change did, as plain data.
    """
    if stages.report.begin():
        decoder = MemoryDecoder.load(stages.decoder / "memory_decoder.pt")
        trained_with = temperature = training_temperature(options, stages.neighbours)
        if math.isinf(temperature):  # equal votes have no temperature to vary, so kNN-LM gets the default
            temperature = default_temperature(np.load(stages.neighbours / "neighbours_D.npy", mmap_mode="r"))
        if options.head_init == "base":
            evaluation.calibrate(base, decoder, [w for w in held_windows if w.example % 2 == 0], options.batch_size)
        decoder.save(stages.report / "memory_decoder.pt")
        scores = evaluation.score_positions(base, decoder, held_windows, options.batch_size, store, options.k, temperature, True)
        samples = evaluation.sample_windows(base, options.max_length, options.seed)
        own = evaluation.score_positions(base, decoder, samples, options.batch_size)
        before = list(stages)[:-1]
        seconds = {stage.name: stage.facts["seconds"] for stage in before}
        seconds["report"] = round(time.monotonic() - stages.report.began, 3)
        metrics = evaluation.summarise(scores, own, temperature) | {
            "scale": float(decoder.scale), "backoff": float(decoder.backoff), "seen_tokens": len(decoder.seen),
            "entries": len(store), "k": options.k, "index": factory, "index_recall": stages.index.facts["recall"],
            "index_nprobe": stages.index.facts["nprobe"],
            "training_knn_temperature": str(trained_with) if math.isinf(trained_with) else trained_with, "seconds": seconds,
            "resumed": [stage.name for stage in before if stage.facts.get("resumed")],
            "peak_memory_bytes": evaluation.peak_memory(), "losses": stages.decoder.facts["losses"]}
        metrics |= {"changed": changed(decoder)} if changed else {}
        evaluation.write_report(metrics, stages.report.path)
        write_examples(held, stages.report / HELD_OUT)
        stages.report.finish()
    metrics = json.loads((stages.report / "metrics.json").read_text())
    print("\n" + evaluation.report_table(metrics), flush=True)
    if "changed" in metrics:
        print("\n" + evaluation.change_table(metrics), flush=True)
    return metrics


def check_neighbours(options, entries):
    """Raise UserError unless at least K entries lie outside every example."""
    total = len(entries.values)
    outside = total - int(np.bincount(entries.example).max()) if total else 0
    if options.k > outside:
        raise UserError(f"K is {options.k}, but only {outside} of the {total} entries lie outside the longest example; "
                        "lower --k or use more rows.")


def run(options):
    """Run all stages. Raises UserError for errors that the user can fix."""
    options.check()
    device = pick_device(options.device)
    if "LOCAL_RANK" not in os.environ:  # accelerate gives each of several processes its own device
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))  # other processes wait while the first builds the datastore
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if fast_bfloat16(device) else "no",
                              kwargs_handlers=[patience])
    with Claim(options.output_dir, accelerator.is_main_process) as claim:
        earlier = Earlier(Path(options.output_dir)) if options.add or options.forget else None
        corpus = earlier.changed(options) if earlier else Corpus.read(options)
        base = BaseLM.load(options.base_model, options.dtype, str(accelerator.device) if device == "cuda" else device)
        if earlier:
            earlier.check(base, options)
        if options.template is None and (options.add or not earlier):
            corpus = corpus.fitting(base)
        make_memory(options, base, corpus, earlier, claim, accelerator)


def make_memory(options, base, corpus, earlier, claim, accelerator):
    """Run the stages of a Corpus in order. earlier: the memory that this run changes, if there is one."""
    if options.max_length > base.max_positions:
        raise UserError(f"--max_length {options.max_length} is more than the {base.max_positions} positions of {base.name}.")
    templates, output = corpus.templates(base), Path(options.output_dir)
    windows = windows_of_sources(base, corpus.examples, templates, options.max_length, options.positions)
    held_windows = windows_of_sources(base, corpus.held, templates, options.max_length)
    entries = entries_of(windows)
    check_neighbours(options, entries)
    grown = earlier if options.add and not options.forget else None
    stages = Stages(output / "stages", options, base, corpus, grown and grown.manifest["stages"])
    claim.make_folder()
    known, decoder = (len(windows) - len(grown.new(windows, corpus)), grown.decoder()) if grown else (0, None)
    seen = len(np.unique(entries.values)) if options.head_init == "base" else base.vocabulary
    with accelerator.main_process_first():
        factory = plan(options, base, windows, held_windows, seen, stages, accelerator.is_main_process,
                       windows[known:] * (1 + REPLAYED) if known else None)
        keys = build_datastore(options, base, corpus, windows, entries, stages.datastore, earlier)
        store = build_neighbours(options, keys, entries, corpus.examples, factory, stages, grown)
    if stages.decoder.begin():
        train_decoder(options, base, keys, entries, stages, accelerator, decoder, known)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        changed = earlier and (lambda decoder: earlier.difference(base, decoder, corpus, len(store), options))
        metrics = make_report(options, base, store, corpus.held, held_windows, stages, factory, changed)
        publish(options, base, corpus, metrics, stages, output)
        flags = "" if options.output_dir == "trained_models" else f" --model_dir {shlex.quote(str(output))}"
        print(f"\nsaved in {output}; chat with it: python app.py{' --demo' if options.output_dir == DEMO['output_dir'] else flags}")


def main():
    try:
        run(parse_options())
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


if __name__ == "__main__":
    main()
