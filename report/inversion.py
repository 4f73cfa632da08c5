"""The result files of inversions, and PSNR against time."""

from pathlib import Path

from matplotlib.figure import Figure

from checkpoint import read_result, reading, write_result
from metrics import summary
from report.pictures import draw_grid, drawable, from_worst_to_best, save_figure
from utils import METRICS_AND_FEATURE_ERROR, write_csv


def write_inversion(pictures, values, names, about, out):
    """Print the table of `invert_images`, write its files to `out`; about: more entries of inversion.json."""
    labels = {"start": about["start"], "inversion": "inversion"}
    metrics, columns = {}, {"image": names}
    print(f"{'':<16}" + "".join(f"{label:>20}" for label in METRICS_AND_FEATURE_ERROR.values()))
    for kind, label in labels.items():
        metrics[kind] = {name: summary(values[kind][name]) for name in METRICS_AND_FEATURE_ERROR}
        cells = [f"{value['mean']:.4f} ± {value['std']:.4f}" for value in metrics[kind].values()]
        print(f"{label:<16}" + "".join(f"{cell:>20}" for cell in cells))
        columns |= {f"{kind}_{name}": values[kind][name].tolist() for name in metrics[kind]}
    (out / "inversion.json").unlink(missing_ok=True)
    write_csv(out / "inversion.csv", columns, zip(*columns.values(), strict=True))
    chosen = from_worst_to_best(values["inversion"]["psnr"])
    rows = {"original": [(pictures["original"][i], names[i]) for i in chosen]}
    for kind, label in labels.items():
        rows[label] = [(pictures[kind][i], f"{values[kind]['psnr'][i]:.2f} dB") for i in chosen]
    draw_grid(rows, out / "inversion.png")
    write_result(out / "inversion.json", about | {"metrics": metrics})


def read_course(folder):
    """(label, {"step", "seconds", "psnr"}) of the inversion in `folder`. Raises UserError."""
    file = Path(folder, "inversion.json")
    with reading(f"{file}: not a result of this invert.py", "invert again"):
        content = read_result(file)
        return f"{content['encoder']} {content['layer']} from {content['start']}", content["course"]


def draw_courses(courses, path):
    """Draw PSNR against seconds for each (label, course)."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for label, course in courses:
        axis.plot(course["seconds"], course["psnr"], marker=".", label=drawable(label))
    axis.set(xscale="log", xlabel="seconds an image", ylabel="PSNR (dB) ↑")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)
    print(f"{path} shows them")
