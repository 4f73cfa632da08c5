"""What a person watches during a training: curves.png, TensorBoard, Weights & Biases."""

import math
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torchvision.utils import make_grid

from checkpoint import EVENTS
from metrics import TERMS
from report.pictures import save_figure
from utils import METRICS


class Tracker:
    """Draws curves.png after each epoch, and writes it for TensorBoard, into the run's folder `out`.

    kind `none`: draws alone. wandb: Weights & Biases reads what TensorBoard gets, into its project
    `feature-inversion` and `out`/wandb. It can't stop a training: whatever goes wrong (a package is missing,
    the disk full, the network down) is one warning on stderr, and it is off from then on. It draws no random
    numbers.
    """

    def __init__(self, kind, out, config):
        self.kind = kind
        self.out = Path(out)
        self.config = config
        self.opened = ExitStack()
        self.writer = None

    def log(self, history, better, targets, outputs):
        """Write the last row of the history and some validation targets and outputs, (N, 3, H, W) in [0, 1].

        better: it has the lowest validation loss so far, so that its metrics are the run's.
        """
        row = history[-1]
        draw_curves(history, self.out / "curves.png")
        if self.kind == "none":
            return
        scalars = {name: row[name] for name in ("lr", "images_per_second")}
        for name in TERMS:
            scalars |= {f"{name}/train": row[f"train_{name}"], f"{name}/validation": row[f"val_{name}"]}
            if better:
                scalars[f"best/{name}"] = row[f"val_{name}"]
        try:
            if self.writer is None:  # only now, so that a run that never gets this far leaves nothing
                self.open(row["epoch"])
            for name, value in scalars.items():
                if not math.isnan(value):
                    self.writer.add_scalar(name, value, row["epoch"])
            picture = validation_grid(targets, outputs)
            self.writer.add_image("validation: original, reconstruction", picture, row["epoch"])
            self.writer.flush()  # raises what its thread has met
        except Exception as error:  # each package has its own
            warn(self.kind, error)
            self.close()
            self.kind = "none"

    def open(self, epoch):
        """Begin with `epoch`: those of the same number, of an epoch that was interrupted, are void."""
        if self.kind == "wandb":
            import wandb

            latest = self.out / "wandb" / "latest-run"  # its link to a folder `run-DATE-ID`
            before = latest.resolve().name.rsplit("-", 1)[1] if epoch > 1 and latest.exists() else None
            about = {"project": "feature-inversion", "name": self.out.name, "dir": self.out}
            about |= {"config": self.config, "id": before, "resume": "allow", "sync_tensorboard": True}
            # Without a time limit it would wait for a network for ever.
            settings = wandb.Settings(console="off", finish_timeout=60)
            self.opened.callback(wandb.init(**about, settings=settings).finish)
        from torch.utils.tensorboard.summary import hparams

        self.writer = self.opened.enter_context(summary_writer(self.out, purge_step=epoch))
        values = {
            key: value if isinstance(value, (int, float, str)) else str(value)
            for key, value in self.config.items()
        }
        final = dict.fromkeys([f"best/{name}" for name in TERMS] + [f"test/{name}" for name in METRICS])
        for summary in hparams(values, final):  # not add_hparams, which makes a run of its own
            self.writer.file_writer.add_summary(summary)

    def close(self):
        with suppress(Exception):
            self.opened.close()


def warn(kind, error):
    """Say in one line on stderr that a tracker is off, and why."""
    reason = " ".join(str(error).split()) or type(error).__name__
    print(f"warning: --tracker {kind} is off, the rest goes on: {reason[:200]}", file=sys.stderr)


@contextmanager
def summary_writer(out, **options):
    """torch's SummaryWriter of folder `out`, whose thread prints no errors: `flush` raises them again."""
    from torch.utils.tensorboard import SummaryWriter

    def report(failure):
        if type(failure.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            before(failure)

    before, threading.excepthook = threading.excepthook, report
    try:
        with SummaryWriter(str(out), **options) as writer:
            yield writer
    finally:
        threading.excepthook = before


def add_test_metrics(out, epoch, means):
    """Add `means`, {metric: value}, to the TensorBoard run in folder `out`, in place of earlier ones.

    Nothing is done where there is no such run, and a failure is one warning on stderr.
    """
    before = list(Path(out).glob(f"{EVENTS}.test"))
    if len(before) == len(list(Path(out).glob(EVENTS))):
        return
    try:
        for path in before:
            path.unlink()
        with summary_writer(out, filename_suffix=".test") as writer:
            for name, value in means.items():
                writer.add_scalar(f"test/{name}", value, epoch)
            writer.flush()
    except Exception as error:
        warn("tensorboard", error)


def validation_grid(targets, outputs):
    """`targets` above `outputs`, (N, 3, H, W) in [0, 1], at half their size, as one picture (3, h, w)."""
    return make_grid(F.avg_pool2d(torch.cat([targets, outputs]), 2), nrow=len(targets))


def draw_curves(history, path):
    """Loss, PSNR and learning rate over the epochs, as a picture."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    loss, psnr, lr = figure.subplots(1, 3)
    for axis, label, columns in (
        (loss, "loss", ("train_loss", "val_loss")),
        (psnr, "PSNR (dB)", ("train_psnr", "val_psnr")),
        (lr, "learning rate", ("lr",)),
    ):
        for column in columns:
            axis.plot(epochs, [row[column] for row in history], ".-", label=column.replace("_", " "))
        axis.set(xlabel="epoch", ylabel=label, yscale="linear" if axis is psnr else "log")
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path, dpi=110)
