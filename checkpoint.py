"""A run's folder: its lock, best.pt and last.pt, resuming, and results that a better best.pt makes stale."""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from filelock import Timeout

from flags import with_defaults
from utils import (
    FORMAT,
    UserError,
    digest,
    leftovers,
    load,
    locked,
    make_folder,
    out_of_memory,
    same_data,
    save,
    write_csv,
    write_text,
)

FILES = ("best.pt", "last.pt", "config.yaml", "history.csv", "curves.png")  # of train.py
EVENTS = "events.out.tfevents.*"  # TensorBoard's files
# Of evaluate.py; the first says what was measured, and is written last.
RESULTS = ("metrics.json", "per_image.csv", "reconstructions.zip", "reconstructions.png")
RESULTS += ("histograms.png", "iterations.png")
INVERSION = ("inversion.json", "inversion.csv", "inversion.png")  # of invert.py, likewise

# --- best.pt and last.pt -----------------------------------------------------------------------------------

PROGRESS = ("epoch", "step", "seconds", "bad_epochs", "best_epoch", "best_loss", "history")
# Flags whose text may differ between a run and its resumption where these entries are equal.
PROOFS = {"encoder": "encoder_sha256", "weights": "encoder_sha256", "init": "init_sha256"}
PROOFS |= {"data": "hash of the training images"}
# What a file with other content leads to; a full disk or a lost network is no such error.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RuntimeError)


def begin_or_resume(training, resuming):
    """Go on from last.pt, if `resuming` and it is there, or begin a new run in its folder. Says which."""
    out, config = training.out, training.config
    resumed = resuming and resume(training)
    if resumed:
        how = "finished" if training.finished else "resumed"
        print(f"{how} after epoch {training.epoch}, step {training.step}")
    if training.finished:
        return
    if training.rank == 0:
        remove_stale_results(out, new_run=not resumed)
    save_last(training)  # a run can be resumed from the start
    if training.rank == 0:
        if training.best_epoch:
            best = load(out / "best.pt")
            new = {name: config[name] for name in ("epochs", "patience")}
            save(best | {"config": best["config"] | new}, out / "best.pt")
        write_text(out / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def save_last(training):
    """Write last.pt in rank 0; every process must call it, for the sums of all."""
    sums = training.meter.total()
    if training.rank == 0:
        content = {"format": FORMAT, "about": training.resume_guard, "sums": sums}
        content |= {"rng": torch.get_rng_state(), "decoder": training.inverter.decoder.state_dict()}
        content |= {name: getattr(training, name) for name in PROGRESS}
        content |= {name: getattr(training, name).state_dict() for name in ("optimizer", "scheduler")}
        save(content, training.out / "last.pt")


def resume(training):
    """Load last.pt into `training`; whether there is one. Raises UserError for another run's."""
    path = training.out / "last.pt"
    contents = [load(path) if training.rank == 0 and path.exists() else None]
    if training.world > 1:
        dist.broadcast_object_list(contents)
    content = contents[0]
    if content is None:
        return False
    with reading(f"{path}: not the last.pt of such a run", "give another --out, or --overwrite", MALFORMED):
        check_same_run(with_defaults(content["about"]), training.resume_guard, training.out)
        training.inverter.decoder.load_state_dict(content["decoder"])
        for name in ("optimizer", "scheduler"):
            getattr(training, name).load_state_dict(content[name])
        for name in PROGRESS:
            setattr(training, name, content[name])
        training.meter.restart(content["sums"] if training.rank == 0 else None)
        torch.set_rng_state(content["rng"])
    return True


def timed_flags(out):
    """The flags of the run in the folder `out` that --minutes decided by the time; {} without a run."""
    path = Path(out, "last.pt")
    with reading(f"{path}: not the last.pt of such a run", "give another --out, or --overwrite", MALFORMED):
        about = load(path)["about"] if path.exists() else {}
        return {flag: about[flag] for flag in ("steps", "kept_crops") if flag in about}


def check_same_run(about, guard, out):
    """Raise UserError unless last.pt's values `about` are this run's, `guard`."""
    for key, value in guard.items():
        found, proof = about.get(key, value), PROOFS.get(key)  # an older version may not have written it
        if found == value or key == "patience" or proof in about and about[proof] == guard[proof]:
            continue
        if key == "epochs" and guard["schedule"] == "plateau" or key == "data" and same_data(found, value):
            continue
        why = ", and not the same content" if proof in about else ""
        why = ": onecycle's learning rates are for so many epochs" if key == "epochs" else why
        given = f"{key} is {value!r}, the run in {out} has {found!r}{why}"
        raise UserError(f"--resume: {given}; give the same, or another --out")


def save_best(training):
    """Write best.pt: the decoder and what rebuilds it, nothing of the encoder. Older results go."""
    packages = ("torch", "torchvision", "timm", "lpips", "numpy")
    digests = ("init_sha256", "weights_sha256", "encoder_sha256")
    inverter = training.inverter
    content = {"format": FORMAT, "config": training.config, "decoder": inverter.decoder.state_dict()}
    content |= {"shape": list(inverter.shape), "programs": inverter.encoder.programs}
    content |= {name: training.resume_guard[name] for name in digests}
    content |= {"epoch": training.epoch, "val_loss": training.best_loss}
    content["versions"] = {name: version(name) for name in packages} | {"python": sys.version.split()[0]}
    remove_stale_results(training.out)
    save(content, training.out / "best.pt")


def read_checkpoint(path):
    """The content of the best.pt at `path`; its `config` has all flags. Raises UserError for another file."""
    checkpoint = load(path)
    wanted = {"decoder", "config", "shape", "encoder_sha256", "programs", "epoch", "val_loss"}
    with reading(f"{path}: not a best.pt of this train.py", "give another"):
        if missing := ", ".join(sorted(wanted - checkpoint.keys())):
            raise UserError(f"{path}: not a best.pt of this train.py (it has no {missing}); give another")
        return checkpoint | {"config": with_defaults(checkpoint["config"], path)}


def write_history(history, path):
    """Write a CSV row for each epoch; LPIPS columns are empty where it was not computed."""
    rows = [["" if value != value else value for value in row.values()] for row in history]
    write_csv(path, history[0], rows)


# --- The folder --------------------------------------------------------------------------------------------


@contextmanager
def claim(out, resume, overwrite):
    """Within `with`: the run's folder `out` exists, is locked and without what killed processes left there.

    Raises UserError if it is in use, or holds what must not be lost.
    """
    out = make_folder(out)
    try:
        lock = locked(out / ".lock", timeout=0)
    except Timeout:
        raise UserError(f"--out {out}: another training is writing there; choose another --out") from None
    with lock:
        files = (*(out / name for name in FILES), *results_of(out), *out.glob(EVENTS))
        held = [str(path.relative_to(out)) for path in files if path.exists()]
        last = "last.pt" in held
        if held and not overwrite and not (last and resume):
            what = "a run; --resume goes on" if last else f"{held[0]} but no last.pt to go on from"
            raise UserError(f"--out {out}: holds {what}, --overwrite replaces it; or choose another --out")
        for name in FILES:
            for path in leftovers(out / name):
                path.unlink()
        yield


def remove_stale_results(out, new_run=False):
    """Delete results that no longer match best.pt; for a new run the earlier one's files, too."""
    files = [out / name for name in FILES if new_run]
    for path in (*files, *results_of(out), *out.glob(EVENTS if new_run else f"{EVENTS}.test")):
        path.unlink(missing_ok=True)


# --- Results -----------------------------------------------------------------------------------------------


def seeds_of(run):
    """The folders of a run's seeds, `seed1` and so on, in the order of their numbers."""
    numbers = {path.name.removeprefix("seed"): path for path in run.glob("seed*") if path.is_dir()}
    return [numbers[number] for number in sorted(filter(str.isdecimal, numbers), key=int)]


def seed_folders(run):
    """[`run`] if it was evaluated; else those of its seeds that were, or the first seed, or [`run`]."""
    if (run / "metrics.json").exists():
        return [run]
    seeds = seeds_of(run)
    return [path for path in seeds if (path / "metrics.json").exists()] or (seeds or [run])[:1]


def write_result(path, content):
    """Write a result, a dictionary, to the JSON file at `path`; its `ckpt` becomes relative to it."""
    if "ckpt" in content:
        ckpt = Path(content["ckpt"])
        ckpt = ckpt.parent.resolve() / ckpt.name  # itself may be a link
        content = content | {"ckpt": os.path.relpath(ckpt, path.parent.resolve())}
    write_text(path, json.dumps(content, indent=2))


@contextmanager
def reading(what, advice, errors=Exception):
    """Raise UserError of `what`, the reason and `advice`, where the block cannot read a file.

    errors: what the file can lead to; each format has many.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        raise UserError(f"{what} ({error!r}); {advice}") from None


def read_result(path):
    """The content of the result at `path`. Raises UserError if there is none, or an earlier checkpoint's."""
    command = "invert" if path.name in INVERSION else "evaluate"
    if not path.exists():
        raise UserError(f"{path.parent}: has no {path.name}; {command} it first")
    content = json.loads(path.read_text(encoding="utf-8"))
    ckpt = path.parent / content["ckpt"] if "ckpt_sha256" in content else None  # older results have none
    if ckpt and ckpt.is_file() and digest(ckpt) != content["ckpt_sha256"]:
        raise UserError(f"{path} is of an earlier {ckpt.name}; {command} again")
    return content


def results_of(run):
    """The result files in the folder `run`, and those of its best.pt in its sub-folders."""
    found = [run / name for name in RESULTS + INVERSION]
    for files in (RESULTS, INVERSION):
        for path in (*run.glob(f"*/{files[0]}"), *run.glob(f"*/*/{files[0]}")):
            with suppress(Exception):  # another program's
                ckpt = json.loads(path.read_text(encoding="utf-8"))["ckpt"]
                if (path.parent / ckpt).resolve() == (run / "best.pt").resolve():
                    found += [path.with_name(name) for name in files]
    return found


def refuse_other_results(out, files, about):
    """Raise UserError if the folder `out` holds other results, or another best.pt, than `about` says.

    files: RESULTS, INVERSION or the baselines'; the first, a JSON file, has the keys and values of `about`.
    """
    best, first = out / "best.pt", out / files[0]
    if "ckpt_sha256" in about and best.exists() and digest(best) != about["ckpt_sha256"]:
        raise UserError(f"{best}: is another than --ckpt, or newer by now; give another --out")
    advice = "give another --out, or remove it"
    if not first.exists():
        found = [out / name for name in files if (out / name).exists()]
        if found and not best.exists():  # else an evaluation of it was interrupted
            raise UserError(f"{found[0]}: no finished evaluation wrote it; {advice}")
        return
    with reading(f"{first}: not a result of this program", advice):
        content = json.loads(first.read_text(encoding="utf-8"))
        if "config" in about:
            content["config"] = about["config"] | content["config"]  # older ones lack newer flags
        other = [key for key in about if key != "ckpt_sha256" and content.get(key) != about[key]]
        places = {"data": content.get("data"), "ckpt": out / content.get("ckpt", "")}
        other = [key for key in other if key not in places or not same_data(places[key], about[key])]
    if other:
        raise UserError(f"{first}: is the result of another {other[0]}; {advice}")


# --- Signals -----------------------------------------------------------------------------------------------

# SLURM sends SIGUSR1 before it pre-empts; Windows has none.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
COPY_SECONDS = 1  # in which a launcher may send the first signal again


class Interrupted(Exception):
    """A stopping signal arrived; the running step is done."""


class Signals:
    """Within `with`: the first stopping signal is remembered, another ends the process at once.

    Works in the main thread; elsewhere it does nothing.
    """

    def __init__(self, device):
        self.received, self.device = 0, device
        self.since = 0.0  # when this process received its first signal

    def __enter__(self):
        self.before = {}
        with suppress(ValueError):  # not the main thread
            self.before = {number: signal.signal(number, self.handle) for number in STOPPING}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        now = time.monotonic()
        if self.since and (number == signal.SIGINT or now - self.since > COPY_SECONDS):
            os._exit(128 + number)
        self.received, self.since = self.received or number, self.since or now

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
