"""Train a decoder to invert the features of a frozen encoder.

  python train.py                                            the study's headline: VGG16 block1, tconv decoder
  python train.py --config configs/sample.yaml               three minutes on two cores, embedded photographs
  python train.py --layer block3 --data FOLDER --out runs/block3 --resume

Writes best.pt, last.pt, config.yaml, history.csv, curves.png and TensorBoard's files to --out. Several GPUs or
hosts: torchrun --nproc_per_node=N train.py … Watch: tensorboard --logdir runs. Next: python evaluate.py --help
"""

import argparse
import math
import os
import reprlib
import shlex
import sys
import time

import yaml

from utils import (
    DECODERS,
    LAYERS,
    PROTOCOLS,
    TRACKERS,
    Parser,
    UserError,
    check_layer,
    non_negative_float,
    positive_float,
    positive_int,
    run,
    whole_number,
)

# Flags that say how to run, not what: they are not part of a run's configuration.
NOT_CONFIG = ("config", "resume", "overwrite", "download", "tracker", "quiet", "bars")
MAY_DIFFER = ("out", "cache", "device")  # between a run and its resumption


def make_parser():
    """The flags; each is also a key of the YAML file, with `_` for `-`."""
    layers = "; ".join(f"{encoder}: {names[0]}…{names[-1]}" for encoder, names in LAYERS.items())
    parser = Parser(__doc__)
    what = parser.add_argument_group("what is inverted, and by what")
    what.add_argument("--encoder", choices=list(LAYERS), default="vgg16", help="frozen network")
    what.add_argument("--layer", default="block1", help=f"where its features are taken ({layers})")
    what.add_argument("--weights", default="imagenet", help="`imagenet`; `random`, the control; or a state-dict file")
    what.add_argument("--decoder", choices=DECODERS, default="tconv", help="trained network")
    what.add_argument("--width", type=positive_int, help="the decoder's main number of channels (default: its own)")
    images = parser.add_argument_group("images")
    images.add_argument("--data", help="folder of DIV2K or with train/ and test/; `sample` (default: DIV2K if there)")
    images.add_argument("--download", action="store_true", help="first fetch DIV2K (3.7 GB) into --data")
    images.add_argument("--cache", help="folder of decoded images (default: ~/.cache/feature-inversion)")
    how = parser.add_argument_group("training (defaults: the study's)")
    how.add_argument("--epochs", type=positive_int, default=30, help="at most")
    how.add_argument("--batch-size", type=positive_int, default=4, help="images a step, per process")
    how.add_argument("--lr", type=positive_float, default=1e-4, help="Adam's learning rate; onecycle: the highest")
    how.add_argument("--schedule", choices=["plateau", "onecycle"], default="plateau", help="of the learning rate")
    how.add_argument(
        "--freeze-bn", type=whole_number, default=0, metavar="STEPS", help="then fix batch norm's statistics; 0: never"
    )
    how.add_argument("--patience", type=positive_int, default=15, help="epochs without a better validation loss")
    how.add_argument("--mse-weight", type=non_negative_float, default=0.5, help="of the loss; 0: not computed")
    how.add_argument("--lpips-weight", type=non_negative_float, default=0.5, help="of the loss; 0: not computed")
    how.add_argument("--protocol", choices=PROTOCOLS, default="documented", help="published: the study's code")
    how.add_argument("--seed", type=whole_number, default=42, help="of initialisation, order, crops and flips")
    running = parser.add_argument_group("running")
    running.add_argument("--config", help="YAML file with values of these flags; the command line wins")
    running.add_argument("--out", default="runs", help="folder of this run")
    again = running.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from last.pt in --out, if it is there")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    running.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    switch = argparse.BooleanOptionalAction
    running.add_argument("--deterministic", action=switch, default=True, help="repeatable on CUDA too, where it can be")
    running.add_argument("--amp", action=switch, default=False, help="encoder and decoder in bfloat16 (slow on CPUs)")
    running.add_argument("--compile", action=switch, default=False, help="torch.compile them first; for long runs")
    running.add_argument("--tracker", choices=TRACKERS, default="tensorboard", help="live curves; wandb: install it")
    running.add_argument("--quiet", action="store_true", help="no progress: neither bars nor a line an epoch")
    running.add_argument("--bars", action="store_true", help="progress bars even where there is no terminal")
    return parser


def parse_args(argv=None):
    """Command line over YAML file over defaults → argparse.Namespace. Raises UserError."""
    parser, argv = make_parser(), sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.config:
        args = parser.parse_args([*read_config(args.config, parser), *argv])
    check_layer(args.encoder, args.layer)
    if not args.mse_weight and not args.lpips_weight:
        raise UserError("--mse-weight 0 --lpips-weight 0: nothing to minimise; give at least one a positive weight")
    return args


def read_config(path, parser):
    """The YAML file at `path` as command-line flags, checked like them. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except (yaml.YAMLError, OSError, RecursionError, ValueError) as error:
        raise UserError(f"--config {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: is {type(values).__name__}, should be lines of `key: value`")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    flags = []
    for key, value in values.items():
        if key not in actions:
            raise UserError(f"--config {path}: unknown key {reprlib.repr(key)}; the keys are {', '.join(actions)}")
        name, default = key.replace("_", "-"), actions[key].default
        if isinstance(default, bool) and isinstance(value, bool):
            negated = isinstance(actions[key], argparse.BooleanOptionalAction)
            flags += [f"--{name}"] if value else [f"--no-{name}"] if negated else []
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool) and not isinstance(default, bool):
            flags.append(f"--{name}={value}")
        elif value is not None or default is not None:
            kind = "true or false" if isinstance(default, bool) else "a number or a word"
            raise UserError(f"--config {path}: {key}: {reprlib.repr(value)} should be {kind}")
    try:
        parser.parse_args(flags)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    return flags


if __name__ == "__main__":
    ARGS = run(parse_args)  # before torch is imported, so that --help and a mistyped flag answer at once

from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from tqdm import tqdm

import data
from models import LPIPS, build_model, count_parameters, feature_shape
from signals import Interrupted, Signals
from tracker import COLUMNS, EVENTS, Tracker, draw_curves, epoch_line, write_history
from utils import (
    INVERSION,
    RESULTS,
    disable_bars,
    keep_freed_memory,
    load,
    make_folder,
    save,
    select_device,
    start_processes,
    write_text,
)

FILES = ("best.pt", "last.pt", "history.csv", "curves.png")
KEPT_FEATURES = 2**28  # bytes of validation features that are computed once; those of shallow layers are larger
DIVERGED = "try a smaller --lr. What the epochs before wrote is kept"


def terms(output, images, config, lpips):
    """Per-image terms (4, B) of the loss, as COLUMNS: the loss itself, MSE, LPIPS (NaN: not asked for) and PSNR in dB.

    output, images: (B, 3, 224, 224) in [0, 1]. A term with weight zero takes no part in the gradient
    (paper 3.3.2), and LPIPS is then not computed.
    """
    target = data.target(images, config["protocol"])
    mse = ((output if config["mse_weight"] else output.detach()) - target).square().mean((1, 2, 3))
    distance = lpips(output, target) if config["lpips_weight"] else torch.full_like(mse, math.nan)
    loss = config["mse_weight"] * mse if config["mse_weight"] else 0
    if config["lpips_weight"]:
        loss = loss + config["lpips_weight"] * distance
    error = (output.detach() - target.clamp(0, 1)).square().mean((1, 2, 3))
    return torch.stack([loss, mse, distance, -10 * torch.log10(error.clamp_min(1e-10))])


def check_finite(losses, epoch, step):
    """Raise UserError if one of `losses`, the last ones up to `step`, is not finite."""
    bad = (~torch.isfinite(torch.stack(losses))).nonzero()
    if len(bad):
        step = step - len(losses) + 1 + int(bad[0])
        raise UserError(f"the loss is not finite in epoch {epoch + 1}, step {step + 1}; {DIVERGED}")


def averages(sums):
    """Per-image averages of `sums` (5,), the summed COLUMNS and the number of images, over all processes."""
    sums = all_processes(sums.clone())
    return dict(zip(COLUMNS, (sums[:4] / sums[4]).tolist(), strict=True))


def all_processes(tensor):
    """Sum `tensor` over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Run:
    """One training: what is trained, with what, and how far it has come.

    config: the values of the flags, a dictionary. Raises UserError for what the user can put right.
    """

    PROGRESS = ("epoch", "step", "bad_epochs", "seconds", "best_epoch", "best_loss", "history")

    def __init__(self, config, device, rank=0, world=1, bars=None, tracker="none"):
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.bars = bars  # tqdm's `disable`
        self.out = Path(config["out"])
        self.tracker = Tracker("none" if rank else tracker, self.out, config)
        options = config["cache"], config["protocol"], self.bars
        self.images = {name: data.load_split(config["data"], name, *options).to(device) for name in ("train", "val")}
        count, size = len(self.images["train"].names), config["batch_size"]
        if size * world > count:
            raise UserError(f"--batch-size {size} × {world} processes: more than the {count} training images")
        self.steps = math.ceil(count / (size * world))
        names = ("encoder", "layer", "decoder", "weights", "width", "seed", "protocol")
        self.encoder, self.decoder = (m.to(device) for m in build_model(**{name: config[name] for name in names}))
        self.lpips = LPIPS().to(device) if config["lpips_weight"] else None
        self.features = feature_shape(self.encoder)
        if config["compile"]:
            self.encoder.compile()
            self.decoder.compile()
        self.model, self.kept = self.decoder, {}
        if world > 1:
            if device.type == "cuda":
                self.decoder = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.decoder)
            self.model = torch.nn.parallel.DistributedDataParallel(self.decoder)
        self.optimizer = torch.optim.Adam(self.decoder.parameters(), lr=config["lr"])
        if config["schedule"] == "plateau":
            lowest = 1e-7 if config["protocol"] == "documented" else 1e-6
            self.scheduler = ReduceLROnPlateau(self.optimizer, factor=0.5, patience=5, min_lr=lowest)
        else:  # warm-up and annealing, a step at a time
            total = config["epochs"] * self.steps
            self.scheduler = OneCycleLR(self.optimizer, config["lr"], total, cycle_momentum=False)
        # How far it has come; `step`, `sums` and `seconds` are of the epoch that is running.
        self.epoch = self.step = self.bad_epochs = 0
        self.sums, self.seconds = torch.zeros(5, dtype=torch.float64, device=device), 0.0
        self.best_epoch, self.best_loss, self.history = 0, math.inf, []

    def describe(self):
        """What will happen, in three lines."""
        c, shape = self.config, " × ".join(map(str, self.features))
        train, val = (len(self.images[name].names) for name in ("train", "val"))
        return (
            f"{c['encoder']} {c['layer']}, {c['weights']} weights: features {shape}\n"
            f"{c['decoder']} decoder: {count_parameters(self.decoder):,} trainable parameters\n"
            f"{c['data']}: {train} training and {val} validation images, {self.steps} steps an epoch, "
            f"{self.world} × {self.device}, to {self.out}"
        )

    def save_last(self):
        """Write last.pt, from which `restore` goes on bit for bit."""
        sums = all_processes(self.sums.clone())
        if self.rank == 0:
            state = {"about": self.about(), "sums": sums, "rng": torch.get_rng_state()}
            state |= {name: getattr(self, name) for name in self.PROGRESS}
            state |= {name: getattr(self, name).state_dict() for name in ("decoder", "optimizer", "scheduler")}
            save(state, self.out / "last.pt")

    def about(self):
        """What a resumption must have in common with the run: the configuration, the processes and the images."""
        same = {key: value for key, value in self.config.items() if key not in MAY_DIFFER}
        return same | {"processes": self.world, "training images": self.images["train"].names}

    def restore(self):
        """Go on from last.pt, which only the first process reads. Raises UserError if it is of another run."""
        path = self.out / "last.pt"
        states = [load(path) if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(states)
        (state,) = states
        try:
            for key, value in self.about().items():
                if state["about"][key] != value:
                    raise UserError(
                        f"--resume: {key} is {reprlib.repr(value)}, the run in {self.out} has "
                        f"{reprlib.repr(state['about'][key])}; give the same, or another --out"
                    )
            for name in ("decoder", "optimizer", "scheduler"):
                getattr(self, name).load_state_dict(state[name])
            for name in self.PROGRESS:
                setattr(self, name, state[name])
            self.sums = state["sums"].to(self.device) * (self.rank == 0)  # they are those of all processes
            torch.set_rng_state(state["rng"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: not the last.pt of such a run ({error})") from None

    def encode(self, images):
        """Features of `images` (B, 3, 224, 224) in [0, 1]; bfloat16 with --amp."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config["amp"]):
            return self.encoder(images)

    def decode(self, decoder, features):
        """Images from `features`, in float32 even with --amp, as the losses want them."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config["amp"]):
            return decoder(features).float()

    def validation_features(self, number, images):
        """Features of the validation batch `number`, kept for the next epoch if those of all batches are not too large.

        Deep layers have small features that take most of a validation's time.
        """
        if number in self.kept:
            return self.kept[number]
        features = self.encode(images)
        if features.nbytes * len(self.images["val"].names) <= KEPT_FEATURES * len(images):
            self.kept[number] = features
        return features

    def set_training(self):
        """Training mode; once --freeze-bn steps are done, batch norm normalises as it will in validation."""
        self.model.train()
        if self.config["freeze_bn"] and self.epoch * self.steps + self.step >= self.config["freeze_bn"]:
            for layer in self.decoder.modules():
                if isinstance(layer, (torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm)):
                    layer.eval()

    def train_step(self, batch):
        """One step of the optimiser on `batch`, (B, 3, 224, 224) in [0, 1]; its terms, without gradient."""
        values = terms(self.decode(self.model, self.encode(batch)), batch, self.config, self.lpips)
        self.optimizer.zero_grad()
        values[0].mean().backward()
        self.optimizer.step()
        if self.config["schedule"] == "onecycle":
            self.scheduler.step()
        return values.detach()

    def train_epoch(self, signals):
        """Train to the end of the epoch; per-image averages of its terms."""
        size, images = self.config["batch_size"], self.images["train"]
        plan = data.epoch_plan(images.sizes, self.config["seed"], self.epoch)
        total = self.steps * size * self.world
        if self.world > 1:  # every process takes as many steps, so the last ones wrap around
            plan = [part[torch.arange(total, device=self.device) % len(part)] for part in plan]
        start, losses = time.perf_counter() - self.seconds, []
        title = f"Epoch {self.epoch + 1}/{self.config['epochs']}"
        with tqdm(None, title, self.steps, initial=self.step, unit="step", leave=False, disable=self.bars) as bar:
            while self.step < self.steps:
                first = (self.step * self.world + self.rank) * size
                batch = data.crops(images, *(part[first : first + size] for part in plan))
                self.set_training()
                values = self.train_step(batch)
                self.sums[:4] += values.sum(1)
                self.sums[4] += len(batch)
                losses.append(values[0].mean())
                self.step += 1
                bar.update()
                if len(losses) == 20 or self.step == self.steps or signals.received:  # each look waits for a GPU
                    check_finite(losses, self.epoch, self.step - 1)
                    bar.set_postfix(loss=f"{losses[-1]:.4f}")
                    losses.clear()
                self.seconds = time.perf_counter() - start
                ask = self.world == 1 or self.device.type == "cpu"  # without waiting for other GPUs
                if ask or self.step % 20 == 0 or self.step == self.steps:
                    signals.check()
        return averages(self.sums)

    @torch.no_grad()
    def validate(self, signals):
        """Per-image averages of the terms over the validation images, each measured by one process."""
        if self.world > 1 and self.device.type == "cpu":  # gloo: batch norm's statistics are those of process 0
            for buffer in self.decoder.buffers():
                dist.broadcast(buffer, 0)
        self.decoder.eval()
        pixels, size = self.images["val"].pixels[self.rank :: self.world], self.config["batch_size"]
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        parts = tqdm(pixels.split(size), "Validation", unit="step", leave=False, disable=self.bars)
        for number, part in enumerate(parts):
            batch = data.center_crops(part)
            output = self.decode(self.decoder, self.validation_features(number, batch))
            sums[:4] += terms(output, batch, self.config, self.lpips).sum(1)
            sums[4] += len(batch)
            if self.world == 1:  # several processes may have unequal numbers of batches
                signals.check()
        return averages(sums)

    def end_epoch(self, train, val):
        """Schedule, keep the best, write the files and the epoch's line."""
        lr = self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(val["loss"]):
            raise UserError(f"the validation loss of epoch {self.epoch + 1} is {val['loss']}; {DIVERGED}")
        if self.config["schedule"] == "plateau":
            self.scheduler.step(val["loss"])
        self.epoch += 1
        row = {"epoch": self.epoch}
        row |= {f"train_{name}": train[name] for name in COLUMNS} | {f"val_{name}": val[name] for name in COLUMNS}
        row |= {"lr": lr, "seconds": round(self.seconds, 2)}
        row["images_per_second"] = round(len(self.images["train"].names) / max(self.seconds, 1e-9), 2)
        self.history.append(row)
        better = val["loss"] < self.best_loss
        self.bad_epochs = 0 if better else self.bad_epochs + 1
        if better:
            self.best_epoch, self.best_loss = self.epoch, val["loss"]
        self.step, self.seconds = 0, 0.0
        self.sums.zero_()
        if self.rank == 0:
            if better:
                self.save_best()
            write_history(self.history, self.out / "history.csv")
            draw_curves(self.history, self.out / "curves.png")
            self.tracker.log(row, better, self.encoder, self.decoder, self.images["val"].pixels)
            if not self.bars:  # --quiet
                print(epoch_line(row, self.config["epochs"], better), flush=True)
        self.save_last()  # last, so that whatever was interrupted before is done again

    def finished(self):
        return self.epoch >= self.config["epochs"] or self.bad_epochs >= self.config["patience"]

    def save_best(self):
        """Write best.pt: the decoder and what rebuilds it, nothing of the encoder."""
        packages = ("torch", "torchvision", "timm", "lpips", "numpy")
        state = {
            "decoder": self.decoder.state_dict(),
            "config": self.config,
            "epoch": self.epoch,
            "val_loss": self.best_loss,
            "versions": {name: version(name) for name in packages} | {"python": sys.version.split()[0]},
        }
        save(state, self.out / "best.pt")

    def fit(self, signals):
        """Train until the epochs are over or the validation loss has stopped falling."""
        if not (self.epoch or self.step):
            self.save_last()  # a run can be resumed from its first moment on
        while not self.finished():
            try:
                train = self.train_epoch(signals)
                val = self.validate(signals)
            except Interrupted:
                self.save_last()
                raise
            self.end_epoch(train, val)


def claim(out, resume, overwrite):
    """Make the folder of the run and lock it. Raises UserError if it is in use or holds a run that must not be lost."""
    out = make_folder(out)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)  # the kernel frees it when the process ends, however it ends
    except Timeout:
        raise UserError(f"--out {out}: another training is writing there; choose another --out") from None
    best, last = (out / "best.pt").exists(), (out / "last.pt").exists()
    if (best or last) and not resume and not overwrite:
        raise UserError(f"--out {out}: holds a run; --resume goes on, --overwrite replaces; or another --out")
    if best and not last and resume:
        raise UserError(f"--out {out}: holds best.pt but no last.pt to go on from; --overwrite, or another --out")
    for leftover in out.glob(".*.tmp*"):  # of a process that was killed while it wrote
        leftover.unlink()
    return lock


def set_up(device, deterministic=True):
    """Repeatable algorithms, where there are, or else the fastest; TF32 on CUDA; freed memory kept."""
    keep_freed_memory()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not deterministic
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def train(args):
    """Train as `args` (a Namespace of the flags) say, and write the run's files."""
    device = select_device(args.device)
    set_up(device, args.deterministic)
    torch.manual_seed(args.seed)
    rank, world, device = start_processes(device)
    if args.download:
        if args.data == "sample":
            raise UserError("--download --data sample: the sample needs no download; give a folder for DIV2K")
        args.data = args.data or data.DIV2K_ROOT
        data.download_div2k(args.data, bars=disable_bars(args))
    config = {key: value for key, value in vars(args).items() if key not in NOT_CONFIG}
    config["data"] = data.resolve(args.data)
    lock = claim(args.out, args.resume, args.overwrite) if rank == 0 else None

    job = Run(config, device, rank, world, disable_bars(args, rank), args.tracker)
    print(job.describe())
    stale = []
    if all_processes(torch.tensor(int(rank == 0 and args.resume and (job.out / "last.pt").exists()), device=device)):
        job.restore()
        print(f"{'finished' if job.finished() else 'resumed'} after epoch {job.epoch}, step {job.step}")
    else:
        stale = [*(job.out / name for name in FILES), *job.out.glob(EVENTS)]
    if not job.finished():
        stale += [job.out / name for name in RESULTS + INVERSION]  # of what was there: will not be true
    if rank == 0:
        for path in stale:
            path.unlink(missing_ok=True)
        write_text(job.out / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    try:
        with Signals(device) as signals:
            job.fit(signals)
    except Interrupted:
        again = [flag for flag in sys.argv if flag not in ("--overwrite", "--resume")]
        again = shlex.join([*again, "--resume"])
        again = f"python {again}" if world == 1 else f"torchrun, as before, {again}"
        print(f"stopped in epoch {job.epoch + 1} after step {job.step}; go on with: {again}")
        sys.exit(128 + signals.received)
    finally:
        job.tracker.close()
        if lock:
            lock.release()
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"best: epoch {job.best_epoch}, validation loss {job.best_loss:.4f}, in {job.out / 'best.pt'}")
    return job


if __name__ == "__main__":
    run(lambda: train(ARGS))
