"""This machine's devices, and the memory that is free for this process."""

import os
import re
from pathlib import Path

import psutil
import torch

from support.command import UserError

# On a CPU with bfloat16, oneDNN keeps the code that it makes for each shape. Texts have hundreds of lengths, and the usual
# 1,024 shapes take a gigabyte of memory. Sixteen are enough for a training step.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")


def devices():
    """The names of all devices that PyTorch can use here, the preferred one first."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return cuda + ["mps"] * torch.backends.mps.is_available() + ["cpu"]


def pick_device(device):
    """The name of the device to use. Raises UserError for one that this machine does not have.

    device: auto, cpu, cuda or mps, with or without a number.
    """
    present = devices()
    wanted = present[0].partition(":")[0] if device == "auto" else device
    kind, _, number = wanted.partition(":")
    numbered = [name if ":" in name else f"{name}:0" for name in present]
    if not re.fullmatch("[a-z]+(:[0-9]+)?", wanted) or f"{kind}:{int(number or 0)}" not in numbered:
        raise UserError(f"There is no device {device or repr(device)} here; present: {', '.join(present)}.")
    return f"cuda:{int(number)}" if number and kind == "cuda" else kind


def lacks_memory(error):
    """Whether an error says that this machine or its GPU has too little memory. PyTorch raises a RuntimeError on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and "alloc" in str(error))


def is_launched(variables):
    """Whether a launcher of several processes started this one. Some set LOCAL_RANK to -1 for a process that is alone."""
    return variables.get("LOCAL_RANK", "-1") != "-1"


def check_launch(variables):
    """Raise UserError if the environment variables of a launcher of several processes are wrong or not all there.

    For a process that is alone only WORLD_SIZE counts, which accelerate reads nevertheless. Others may be somebody else's.
    """
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT") if is_launched(variables) else ("WORLD_SIZE",):
        if not variables.get(name, "0").isdecimal():
            raise UserError(f"The environment variable {name} is {variables[name]!r} and no whole number; unset it, or start "
                            "several processes with `accelerate launch`.")
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not variables.get(name)]
    if not is_launched(variables):
        return
    if missing or int(variables["RANK"]) >= int(variables["WORLD_SIZE"]):
        what = f"{missing[0]} is not" if missing else "RANK is not below WORLD_SIZE"
        raise UserError(f"The environment variable LOCAL_RANK is set, but {what}; unset it, or start several processes with "
                        "`accelerate launch`.")


def fast_bfloat16(device):
    """Whether the device multiplies bfloat16 faster than float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def free_memory(root="/"):
    """Bytes of memory that this process may still take: the machine's free memory, or less if a control group limits it.

    root: the folder that holds proc and sys.
    """
    return min([psutil.virtual_memory().available, *left_by_groups(Path(root))])


def left_by_groups(root):
    """Bytes that each control group of this process leaves to it. A container is such a group, or is in one."""
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2 has one tree for all
            files = ("memory.max", "memory.current", "inactive_file")
            mount = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):  # version 1 has a separate tree for memory
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):  # inside a container only the mount itself may be there
            yield from left_in(mount.joinpath(*parts[:depth]), *files)


def left_in(folder, limit, used, reclaimable):
    """Bytes that one control group leaves, if it has a limit. File pages that the system would drop count as free."""
    most, now = text_of(folder / limit).strip(), text_of(folder / used).strip()
    if most.isdecimal() and now.isdecimal():
        counts = dict(line.split(maxsplit=1) for line in text_of(folder / "memory.stat").splitlines() if " " in line)
        yield max(0, int(most) - max(0, int(now) - int(counts.get(reclaimable, 0))))


def text_of(path):
    """The text of a system file; "" if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
