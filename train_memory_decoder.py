"""Script 1: text -> datastore -> neighbours -> MemoryDecoder -> held-out report.

    python train_memory_decoder.py --demo        # embedded model and data, no network
    python train_memory_decoder.py               # google/gemma-2b and the legal Q&A dataset of the hub

Every stage keeps its result under <output_dir>/stages. So a stopped run goes on where it was, and a stage
whose inputs have not changed is not run again. Artefacts are replaced only when all stages are done.
"""

import errno
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import faiss
import numpy as np
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list

import evaluation
from base_model import DEMO_MODEL, BaseLM, fast_bfloat16, pick_device
from corpus import HELD_OUT, Corpus
from datastore import (
    copy_keys,
    default_temperature,
    open_keys,
    write_examples,
    write_keys,
)
from earlier import Claim, Earlier, earlier_options
from index import build_index, check_index, grow_index, inverted_lists
from memory_decoder import MemoryDecoder, check_heads
from search import TrainingDatastore, find_neighbours
from stages import Stages, check_finished, plan, publish
from support import command
from support.command import Terminated, UserError, check_filled, fail, one_line, option, terminated
from support.machine import check_launch, is_launched, lacks_memory
from support.shards import new_file, write_atomically
from texts import entries_of, windows_of_sources
from training import REPLAYED, train_decoder, training_temperature

HERE = Path(__file__).resolve().parent
DEMO = {"base_model": DEMO_MODEL, "dataset": str(HERE / "demo/legal_qa.jsonl"), "template": "chat {Question} {Answer}",
        "output_dir": str(HERE / "demo/trained_models"), "max_length": 512, "batch_size": 4, "context": 64,
        # A chat asks about stored text. Many epochs, a high learning rate, no dropout and little KL teach it word for word.
        "num_epochs": 5, "decoder_lr": 2e-3, "dropout": 0.0, "kl_weight": 0.15}
ORIGINAL = {"decoder_lr": 1e-4, "context": 1, "norm": "post", "head_init": "random", "knn_temperature": math.inf,
            "positions": "last", "num_epochs": 3, "dropout": 0.1, "kl_weight": 0.5}


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
    index: str = option("auto", "faiss factory string, e.g. Flat or IVF1024,SQfp16; auto chooses by size and free memory")
    recall: float = option(0.95, "share of the K nearest that a search in inverted lists must find; 1 reads all lists")
    knn_temperature: float | None = option(None, "temperature of the kNN weights, in squared distance; inf: equal votes; "
                                                 "default: half the median distance")
    decoder_dim: int = option(256, "width of the MemoryDecoder (DECODER_DIM); 32 must divide it")
    context: int = option(128, "hidden states the decoder attends to; 1 reads each alone")
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
    forget: str | None = option(None, "document, table, folder, or row (table:number) to remove from the memory in --output_dir")
    dtype: str = option("auto", "number format of the base model; auto: bfloat16 where that is faster",
                        choices=["auto", "float32", "bfloat16", "float16"])
    device: str = option("auto", "auto, cpu, cuda, cuda:1 and so on, or mps")
    seed: int = option(0, "seed of weights, order and the held-out share")
    demo: bool = option(False, "train on the embedded model and data: no network, no account")
    original: bool = option(False, "the original demo's recipe as defaults: lr 1e-4, context 1, post-norm, random head, "
                                   "equal votes, one entry a row; these win over --demo's")

    def __post_init__(self):
        self.output_dir = os.path.expanduser(self.output_dir)  # a shell does not expand the ~ of --output_dir=~/memory
        self.base_model = os.path.expanduser(self.base_model)

    def check(self):
        """Raise UserError for a value that cannot work, before anything is loaded."""
        check_filled(self, "base_model", "dataset", "split", "template", "validation_dataset", "validation_split", "index",
                     "output_dir", "add", "forget", "device")
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


def begin_together(stage):
    """Begin a stage in all processes. They go by what the first one sees, since another may look when it is done already."""
    return broadcast_object_list([stage.begin()])[0]


def build_datastore(options, base, corpus, windows, entries, stage, earlier, accelerator):
    """Stage 1: keys.f16, values and the examples. Returns the keys (N, H), memory-mapped. All processes read a share."""
    if begin_together(stage):
        found = earlier and earlier.found("datastore")
        known = len(windows) - len(earlier.new(windows, corpus)) if found else 0
        if accelerator.is_main_process:
            if found:
                copy_keys(found[0] / "keys.f16", earlier.entries_in(corpus), stage / "keys.f16", base.width)
            with new_file(stage / "datastore_values.npy") as file:
                np.save(file, entries.values)
            write_examples(corpus.examples, stage / "examples.jsonl")
        accelerator.wait_for_everyone()
        write_keys(base, windows, entries.offsets, stage / "keys.f16", options.batch_size, known, accelerator.process_index,
                   accelerator.num_processes)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
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
        recall = store_of(index, keys, entries, stage).tune(options.k, options.recall, options.seed)
        with new_file(stage / "faiss_index.bin") as file:
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        lists = inverted_lists(index)
        stage.finish(recall=recall, nprobe=lists and lists.nprobe, lists=lists and lists.nlist)
    facts = stage.facts
    more = f", reads {facts['nprobe']} of {facts['lists']} inverted lists" if facts["lists"] else ""
    print(f"index: recall@{options.k} against exact search {facts['recall']:.3f}{more}", flush=True)


def store_of(index, keys, entries, stage, device="cpu"):
    """The TrainingDatastore of an index, over the keys on disk."""
    mean = np.load(stage / "datastore_entries.npz", allow_pickle=False)["mean"]
    return TrainingDatastore(index, mean, entries.values, entries.example, entries.position, None, keys, device)


def build_neighbours(options, keys, entries, factory, stages, accelerator, earlier=None):
    """Stages 2 and 3: the index, then every entry's neighbours. Returns the TrainingDatastore.

    The first process builds the index. All search a share. earlier: the memory whose entries come first among these.
    """
    grown = earlier.found("index", "neighbours") if earlier else None
    if accelerator.is_main_process:
        make_index(options, keys, entries, factory, stages.index, grown, earlier)
    accelerator.wait_for_everyone()
    index = faiss.read_index(str(stages.index / "faiss_index.bin"), faiss.IO_FLAG_MMAP)
    store = store_of(index, keys, entries, stages.index, accelerator.device)
    if begin_together(stages.neighbours):
        find_neighbours(store, options.k, stages.neighbours.path, grown and grown[1], accelerator.process_index,
                        accelerator.num_processes)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            stages.neighbours.finish()
    return store


def score_held_out(options, base, store, held_windows, stages, accelerator):
    """(the calibrated decoder, scores of held-out windows, scores of the base's own texts, kNN-LM's temperature).

    All processes score a share of the windows.
    """
    decoder = MemoryDecoder.load(stages.decoder / "memory_decoder.pt")
    temperature = training_temperature(options, stages.neighbours)
    if math.isinf(temperature):  # equal votes have no temperature to vary, so kNN-LM gets the default
        temperature = default_temperature(np.load(stages.neighbours / "neighbours_D.npy", mmap_mode="r"))
    if options.head_init == "base":
        even = [w for w in held_windows if w.example % 2 == 0]
        evaluation.calibrate(base, decoder, even, options.batch_size, accelerator)
    scores = evaluation.score_positions(base, decoder, held_windows, options.batch_size, store, options.k, temperature, True,
                                        accelerator)
    samples = evaluation.sample_windows(base, options.max_length, options.seed) if accelerator.is_main_process else None
    [samples] = broadcast_object_list([samples])
    own = evaluation.score_positions(base, decoder, samples, options.batch_size, accelerator=accelerator)
    return decoder, scores, own, temperature


def make_report(options, base, store, held, held_windows, stages, factory, accelerator, changed=None):
    """Stage 5: score the held-out rows. The first process writes metrics.json, report.md and the plots, and prints the table.

    Returns the metrics. changed: a function of the new decoder that returns what the change did, as plain data.
    """
    if begin_together(stages.report):
        decoder, scores, own, temperature = score_held_out(options, base, store, held_windows, stages, accelerator)
    if not accelerator.is_main_process:
        return None
    if not (stages.report / "done.json").exists():
        decoder.save(stages.report / "memory_decoder.pt")
        trained_with, before = training_temperature(options, stages.neighbours), list(stages)[:-1]
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
    if not is_launched(os.environ):  # accelerate gives each of several processes its own device
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))  # other processes wait while the first builds the index
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if fast_bfloat16(device) else "no",
                              kwargs_handlers=[patience])
    quiet = nullcontext() if accelerator.is_main_process else redirect_stdout(io.StringIO())
    with quiet, Claim(options.output_dir, accelerator.is_main_process) as claim:
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
    if options.index != "auto":
        check_index(options.index, base.width, len(entries.values))
    grown = earlier if options.add and not options.forget else None
    stages = Stages(output / "stages", options, base, corpus, grown and grown.manifest["stages"])
    claim.make_folder()
    if accelerator.is_main_process:
        check_finished([*(stage.path for stage in stages), *(earlier.stages() if earlier else [])])
    accelerator.wait_for_everyone()
    known, decoder = (len(windows) - len(grown.new(windows, corpus)), grown.decoder()) if grown else (0, None)
    seen = len(np.unique(entries.values)) if options.head_init == "base" else base.vocabulary
    factory = plan(options, base, windows, held_windows, seen, stages, accelerator.is_main_process,
                   windows[known:] * (1 + REPLAYED) if known else None)
    [factory] = broadcast_object_list([factory])
    keys = build_datastore(options, base, corpus, windows, entries, stages.datastore, earlier, accelerator)
    store = build_neighbours(options, keys, entries, factory, stages, accelerator, grown)
    if begin_together(stages.decoder):
        train_decoder(options, base, keys, entries, stages, accelerator, decoder, known)
    accelerator.wait_for_everyone()
    changed = earlier and (lambda decoder: earlier.difference(base, decoder, corpus, len(store), options))
    metrics = make_report(options, base, store, corpus.held, held_windows, stages, factory, accelerator, changed)
    if accelerator.is_main_process:
        publish(options, base, corpus, metrics, stages, output)
        flags = "" if options.output_dir == "trained_models" else f" --model_dir {shlex.quote(str(output))}"
        print(f"\nsaved in {output}; chat with it: python app.py{' --demo' if options.output_dir == DEMO['output_dir'] else flags}")


def main():
    command.print_all_characters()
    # When one of several processes fails, the launcher ends the others with SIGTERM. They must leave at once, and a handler
    # would not run while they wait for the one that failed.
    if not is_launched(os.environ):
        signal.signal(signal.SIGTERM, terminated)
    options = None
    try:
        check_launch(os.environ)
        options = parse_options()
        run(options)
    except UserError as error:
        sys.exit(fail(str(error)))
    except KeyboardInterrupt as stop:
        print("\nStopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = options.output_dir if options else "--output_dir"
            sys.exit(fail(f"The disk of {where} is full; make room, and the same command goes on from here."))
        sys.exit(fail(f"A file could not be read or written: {one_line(error)}; the same command goes on from here."))
    except (MemoryError, RuntimeError) as error:
        if "Connection closed by peer" in str(error):
            sys.exit(fail("Another process of this run has ended; its own error says why."))
        if not lacks_memory(error):
            raise
        sys.exit(fail("There is not enough memory; lower --batch_size, then --max_length, --max_examples or --decoder_dim."))


if __name__ == "__main__":
    main()
