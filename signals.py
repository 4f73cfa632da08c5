"""The signals that stop a training: the step that is running is finished, and nothing is lost."""

import os
import signal

import torch
import torch.distributed as dist


class Interrupted(Exception):
    """SIGINT, SIGTERM or SIGUSR1 (SLURM's pre-emption) arrived; the step that was running is done."""


class Signals:
    """Within `with`: remembers the first of the stopping signals; a SIGINT after it ends the process at once."""

    def __init__(self, device):
        self.received, self.device = 0, device

    def __enter__(self):
        self.before = {n: signal.signal(n, self.handle) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.received and number == signal.SIGINT:  # a launcher may send the others twice
            os._exit(128 + number)
        self.received = self.received or number

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
