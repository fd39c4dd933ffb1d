"""The stages of a run and their files, and a plan of the disk, memory and time that they take.

Letters: N entries, H key width, V' seen tokens, B windows a step, T positions of a window.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from importlib.metadata import version

import psutil
import torch

from base_model import file_checksum
from corpus import HELD_OUT
from evaluation import SAMPLE_LENGTH, SAMPLES, SAMPLES_WEIGHT
from index import choose_index, index_bytes, list_count, training_keys
from memory_decoder import LOGITS_AT_ONCE, SCORES_AT_ONCE, MemoryDecoder, TrainingLoss, block_size
from search import PAIRS, PROBES, chunk_size
from support.command import UserError, undisturbed
from support.machine import fast_bfloat16, free_memory
from support.sealed import sealed, unsealed
from support.shards import write_atomically

STRANGERS = ("Thumbs.db", "desktop.ini")  # that Windows leaves in folders
READ_LISTS = 30  # inverted lists that reach the usual recall: 20 to 37 in trainings of 106,000 to 1,309,000 entries
SEARCH_PACE = 2e10  # multiplications and additions a second and thread, with centroids and with keys in lists
NEW_MANIFEST = "config.json.part"
SCORING_SECONDS = 25e-9  # for one token's logit, under everything that is compared


class Stage:
    """The files of one stage, in a folder named by a hash of all inputs. done.json is written last."""

    def __init__(self, root, name, inputs, parent=None):
        text = json.dumps([parent.key if parent else None, inputs], sort_keys=True)
        self.name, self.key = name, hashlib.sha256(text.encode()).hexdigest()[:12]
        self.path = root / f"{name}-{self.key}"

    def __truediv__(self, name):
        return self.path / name

    def begin(self):
        """Make the folder, start the clock, and return whether there is work to do."""
        self.resumed, self.began = self.path.exists(), time.monotonic()
        self.path.mkdir(parents=True, exist_ok=True)
        return not (self / "done.json").exists()

    @property
    def facts(self):
        return unsealed(self / "done.json")

    def finish(self, **facts):
        """Write done.json: these facts, and a checksum of every file that stays."""
        facts |= {"seconds": round(time.monotonic() - self.began, 3), "resumed": self.resumed}
        seal_stage(self.path, facts)


def files_of(folder):
    """The paths of a stage's own files, but for done.json. File managers and network disks leave others there."""
    return sorted(path for path in folder.iterdir()
                  if path.is_file() and not path.name.startswith(".") and path.name not in ("done.json", *STRANGERS))


def seal_stage(folder, facts):
    """Write the done.json of a stage, with a checksum of every file that stays."""
    files = [path for path in files_of(folder) if path.name != "checkpoint.pt" and path.suffix != ".part"]
    facts["files"] = {path.name: file_checksum(path) for path in files}
    write_atomically(folder / "done.json", sealed(facts))


def check_finished(folders):
    """Remove each finished stage of which a file is not as it was when the stage was finished. The run then makes it anew.

    Also remove what a killed run has left over in finished stages.
    """
    for folder in folders:
        if damaged := damaged_file(folder):
            print(f"The file {damaged} is damaged; what it held is made anew.", flush=True)
            shutil.rmtree(folder)
        elif (folder / "done.json").exists():
            facts = unsealed(folder / "done.json")
            if "files" not in facts:  # of an earlier version
                seal_stage(folder, facts)
            for path in files_of(folder):
                if path.name not in facts["files"]:
                    path.unlink()


def damaged_file(folder):
    """The path of a damaged or missing file of a finished stage. None if there is none, or if the stage is not finished."""
    if not (folder / "done.json").exists():
        return None
    try:
        files = unsealed(folder / "done.json").get("files", {})  # those of earlier versions have none
    except ValueError:
        return folder / "done.json"
    return next((folder / name for name, checksum in files.items()
                 if not (folder / name).exists() or file_checksum(folder / name) != checksum), None)


class Stages:
    """The five stages of one run, each keyed by its own inputs and by the stage before it.

    grown_from: names of the stages of the memory that this one extends, if there is one.
    """

    def __init__(self, root, options, base, corpus, grown_from=None):
        def digest(examples):
            return hashlib.sha256(json.dumps(examples).encode()).hexdigest()

        def values(*names):
            return {name: str(getattr(options, name)) for name in names}

        templates = [[template.pattern, *(str(words) for words, _ in template.parts), str(template.tail)]
                     for template in corpus.templates(base)]
        self.datastore = Stage(root, "datastore", [base.fingerprint, str(base.model.dtype), digest(corpus.examples), templates,
                                                   values("max_length", "positions")])
        self.index = Stage(root, "index", [values("index", "recall", "k", "seed"), grown_from], self.datastore)
        self.neighbours = Stage(root, "neighbours", values("k"), self.index)
        self.decoder = Stage(root, "decoder", ["seen tokens, backoff for the others", values(
            "decoder_dim", "context", "norm", "head_init", "dropout", "num_epochs", "decoder_lr", "weight_decay", "batch_size",
            "kl_weight", "knn_temperature", "seed")], self.neighbours)
        self.report = Stage(root, "report", [digest(corpus.held), "scale", SAMPLES_WEIGHT], self.decoder)

    def __iter__(self):
        return iter((self.datastore, self.index, self.neighbours, self.decoder, self.report))


def publish(options, base, corpus, metrics, stages, output):
    """Put the artefacts in place, remove stage folders of other settings, and put the manifest in place last."""
    sources = {"memory_decoder.pt": stages.report, "faiss_index.bin": stages.index, "datastore_entries.npz": stages.index,
               "datastore_values.npy": stages.datastore, "examples.jsonl": stages.datastore,
               **dict.fromkeys(("metrics.json", "report.md", "loss_curve.png", "alpha_sweep.png", HELD_OUT), stages.report)}
    checksums = {}
    for name, stage in sources.items():
        part = output / f"{name}.part"
        shutil.copyfile(stage / name, part)
        checksums[name] = file_checksum(part)
    manifest = {
        "base_model": base.name, "base_fingerprint": base.fingerprint, "dtype": options.dtype, "sources": corpus.sources,
        "base_revision": getattr(base.model.config, "_commit_hash", None), "chosen": metrics["chosen"],
        "entries": metrics["entries"], "k": options.k, "files": checksums, "stages": {s.name: s.path.name for s in stages},
        "options": {name: str(value) if value == math.inf else value for name, value in dataclasses.asdict(options).items()},
        "versions": {name: version(name) for name in ("torch", "transformers", "faiss-cpu", "numpy")},
    }
    write_atomically(output / NEW_MANIFEST, sealed(manifest, indent=2))
    finish_publishing(output)


def finish_publishing(output):
    """Replace all artefacts by the new ones beside them, if the new manifest is there. It is written after all of them.

    Stages of an earlier memory are removed before the manifest is put in place, so that no forgotten text remains.
    """
    if not (output / NEW_MANIFEST).exists():
        return
    try:
        manifest = unsealed(output / NEW_MANIFEST)
    except ValueError:  # the run publishes again
        (output / NEW_MANIFEST).unlink()
        return
    with undisturbed():  # in between, nobody can open the folder
        (output / "config.json").unlink(missing_ok=True)  # after a kill between two replacements it must not look complete
        for name in manifest["files"]:
            if (output / f"{name}.part").exists():
                os.replace(output / f"{name}.part", output / name)
        for folder in output.joinpath("stages").iterdir():
            if folder.is_dir() and folder.name not in manifest["stages"].values():
                shutil.rmtree(folder)
        os.replace(output / NEW_MANIFEST, output / "config.json")


def plan(options, base, windows, held_windows, seen, stages, is_main=True, learned=None):
    """Print what will be made and what it takes. Returns the faiss factory string. Raises UserError if it does not fit.

    The choice of auto depends on free memory, so it is kept with the stage. Disk that files of an earlier run already take
    is not counted again. Only the main process prints and checks. learned: the windows of one epoch, if not all.
    """
    output = stages.index.path.parent
    entries = sum(len(w.ids) - 1 - w.skip for w in windows)
    available, free_disk = free_memory(), shutil.disk_usage(output).free
    factory = choose_index(entries, base.width, available // 2) if options.index == "auto" else options.index
    if (stages.index / "factory.txt").exists():
        factory = (stages.index / "factory.txt").read_text()
    if not is_main:
        return factory
    disk = max(0, estimate_disk(options, base, entries, seen, factory)
               - sum(file.stat().st_size for stage in stages for file in stage.path.glob("*")))
    memory = estimate_memory(options, base, entries, seen, factory)
    print(f"plan: {entries:,} entries of width {base.width}, {seen:,} of {base.vocabulary:,} tokens seen; index {factory}; disk "
          f"{disk / 2**30:.2f} GiB of {free_disk / 2**30:.1f} free; memory {(memory + held_memory()) / 2**30:.1f} GiB in all, "
          f"{available / 2**30:.1f} free beside the model", flush=True)
    if disk > free_disk:
        raise UserError(f"The datastore needs {disk / 2**30:.2f} GiB of disk and {output} has {free_disk / 2**30:.2f}; lower "
                        "--max_examples or --k, or name another --output_dir.")
    if memory > available:
        raise UserError(f"Training needs about {memory / 2**30:.2f} GiB of memory beside the model and {available / 2**30:.2f} "
                        "are free; lower --max_examples or --decoder_dim, or choose a smaller --index such as PCA64,IVF1024,SQ8.")
    if not (stages.decoder / "done.json").exists():
        seconds = estimate_seconds(options, base, learned or windows, held_windows, entries, seen, factory)
        print(f"plan: about {max(1, round(seconds / 60))} min from here, when nothing of it is done yet", flush=True)
    return factory


def held_memory():
    """Bytes of memory that this process holds now: libraries and base model."""
    return psutil.Process().memory_info().rss


def estimate_disk(options, base, entries, seen, factory):
    """Bytes of disk of all stages: keys, the index in its stage and published, neighbours, decoders and checkpoint."""
    weights, index = 4 * decoder_weights(options, base, seen), index_bytes(entries, base.width, factory)
    # A checkpoint holds three numbers a weight. A new one is written beside the old one. Both are gone when all is published.
    return entries * (base.width * 2 + options.k * 8) + index + max(6 * weights, index + 3 * weights)


def decoder_weights(options, base, seen):
    """Approximate number of parameters of the decoder."""
    return options.decoder_dim * (seen + base.width + 75 * options.decoder_dim)


def estimate_memory(options, base, entries, seen, factory):
    """Bytes of memory that the largest stage takes, beside the base model."""
    positions = options.batch_size * options.max_length
    reach = min(options.max_length, options.context + 2 * block_size(options.context))  # keys that a block of attention scores
    scores = min(SCORES_AT_ONCE, positions * 32 * reach)  # of one layer; six are kept
    learning = (16 * decoder_weights(options, base, seen) + 4 * 6 * (3 * scores + 24 * positions * options.decoder_dim)
                + 3 * 4 * min(LOGITS_AT_ONCE, positions * seen))
    scoring = 6 * 4 * LOGITS_AT_ONCE // 4
    searching = 16 * PAIRS + 24 * PROBES + chunk_size(entries, base.width, options.k) * (12 * base.width + 40 * options.k)
    building = 6 * base.width * training_keys(entries, factory)  # in half and in full precision, while the index is empty
    return max(building, index_bytes(entries, base.width, factory) + max(learning, scoring, searching))


def timed(work):
    """Seconds that `work` takes the second time. It must return a number, so that an accelerator has finished."""
    work()
    began = time.monotonic()
    work()
    return max(time.monotonic() - began, 1e-5)


def step_seconds(options, base, windows, seen):
    """Seconds of one training step on random states, with windows of mean length."""
    B, T = options.batch_size, max(1, sum(len(w.ids) - 1 - w.skip for w in windows) // len(windows))
    decoder = MemoryDecoder(base.width, base.vocabulary, range(seen), 0.0, options.decoder_dim, context=options.context)
    model = TrainingLoss(decoder, options.kl_weight).to(base.device)
    hidden, real = torch.randn(B, T, base.width, device=base.device), torch.ones(B, T, dtype=torch.bool, device=base.device)
    tokens = torch.randint(seen, (B * T, options.k), device=base.device)
    weights = torch.full(tokens.shape, 1 / options.k, device=base.device)

    def step():
        with torch.autocast(base.device.type, torch.bfloat16, enabled=fast_bfloat16(base.device.type)):
            loss, _, _ = model(hidden, real, tokens, weights, tokens[:, 0])
        loss.backward()
        return float(loss.detach())

    return timed(step)


def estimate_seconds(options, base, windows, held_windows, entries, seen, factory):
    """Seconds for all stages, from measured passes of base and decoder. The rest is estimated from counts of multiplications."""
    ids = torch.tensor([w.ids for w in windows[:1]])
    pace = timed(lambda: float(base.hidden(ids).sum())) / ids.numel()  # seconds a token of the base
    flop = pace / (2 * sum(p.numel() for p in base.decoder.parameters()))
    texts, length = SAMPLES, min(SAMPLE_LENGTH, options.max_length)
    writing = length * timed(lambda: float(base.logits(base.hidden(ids[:, :1].expand(texts, 1))).sum()))
    tokens = sum(len(w.ids) for part in (windows, held_windows, held_windows[::2]) for w in part) + 2 * texts * length
    positions = sum(len(w.ids) - 1 - w.skip for w in held_windows) + 2 * texts * length
    scoring = positions * base.vocabulary * (2 * base.width * flop + SCORING_SECONDS)
    lists = list_count(factory)
    if lists <= READ_LISTS or options.recall == 1:  # every entry meets every key
        searching = 2 * base.width * entries * (entries + positions) * flop
    else:
        met = lists + entries * READ_LISTS / lists  # centroids and keys that an entry is compared with
        searching = 2 * base.width * met * (entries + positions) / (SEARCH_PACE * torch.get_num_threads())
    learning = options.num_epochs * -(-len(windows) // options.batch_size) * step_seconds(options, base, windows, seen)
    return pace * tokens + searching + learning + scoring + writing
