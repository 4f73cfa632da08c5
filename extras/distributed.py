"""Several processes, started by torchrun."""

import itertools
import os
import re
import sys
from contextlib import contextmanager, redirect_stdout

import torch.distributed as dist

from utils import UserError, select_device

PROCESS_GROUPS = itertools.count()


@contextmanager
def join_processes(device):
    """Yield (rank, world size, this process's device): NCCL on CUDA, else gloo. Only rank 0 prints.

    Raises UserError for half an environment.
    """
    text = os.environ["WORLD_SIZE"]
    advice = "start with torchrun, or unset WORLD_SIZE"
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise UserError(f"WORLD_SIZE is {text!r}, which is no number of processes: {advice}")
    if device.type == "mps":
        raise UserError("--device mps: one process only; start it without torchrun")
    if missing := {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(f"WORLD_SIZE is {text}, but {', '.join(sorted(missing))} not set: {advice}")
    for name in ("RANK", "LOCAL_RANK"):
        if not os.environ[name].isdecimal() or int(os.environ[name]) >= int(text):
            raise UserError(f"{name} is {os.environ[name]!r}, should be below WORLD_SIZE, {text}: {advice}")
    if device.type == "cuda":
        device = select_device(f"cuda:{os.environ['LOCAL_RANK']}")
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"training {next(PROCESS_GROUPS)}", store)  # its own keys for each group
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            yield rank, world, device
    finally:
        dist.destroy_process_group()
