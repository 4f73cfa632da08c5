"""What a person sees of a training: the epoch's line, history.csv, curves.png, TensorBoard and Weights & Biases."""

import csv
import math
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torchvision.utils import make_grid

import data
from utils import METRICS, atomic

COLUMNS = ("loss", "mse", "lpips", "psnr")  # the per-image terms that an epoch averages
EVENTS = "events.out.tfevents.*"  # TensorBoard's files in the folder of a run


class Tracker:
    """Sends each epoch to `tensorboard`, `wandb` or, for `none`, nowhere; out: the run's folder, where it writes.

    It can't stop a training: whatever goes wrong (a package is missing, the disk full, the network down) is one
    warning on stderr, and it is off from then on. It draws no random numbers.
    """

    def __init__(self, kind, out, config):
        self.kind, self.out, self.config, self.writer = kind, Path(out), config, None

    def log(self, row, better, encoder, decoder, pixels):
        """Send `row` of the history and six images of `pixels`, uint8 (N, 256, 256, 3), with their reconstructions.

        better: `row` has the lowest validation loss so far, so that its metrics are the run's.
        """
        if self.kind == "none":
            return
        scalars = {name: row[name] for name in ("lr", "images_per_second")}
        for name in COLUMNS:
            scalars |= {f"{name}/train": row[f"train_{name}"], f"{name}/validation": row[f"val_{name}"]}
            if better:
                scalars[f"best/{name}"] = row[f"val_{name}"]
        scalars = {name: value for name, value in scalars.items() if not math.isnan(value)}
        try:
            if self.writer is None:  # only now, so that a run that never gets this far leaves nothing
                backend = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}[self.kind]
                self.writer = backend(self.out, self.config, row["epoch"])
            self.writer.log(row["epoch"], scalars, validation_grid(encoder, decoder, pixels))
        except Exception as error:  # each backend has its own kinds
            warn(self.kind, error)
            self.close()
            self.kind = "none"

    def close(self):
        if self.writer:
            with suppress(Exception):
                self.writer.close()
            self.writer = None


def warn(kind, error):
    """Say in one line on stderr that a tracker is off, and why."""
    reason = " ".join(str(error).split()) or type(error).__name__
    print(f"warning: --tracker {kind} is off, the rest goes on: {reason[:200]}", file=sys.stderr)


class TensorBoard:
    """Event files in the folder of the run: scalars, pictures and hyper-parameters. epoch: the first to come."""

    def __init__(self, out, config, epoch):
        from torch.utils.tensorboard.summary import hparams

        self.writer = summary_writer(out, purge_step=epoch)  # those of an epoch that was interrupted are void
        values = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in config.items()}
        final = dict.fromkeys([f"best/{name}" for name in COLUMNS] + [f"test/{name}" for name in METRICS])
        for summary in hparams(values, final):  # not add_hparams, which makes a run of its own
            self.writer.file_writer.add_summary(summary)

    def log(self, epoch, scalars, picture):
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.add_image("validation: original, reconstruction", picture, epoch)
        self.writer.flush()  # raises what its thread has met

    def close(self):
        self.writer.close()


def summary_writer(out, **options):
    """torch's SummaryWriter of folder `out`, whose thread does not print what it raises: `flush` raises it again."""
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = report_thread
    return SummaryWriter(str(out), **options)


def report_thread(failure):
    if type(failure.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
        threading.__excepthook__(failure)


def add_test_metrics(out, epoch, means):
    """Add `means`, {metric: value}, to the TensorBoard run in folder `out`, in place of those of an earlier evaluation.

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


class WeightsAndBiases:
    """A run of the project `feature-inversion`, kept in wandb/ in the folder of the run. epoch: the first to come."""

    def __init__(self, out, config, epoch):
        import wandb

        latest = out / "wandb" / "latest-run"  # wandb's link to a folder `run-DATE-ID`
        before = latest.resolve().name.rsplit("-", 1)[1] if epoch > 1 and latest.exists() else None
        settings = wandb.Settings(console="off", finish_timeout=60)  # without a network it would wait for ever
        about = {"project": "feature-inversion", "name": out.name, "dir": out, "config": config}
        self.image, self.run = wandb.Image, wandb.init(**about, id=before, resume="allow", settings=settings)

    def log(self, epoch, scalars, picture):
        picture = (255 * picture).byte().permute(1, 2, 0).cpu().numpy()
        self.run.log(scalars | {"validation: original, reconstruction": self.image(picture)}, step=epoch)

    def close(self):
        self.run.finish()


@torch.no_grad()
def validation_grid(encoder, decoder, pixels, columns=6):
    """Evenly spaced images of `pixels`, uint8 (N, 256, 256, 3), above their reconstructions at half their size.

    Returns one picture (3, H, W) in [0, 1].
    """
    decoder.eval()
    chosen = pixels[torch.linspace(0, len(pixels) - 1, min(columns, len(pixels))).long()]
    images = data.center_crops(chosen).to(next(decoder.parameters()).device)  # (6, 3, 224, 224)
    outputs = [decoder(encoder(image[None])) for image in images]  # one by one: no more memory than a step
    return make_grid(F.avg_pool2d(torch.cat([images, *outputs]), 2), nrow=len(images))


def epoch_line(row, epochs, better):
    """The line that an epoch prints."""
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
    for split in ("train", "val"):
        values = {name: row[f"{split}_{name}"] for name in COLUMNS}
        lpips = "–" if math.isnan(values["lpips"]) else f"{values['lpips']:.4f}"
        parts.append(
            f"{split} loss {values['loss']:.4f} mse {values['mse']:.4f} lpips {lpips} psnr {values['psnr']:.2f}"
        )
    parts.append(f"lr {row['lr']:.1e}")
    parts.append(f"{row['seconds']:.0f} s, {row['images_per_second']:.1f} images/s")
    if row["epoch"] < epochs:
        parts[-1] += f", about {row['seconds'] * (epochs - row['epoch']) / 60:.0f} min left"
    return " | ".join(parts) + ("  best" if better else "")


def write_history(history, path):
    """One CSV row an epoch; the LPIPS columns are empty where it took no part in the loss."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        for row in history:
            writer.writerow({key: "" if value != value else value for key, value in row.items()})


def draw_curves(history, path):
    """Loss, PSNR and learning rate over the epochs, as a picture."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axis, name, label in zip(
        figure.subplots(1, 3), ("loss", "psnr", "lr"), ("loss", "PSNR (dB)", "learning rate"), strict=True
    ):
        for key in ("lr",) if name == "lr" else (f"train_{name}", f"val_{name}"):
            axis.plot(epochs, [row[key] for row in history], ".-", label=key.replace("_", " "))
        axis.set(xlabel="epoch", ylabel=label, yscale="linear" if name == "psnr" else "log")
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)
