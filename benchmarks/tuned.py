"""What one would take instead of a memory: LoRA or full tuning of the same base."""

import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence

from base_model import BaseLM, fast_bfloat16
from datastore import hidden_batches
from generation import opinions
from texts import entries_of
from training import epoch_batches

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def tune(base, windows, seconds, lr, lora, seed=0, batch_size=4):
    """Fit a copy of the base to the windows' tokens for so many seconds; the learning rate falls to 0 on a cosine.

    lora: train adapters of rank 16 on every linear layer, else all weights. AdamW on float32 weights, with bfloat16 products
    where the memory's training would use them. Returns (the model, trained parameters, steps, whole passes).
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(base.model).float().requires_grad_(not lora)
    model = get_peft_model(model, LoraConfig(**LORA)) if lora else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    precise = not fast_bfloat16(base.device.type)
    lengths, began, epoch, steps = np.array([len(w.ids) for w in windows]), time.monotonic(), 0, 0
    model.train()
    while True:
        for numbers in epoch_batches(lengths, batch_size, seed, epoch):
            share = (time.monotonic() - began) / seconds
            if share >= 1:
                model = model.merge_and_unload() if lora else model
                model = BaseLM(model.eval(), base.tokenizer, base.name)
                return model, sum(p.numel() for p in parameters), steps, epoch
            optimizer.param_groups[0]["lr"] = lr * min(1, steps / 10) * (1 + np.cos(np.pi * share)) / 2
            batch = [windows[b] for b in numbers]
            ids = pad_sequence([torch.tensor(w.ids) for w in batch], batch_first=True).to(base.device)
            labels = pad_sequence([torch.tensor([-100] * (w.skip + 1) + w.ids[w.skip + 1:]) for w in batch], batch_first=True,
                                  padding_value=-100).to(base.device)
            with torch.autocast(base.device.type, torch.bfloat16, enabled=not precise):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step(), optimizer.zero_grad()
            steps += 1
        epoch += 1


def score_pair(base, tuned, windows, batch_size=16):
    """The scores of evaluation.score_positions with a tuned model in the memory's place."""
    values, example, position, _ = entries_of(windows)
    parts, done = {"base": [], "memory": [], "opinions": []}, 0
    batches = (hidden_batches(model, windows, batch_size) for model in (base, tuned))
    for (_, first), (_, second) in zip(*batches, strict=True):
        for pair in zip(first.split(1024), second.split(1024), strict=True):
            b, m = (torch.log_softmax(model.logits(states), -1) for model, states in zip((base, tuned), pair, strict=True))
            y = torch.from_numpy(values[done:done + len(b)]).long().to(b.device)[:, None]
            for name, found in (("base", b), ("memory", m)):
                parts[name].append(found.gather(1, y)[:, 0].cpu().numpy())
            parts["opinions"].append(opinions(b, m).cpu().numpy())
            done += len(b)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()} | {"example": example, "position": position}
