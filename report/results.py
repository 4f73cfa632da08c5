"""What was measured, and what was published: a row for each experiment of a folder, and for each baseline."""

import csv
import json
import math
from pathlib import Path

import numpy as np

from checkpoint import read_result, reading, seed_folders, seeds_of
from flags import MAY_DIFFER, parse_train, with_defaults
from report.baselines import BASELINES, thumbnail_name
from utils import IMAGE_SIZE, ITERATIONS, METRICS, PROTOCOLS, UserError, same_data

CONFIGS = Path(__file__).parents[1] / "configs"
# The flags that make an experiment what it is.
EXPERIMENT_KEYS = ("encoder", "layer", "decoder", "width", "mse_weight", "lpips_weight")


class PublishedResult(NamedTuple):
    """What the study published of an experiment; None: nothing."""

    psnr: float
    ssim: float
    lpips: float | None = None
    parameters: str | None = None
    minutes: int | None = None  # of training
    inference: str = "12–15"  # milliseconds an image, on an RTX 3090


# By the names of the files in configs/; 05 and 15 are from the study's public repository, the rest from its
# text.
PUBLISHED_RESULTS = {
    "01_vgg16_block1_tconv": PublishedResult(17.35, 0.560, 0.398, "34K", 70),
    "02_vgg16_block2_tconv": PublishedResult(16.89, 0.512, 0.452),
    "03_vgg16_block3_tconv": PublishedResult(15.12, 0.421, 0.587, "75K"),
    "04_vgg16_block4_tconv": PublishedResult(13.76, 0.334, 0.724),
    "05_vgg16_block5_tconv": PublishedResult(12.26, 0.269),
    "06_vgg16_block1_attention": PublishedResult(16.92, 0.531, None, "12M", 180),
    "07_vgg16_block1_wavelet": PublishedResult(16.78, 0.524, None, "8M", 140),
    "08_vgg16_block1_frequency": PublishedResult(16.54, 0.518, None, "35M", 220),
    "09_vgg16_block1_tconv_mse": PublishedResult(17.12, 0.541, 0.445, "34K"),
    "10_vgg16_block1_tconv_lpips": PublishedResult(16.43, 0.538, 0.372, "34K"),
    "11_resnet34_layer1_tconv": PublishedResult(16.82, 0.506, 0.461, "50K"),
    "12_resnet34_layer2_tconv": PublishedResult(15.43, 0.428, 0.573),
    "13_vit_small_block0_tconv": PublishedResult(14.67, 0.412, 0.621),
    "14_vit_small_block1_tconv": PublishedResult(14.29, 0.389, 0.658),
    "15_resnet34_layer1_attention": PublishedResult(13.53, 0.376, 0.282),
}


def result_rows(runs):
    """A dictionary for each of the fifteen experiments, every other evaluated run and baseline in `runs`.

    The published numbers are those of the experiment that has the run's configuration, whatever its folder is
    called. `note` says what is special about a run, or why there are no measurements. Baselines come last.
    """
    experiments = {}
    for name in PUBLISHED_RESULTS:
        experiments[name] = defining(vars(parse_train(["--config", str(CONFIGS / f"{name}.yaml")])))
    found = [path.parent for path in (*runs.glob("metrics.json"), *runs.glob("*/metrics.json"))]
    found += [path.parent.parent for path in runs.glob("*/seed[0-9]*/metrics.json")]
    others = {
        str(folder.relative_to(runs)) for folder in found
    } - PUBLISHED_RESULTS.keys()  # `.` is `runs` itself
    rows = [run_row(runs, name, experiments) for name in [*PUBLISHED_RESULTS, *sorted(others)]]
    baselines = baseline_rows(runs)
    note_below(rows, baselines)
    rows += baselines
    label_data(rows)
    return rows


def run_row(runs, name, experiments):
    """The row of the run in folder `name` of `runs`, or of its seeds; experiments: {name: what makes it}."""
    experiment = name if name in PUBLISHED_RESULTS else None
    seeds, first = [], None
    try:
        for folder in seed_folders(runs / name):
            results = read_results(folder)
            first = first or results
            refuse_another(first, results, folder)
            config = defining(results["config"])
            experiment = next((key for key, wanted in experiments.items() if wanted == config), None)
            seeds.append(measured(results, folder))
        row = over_seeds(seeds) if len(seeds) > 1 else seeds[0]
        notes = [row["note"]]
        if name in PUBLISHED_RESULTS and experiment != name:
            others = [
                f"{key} {config[key]}" for key in EXPERIMENT_KEYS if config[key] != experiments[name][key]
            ]
            notes.insert(0, f"not this experiment: {', '.join(others)}")
        if folder != runs / name:
            missing = [path for path in seeds_of(runs / name) if not (path / "metrics.json").exists()]
            notes += [f"{path.name} {not_measured(path)}" for path in missing]
        row["note"] = joined(*notes)
    except UserError as error:
        row = (seeds[0] if seeds else {}) | {"note": str(error).removeprefix(f"{runs}/")}
    values = PUBLISHED_RESULTS[experiment]._asdict() if experiment else dict.fromkeys(PublishedResult._fields)
    return {"experiment": name} | {f"published_{key}": value for key, value in values.items()} | row


def not_measured(folder):
    """Why a run has no metrics.json."""
    if (folder / "error.txt").exists():
        lines = (folder / "error.txt").read_text(errors="replace").strip().splitlines()
        return f"failed: {lines[-1] if lines else 'no message'}"
    return "not finished" if (folder / "last.pt").exists() else "not run"


def refuse_another(results, others, folder):
    """Raise UserError where metrics.json in `folder` is not that of another seed of the same."""
    for name in results["config"]:
        a, b = (found["config"].get(name) for found in (results, others))
        if a != b and name not in ("seed", *MAY_DIFFER):
            raise UserError(f"{folder.name}: {name} is {b}, of another seed {a}")
    for name in ("data", "iterations"):
        a, b = results.get(name), others.get(name)  # of the test images
        if a != b and (name != "data" or not same_data(a, b)):
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
    return {key: config[key] for key in EXPERIMENT_KEYS}


def read_results(folder):
    """The content of metrics.json in `folder`, whose numbers are finite. Raises UserError."""
    if not (folder / "metrics.json").exists():
        raise UserError(not_measured(folder))
    with reading("metrics.json is not that of evaluate.py", "evaluate again"):
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
        results["config"] = with_defaults(results["config"])
        return results


def measured(results, folder):
    """What metrics.json, its content, and history.csv in `folder` say, as a part of a row."""
    config, weights, asked = results["config"], results["weights"], results.get("iterations")
    row = means(results)
    copied = ("parameters", "inference_ms", "epoch", "data", "protocol", "weights")
    row |= {key: results[key] for key in copied}
    row |= {key: config.get(key) for key in ("encoder", "decoder", "seed")}
    row |= {"resolution": results["shape"][1], "size": results["size"]}
    history, damage = read_history(folder)
    seconds = history.get("seconds", []) + history.get("val_seconds", [])
    row["minutes"] = sum(filter(None, seconds)) / 60 if seconds else None
    notes = [{"imagenet": "", "random": "random weights (control)"}.get(weights, f"weights {weights}")]
    notes += [unusual(row["protocol"]), optimisation(config)]
    if asked and asked != (config.get("iterations") or ITERATIONS):
        notes.append(f"asked for {asked} iterations")
    row["note"] = joined(*notes, inversion(folder, results), damage)
    return row


def optimisation(config):
    """How a run's optimisation and its images differ from the study's, or ""."""
    study = with_defaults({"crop": IMAGE_SIZE})
    elsewhere = (
        *EXPERIMENT_KEYS,
        *MAY_DIFFER,
        "weights",
        "data",
        "protocol",
        "seed",
        "deterministic",
        "compile",
    )
    keys = [key for key in study if key not in elsewhere]
    return ", ".join(f"{key} {config[key]}" for key in keys if config.get(key, study[key]) != study[key])


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
        with reading("inversion.json is not that of invert.py", "invert again"):
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


def read_history(folder):
    """{column: values, an epoch each} of history.csv in `folder`, and what is wrong with the file, or "".

    What is no finite number is None. {} where there is no such file.
    """
    path = folder / "history.csv"
    if not path.exists():
        return {}, ""
    try:
        with reading("history.csv is not that of train.py", "train again"):
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            return {key: [finite(row[key]) for row in rows] for key in rows[0]}, ""
    except UserError as error:
        return {}, str(error)


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
        with reading(f"{path.name} is not that of evaluate.py --baselines", "remove it and measure again"):
            found = json.loads(path.read_text(encoding="utf-8"))
            Path(found["data"]).resolve()  # or an error: no name that a folder can have
            about = {"data": found["data"], "protocol": PROTOCOLS[found["protocol"]].name}
            about["note"] = joined("baseline, no features", unusual(about["protocol"]))
            for name, metrics in found["baselines"].items():
                numbers = means(metrics)
                if name not in BASELINES or not all(map(math.isfinite, numbers.values())):
                    raise ValueError(f"{name!r} is no baseline, or a number of it not finite")
                rows.append({"experiment": name} | numbers | about)
        return rows
    except UserError as error:
        return [{"experiment": path.name, "note": str(error)}]


def note_below(rows, baselines):
    """Have `note` say which rows have a PSNR below that of a baseline, on their data.

    Those are each image's mean colour, and each image reduced to as many pixels as the layer has positions;
    baselines are of images of IMAGE_SIZE.
    """
    for row in rows:
        if row.get("size") != IMAGE_SIZE:  # or not measured
            continue
        for limit in baselines:
            if limit["experiment"] not in ("mean colour", thumbnail_name(row["resolution"])):
                continue
            same = row["protocol"] == limit["protocol"] and same_data(row["data"], limit["data"])
            if same and row["psnr"] < limit["psnr"]:
                row["note"] = joined(row["note"], f"below {limit['experiment']}")


def label_data(rows):
    """Have the column `data` name each folder as shortly as tells it from the others."""
    rows = [row for row in rows if "data" in row]
    sources = {row["data"] for row in rows}
    for row in rows:
        source, parts = row["data"], Path(row["data"]).parts
        others = [Path(other).parts for other in sources if not same_data(source, other)]
        for length in range(1, len(parts) + 1):  # none of `.`
            row["data"] = str(Path(*parts[-length:]))
            if all(other[-length:] != parts[-length:] for other in others):
                break
