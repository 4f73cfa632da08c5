"""The rows of a report: what each experiment, other run and baseline measured, and what was published."""

import csv
import json
import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoint import read_result, reading, seed_folders, seeds_of
from flags import MAY_DIFFER, parse_train, with_defaults
from utils import FREE_BASELINES, IMAGE_SIZE, METRICS, METRICS_AND_FEATURE_ERROR, UserError, same_data

CONFIGS = Path(__file__).parents[1] / "configs"
EXPERIMENT_KEYS = ("encoder", "layer", "decoder", "width", "mse_weight", "lpips_weight")  # define one
DIGITS = {name: 2 if "dB" in label else 3 for name, label in METRICS_AND_FEATURE_ERROR.items()}
DIGITS |= dict.fromkeys(FREE_BASELINES, 2) | {"top1_agreement": 2}


class PublishedResult(NamedTuple):
    """The study's numbers for an experiment; None: not published."""

    psnr: float
    ssim: float
    lpips: float | None = None
    parameters: str | None = None
    minutes: int | None = None  # of training
    inference: str = "12–15"  # milliseconds an image, on an RTX 3090


# By the names of configs/; 05 and 15 are from the study's public repository, the rest from its text.
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
PROTOCOL = {"documented": "", "published": "protocol published"}  # in a note
COPIED = ("parameters", "inference_ms", "epoch", "data", "protocol", "weights", "size")
# Flags that are in a column or note of their own, or change no number.
ELSEWHERE = (*EXPERIMENT_KEYS, *MAY_DIFFER, "weights", "data", "protocol", "seed", "deterministic", "compile")
NOTHING = PublishedResult(*[None] * len(PublishedResult._fields))


def result_rows(runs):
    """A dictionary for each evaluated run in `runs`, experiment of the fifteen if one was run, and baseline.

    `note` says what is special about a row, or why it has no measurements.
    """
    experiments = {}
    for name in PUBLISHED_RESULTS:
        experiments[name] = defining(vars(parse_train(["--config", str(CONFIGS / f"{name}.yaml")])))
    found = [path.parent for path in (*runs.glob("metrics.json"), *runs.glob("*/metrics.json"))]
    found += [path.parent.parent for path in runs.glob("*/seed[0-9]*/metrics.json")]
    names = {str(folder.relative_to(runs)) for folder in found}  # `.` is `runs` itself
    others = sorted(names - PUBLISHED_RESULTS.keys())
    tried = not others or any((runs / name).exists() for name in PUBLISHED_RESULTS)
    rows = [run_row(runs, name, experiments) for name in [*others, *(PUBLISHED_RESULTS if tried else ())]]
    rows += baseline_rows(runs)
    names = {row["data"]: Path(row["data"]).name or row["data"] for row in rows if "data" in row}
    if len(set(names.values())) == len({Path(data).resolve() for data in names}):  # no two folders share one
        for row in (row for row in rows if "data" in row):
            row["data"] = names[row["data"]]
    return rows


def run_row(runs, name, experiments):
    """The row of a folder with a run or its seeds; experiments: {name: its `defining` flags}."""
    experiment, history, folders = name, {}, seed_folders(runs / name)
    try:
        history = read_history(folders[0])
        found = [read_results(folder) for folder in folders]
        for results, folder in zip(found, folders, strict=True):
            refuse_another(found[0], results, folder)
        flags, row = defining(found[0]["config"]), measured(found)
        experiment = next((key for key, wanted in experiments.items() if wanted == flags), None)
        others = [flag for flag in flags if flag not in experiments.get(name, flags)]
        notes = [f"not this experiment: {', '.join(others)}"] if others else []
        notes += [row["note"], inversion(folders[0], found[0])]
        if folders != [runs / name]:
            missing = [seed for seed in seeds_of(runs / name) if seed not in folders]
            notes += [f"{seed.name} {not_measured(seed)}" for seed in missing]
        seconds = history.get("seconds", []) + history.get("val_seconds", [])
        row["minutes"] = sum(filter(math.isfinite, seconds)) / 60 if seconds else None
        row |= {"note": joined(*notes), "images": read_images(folders[0])}
    except UserError as error:
        row = {"note": str(error).removeprefix(f"{runs}/")}
    published = PUBLISHED_RESULTS.get(experiment, NOTHING)._asdict()
    row = {f"published_{key}": value for key, value in published.items()} | row
    return {"experiment": name} | row | {"history": history}


def defining(config):
    """The flags that define an experiment, each as text."""
    return [f"{key} {config[key]}" for key in EXPERIMENT_KEYS]


def not_measured(folder):
    """Why a run has no metrics.json."""
    if (folder / "error.txt").exists():
        last = (folder / "error.txt").read_text(errors="replace").strip().split("\n")[-1]
        return f"failed: {last}"
    return "not finished" if (folder / "last.pt").exists() else "not run"


def refuse_another(first, results, folder):
    """Raise UserError unless the results in `folder` are of another seed of the `first`."""
    a, b = (it["config"] | {key: it.get(key) for key in ("data", "iterations")} for it in (first, results))
    for key in (key for key in a if key not in ("seed", *MAY_DIFFER)):
        if a[key] != b.get(key) and not (key == "data" and same_data(a[key], b[key])):
            raise UserError(f"{folder.name}: {key} is {b.get(key)}, of another seed {a[key]}")


def read_results(folder):
    """The content of metrics.json in `folder`. Raises UserError."""
    if not (folder / "metrics.json").exists():
        raise UserError(not_measured(folder))
    with reading("metrics.json is not that of evaluate.py", "evaluate again"):
        results = read_result(folder / "metrics.json")
        results["config"] = with_defaults(results["config"])
        measured([results])  # or an error
        return results


def measured(found):
    """The part of a row that comes from metrics.json; found: its content for each seed."""
    first, config = found[0], found[0]["config"]
    row = means(found) | {key: first[key] for key in COPIED}
    row |= {"encoder": config["encoder"], "decoder": config["decoder"]}
    row["seed"] = ", ".join(str(results["config"]["seed"]) for results in found)
    free = {kind: values["psnr"]["mean"] for kind, values in first.get("baselines", {}).items()}
    weights, study = first["weights"], with_defaults({"crop": IMAGE_SIZE})
    others = [key for key in study if key not in ELSEWHERE and config[key] not in (study[key], None)]
    notes = [{"imagenet": "", "random": "random weights (control)"}.get(weights, f"weights {weights}")]
    notes += ["below the mean colour" if row["psnr"] < free.get("mean_colour", 0) else ""]
    notes += [PROTOCOL[first["protocol"]], ", ".join(f"{key} {config[key]}" for key in others)]
    if len(found) > 1:
        psnr, ssim, lpips = (row[f"{name}_seeds"] for name in METRICS)
        notes.append(f"{len(found)} seeds: ± {psnr:.2f} PSNR, ± {ssim:.4f} SSIM, ± {lpips:.4f} LPIPS")
    if all("top1_agreement" in results for results in found):
        row["top1_agreement"] = float(np.mean([results["top1_agreement"] for results in found]))
    return row | free | {"note": joined(*notes)}


def means(found):
    """Mean and std of each metric over images, and the std over seeds; found: {metric: summary} of each."""
    row = {}
    for name in (name for name in METRICS_AND_FEATURE_ERROR if all(name in part for part in found)):
        values = [summaries[name]["mean"] for summaries in found]
        row[name] = float(np.mean(values))
        row[f"{name}_std"] = float(np.mean([summaries[name]["std"] for summaries in found]))
        if len(found) > 1:
            row[f"{name}_seeds"] = float(np.std(values, ddof=1))
    return row


def joined(*notes):
    return "; ".join(filter(None, notes))


def inversion(folder, results):
    """A note on inversion.json in `folder`, if it is of the networks and data in `results`, or ""."""
    if not (folder / "inversion.json").exists():
        return ""
    try:
        with reading("inversion.json is not that of invert.py", "invert again"):
            found, config = read_result(folder / "inversion.json"), results["config"]
            same = {name: config[name] for name in ("encoder", "layer", "weights")}
            same |= {"start": config["decoder"], "data": results["data"]}
            if not same.items() <= found.items():
                return ""
            start, end = (found["metrics"][name]["psnr"]["mean"] for name in ("start", "inversion"))
            return f"inverted: {end:.2f} dB from {start:.2f} ({found['images']} images)"
    except UserError as error:
        return str(error).removeprefix(f"{folder}/")


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_history(folder):
    """{column: a number or NaN for each epoch} of history.csv in `folder`. Raises UserError."""
    if not (folder / "history.csv").exists():
        return {}
    with reading("history.csv is not that of train.py", "train again"):
        rows = read_rows(folder / "history.csv")
        return {key: [float(row[key] or "nan") for row in rows] for key in rows[0]}


def read_images(folder):
    """[(name, original, {"picture", "metrics"})] of reconstructions.zip, as JPEGs. Raises UserError."""
    if not (folder / "reconstructions.zip").exists():
        return []
    images = []
    with reading("reconstructions.zip: damaged, or not per_image.csv's", "evaluate again"):
        rows = read_rows(folder / "per_image.csv")
        with zipfile.ZipFile(folder / "reconstructions.zip") as archive:
            for number in sorted({name.split("-")[0] for name in archive.namelist()}):
                row = rows[int(number)]
                metrics = {label: f"{float(row[key]):.{DIGITS[key]}f}" for key, label in METRICS.items()}
                run = {"picture": archive.read(f"{number}-reconstruction.jpg"), "metrics": metrics}
                images.append((row["image"], archive.read(f"{number}-original.jpg"), run))
    return images


def baseline_rows(runs):
    """A row for each baseline of baselines.json in the folder `runs`, or one that says what is wrong."""
    path = runs / "baselines.json"
    if not path.exists():
        return []
    try:
        with reading("it is not that of evaluate.py --baselines", "remove it and measure again"):
            found = json.loads(path.read_text(encoding="utf-8"))
            note = joined("baseline, no features", PROTOCOL[found["protocol"]])
            about = {"data": found["data"], "protocol": found["protocol"], "note": note}
            return [{"experiment": key} | means([value]) | about for key, value in found["baselines"].items()]
    except UserError as error:
        return [{"experiment": path.name, "note": str(error)}]
