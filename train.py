"""Train a decoder to invert the features of a frozen encoder.

  python train.py                                            the study's headline: VGG16 block1, tconv decoder
  python train.py --config configs/sample.yaml               a minute on two cores, embedded photographs
  python train.py --config configs/fast.yaml --data FOLDER   the headline in a minute and a half
  python train.py --layer block3 --data FOLDER --out runs/block3 --resume

Writes best.pt, last.pt, config.yaml, history.csv, curves.png and TensorBoard's files to --out. Several GPUs
or hosts: torchrun --nproc_per_node=N train.py … Watch: tensorboard --logdir runs. Next: python evaluate.py
--help
"""

from flags import MAY_DIFFER, config_of, parse_train
from utils import run

if __name__ == "__main__":
    ARGS = run(lambda: parse_train(doc=__doc__))  # before torch is imported: --help answers at once

import math
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

import data
import prepare
from encoders import weights_key
from feedback import FeedbackDecoder
from graphs import Graphs
from kept import keep_crops
from metrics import TERMS, Loss, Meter, target
from models import inverter_of, load_decoder
from muon import Muon
from signals import Interrupted, Signals
from state import State, claim, hold, remove_what_will_not_be_true, resume, save_best, save_last, update_best
from study import PROTOCOLS
from tracker import Tracker, draw_curves, epoch_line, write_history
from utils import UserError, disable_bars, evenly_spaced, processes, select_device, tf32, write_text

VALIDATED = 4  # images at a time
KEPT_FEATURES = 2**28  # bytes of validation features that are computed once; shallow layers' are larger
SHOWN = 6  # validation images, to the tracker
LOOKS = 20  # steps from one look at the losses, and at other GPUs' signals, to the next: each waits
DIVERGED = "try a smaller --lr. What the epochs before wrote is kept"


def train(args):
    """Train as `args` (a Namespace of the flags) say, and write the run's files; the State at its end."""
    with processes(select_device(args.device)) as started, ExitStack() as held:
        return train_here(args, held, *started)


def train_here(args, held, rank, world, device):
    """`train`, in one of `world` processes; held: what the run's lock is released with."""
    # --- networks
    prepare.set_up(args.deterministic)
    torch.manual_seed(args.seed)
    bars = disable_bars(args, rank)
    if args.download:
        prepare.download(args)
    config = config_of(args) | {"data": data.resolve(args.data)}
    protocol = PROTOCOLS[config["protocol"]]
    out = Path(args.out)
    if rank == 0:
        held.enter_context(hold(out))
        claim(out, args.resume, args.overwrite)
    inverter = inverter_of(config)
    init_sha256 = load_decoder(inverter, config) if config["init"] else None
    inverter.to(device)
    config["crop"] = config["crop"] or inverter.size

    # --- data, loss and optimiser
    source = (args.cache, protocol, disable_bars(args), inverter.size)  # which process builds it shows it
    train_images = data.load_split(config["data"], "train", *source)
    val_images = data.load_split(config["data"], "val", *source)
    if config["train_images"]:
        train_images = data.subset(train_images, evenly_spaced(len(train_images), config["train_images"]))
    train_images, val_images = train_images.to(device), val_images.to(device)
    val_numbers = evenly_spaced(len(val_images), config["val_images"] or len(val_images))
    steps = prepare.steps_of_a_pass(len(train_images), config["batch_size"], world) * config["passes"]

    prepare.check_crop(inverter, config, len(train_images), world)
    loss = Loss(config["mse_weight"], config["lpips_weight"], protocol).to(device)
    if world > 1 and device.type == "cuda":
        inverter.decoder = torch.nn.SyncBatchNorm.convert_sync_batchnorm(inverter.decoder)
    if hasattr(inverter.decoder, "deviation") and not config["init"]:  # --init has its own
        prepare.measure_features(inverter, train_images, config)
    if config["compile"]:
        inverter.compile()
    model = DistributedDataParallel(inverter) if world > 1 else inverter
    optimizer = prepare.make_optimizer(inverter, config["lr"], config["optimizer"])
    scheduler = prepare.make_scheduler(optimizer, config, steps, protocol.lowest_lr)
    state = State(inverter.decoder, optimizer, scheduler, Meter(TERMS, device))
    print(prepare.description(config, inverter, len(train_images), len(val_numbers), steps, world, device))

    # --- resume, or make room for a new run
    same = {key: value for key, value in config.items() if key not in MAY_DIFFER}
    same |= {"processes": world, "hash of the training images": train_images.key}
    same |= {"hash of the validation images": val_images.key, "init_sha256": init_sha256}
    encoder = inverter.encoder
    same |= {"weights_sha256": encoder.weights_sha256, "encoder_sha256": weights_key(encoder)}
    resumed = args.resume and resume(state, same, out, rank, world)
    if resumed:
        how = "finished" if finished(state, config) else "resumed"
        print(f"{how} after epoch {state.epoch}, step {state.step}")
    kept = None
    if not finished(state, config):
        if rank == 0:
            remove_what_will_not_be_true(out, resumed)
        save_last(state, same, out, rank)  # a run can be resumed from its first moment on
        if rank == 0:
            if state.best_epoch:
                update_best(config, out)
            write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        if config["kept_crops"]:
            kept = keep_crops(train_images, inverter, config, args.cache, disable_bars(args))

    # --- the loop
    tracker = Tracker("none" if rank else args.tracker, out, config)
    held.callback(tracker.close)
    known = {}  # validation features
    graphs = args.graphs and world == 1 and device.type == "cuda"
    compute = Graphs(gradients) if graphs else gradients
    signals = held.enter_context(Signals(device))
    while not finished(state, config):
        try:
            batches = epoch_batches(train_images, kept, config, state, steps, rank, world, device)
            trained = train_epoch(model, batches, loss, state, config, steps, signals, bars, compute)
            start = time.perf_counter()
            numbers = val_numbers[rank::world]
            validated, *shown = validate(inverter, val_images, numbers, loss, known, world, signals, bars)
            val_seconds = time.perf_counter() - start
        except Interrupted:
            save_last(state, same, out, rank)
            where = f"epoch {state.epoch + 1} after step {state.step}"
            again = shlex.join([flag for flag in sys.argv if flag not in ("--overwrite", "--resume")])
            how = "python" if world == 1 else "torchrun, as before,"
            print(f"stopped in {where}; go on with: {how} {again} --resume")
            sys.exit(128 + signals.received)
        images = len(train_images) * config["passes"]
        row, better = end_epoch(state, trained, validated, val_seconds, images)
        if rank == 0:
            if better:
                remove_what_will_not_be_true(out, resumed=True)  # results of the best until now
                save_best(inverter, config, state, out, init_sha256)
            write_history(state.history, out / "history.csv")
            draw_curves(state.history, out / "curves.png")
            tracker.log(row, better, *shown)
            if not bars:  # --quiet
                print(epoch_line(row, config["epochs"], better), flush=True)
        save_last(state, same, out, rank)  # last: what was interrupted before is done again
    print(f"best: epoch {state.best_epoch}, validation loss {state.best_loss:.4f}, in {out / 'best.pt'}")
    return state


# --- An epoch --------------------------------------------------------------------------------------------


def finished(state, config):
    """Whether the epochs are over or the validation loss has stopped falling."""
    return state.epoch >= config["epochs"] or state.bad_epochs >= config["patience"]


def epoch_batches(images, kept, config, state, steps, rank, world, device):
    """Yield this process's batches of the epoch of `state`, from its step on.

    Each is crops (B, 3, N, N) in [0, 1], and their features where `kept`, a KeptCrops, has them, else None.
    """
    size = config["batch_size"]
    crop = config["crop"]
    steps_of_pass = steps // config["passes"]
    plan = None
    for step in range(state.step, steps):
        number, place = divmod(state.epoch * steps + step, steps_of_pass)  # passes so far, steps in this one
        if plan is None or place == 0:
            plan = data.epoch_plan(images.sizes, config["seed"], number, crop, images.side)
            if world > 1:  # every process takes as many steps, so the last ones wrap around
                places = torch.arange(steps_of_pass * size * world, device=images.sizes.device) % len(images)
                plan = [part[places] for part in plan]
        first = (place * world + rank) * size
        index, *drawn = (part[first : first + size] for part in plan)
        features = None
        if kept:
            features, *drawn = kept.of(number, index)
            features = features.to(device)
        yield data.crops(images, index, *drawn, crop).to(device), features


def gradients(model, images, features, loss, optimizer, clip):
    """Give each parameter its gradient, or what Muon makes of it; arguments and result are train_step's."""
    *earlier, output = model(images, features, each=True)
    terms = loss(output, images, earlier)
    total = terms["loss"].mean()
    if isinstance(model, DistributedDataParallel):  # it wants a gradient, if 0, of every parameter
        total = total + 0 * sum(image.sum() for image in earlier)
    optimizer.zero_grad()
    total.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    if isinstance(optimizer, Muon):
        optimizer.turn()
    return {name: value.detach() for name, value in terms.items()}


def train_step(model, images, features, loss, optimizer, clip=0, compute=gradients):
    """One step on `images` (B, 3, N, N) in [0, 1]; {term of the loss: (B,)}, without gradient.

    features: theirs, where they are known, else None. clip: the largest norm of the gradient; 0: any.
    compute: `gradients`, or Graphs of it.
    """
    core = getattr(model, "module", model).core  # DistributedDataParallel's is inside
    if isinstance(core, FeedbackDecoder):
        core.draw()
    terms = compute(model, images, features, loss, optimizer, clip)
    optimizer.step()
    return terms


def train_epoch(model, batches, loss, state, config, steps, signals, bars, compute=gradients):
    """Train on `batches` to the end of the epoch, which is counted in `state`; averages of the loss's terms.

    Raises UserError for a loss that is not finite, and Interrupted where a signal arrived.
    """
    start = time.perf_counter() - state.seconds
    losses = []
    title = f"Epoch {state.epoch + 1}/{config['epochs']}"
    bar = tqdm(None, title, steps, initial=state.step, unit="step", leave=False, disable=bars)
    with bar, tf32(config["tf32"]):
        for batch, features in batches:
            model.train()
            done = state.epoch * steps + state.step
            if config["freeze_bn"] and done >= config["freeze_bn"]:
                for layer in state.decoder.modules():  # batch norm's statistics stay as they are
                    if isinstance(layer, (torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm)):
                        layer.eval()
            terms = train_step(model, batch, features, loss, state.optimizer, config["clip_grad"], compute)
            if config["schedule"] == "onecycle" and state.step + 1 < steps:  # else `end_epoch` does it
                state.scheduler.step()
            state.meter.add(terms)
            losses.append(terms["loss"].mean())
            state.step += 1
            bar.update()
            last = state.step == steps
            if last or len(losses) == LOOKS or signals.received:
                check_finite(losses, state.epoch, state.step)
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
                losses.clear()
            state.seconds = time.perf_counter() - start
            alone = not dist.is_initialized() or signals.device.type == "cpu"  # else a look has GPUs wait
            if last or state.step % LOOKS == 0 or alone:
                signals.check()
    return state.meter.averages()


def check_finite(losses, epoch, step):
    """Raise UserError if one of `losses`, those of the last steps up to number `step`, is not finite."""
    bad = (~torch.isfinite(torch.stack(losses))).nonzero()
    if len(bad):
        step = step - len(losses) + 1 + int(bad[0])
        raise UserError(f"the loss is not finite in epoch {epoch + 1}, step {step}; {DIVERGED}")


@torch.no_grad()
def validate(inverter, images, numbers, loss, known, world, signals, bars):
    """Measure the centre of the images that `numbers` names, which are this process's part.

    known: {place of a batch's first image: features}, filled for the next validation. Of several processes on
    the CPU each takes over the first one's batch norm. Returns averages of the loss's terms, and of some
    images the targets and outputs, (SHOWN, 3, H, W) in [0, 1] each.
    """
    device = inverter.device
    if world > 1 and device.type == "cpu":  # gloo: batch norm's statistics are those of process 0
        for buffer in inverter.decoder.buffers():
            dist.broadcast(buffer, 0)
    inverter.eval()
    shown = evenly_spaced(len(numbers), SHOWN)
    targets = [torch.empty(0, 3, inverter.size, inverter.size, device=device)]  # a process may have no image
    outputs = targets.copy()
    meter = Meter(TERMS, device)
    firsts = range(0, len(numbers), VALIDATED)
    for first in tqdm(firsts, "Validation", unit="step", leave=False, disable=bars):
        batch = data.center_crops(images[numbers[first : first + VALIDATED]], inverter.size).to(device)
        features = known[first] if first in known else inverter.encode(batch)
        size = features.nbytes / len(batch) * len(numbers) * world
        if size <= KEPT_FEATURES:  # deep layers', which take long and are small
            known[first] = features
        output = inverter.decode(features)
        meter.add(loss(output, batch))
        here = [i - first for i in shown if first <= i < first + VALIDATED]
        targets.append(target(batch[here], loss.protocol).clamp(0, 1))
        outputs.append(output[here].clamp(0, 1))
        if world == 1:  # several processes may have unequal numbers of batches
            signals.check()
    return meter.averages(), torch.cat(targets), torch.cat(outputs)


def end_epoch(state, trained, validated, val_seconds, images):
    """Count the epoch in `state`; its row of the history, and whether its validation loss is the lowest.

    Steps the schedule, and restarts what counts an epoch. trained, validated: averages of the
    loss's terms. images: their number in the epoch's training. Raises UserError for a validation loss that is
    not finite.
    """
    if not math.isfinite(validated["loss"]):
        raise UserError(f"the validation loss of epoch {state.epoch + 1} is {validated['loss']}; {DIVERGED}")
    row = {"epoch": state.epoch + 1}
    row |= {f"train_{name}": trained[name] for name in TERMS}
    row |= {f"val_{name}": validated[name] for name in TERMS}
    row |= {"lr": state.optimizer.param_groups[0]["lr"], "seconds": round(state.seconds, 2)}
    row["images_per_second"] = round(images / max(state.seconds, 1e-9), 2)
    row["val_seconds"] = round(val_seconds, 2)
    if isinstance(state.scheduler, ReduceLROnPlateau):
        state.scheduler.step(validated["loss"])
    else:
        state.scheduler.step()
    state.history.append(row)
    state.epoch += 1
    state.step = 0
    state.seconds = 0.0
    state.meter.restart()
    better = validated["loss"] < state.best_loss
    if better:
        state.best_epoch = state.epoch
        state.best_loss = validated["loss"]
        state.bad_epochs = 0
    else:
        state.bad_epochs += 1
    return row, better


if __name__ == "__main__":
    run(lambda: train(ARGS))
