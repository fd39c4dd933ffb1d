"""Rebuild demo/base_model: a small Gemma, pretrained from scratch on general English.

    python demo/build_base_model.py --text textbooks.jsonl.xz:3 novels.jsonl.xz:1

Every --text is a JSONL file (plain or .xz) whose rows hold `source` and `text`, and a weight: how
often a training sequence is drawn from it. The last 2% of every document are held out. Run the same
command again to go on from the last checkpoint; a larger --tokens lengthens the schedule.

Letters: B sequences, T positions.
"""

import argparse
import json
import lzma
import math
import os
import re
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datastore import keep_freed_memory

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0 to 3, as in Gemma
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Typographic marks become their ASCII forms, so that the model and plainly typed questions agree.
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " "})
HELD_OUT = 0.02
FULL_LENGTH = 0.3  # final share of the steps that reads max_length at once; the others read halves
UNKNOWN = 0.005  # share of tokens that become <unk> in those last steps: else that token would never be trained
LEFT_OUT = ("business-ethics", "introduction-political-science", "business-law")  # closest to the demo's domain


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--text", nargs="+", required=True, metavar="PATH[:WEIGHT]", help="training documents, JSONL or JSONL.xz")
    add("--evaluate", nargs="*", default=[], metavar="PATH", help="plain text files to measure bits per byte on")
    add("--output_dir", type=Path, default=Path(__file__).parent / "base_model", help="where the model is saved")
    add("--work_dir", type=Path, default=Path("build/base_model"), help="token arrays and checkpoints")
    add("--vocab_size", type=int, default=6144, help="tokens, 260 of them special and byte tokens")
    add("--hidden_size", type=int, default=256, help="model width")
    add("--num_layers", type=int, default=5, help="Transformer layers")
    add("--intermediate_size", type=int, default=1024, help="width of the gated MLP")
    add("--tokens", type=int, default=27_000_000, help="training tokens in all")
    add("--batch_size", type=int, default=16, help="sequences a step")
    add("--max_length", type=int, default=512, help="tokens a sequence, BOS among them")
    add("--lr", type=float, default=0.02, help="Muon's learning rate for matrices")
    add("--embedding_lr", type=float, default=4e-3, help="AdamW's learning rate for embeddings and norms")
    add("--weight_decay", type=float, default=0.01, help="Muon's weight decay")
    add("--decay", type=float, default=0.9, help="final share of the steps over which the rate falls to 0")
    add("--checkpoint_minutes", type=float, default=5, help="minutes between checkpoints")
    add("--stop_after_minutes", type=float, default=math.inf, help="checkpoint and stop after so long")
    add("--compile", action="store_true", help="compile the model first (needs a C++ compiler on a CPU)")
    add("--seed", type=int, default=0, help="seed of weights and order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser.parse_args()


def read_documents(path):
    """Yield the (training part, held-out part) of every document of one file, in plain marks."""
    opener = lzma.open if path.endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["source"] not in LEFT_OUT:
                text = re.sub(r"\n{3,}", "\n\n", row["text"].translate(PLAIN))
                cut = int(len(text) * (1 - HELD_OUT))
                yield text[:cut], text[cut:]


def train_tokenizer(texts, vocab_size):
    """A byte-fallback BPE tokenizer built as Gemma's is: spaces as U+2581, single digits, BOS in front."""
    # Special and byte tokens take part only by their place in the vocabulary, so that only the four
    # special ones are ever matched in text or dropped in decoding.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL + BYTES, limit_alphabet=160)
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|\p{N}|▁?[^\s▁\p{L}\p{N}]+|▁+(?=▁)|\n+|."), "isolated")
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]

    tokenizer = Tokenizer(models.BPE(vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]],
                                     unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = learner.normalizer
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   bos_token="<bos>", unk_token="<unk>", padding_side="left")


def encode(tokenizer, text):
    """Token ids (uint16) of one text as text: no BOS, and marks such as "<unk>" spelled out."""
    # A special token's name in the text is text: break it after "<" so that it is not matched.
    parts = re.split(r"(?<=<)(?=pad>|eos>|bos>|unk>)", text)
    return np.concatenate([np.asarray(tokenizer.backend_tokenizer.encode(part, add_special_tokens=False).ids, np.uint16)
                           for part in parts])


def prepare(args):
    """Train the tokenizer and write each file's tokens and held-out text to the work folder, once."""
    args.work_dir.mkdir(parents=True, exist_ok=True)
    sources = [(spec.rpartition(":")[0], float(spec.rpartition(":")[2])) if re.search(r":[\d.]+$", spec)
               else (spec, 1.0) for spec in args.text]
    # The folder's name holds what the tokens depend on, so that other texts do not meet old tokens.
    texts = zlib.crc32(json.dumps([(path, Path(path).stat().st_size) for path, _ in sources]).encode())
    folder = args.work_dir / f"tokens_{args.vocab_size}_{texts:08x}"
    if not folder.exists():
        print(f"tokenizer: {args.vocab_size} tokens from {len(sources)} files", flush=True)
        documents = [list(read_documents(path)) for path, _ in sources]
        tokenizer = train_tokenizer((train[i:i + 20_000] for file in documents for train, _ in file
                                     for i in range(0, len(train), 20_000)), args.vocab_size)
        part = folder.with_suffix(".part")
        part.mkdir(exist_ok=True)
        tokenizer.save_pretrained(part)
        for number, file in enumerate(documents):
            ids = [encode(tokenizer, train) for train, _ in tqdm(file, desc=f"encode {sources[number][0]}")]
            np.save(part / f"{number}.npy", np.concatenate(ids))
            (part / f"{number}_held_out.txt").write_text("\n\n".join(held for _, held in file), encoding="utf-8")
        os.replace(part, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = [np.load(folder / f"{number}.npy", mmap_mode="r") for number in range(len(sources))]
    held_out = [(folder / f"{number}_held_out.txt") for number in range(len(sources))]
    return tokenizer, tokens, [weight for _, weight in sources], held_out


class Sequences:
    """Training sequences by number: the same number gives the same sequence, so a run can resume.

    Each file is cut into windows that are visited once an epoch, in a new order and from a new offset.
    """

    def __init__(self, tokens, weights, length, seed):
        self.tokens, self.weights, self.length, self.seed = tokens, list(weights), length, seed
        self.orders = {}

    def place(self, number):
        """(file, how many earlier sequences are of that file), without state: shares are exact at every point."""
        for file, weight in enumerate(self.weights):
            share = weight / sum(self.weights[file:])
            earlier = int(number * share)
            if int((number + 1) * share) > earlier:
                return file, earlier
            number -= earlier
        raise AssertionError("the last file's share is 1")

    def __getitem__(self, number):
        file, drawn = self.place(number)
        count = (len(self.tokens[file]) - 1) // self.length - 1
        epoch, position = divmod(drawn, count)
        if (file, epoch) not in self.orders:
            rng = np.random.default_rng([self.seed, file, epoch])
            self.orders[file, epoch] = (int(rng.integers(self.length)), rng.permutation(count))
        offset, order = self.orders[file, epoch]
        start = offset + int(order[position]) * self.length
        return np.concatenate([[2], self.tokens[file][start:start + self.length]]).astype(np.int64)


def halve(batch):
    """Sequences (B, T+1) with BOS in front as (2B, T/2+1), BOS in front of each half."""
    first, second = np.split(batch[:, 1:], 2, axis=1)
    return np.concatenate([batch[:, :1].repeat(2, axis=0), np.concatenate([first, second])], axis=1)


def mark_unknown(batch, seed):
    """Sequences (B, T+1) with a share UNKNOWN of the tokens behind BOS replaced by <unk>, the same for the same seed."""
    chosen = np.random.default_rng(seed).random(batch.shape) < UNKNOWN
    chosen[:, 0] = False
    return np.where(chosen, SPECIAL.index("<unk>"), batch)


def make_model(args):
    torch.manual_seed(args.seed)
    config = GemmaConfig(
        vocab_size=args.vocab_size, hidden_size=args.hidden_size, intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers, num_attention_heads=args.hidden_size // 128, num_key_value_heads=1,
        head_dim=128, max_position_embeddings=2048, attn_implementation="sdpa")
    return GemmaForCausalLM(config).to(args.device)


def make_optimizers(model, args):
    """Muon for the matrices inside the layers, AdamW for embeddings and norms (Jordan et al. 2024)."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    outer = [p for p in model.parameters() if not any(p is q for q in inner)]
    return [torch.optim.Muon(inner, lr=args.lr, weight_decay=args.weight_decay, momentum=0.95),
            torch.optim.AdamW(outer, lr=args.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def rate_factor(step, steps, decay):
    """Warm-up over 50 steps, then constant, then linear to 0 over the last `decay` of the steps."""
    return min(1.0, (step + 1) / 50, (steps - step) / (decay * steps))


def loss_of(model, batch, device):
    """Mean cross-entropy in nats of batch (B, T+1)."""
    batch = torch.from_numpy(batch)
    if device == "cuda":  # pinned, so that the copy does not wait for the step before
        batch = batch.pin_memory()
    batch = batch.to(device, non_blocking=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model, tokenizer, text, length, device):
    """Bits per UTF-8 byte of `text`; every token but the first half window's has length/2 tokens before it.

    A special token's name in the text is that token: WikiText's <unk> is read as the unknown token it stands for.
    """
    ids = torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    half, nats, inputs, targets = length // 2, 0.0, [], []
    for start in range(0, len(ids), half):
        window, known = ids[max(0, start - half):start + half], min(start, half)
        inputs.append(torch.cat([ids.new_tensor([2]), window[:-1]]))
        targets.append(torch.cat([ids.new_full((known,), -100), window[known:]]))  # -100: what cross_entropy leaves out
    for first in range(0, len(inputs), 16):
        x, y = (pad_sequence(part[first:first + 16], batch_first=True, padding_value=value).to(device)
                for part, value in ((inputs, 0), (targets, -100)))
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(x, use_cache=False).logits
        nats += torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


def save_checkpoint(path, model, optimizers, step):
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def train(args, model, tokenizer, tokens, weights, probe_text):
    """Train to args.tokens, going on from the checkpoint if there is one; returns whether it is done."""
    sizes = f"{args.hidden_size}x{args.num_layers}x{args.intermediate_size}"
    texts = zlib.crc32(b"".join(array[:65536].tobytes() for array in tokens))  # other texts have checkpoints of their own
    path = args.work_dir / f"checkpoint_{args.vocab_size}_{sizes}_{texts:08x}.pt"
    optimizers, step = make_optimizers(model, args), 0
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
    sequences = Sequences(tokens, weights, args.max_length, args.seed)
    steps = args.tokens // (args.batch_size * args.max_length)
    run = torch.compile(model) if args.compile else model
    begun = saved_at = time.monotonic()
    mean = None
    with tqdm(total=steps, initial=step, desc="train", unit="step", mininterval=30) as bar:
        while step < steps:
            batch = np.stack([sequences[step * args.batch_size + i] for i in range(args.batch_size)])
            for optimizer, base in zip(optimizers, (args.lr, args.embedding_lr), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = base * rate_factor(step, steps, args.decay)
            # Halves first: attention costs a quarter of the step at full length.
            batch = halve(batch) if step < (1 - FULL_LENGTH) * steps else mark_unknown(batch, [args.seed, step])
            loss = loss_of(run, batch, args.device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 10 == 0:
                mean = loss.item() if mean is None else 0.9 * mean + 0.1 * loss.item()
                bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            bar.update()
            if step % 250 == 0:
                held = bits_per_byte(model, tokenizer, probe_text[:60_000], args.max_length, args.device)
                tqdm.write(f"step {step}  loss {mean:.3f}  held-out bits per byte {held:.3f}"
                           f"  minutes {(time.monotonic() - begun) / 60:.1f}")
            if time.monotonic() - saved_at > 60 * args.checkpoint_minutes:
                save_checkpoint(path, model, optimizers, step)
                saved_at = time.monotonic()
            if time.monotonic() - begun > 60 * args.stop_after_minutes:
                break
    save_checkpoint(path, model, optimizers, step)
    return step >= steps


def main():
    args = parse_args()
    keep_freed_memory()
    tokenizer, tokens, weights, held_out = prepare(args)
    print("tokens: " + ", ".join(f"{len(array):,}" for array in tokens), flush=True)
    model = make_model(args)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    done = train(args, model, tokenizer, tokens, weights, held_out[0].read_text(encoding="utf-8"))
    if done:
        model.to(torch.bfloat16).save_pretrained(args.output_dir)
        for key in ("is_local", "local_files_only"):  # where it was read from is of no use to others
            tokenizer.init_kwargs.pop(key, None)
        tokenizer.save_pretrained(args.output_dir)
        print(f"saved {args.output_dir}", flush=True)
    for path in [*held_out, *map(Path, args.evaluate)]:
        result = bits_per_byte(model, tokenizer, path.read_text(encoding="utf-8"), args.max_length, args.device)
        print(f"bits per byte {result:.3f}  {path.name}", flush=True)


if __name__ == "__main__":
    main()
