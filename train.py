"""Train a decoder to invert the features of a frozen encoder.

  python train.py                                            the study's headline: VGG16 block1, tconv decoder
  python train.py --config configs/sample.yaml               a minute on two cores, embedded photographs
  python train.py --config configs/fast.yaml --data FOLDER   the headline in a minute and a half
  python train.py --layer block3 --data FOLDER --out runs/block3 --resume

Writes best.pt, last.pt, config.yaml, history.csv, curves.png and TensorBoard's files to --out. Several GPUs
or hosts: torchrun --nproc_per_node=N train.py … Watch: tensorboard --logdir runs. Next: evaluate.py --help
"""

from flags import MAY_DIFFER, config_of, parse_train
from utils import PROTOCOLS, UserError, cli_main, disable_bars, evenly_spaced

if __name__ == "__main__":
    ARGS = cli_main(lambda: parse_train(doc=__doc__))  # before torch is imported: --help answers at once

import copy
import math
import shlex
import sys
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import BatchNorm2d, SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from tqdm import tqdm

import data
from checkpoint import (
    Interrupted,
    Signals,
    begin_or_resume,
    claim,
    save_best,
    save_last,
    timed_flags,
    write_history,
)
from decoders import FeedbackDecoder, Fused
from encoders import encoder_sha256
from metrics import LPIPS_MIN_SIZE, TERMS, Loss, Meter, target
from models import Inverter, count_parameters, encoder_of, inverter_of, load_decoder
from utils import out_of_memory, processes, select_device, set_determinism, tf32

VAL_BATCH = 4
VAL_CACHE_BYTES = 2**28  # validation features up to this size are computed once
LOGGED_IMAGES = 6  # validation images for the tracker
SYNC_EVERY = 20  # steps between looks at the losses, and at other GPUs' signals: each makes a GPU wait
STATISTICS_CROPS = 64  # for the mean and std of the features
DIVERGED = "try a smaller --lr; the files of earlier epochs are kept"


def train(args):
    """Train as the flags in `args` say, and write the run's files. Returns the Training.

    An epoch is train_epoch → train_step → forward_backward → Loss for each batch, then validate, end_epoch.
    """
    with processes(select_device(args.device)) as (rank, world, device), ExitStack() as stack:
        set_determinism(args.deterministic)
        if args.download:
            from extras.div2k import download_div2k

            args.data = args.data or data.DIV2K_ROOT
            download_div2k(args.data, bars=disable_bars(args))
        if rank == 0:
            stack.enter_context(claim(args.out, args.resume, args.overwrite))
        if args.minutes and args.resume:
            vars(args).update(timed_flags(args.out))
        training = Training(args, rank, world, device)
        print(training.description())
        begin_or_resume(training, args.resume)
        if training.config["kept_crops"] and not training.finished:
            from extras.feature_cache import cache_features

            training.feature_cache = cache_features(training, args.cache, disable_bars(args))
        tracker = make_tracker(training, args.tracker)
        if tracker:
            stack.callback(tracker.close)
        stack.enter_context(training.signals)
        while not training.finished:
            try:
                trained = train_epoch(training)
                validated, *images = validate(training)
            except Interrupted:
                stop(training)
            better = end_epoch(training, trained, validated)
            if rank == 0:
                if better:
                    save_best(training)
                write_history(training.history, training.out / "history.csv")
                if tracker:
                    tracker.log(training.history, better, *images)
                if not training.quiet:
                    print(epoch_line(training.history[-1], training.config["epochs"], better), flush=True)
            save_last(training)  # at the end: an epoch that is interrupted before this is done again
        best = f"best: epoch {training.best_epoch}, validation loss {training.best_loss:.4f}"
        print(f"{best}, in {training.out / 'best.pt'}")
        return training


class Training:
    """Images, inverter, loss, optimizer and scheduler of a training, and its progress.

    args: train.py's flags. rank, world: number of this process, and of all. Raises UserError for flags that
    do not fit together.
    """

    def __init__(self, args, rank=0, world=1, device=None):
        self.rank, self.world, self.device = rank, world, device or torch.device("cpu")
        self.out, self.quiet = Path(args.out), disable_bars(args, rank)
        torch.manual_seed(args.seed)
        self.config = config = config_of(args) | {"data": data.resolve(args.data)}
        self.protocol = PROTOCOLS[config["protocol"]]
        encoder = encoder_of(config).to(self.device)
        self.train_images, self.val_images = self.load_images(args, encoder.input_size)
        self.chosen = ""  # flags of --recipe auto
        if config["recipe"] == "auto":
            from extras.recipe import choose_recipe

            self.chosen = choose_recipe(config, encoder, len(self.train_images))
        self.val_indices = evenly_spaced(len(self.val_images), config["val_images"] or len(self.val_images))
        config["crop"] = config["crop"] or encoder.input_size
        self.inverter = inverter_of(config, encoder)
        init_sha256 = load_decoder(self.inverter, config) if config["init"] else None
        self.inverter.to(self.device)
        self.steps_per_pass = steps_of_a_pass(len(self.train_images), config["batch_size"], world)
        check_crop(self)

        self.loss = Loss(config["mse_weight"], config["lpips_weight"], self.protocol).to(self.device)
        if world > 1 and self.device.type == "cuda":
            self.inverter.decoder = SyncBatchNorm.convert_sync_batchnorm(self.inverter.decoder)
        if hasattr(self.inverter.decoder, "deviation") and not config["init"]:  # --init brings its own
            measure_features(self.inverter, self.train_images, config)
        if config["compile"]:
            self.inverter.compile()
        self.model = DistributedDataParallel(self.inverter) if world > 1 else self.inverter
        self.optimizer = make_optimizer(self.inverter, config["lr"], config["optimizer"])
        self.signals = Signals(self.device)
        self.meter = Meter(TERMS, self.device)  # of this epoch, like step and seconds
        self.epoch = self.step = self.bad_epochs = self.best_epoch = 0
        self.seconds, self.best_loss = 0.0, math.inf
        self.history = []  # a dictionary for each epoch
        self.feature_cache = None  # of --kept-crops
        self.val_feature_cache = {}  # {first image of a batch: features}
        self.forward_backward = forward_backward
        if config["minutes"] and not config["steps"]:
            from extras.recipe import MOST_STEPS, find_steps

            self.steps = MOST_STEPS
            config["steps"] = find_steps(self, epoch_batches(self), train_step)
        self.steps = config["steps"] or self.steps_per_pass * config["passes"]  # in an epoch
        if config["schedule"] == "plateau":  # paper 3.3.4
            lowest = self.protocol.lowest_lr
            self.scheduler = ReduceLROnPlateau(self.optimizer, factor=0.5, patience=5, min_lr=lowest)
        else:
            steps = config["epochs"] * self.steps
            self.scheduler = OneCycleLR(self.optimizer, config["lr"], steps, cycle_momentum=False)
        if args.graphs and world == 1 and self.device.type == "cuda":
            from extras.cuda_graphs import CudaGraphStep

            self.forward_backward = CudaGraphStep(forward_backward)
        self.resume_guard = self.in_common(init_sha256)

    def load_images(self, args, size):
        """Training and validation images for an encoder of size×size images."""
        options = {"cache": args.cache, "protocol": self.protocol, "size": size}
        options["bars"] = disable_bars(args)  # any process may build the cache
        images = data.load_split(self.config["data"], "train", **options)
        indices = evenly_spaced(len(images), self.config["train_images"] or len(images))
        val_images = data.load_split(self.config["data"], "val", **options)
        return data.subset(images, indices).to(self.device), val_images.to(self.device)

    def in_common(self, init_sha256):
        """What a run and its resumption must have in common."""
        encoder = self.inverter.encoder
        return {key: value for key, value in self.config.items() if key not in MAY_DIFFER} | {
            "processes": self.world,
            "hash of the training images": self.train_images.key,
            "hash of the validation images": self.val_images.key,
            "init_sha256": init_sha256,
            "weights_sha256": encoder.weights_sha256,
            "encoder_sha256": encoder_sha256(encoder),
        }

    @property
    def finished(self):
        """Whether the epochs are over, or the validation loss has stopped falling."""
        return self.epoch >= self.config["epochs"] or self.bad_epochs >= self.config["patience"]

    def description(self):
        """What will happen, in a few lines."""
        config = self.config
        shape = " × ".join(map(str, self.inverter.shape))
        parameters = f"{count_parameters(self.inverter.decoder):,} trainable parameters"
        recipe = f"recipe auto: {self.chosen}\n" if self.chosen else ""
        images = f"{len(self.train_images)} training and {len(self.val_indices)} validation images"
        where = f"{self.world} processes on {self.device}" if self.world > 1 else self.device
        return (
            f"encoder: {config['encoder']}, layer {config['layer']}, {config['weights']} weights\n"
            f"decoder: {config['decoder']}, {parameters}, for features {shape}\n"
            f"data: {config['data']}, {images}, crops of {config['crop']}×{config['crop']}\n{recipe}"
            f"training: to epoch {config['epochs']}, {self.steps} steps each, on {where}, to {config['out']}"
        )


# --- Set-up ------------------------------------------------------------------------------------------------


def steps_of_a_pass(images, batch_size, world):
    """Steps in which `world` processes take all `images`. Raises UserError if `batch_size` is too large."""
    if batch_size * world > images:
        raise UserError(f"--batch-size {batch_size} × {world} processes: only {images} training images")
    return math.ceil(images / (batch_size * world))


def check_crop(training):
    """Raise UserError unless encoder, decoder and LPIPS take crops of this size."""
    inverter, config = training.inverter, training.config
    crop, size, stride, batch_size = config["crop"], inverter.size, inverter.stride, config["batch_size"]
    layer, side = f"{config['encoder']} {config['layer']}", data.side_of(size)
    if crop > side:
        raise UserError(f"--crop {crop}: images are {side} pixels wide; at most that")
    if crop % stride and crop != size:
        raise UserError(f"--crop {crop}: {layer} has a stride of {stride} pixels; give a multiple of it")
    if size < LPIPS_MIN_SIZE:
        raise UserError(f"--input-size {size}: LPIPS needs at least {LPIPS_MIN_SIZE} pixels")
    if config["lpips_weight"] and crop < LPIPS_MIN_SIZE:
        raise UserError(f"--crop {crop}: LPIPS needs at least {LPIPS_MIN_SIZE} pixels")
    try:
        shape = inverter.shape_at(crop)
    except Exception as error:  # each network has its own
        if out_of_memory(error):
            raise
        raise UserError(f"--crop {crop}: {layer} takes no such image ({error})") from None
    last = len(training.train_images) % batch_size if training.world == 1 else 0
    synchronized = training.world > 1 and training.device.type == "cuda"
    if (last or batch_size) == 1 and shape[1:] == (1, 1) and not synchronized:
        trial = Inverter(inverter.encoder, copy.deepcopy(inverter.decoder), inverter.shape).train()
        try:  # batch norm may need more values
            trial.decode(torch.zeros(1, *shape, device=training.device), (crop, crop))
        except ValueError:
            few = f"a batch of one image has one position of {layer}; give another --crop or --batch-size"
            raise UserError(f"--crop {crop}: {few} ({len(training.train_images)} images)") from None


@torch.no_grad()
def measure_features(inverter, images, config):
    """Set the decoder's mean and std of each feature channel, measured on the first training crops."""
    plan = data.epoch_plan(images.sizes, config["seed"], 0, config["crop"], images.side)
    parts = zip(*(part[:STATISTICS_CROPS].split(4) for part in plan), strict=True)
    crops = (data.crops(images, part, config["crop"]).to(inverter.device) for part in parts)
    features = torch.cat([inverter.encode(batch) for batch in crops]).float()
    decoder = inverter.decoder
    if isinstance(decoder, Fused):
        std = torch.stack([source.std() for source in features.split(decoder.channels, 1)])
        decoder.deviation.copy_(positive(std))
        features, decoder = decoder.fuse(features), decoder.decoder
    if hasattr(decoder, "deviation"):
        std, mean = torch.std_mean(features, (0, 2, 3), keepdim=True)
        decoder.mean.copy_(mean[0])
        decoder.deviation.copy_(positive(std[0]))


def positive(std):
    """`std` where it is not much smaller than the others, as of channels that are hardly ever active."""
    return std.clamp_min(0.01 * std.mean()).clamp_min(1e-12)


def make_optimizer(inverter, lr, optimizer="adam"):
    """Adam (paper 3.3.4) or Muon over the decoder's parameters."""
    parameters = inverter.decoder.parameters()
    if optimizer == "muon":
        from extras.muon import Muon

        return Muon(parameters, lr)
    return torch.optim.Adam(parameters, lr, fused=True if inverter.device.type == "cuda" else None)


def make_tracker(training, kind):
    """The Tracker of rank 0, which also draws curves.png; None without extras/ and report/."""
    if training.rank == 0 and find_spec("extras") and find_spec("report"):
        from extras.trackers import Tracker

        return Tracker(kind, training.out, training.config)


# --- An epoch ----------------------------------------------------------------------------------------------


def train_epoch(training):
    """Train to the end of the epoch. Returns the means of the loss's terms.

    Raises UserError for a loss that is not finite, and Interrupted if a signal arrived.
    """
    config, signals, steps = training.config, training.signals, training.steps
    start = time.perf_counter() - training.seconds
    losses = []
    cheap = training.world == 1 or training.device.type == "cpu"  # else GPUs wait for each other
    title = f"Epoch {training.epoch + 1}/{config['epochs']}"
    bar = tqdm(None, title, steps, initial=training.step, unit="step", leave=False, disable=training.quiet)
    with bar, tf32(config["tf32"]):
        for images, features in epoch_batches(training):
            terms = train_step(training, images, features)
            if config["schedule"] == "onecycle" and training.step + 1 < steps:  # the last: in end_epoch
                training.scheduler.step()
            training.meter.add(terms)
            losses.append(terms["loss"].mean())
            training.step += 1
            bar.update()
            due = training.step % SYNC_EVERY == 0 or training.step == steps
            if due or signals.received:
                check_finite(losses, training)
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
                losses.clear()
            training.seconds = time.perf_counter() - start
            if due or cheap:
                signals.check()
    return training.meter.averages()


def epoch_batches(training):
    """Yield this process's batches of the rest of the epoch: crops (B, 3, N, N) in [0, 1], and features.

    The features come from the FeatureCache; None without one.
    """
    config, images, size = training.config, training.train_images, training.config["batch_size"]
    done = training.epoch * training.steps
    plan = None
    for step in range(done + training.step, done + training.steps):
        pass_index, place = divmod(step, training.steps_per_pass)
        if plan is None or place == 0:
            plan = data.epoch_plan(images.sizes, config["seed"], pass_index, config["crop"], images.side)
            if training.world > 1:  # full batches for all processes: the last ones wrap around
                count = training.steps_per_pass * size * training.world
                plan = [part.repeat(2)[:count] for part in plan]
        first = (place * training.world + training.rank) * size
        batch, features = [part[first : first + size] for part in plan], None
        if training.feature_cache:
            features, *batch = training.feature_cache.batch(pass_index, batch[0])
            features = features.to(training.device).float()
        yield data.crops(images, batch, config["crop"]).to(training.device), features


def train_step(training, images, features=None):
    """One step on `images` (B, 3, N, N) in [0, 1]; {term of the loss: (B,)}, detached."""
    config = training.config
    training.model.train()
    done = training.epoch * training.steps + training.step
    if config["freeze_bn"] and done >= config["freeze_bn"]:
        for layer in training.inverter.decoder.modules():
            if isinstance(layer, (BatchNorm2d, SyncBatchNorm)):
                layer.eval()
    if isinstance(training.inverter.base_decoder, FeedbackDecoder):
        training.inverter.base_decoder.sample_warm_start()
    terms = training.forward_backward(training, images, features)
    training.optimizer.step()
    return terms


def forward_backward(training, images, features=None):
    """Compute the gradients of the loss; {term: (B,)}, detached. features: of `images`, if known."""
    *intermediate, output = training.model(images, features, each=True)
    terms = training.loss(output, images, intermediate)
    total = terms["loss"].mean()
    if training.world > 1:  # DistributedDataParallel needs a gradient of every parameter
        total = total + 0 * sum(image.sum() for image in intermediate)
    training.optimizer.zero_grad()
    total.backward()
    if training.config["clip_grad"]:
        torch.nn.utils.clip_grad_norm_(training.model.parameters(), training.config["clip_grad"])
    if hasattr(training.optimizer, "orthogonalize_grads"):  # Muon
        training.optimizer.orthogonalize_grads()
    return {name: value.detach() for name, value in terms.items()}


def check_finite(losses, training):
    """Raise UserError if one of the last steps' losses is not finite."""
    finite = torch.stack(losses).isfinite().tolist()
    if not all(finite):
        step = training.step - len(losses) + 1 + finite.index(False)
        raise UserError(f"the loss is not finite in epoch {training.epoch + 1}, step {step}; {DIVERGED}")


@torch.no_grad()
def validate(training):
    """Measure the centres of this process's validation images.

    Returns means of the loss's terms, with `seconds`, and targets and outputs of some images, (LOGGED_IMAGES,
    3, H, W) in [0, 1] each. On the CPU all processes take over rank 0's batch norm.
    """
    start = time.perf_counter()
    inverter, device, world = training.inverter, training.device, training.world
    indices = training.val_indices[training.rank :: world]
    if world > 1 and device.type == "cpu":
        for buffer in inverter.decoder.buffers():
            dist.broadcast(buffer, 0)
    inverter.eval()
    logged = evenly_spaced(len(indices), LOGGED_IMAGES)
    pairs = [torch.empty(2, 0, 3, inverter.size, inverter.size, device=device)]  # a process may have no image
    meter, cache = Meter(TERMS, device), training.val_feature_cache
    firsts = range(0, len(indices), VAL_BATCH)
    for first in tqdm(firsts, "Validation", unit="step", leave=False, disable=training.quiet):
        pixels = training.val_images[indices[first : first + VAL_BATCH]]
        batch = data.center_crops(pixels, inverter.size).to(device)
        features = cache[first] if first in cache else inverter.encode(batch)
        if features.nbytes / len(batch) * len(training.val_indices) <= VAL_CACHE_BYTES:
            cache[first] = features
        output = inverter.decode(features)
        meter.add(training.loss(output, batch))
        here = [i - first for i in logged if first <= i < first + VAL_BATCH]
        pairs.append(torch.stack([target(batch, training.protocol), output])[:, here].clamp(0, 1))
        if world == 1:  # several processes may have unequal numbers of batches
            training.signals.check()
    means = meter.averages() | {"seconds": time.perf_counter() - start}
    return means, *torch.cat(pairs, 1)


def end_epoch(training, trained, validated):
    """Count the epoch, add its row to the history; whether its validation loss is the lowest so far.

    trained, validated: means of the loss's terms. Raises UserError for a validation loss that is not finite.
    """
    loss, seconds = validated["loss"], training.seconds
    if not math.isfinite(loss):
        raise UserError(f"the validation loss of epoch {training.epoch + 1} is {loss}; {DIVERGED}")
    training.epoch += 1
    row = {"epoch": training.epoch}
    row |= {f"train_{name}": trained[name] for name in TERMS}
    row |= {f"val_{name}": validated[name] for name in TERMS}
    row |= {"lr": training.optimizer.param_groups[0]["lr"], "seconds": round(seconds, 2)}
    taken = training.steps / training.steps_per_pass  # passes
    row["images_per_second"] = round(len(training.train_images) * taken / max(seconds, 1e-9), 2)
    row["val_seconds"] = round(validated["seconds"], 2)
    training.history.append(row)
    if isinstance(training.scheduler, ReduceLROnPlateau):
        training.scheduler.step(loss)
    else:
        training.scheduler.step()
    training.step, training.seconds = 0, 0.0
    training.meter.restart()
    better = loss < training.best_loss
    training.bad_epochs = 0 if better else training.bad_epochs + 1
    if better:
        training.best_epoch, training.best_loss = training.epoch, loss
    return better


def stop(training):
    """Save what an interrupted training has done, say how it goes on, and end the process."""
    save_last(training)
    flags = [flag for flag in sys.argv if flag not in ("--overwrite", "--resume")]
    if Path(sys.argv[0]).name == "train.py":  # survey.py always goes on
        flags.append("--resume")
    command = "python" if training.world == 1 else "torchrun, as before,"
    where = f"epoch {training.epoch + 1} after step {training.step}"
    print(f"stopped in {where}; go on with: {command} {shlex.join(flags)}")
    sys.exit(128 + training.signals.received)


def epoch_line(row, epochs, better):
    """An epoch's line on the screen."""
    parts = [f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"]
    for split in ("train", "val"):
        terms = [f"{name} {row[f'{split}_{name}']:.{2 if name == 'psnr' else 4}f}" for name in TERMS]
        parts.append(f"{split} {' '.join(terms)}".replace("nan", "–"))
    parts.append(f"lr {row['lr']:.1e}")
    parts.append(f"{row['seconds']:.0f} s, {row['images_per_second']:.1f} images/s")
    if left := (row["seconds"] + row["val_seconds"]) * (epochs - row["epoch"]):
        parts[-1] += f", {left:.0f} s left" if left < 100 else f", {left / 60:.0f} min left"
    return " | ".join(parts) + ("  best" if better else "")


if __name__ == "__main__":
    cli_main(lambda: train(ARGS))
