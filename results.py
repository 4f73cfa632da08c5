"""What was measured, and what was published: a row for each experiment of a folder, and for each baseline."""

import csv
import json
import math
import operator
from pathlib import Path

import numpy as np

from baselines import BASELINES, thumbnail_name
from flags import MAY_DIFFER, completed, parse_train
from study import (
    DEFINING,
    IMAGE_SIZE,
    ITERATIONS,
    METRICS,
    PROTOCOLS,
    PUBLISHED,
    Published,
)
from utils import UNREADABLE, UserError, read_result, same_data, seed_folders, seeds_of

CONFIGS = Path(__file__).with_name("configs")


def result_rows(runs):
    """A dictionary for each of the fifteen experiments, every other evaluated run and baseline in `runs`.

    The published numbers are those of the experiment that has the run's configuration, whatever its folder is
    called. `note` says what is special about a run, or why there are no measurements. Baselines come last.
    """
    experiments = {}
    for name in PUBLISHED:
        experiments[name] = defining(vars(parse_train(["--config", str(CONFIGS / f"{name}.yaml")])))
    found = [path.parent for path in (*runs.glob("metrics.json"), *runs.glob("*/metrics.json"))]
    found += [path.parent.parent for path in runs.glob("*/seed[0-9]*/metrics.json")]
    others = {str(folder.relative_to(runs)) for folder in found} - PUBLISHED.keys()  # `.` is `runs` itself
    rows = []
    for name in [*PUBLISHED, *sorted(others)]:
        row = {}
        experiment = name if name in PUBLISHED else None
        folder, *more = seed_folders(runs / name)
        try:
            if (folder / "metrics.json").exists():
                results = read_results(folder)
                experiment = experiment_of(results["config"], experiments)
                row |= measured(results, folder)
                seeds = [row]
                for other in more:
                    others_results = read_results(other)
                    refuse_another(results, others_results, other)
                    seeds.append(measured(others_results, other))
                if more:
                    row = over_seeds(seeds)
                if name in PUBLISHED and experiment != name:
                    row["note"] = joined(other_than(results["config"], experiments[name]), row["note"])
                if folder.parent == runs / name:
                    row["note"] = joined(row["note"], *seeds_that_are_missing(runs / name))
            else:
                row["note"] = not_measured(folder)
        except UserError as error:
            row["note"] = str(error).removeprefix(f"{runs}/")
        rows.append({"experiment": name} | published(experiment) | row)
    baselines = baseline_rows(runs)
    note_below(rows, baselines)
    rows += baselines
    label_data(rows)
    return rows


def not_measured(folder):
    """Why a run has no metrics.json."""
    if (folder / "error.txt").exists():
        lines = (folder / "error.txt").read_text(errors="replace").strip().splitlines()
        return f"failed: {lines[-1] if lines else 'no message'}"
    return "not finished" if (folder / "last.pt").exists() else "not run"


def seeds_that_are_missing(run):
    """What is to be said of a run's seeds that were begun, but have no metrics.json."""
    missing = [path for path in seeds_of(run) if not (path / "metrics.json").exists()]
    return [f"{path.name} {not_measured(path)}" for path in missing]


def refuse_another(results, others, folder):
    """Raise UserError where metrics.json in `folder` is not that of another seed of the same."""
    for name in results["config"]:
        a, b = (found["config"].get(name) for found in (results, others))
        if a != b and name not in ("seed", *MAY_DIFFER):
            raise UserError(f"{folder.name}: {name} is {b}, of another seed {a}")
    for name, same in (("data", same_data), ("protocol", operator.eq), ("iterations", operator.eq)):
        a, b = results.get(name), others.get(name)  # of the test images
        if not same(a, b):
            raise UserError(f"{folder.name}: {name} is {b}, of another seed {a}")


def over_seeds(rows):
    """One row of those of several seeds: means of their metrics, and in `note` the deviations of these."""
    row = dict(rows[0])
    spread = []
    for metric, label in METRICS.items():
        digits = 2 if metric == "psnr" else 4
        values = [other[metric] for other in rows]
        row[metric] = float(np.mean(values))
        row[f"{metric}_std"] = float(np.mean([other[f"{metric}_std"] for other in rows]))
        row[f"{metric}_seeds"] = float(np.std(values, ddof=1))
        spread.append(f"± {row[f'{metric}_seeds']:.{digits}f} {label.split()[0]}")
    row["seed"] = ", ".join(str(other["seed"]) for other in rows)
    row["note"] = joined(row["note"], f"{len(rows)} seeds: {', '.join(spread)}")
    return row


def is_experiment(row):
    """Whether a row is of a run: a baseline's has no published numbers, not even empty ones."""
    return "published_psnr" in row


def defining(config):
    """What of a configuration, {flag: value}, makes an experiment."""
    return {key: config[key] for key in DEFINING}


def experiment_of(config, experiments):
    """The name of the experiment that has this configuration, or None."""
    return next((name for name, wanted in experiments.items() if defining(config) == wanted), None)


def other_than(config, wanted):
    """How a run's configuration differs from the experiment that its folder is called after."""
    differences = [f"{key} {config[key]}" for key in DEFINING if config[key] != wanted[key]]
    return f"not this experiment: {', '.join(differences)}"


def published(experiment):
    """What the study published of an experiment, as a part of a row; None: of no experiment."""
    values = PUBLISHED.get(experiment, [None] * len(Published._fields))
    return {f"published_{name}": value for name, value in zip(Published._fields, values, strict=True)}


def read_results(folder):
    """The content of metrics.json in `folder`, whose numbers are finite. Raises UserError."""
    try:
        results = read_result(folder / "metrics.json")
        numbers = [results[name][kind] for name in METRICS for kind in ("mean", "std")]
        numbers += [results[name] for name in ("parameters", "inference_ms", "epoch", "size")]
        numbers += results["shape"]
        if len(results["shape"]) != 3 or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"a number in it is not finite, or the shape {results['shape']} is none")
        if not all(type(results[name]) is str for name in ("data", "protocol", "weights")):
            raise ValueError("data, protocol and weights should be words")
        Path(results["data"]).resolve()  # or an error: no name that a folder can have
        defining(results["config"])
        results["config"] = completed(results["config"])
        return results
    except UNREADABLE as error:
        raise UserError(f"metrics.json is not that of evaluate.py ({error!r}); evaluate again") from None


def measured(results, folder):
    """What metrics.json, its content, and history.csv in `folder` say, as a part of a row."""
    row = means(results)
    row |= {
        key: results[key] for key in ("parameters", "inference_ms", "epoch", "data", "protocol", "weights")
    }
    row |= {key: results["config"].get(key) for key in ("encoder", "decoder", "seed")}
    row["resolution"] = results["shape"][1]
    row["size"] = results["size"]
    history, damage = read_history(folder)
    seconds = history.get("seconds", []) + history.get("val_seconds", [])
    row["minutes"] = sum(filter(None, seconds)) / 60 if seconds else None
    weights = {"imagenet": "", "random": "random weights (control)"}.get(
        row["weights"], f"weights {row['weights']}"
    )
    budget = optimisation(results["config"])
    notes = weights, unusual(row["protocol"]), budget, asked(results), inversion(folder, results), damage
    row["note"] = joined(*notes)
    return row


def optimisation(config):
    """How a run's optimisation and its images differ from the study's, or ""."""
    study = completed({"crop": IMAGE_SIZE})
    elsewhere = (*DEFINING, *MAY_DIFFER, "weights", "data", "protocol", "seed", "deterministic", "compile")
    keys = [key for key in study if key not in elsewhere]
    return ", ".join(f"{key} {config[key]}" for key in keys if config.get(key, study[key]) != study[key])


def asked(results):
    """What a note says of an evaluation with more or fewer iterations than the training had, or ""."""
    found = results.get("iterations")
    trained = results["config"].get("iterations") or ITERATIONS
    return f"asked for {found} iterations" if found and found != trained else ""


def means(metrics):
    """Mean and standard deviation of each metric of {metric: its summary}, as a part of a row."""
    row = {}
    for name in METRICS:
        row[name] = metrics[name]["mean"]
        row[f"{name}_std"] = metrics[name]["std"]
    return row


def unusual(protocol):
    """What a note says of a protocol, by its name."""
    return "" if protocol == "documented" else f"protocol {protocol}"


def joined(*notes):
    """One note of several, of which some may be empty."""
    return "; ".join(filter(None, notes))


def inversion(folder, results):
    """What inversion.json in `folder` says of the networks and data that `results` are of, or ""."""
    if not (folder / "inversion.json").exists():
        return ""
    try:
        found = read_result(folder / "inversion.json")
        config = results["config"]
        same = {name: config[name] for name in ("encoder", "layer", "weights")}
        same |= {"start": config["decoder"], "data": results["data"]}
        if any(found.get(name) != value for name, value in same.items()):
            return ""
        start, end = (found["metrics"][kind]["psnr"]["mean"] for kind in ("start", "inversion"))
        return f"inverted: {end:.2f} dB from {start:.2f} ({found['images']} images)"
    except UserError as error:
        return str(error).removeprefix(f"{folder}/")
    except UNREADABLE as error:
        return f"inversion.json is not that of invert.py ({error!r}); invert again"


def read_history(folder):
    """{column: values, an epoch each} of history.csv in `folder`, and what is wrong with the file, or "".

    What is no finite number is None. {} where there is no such file.
    """
    path = folder / "history.csv"
    if not path.exists():
        return {}, ""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return {key: [finite(row[key]) for row in rows] for key in rows[0]}, ""
    except UNREADABLE as error:
        return {}, f"history.csv is not that of train.py ({error}); train again"


def finite(text):
    """`text` as a number; None for an empty one, infinity and NaN, which JSON has not. Raises ValueError."""
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None


def baseline_rows(runs):
    """A row for each baseline of baselines.json in the folder `runs`, or one that says what is wrong."""
    path = runs / "baselines.json"
    if not path.exists():
        return []
    rows = []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        Path(found["data"]).resolve()  # or an error: no name that a folder can have
        about = {"data": found["data"], "protocol": PROTOCOLS[found["protocol"]].name}
        about["note"] = joined("baseline, no features", unusual(about["protocol"]))
        for name, metrics in found["baselines"].items():
            row = {"experiment": name} | means(metrics) | about
            if name not in BASELINES or not all(math.isfinite(row[key]) for key in means(metrics)):
                raise ValueError(f"{name!r} is no baseline, or a number of it not finite")
            rows.append(row)
        return rows
    except UNREADABLE as error:
        advice = "remove it and measure again"
        note = f"{path.name} is not that of evaluate.py --baselines ({error!r}); {advice}"
        return [{"experiment": path.name, "note": note}]


def note_below(rows, baselines):
    """Have `note` say which rows have a PSNR below that of a baseline, on their data.

    Those are each image's mean colour, and each image reduced to as many pixels as the layer has positions;
    baselines are of images of IMAGE_SIZE.
    """
    for limit in baselines:
        for row in rows:
            if "psnr" not in row or row["protocol"] != limit.get("protocol") or row["size"] != IMAGE_SIZE:
                continue
            own = ("mean colour", thumbnail_name(row["resolution"]))
            if limit["experiment"] not in own or row["psnr"] >= limit["psnr"]:
                continue
            if same_data(row["data"], limit["data"]):
                row["note"] = joined(row["note"], f"below {limit['experiment']}")


def label_data(rows):
    """Have the column `data` name each folder as shortly as tells it from the others."""
    sources = {row["data"] for row in rows if "data" in row}
    labels = {source: source for source in sources}  # `.` has no parts
    for source in sources:
        parts = Path(source).parts
        others = [other for other in sources if not same_data(source, other)]
        for length in range(1, len(parts) + 1):
            labels[source] = str(Path(*parts[-length:]))
            if not any(Path(other).parts[-length:] == parts[-length:] for other in others):
                break
    for row in rows:
        if "data" in row:
            row["data"] = labels[row["data"]]
