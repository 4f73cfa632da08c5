"""What changes while a decoder trains, and the run's folder where it is kept."""

import math
import sys
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
import torch.distributed as dist
from filelock import Timeout

from encoders import weights_key
from flags import completed
from metrics import Meter
from study import FORMAT
from tracker import EVENTS
from utils import UserError, leftovers, load, locked, make_folder, out_of_memory, results_of, same_data, save

# Names of things, whose text may differ between a run and its resumption where these are equal.
PROOFS = {"encoder": "encoder_sha256", "weights": "encoder_sha256", "init": "init_sha256"}
PROOFS |= {"data": "hash of the training images"}
FILES = ("best.pt", "last.pt", "config.yaml", "history.csv", "curves.png")


@dataclass
class State:
    """All that changes while a decoder trains: what last.pt holds and --resume goes on from, bit for bit."""

    decoder: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    meter: Meter  # of the epoch that is running, as are `step` and `seconds`
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    bad_epochs: int = 0  # since the best
    best_epoch: int = 0
    best_loss: float = math.inf
    history: list = field(default_factory=list)  # a dictionary an epoch


PROGRESS = ("epoch", "step", "seconds", "bad_epochs", "best_epoch", "best_loss", "history")


def save_last(state, same, out, rank):
    """Write last.pt, in the first process; each has to call it, for the sums of all.

    same: what a resumption must have in common with the run, a dictionary.
    """
    sums = state.meter.total()
    if rank == 0:
        content = {"format": FORMAT, "about": same, "sums": sums, "rng": torch.get_rng_state()}
        content |= {name: getattr(state, name) for name in PROGRESS}
        content |= {name: getattr(state, name).state_dict() for name in ("decoder", "optimizer", "scheduler")}
        save(content, out / "last.pt")


def resume(state, same, out, rank, world):
    """Put last.pt into `state` and return whether it is there. Raises UserError if it is of another run."""
    contents = [load(out / "last.pt") if rank == 0 and (out / "last.pt").exists() else None]
    if world > 1:
        dist.broadcast_object_list(contents)  # only the first process reads
    content = contents[0]
    if content is None:
        return False
    try:
        about = completed(content["about"])
        for key, value in same.items():
            found, proof = about.get(key, value), PROOFS.get(key)  # an older version may not have written it
            if found == value or key == "patience" or proof in about and about[proof] == same[proof]:
                continue
            if key == "epochs" and same["schedule"] == "plateau" or key == "data" and same_data(found, value):
                continue
            why = ": onecycle's rates are those of so many epochs" if key == "epochs" else ""
            why = ", and not the same content" if proof in about else why
            given = f"{key} is {value!r}, the run in {out} has {found!r}{why}"
            raise UserError(f"--resume: {given}; give the same, or another --out")
        for name in ("decoder", "optimizer", "scheduler"):
            getattr(state, name).load_state_dict(content[name])
        for name in PROGRESS:
            setattr(state, name, content[name])
        state.meter.restart(content["sums"] if rank == 0 else None)
        torch.set_rng_state(content["rng"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{out / 'last.pt'}: not the last.pt of such a run ({error})") from None
    return True


def save_best(inverter, config, state, out, init_sha256=None):
    """Write best.pt: the decoder and what rebuilds it, nothing of the encoder; init_sha256: of --init."""
    packages = ("torch", "torchvision", "timm", "lpips", "numpy")
    content = {
        "format": FORMAT,
        "decoder": inverter.decoder.state_dict(),
        "config": config,
        "init_sha256": init_sha256,
        "shape": list(inverter.shape),
        "weights_sha256": inverter.encoder.weights_sha256,
        "encoder_sha256": weights_key(inverter.encoder),
        "programs": inverter.encoder.programs,
        "epoch": state.epoch,
        "val_loss": state.best_loss,
        "versions": {name: version(name) for name in packages} | {"python": sys.version.split()[0]},
    }
    save(content, out / "best.pt")


def update_best(config, out):
    """Have best.pt name the epochs and the patience of the run that goes on now."""
    best = load(out / "best.pt")
    new = {name: config[name] for name in ("epochs", "patience")}
    save(best | {"config": best["config"] | new}, out / "best.pt")


# --- The folder ----------------------------------------------------------------------------------------


def hold(out):
    """Make the run's folder and lock it; the lock. Raises UserError if it is in use."""
    try:
        return locked(make_folder(out) / ".lock", timeout=0)
    except Timeout:
        raise UserError(f"--out {out}: another training is writing there; choose another --out") from None


def claim(out, resume, overwrite):
    """Remove what killed processes left in a run's folder; UserError if it holds what must not be lost."""
    best = (out / "best.pt").exists()
    last = (out / "last.pt").exists()
    if (best or last) and not resume and not overwrite:
        raise UserError(f"--out {out}: holds a run; --resume goes on, --overwrite replaces; or another --out")
    if best and not last and resume:
        raise UserError(
            f"--out {out}: holds best.pt but no last.pt to go on from; --overwrite, or another --out"
        )
    files = (*(out / name for name in FILES), *results_of(out), *out.glob(EVENTS))
    others = [str(path.relative_to(out)) for path in files if path.exists()]
    if others and not best and not last and not overwrite:
        raise UserError(
            f"--out {out}: holds {others[0]} of no run; choose another --out, or --overwrite replaces it"
        )
    for name in FILES:
        for path in leftovers(out / name):
            path.unlink()


def remove_what_will_not_be_true(out, resumed):
    """Remove the results of a run that goes on, and with it the files of one that is replaced."""
    files = [out / name for name in FILES if not resumed]
    for path in (*files, *results_of(out), *out.glob(f"{EVENTS}.test" if resumed else EVENTS)):
        path.unlink(missing_ok=True)
