"""Devices by their names and numbers, the memory that control groups leave, and where training puts base and decoder."""

import os
from types import SimpleNamespace

import accelerate.state
import pytest
import torch
from runs import command_line

import base_model
import train_memory_decoder as script
from support import machine
from support.command import UserError
from support.machine import check_launch, devices, free_memory, pick_device

GIB = 2**30


@pytest.fixture
def gpus(monkeypatch):
    """Makes PyTorch see a number of NVIDIA GPUs, and Apple's if asked."""
    def see(number, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    return see


@pytest.mark.parametrize(("number", "mps", "device", "picked"), [
    (0, False, "auto", "cpu"), (0, False, "cpu", "cpu"), (0, False, "cpu:0", "cpu"), (0, True, "auto", "mps"),
    (0, True, "mps:0", "mps"), (0, True, "cpu", "cpu"), (2, False, "auto", "cuda"), (2, True, "auto", "cuda"),
    (2, False, "cuda", "cuda"), (2, False, "cuda:0", "cuda:0"), (2, False, "cuda:1", "cuda:1"), (2, False, "cuda:01", "cuda:1"),
    (2, False, "cpu", "cpu")])
def test_a_device_that_is_here_is_taken(gpus, number, mps, device, picked):
    gpus(number, mps)
    assert pick_device(device) == picked
    assert str(torch.device(picked)) == picked


ODD = ["cuda:x", "cuda:-1", "cuda:", "cuda:1:1", "cpu:1", "mps:1", "banana", "banana:0", "", " ", "cpu ", "cuda:²", "meta", ":0",
       "autos"]


@pytest.mark.parametrize("device", ["cuda:2", "cuda:7", "mps", *ODD])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(gpus, device):
    gpus(2)
    with pytest.raises(UserError) as error:
        pick_device(device)
    assert str(error.value) == f"There is no device {device or repr('')} here; present: cuda:0, cuda:1, cpu."


def test_without_gpus_only_the_processor_is_named(gpus):
    gpus(0)
    for device in ("cuda", "cuda:0", "mps:0"):
        with pytest.raises(UserError, match=f"no device {device} here; present: cpu\\."):
            pick_device(device)
    gpus(0, mps=True)
    assert devices() == ["mps", "cpu"]


@pytest.fixture
def placed(gpus, tiny_gemma, rows_file, tmp_path, monkeypatch):
    """Runs the training's first steps with a device. Returns the devices of the accelerator and the base model."""
    gpus(2)
    monkeypatch.setattr(script, "fast_bfloat16", lambda device: False)
    monkeypatch.setattr(accelerate.state, "check_cuda_p2p_ib_support", lambda: True)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")  # a user's shell may set this; it is restored after the test
    seen, real = [], script.Accelerator

    def load(name, dtype, device):
        seen.append(device)
        raise UserError("far enough")

    def accelerator(**more):
        made = real(**more)
        seen.append(str(made.device))
        return made
    monkeypatch.setattr(script.BaseLM, "load", load)
    monkeypatch.setattr(script, "Accelerator", accelerator)

    def run(device):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(UserError, match="far enough"):
            script.run(script.parse_options(command_line(tiny_gemma, rows_file, tmp_path / "out", "--device", device)))
        return seen[-2:]
    yield run
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", "cuda:1"), ("cuda:0", "cuda:0"), ("cuda", "cuda"), ("auto", "cuda"),
                                                  ("cpu", "cpu"), ("cpu:0", "cpu")])
def test_base_and_decoder_land_on_the_same_device(placed, device, expected):
    assert placed(device) == [expected, expected]


def test_one_of_several_processes_keeps_the_device_that_is_its_own(placed, monkeypatch):
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    monkeypatch.setenv("LOCAL_RANK", "1")
    made = SimpleNamespace(device=torch.device("cuda:1"), is_main_process=False)
    monkeypatch.setattr(script, "Accelerator", lambda **_: made)
    seen = []

    def load(name, dtype, device):
        seen.append(device)
        raise UserError("far enough")
    monkeypatch.setattr(script.BaseLM, "load", load)
    placed("cuda")
    assert seen == ["cuda:1"] and "ACCELERATE_TORCH_DEVICE" not in os.environ


def version_2(folder, limit, used, inactive=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile 2\ninactive_file {inactive}\nactive_file 3\n")


def version_1(folder, limit, used, inactive=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 5\ninactive_file 1\ntotal_inactive_file {inactive}\n")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root folder with the control groups of the process. The machine itself has 64 GiB free."""
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))

    def made(groups):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        return tmp_path
    return made


V1 = "9:name=systemd:/docker/abc\n5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n"


def test_a_container_of_version_2_leaves_its_limit_less_what_is_used(root):
    folder = root("0::/\n")
    version_2(folder / "sys/fs/cgroup", 8 * GIB, 5 * GIB, inactive=2 * GIB)
    assert free_memory(folder) == 5 * GIB


def test_the_smallest_of_all_groups_around_the_process_counts(root):
    folder = root("0::/user.slice/job 1/step:2\n")
    groups = folder / "sys/fs/cgroup"
    version_2(groups / "user.slice/job 1/step:2", "max", 1 * GIB)
    version_2(groups / "user.slice/job 1", 6 * GIB, 2 * GIB)
    version_2(groups / "user.slice", 20 * GIB, 3 * GIB)
    assert free_memory(folder) == 4 * GIB
    version_2(groups / "user.slice/job 1/step:2", 3 * GIB, 1 * GIB)
    assert free_memory(folder) == 2 * GIB
    version_2(groups / "user.slice", 20 * GIB, 19 * GIB)
    assert free_memory(folder) == 1 * GIB


def test_version_1_is_read_where_its_path_is_and_where_only_its_mount_is(root):
    folder = root(V1)
    mount = folder / "sys/fs/cgroup/memory"
    version_1(mount, 8 * GIB, 7 * GIB, inactive=3 * GIB)
    assert free_memory(folder) == 4 * GIB
    version_1(mount, 2**63 - 4096, 7 * GIB)
    assert free_memory(folder) == 64 * GIB
    version_1(mount / "docker/abc", 3 * GIB, 1 * GIB)
    assert free_memory(folder) == 2 * GIB
    version_1(mount / "docker", 3 * GIB, 2 * GIB)
    assert free_memory(folder) == 1 * GIB


@pytest.mark.parametrize("limit", ["max", 2**62, 65 * GIB, "", "-1", "nonsense"])
def test_a_limit_that_is_none_leaves_what_the_machine_has(root, limit):
    folder = root("0::/\n")
    version_2(folder / "sys/fs/cgroup", limit, 0)
    assert free_memory(folder) == 64 * GIB


def test_a_group_that_is_over_its_limit_leaves_nothing(root):
    folder = root("0::/a\n")
    version_2(folder / "sys/fs/cgroup/a", 1 * GIB, 2 * GIB)
    assert free_memory(folder) == 0


def test_dropped_pages_never_leave_more_than_the_limit(root):
    folder = root("0::/\n")
    version_2(folder / "sys/fs/cgroup", 4 * GIB, 1 * GIB, inactive=2 * GIB)
    assert free_memory(folder) == 4 * GIB


def test_files_that_are_not_there_set_no_limit(root, tmp_path):
    assert free_memory(tmp_path / "nowhere") == 64 * GIB
    folder = root("0::/../outside\n4:memory:/\n")
    assert free_memory(folder) == 64 * GIB
    version_2(folder / "sys/fs/cgroup", 4 * GIB, 1 * GIB)
    (folder / "sys/fs/cgroup/memory.stat").unlink()
    assert free_memory(folder) == 3 * GIB  # unknown pages do not count as free
    (folder / "sys/fs/cgroup/memory.current").unlink()
    assert free_memory(folder) == 64 * GIB


def test_the_memory_of_the_machine_counts_where_it_is_less(root, monkeypatch):
    folder = root("0::/\n")
    version_2(folder / "sys/fs/cgroup", 8 * GIB, 1 * GIB)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * GIB))
    assert free_memory(folder) == 2 * GIB


def test_dtype_auto_asks_for_what_the_groups_leave(monkeypatch):
    monkeypatch.setattr(base_model, "fast_bfloat16", lambda device: False)
    half = SimpleNamespace(num_parameters=lambda: GIB, dtype=torch.bfloat16)
    for free, expected in ((4 * GIB + 1, torch.float32), (4 * GIB, torch.bfloat16)):
        monkeypatch.setattr(base_model, "free_memory", lambda free=free: free)
        assert base_model.automatic_dtype(half, "cpu") == expected


LAUNCHED = {"LOCAL_RANK": "0", "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_the_variables_of_a_launcher_and_none_of_them_are_accepted():
    check_launch(LAUNCHED)
    check_launch({"HOME": "/root"})
    check_launch({"LOCAL_RANK": "-1", "RANK": "-1", "WORLD_SIZE": "1"})  # a process that is alone
    check_launch({"MASTER_PORT": "tcp://10.0.0.1:80", "RANK": "first"})  # somebody else's


@pytest.mark.parametrize("change", [*({name: value} for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")
                                      for value in ("x", "", "-1", "1.5") if (name, value) != ("LOCAL_RANK", "-1")),
                                    {"RANK": "2"}, {"MASTER_ADDR": ""}])
def test_a_variable_of_a_launcher_that_cannot_be_is_named(change):
    with pytest.raises(UserError, match=next(iter(change))):
        check_launch(LAUNCHED | change)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_of_a_launcher_that_is_missing_is_named(name):
    with pytest.raises(UserError, match=f"but {name} is not"):
        check_launch({key: value for key, value in LAUNCHED.items() if key != name})
