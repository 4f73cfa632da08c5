"""The signals that stop a training: the step that is running is finished, and nothing is lost."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress

import torch
import torch.distributed as dist

# SIGUSR1 is SLURM's, before it pre-empts; Windows has none.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
COPIES = 1  # seconds after the first signal in which a launcher may send it again


class Interrupted(Exception):
    """One of the stopping signals arrived; the step that was running is done."""


class Signals:
    """Within `with`: remembers the first stopping signal; another ends the process at once.

    Python gives signals to the main thread; in another one nothing is remembered.
    """

    def __init__(self, device):
        self.received = 0
        self.device = device

    def __enter__(self):
        self.before = {}
        self.waker, woken = socket.socketpair()
        with suppress(ValueError):  # not the main thread
            self.before = {number: signal.signal(number, self.handle) for number in STOPPING}
            self.waker.setblocking(False)
            self.waker_before = signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=end_at_another, args=(woken,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        if self.before:
            signal.set_wakeup_fd(self.waker_before)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.waker.close()

    def handle(self, number, frame):
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


def end_at_another(woken):
    """End the process at a stopping signal that is neither the first nor its copy.

    `woken` is a socket that gets the number of each signal as it arrives. `handle` would have to wait for
    what PyTorch computes, as a whole backward pass.
    """
    first = None
    while number := woken.recv(1):
        if number[0] not in STOPPING:
            continue
        now = time.monotonic()
        first = first or now
        if now - first > COPIES or now > first and number[0] == signal.SIGINT:
            os._exit(128 + number[0])
