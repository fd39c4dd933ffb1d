"""The memory that a folder already holds: the lock on the folder, and what a run that changes the memory reuses."""

import contextlib
import json
import math
import os
from pathlib import Path

import filelock
import numpy as np

import evaluation
from corpus import Corpus, few_of
from memory_decoder import MemoryDecoder, read_manifest
from stages import finish_publishing
from support.command import UserError
from texts import windows_of_sources

# Old and new entries and the decoder have these in common, so they cannot change.
FIXED = ("max_length", "positions", "k", "index", "decoder_dim", "context", "norm", "head_init", "dtype")
OF_A_WHOLE_TRAINING = ("dataset", "max_examples", "validation_dataset", "validation_split", "validation_fraction")
OF_ONE_RUN = ("output_dir", "add", "forget", "demo", "original", "template", "split", "device")
MOST_WINDOWS = 50  # windows of added, kept or forgotten text that are scored before and after


class Claim:
    """A lock on a folder, so that one run at a time writes into it. A context manager."""

    def __init__(self, folder, wanted=True):
        """wanted: False in those processes of a run that write nothing."""
        self.folder, self.wanted = Path(folder) / "stages", wanted
        self.lock, self.made = filelock.FileLock(self.folder / ".lock"), []

    def __enter__(self):
        if self.folder.is_dir():
            self.make_folder()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            if self.made and os.listdir(self.folder) == [".lock"]:  # a run that was refused leaves nothing behind
                (self.folder / ".lock").unlink()
        self.lock.release(force=True)
        for folder in self.made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()

    def make_folder(self):
        """Make the folder and claim it. Raises UserError if another run holds it, or if nothing can be written."""
        try:
            new = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.wanted:
                self.lock.acquire(timeout=0)
                self.made += new
                finish_publishing(self.folder.parent)
        except filelock.Timeout:
            raise UserError(f"Another training is writing to the folder {self.folder.parent}; wait for its end, or name another "
                            "--output_dir.") from None
        except OSError as error:
            raise UserError(f"Nothing can be written to the folder {self.folder.parent}: {error.strerror}.") from None


def text_of(example):
    """An Example as a text, for comparison. A changed document keeps its name but is another Example."""
    return json.dumps(example)


def earlier_options(options):
    """The memory's training options, as defaults for --add and --forget. Raises UserError if there is no memory."""
    if os.environ.get("RANK", "0") == "0":  # only one of several processes
        with Claim(options.output_dir):  # this finishes what a killed run began to publish
            pass
    manifest = read_manifest(options.output_dir)
    if manifest is None:
        raise UserError(f"There is no memory in {options.output_dir} to change; train one first, or name its --output_dir.")
    return {name: value for name, value in manifest["options"].items() if name not in OF_ONE_RUN}


class Earlier:
    """A memory that a run changes: its text, its artefacts, and what is left of its stages."""

    def __init__(self, folder):
        self.folder, self.manifest = folder, read_manifest(folder)
        self.corpus = Corpus.open(folder, self.manifest)
        with np.load(folder / "datastore_entries.npz", allow_pickle=False) as entries:
            self.example, self.mean = entries["example"], entries["mean"]

    def changed(self, options):
        """The Corpus after forgetting and adding what the options name."""
        corpus = self.corpus
        if options.forget:
            corpus = corpus.without(options.forget, options.seed)
        return corpus.added(options.add, options.split, options.template) if options.add else corpus

    def check(self, base, options):
        """Raise UserError for another base model, or for an option that cannot differ from this memory's."""
        if base.fingerprint != self.manifest["base_fingerprint"]:
            raise UserError(f"The base model {base.name} is not the one that this memory was trained with "
                            f"({self.manifest['base_model']}); name that one with --base_model.")
        for name in OF_A_WHOLE_TRAINING:
            if str(getattr(options, name)) != str(self.manifest["options"][name]):
                raise UserError(f"--{name} belongs to a whole training and not to --add or --forget; leave it out.")
        for name in FIXED:
            was = self.manifest["options"][name]
            if str(getattr(options, name)) != str(was):
                raise UserError(f"This memory was made with --{name} {was}, which cannot change; train a new one for another.")

    def decoder(self):
        return MemoryDecoder.load(self.folder / "memory_decoder.pt")

    def found(self, *names):
        """The folders of these stages, or None if they are no longer there."""
        folders = [self.stage(name) for name in names]
        return folders if all((folder / "done.json").exists() for folder in folders) else None

    def stage(self, name):
        return self.folder / "stages" / self.manifest["stages"][name]

    def stages(self):
        """The folders of all stages, there or not."""
        return [self.folder / "stages" / name for name in self.manifest["stages"].values()]

    def entries_in(self, corpus):
        """Ids of the entries whose example is also in another Corpus."""
        there = set(map(text_of, corpus.examples))
        return np.flatnonzero(np.array([text_of(example) in there for example in self.corpus.examples])[self.example])

    def new(self, windows, corpus):
        """The windows of a Corpus whose text this memory does not have."""
        known = set(map(text_of, self.corpus.examples))
        return [window for window in windows if text_of(corpus.examples[window.example]) not in known]

    def difference(self, base, decoder, corpus, entries, options):
        """What the change did, as plain data: counts, and perplexities of added, kept and forgotten text before and after."""
        was, now = (set(map(text_of, [*c.examples, *c.held])) for c in (self.corpus, corpus))
        metrics = json.loads((self.folder / "metrics.json").read_text())
        found = {"entries": [len(self.example), entries], "held_out": metrics["held_out"]}
        for name, c, texts in (("added", corpus, now - was), ("kept", corpus, now & was), ("forgotten", self.corpus, was - now)):
            among = c.examples if name == "kept" else [*c.examples, *c.held]
            examples = [example for example in among if text_of(example) in texts]
            if examples and (name != "forgotten" or options.forget):  # what is held out and then added was never learned
                windows = windows_of_sources(base, examples, c.templates(base), options.max_length)
                names = few_of([example.name for example in examples])
                found[name] = {"names": names} | self.scored(base, decoder, windows, options)
        return found

    def scored(self, base, decoder, windows, options):
        """Perplexity of windows under the base, and under the memory before and after."""
        windows = windows[::math.ceil(len(windows) / MOST_WINDOWS)]
        after, before = (evaluation.score_positions(base, each, windows, options.batch_size) for each in (decoder, self.decoder()))
        return {"base": evaluation.perplexity(after["base"]), "before": evaluation.perplexity(before["memory"]),
                "after": evaluation.perplexity(after["memory"])}
