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

    kind: `tensorboard`; `wandb`, which takes what TensorBoard gets into its project `feature-inversion`; or
    `none`. It can't stop a training: what goes wrong (no package, no network, a full disk) is one warning on
    stderr, and it is off from then on. It draws no random numbers.
    """

    def __init__(self, kind, out, config):
        self.kind, self.out, self.config = kind, Path(out), config
        self.opened = ExitStack()
        self.writer = None

    def log(self, history, better, targets, outputs):
        """Write the last row of the history and some validation targets and outputs, (N, 3, H, W) in [0, 1].

        better: it has the lowest validation loss so far, so that its metrics are the run's.
        """
        row, epoch = history[-1], history[-1]["epoch"]
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
                self.open(epoch)
            for name, value in scalars.items():
                if not math.isnan(value):
                    self.writer.add_scalar(name, value, epoch)
            picture = validation_grid(targets, outputs)
            self.writer.add_image("validation: original, reconstruction", picture, epoch)
            self.writer.flush()  # raises errors of its thread
        except Exception as error:  # each package has its own
            warn(self.kind, error)
            self.close()
            self.kind = "none"

    def open(self, epoch):
        """Begin with `epoch`; what an interrupted epoch wrote under the same number is void."""
        if self.kind == "wandb":
            import wandb

            latest = self.out / "wandb" / "latest-run"  # its link to a folder `run-DATE-ID`
            before = latest.resolve().name.rsplit("-", 1)[1] if epoch > 1 and latest.exists() else None
            about = {"project": "feature-inversion", "name": self.out.name, "dir": self.out}
            about |= {"config": self.config, "id": before, "resume": "allow", "sync_tensorboard": True}
            settings = wandb.Settings(console="off", finish_timeout=60)  # else it may wait for ever
            self.opened.callback(wandb.init(**about, settings=settings).finish)
        from torch.utils.tensorboard.summary import hparams

        self.writer = self.opened.enter_context(summary_writer(self.out, purge_step=epoch))
        plain = (int, float, str)
        values = {key: v if isinstance(v, plain) else str(v) for key, v in self.config.items()}
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
    """torch's SummaryWriter for the folder `out`. Its thread prints no errors; `flush` raises them."""
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
    """Replace the test metrics of the TensorBoard run in `out`, if there is one, by `means`, {metric: value}.

    A failure is one warning on stderr.
    """
    earlier = list(Path(out).glob(f"{EVENTS}.test"))
    if len(earlier) == len(list(Path(out).glob(EVENTS))):  # no run
        return
    try:
        for path in earlier:
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
    panels = {"loss": ("train_loss", "val_loss"), "PSNR (dB)": ("train_psnr", "val_psnr")}
    panels["learning rate"] = ("lr",)
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axis, (label, columns) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for column in columns:
            axis.plot(epochs, [row[column] for row in history], ".-", label=column.replace("_", " "))
        axis.set(xlabel="epoch", ylabel=label, yscale="linear" if label == "PSNR (dB)" else "log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    save_figure(figure, path, dpi=110)
