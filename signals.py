"""The signals that stop a training: the step that is running is finished, and nothing is lost."""

import os
import signal

import torch
import torch.distributed as dist

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is SLURM's, before it pre-empts


class Interrupted(Exception):
    """One of the stopping signals arrived; the step that was running is done."""


class Signals:
    """Within `with`: remembers the first stopping signal; a SIGINT after it ends the process at once."""

    def __init__(self, device):
        self.received = 0
        self.device = device

    def __enter__(self):
        self.before = {number: signal.signal(number, self.handle) for number in STOPPING}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.received and number == signal.SIGINT:  # a launcher may send the others twice
            os._exit(128 + number)
        self.received = self.received or number

    @property
    def costly(self):
        """Whether to `check` makes GPUs wait for each other."""
        return dist.is_initialized() and self.device.type == "cuda"

    def check(self):
        """Raise Interrupted if any process has received a signal."""
        received = self.received
        if dist.is_initialized():
            flag = torch.tensor(received, device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            received = int(flag)
        if received:
            self.received = received
            raise Interrupted
