"""Training of the MemoryDecoder: batches of windows, the steps that several processes share, and checkpoints.

Letters: N entries, H key width, K neighbours, V' seen tokens, B windows, T positions, P real positions.
"""

import os
import pickle
import time

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from datastore import default_temperature, knn_weights, seen_tokens
from memory_decoder import MemoryDecoder, TrainingLoss
from support.shards import new_file

CHECKPOINT_SECONDS = 120
# Added text is learned at half the learning rate, with four windows of old text for each new one. At the full learning rate,
# with one window of old text, a small memory forgets much of what it knew.
REPLAYED, GROWING_RATE = 4, 0.5


def training_temperature(options, neighbours):
    """The temperature of the kNN weights in training, in squared distance: the option, or the default."""
    if options.knn_temperature is not None:
        return options.knn_temperature
    return default_temperature(np.load(neighbours / "neighbours_D.npy", mmap_mode="r"))


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


def share_of(numbers, lengths, rank=0, world=1):
    """(the windows of a batch (B,) that this process takes, the weight of their loss).

    DDP averages the gradients of all processes, and a loss is a mean over positions. So with this weight the gradient is that
    of the whole batch. lengths: entries of each window. A process that is left without a window takes one that counts nothing.
    """
    own = numbers[rank::world]
    return own if len(own) else numbers[:1], float(world * lengths[own].sum() / lengths[numbers].sum())


def train_decoder(options, base, keys, entries, stages, accelerator, earlier=None, known=0):
    """Stage 4: train the MemoryDecoder. Saves a checkpoint every two minutes and at the end of each epoch.

    All processes share each batch, so steps and losses do not depend on their number. Dropout does: each draws its own.
    earlier: a MemoryDecoder that has learned the first `known` windows and goes on learning.
    """
    stage = stages.decoder
    decoder = make_decoder(options, base, keys, entries, earlier)
    batches = Batches(keys, entries, stages.neighbours, training_temperature(options, stages.neighbours),
                      decoder.seen.cpu().numpy())
    lengths, rank, world = np.diff(entries.offsets), accelerator.process_index, accelerator.num_processes
    per_epoch = len(epoch_batches(lengths, options.batch_size, options.seed, 0, known))
    model = TrainingLoss(decoder, options.kl_weight)
    rate = options.decoder_lr * (GROWING_RATE if earlier else 1)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=rate, weight_decay=options.weight_decay, fused=True)
    total = per_epoch * options.num_epochs
    schedule = get_cosine_schedule_with_warmup(optimizer, total // 20, total)
    model, optimizer = accelerator.prepare(model, optimizer)
    first, losses = load_checkpoint(stage, decoder, optimizer, schedule)
    saved_at = time.monotonic()
    with tqdm(total=total, initial=first, desc="decoder", unit="step", disable=not accelerator.is_main_process) as bar:
        for step in range(first, total):
            epoch, number = divmod(step, per_epoch)
            if number == 0 or step == first:
                order = epoch_batches(lengths, options.batch_size, options.seed, epoch, known)
            torch.manual_seed((options.seed + step * world + rank) % 2**63)  # dropout, the same after a restart
            numbers, weight = share_of(order[number], lengths, rank, world)
            parts = model(*batches(numbers, accelerator.device))
            accelerator.backward(weight * parts[0])
            accelerator.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step(), schedule.step(), optimizer.zero_grad()
            done = step + 1
            bar.update()
            if done % 10 == 0 or done == total:
                loss, kl, ce = accelerator.reduce(weight * torch.stack(parts).detach(), "mean").tolist()
                losses.append([done, loss, kl, ce])
                bar.set_postfix(loss=f"{loss:.3f}", kl=f"{kl:.3f}", ce=f"{ce:.3f}", refresh=False)
            if accelerator.is_main_process and (done % per_epoch == 0 or time.monotonic() - saved_at > CHECKPOINT_SECONDS):
                save_checkpoint(stage, decoder, optimizer, schedule, done, losses)
                saved_at = time.monotonic()
    if accelerator.is_main_process:
        decoder.save(stage / "memory_decoder.pt")
        stage.finish(losses=losses)
        (stage / "checkpoint.pt").unlink(missing_ok=True)


def save_checkpoint(stage, decoder, optimizer, schedule, step, losses):
    state = {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
             "step": step, "losses": losses}
    with new_file(stage / "checkpoint.part") as file:
        torch.save(state, file)
    os.replace(stage / "checkpoint.part", stage / "checkpoint.pt")


def load_checkpoint(stage, decoder, optimizer, schedule):
    """Restore a checkpoint, if there is one. Returns (steps done, losses so far)."""
    if not (stage / "checkpoint.pt").exists():
        return 0, []
    try:
        state = torch.load(stage / "checkpoint.pt", map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError):  # the machine itself stopped before all was on the disk
        print("the checkpoint of the decoder is damaged; it is trained from its start", flush=True)
        return 0, []
    decoder.load_state_dict(state["decoder"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"], state["losses"]
