"""The files of an inversion: table, picture and JSON; and PSNR against time of several."""

from pathlib import Path

from matplotlib.figure import Figure

from checkpoint import read_result, reading, write_result
from metrics import summary
from report.pictures import draw_grid, drawable, from_worst_to_best, save_figure
from utils import METRICS_AND_FEATURE_ERROR, write_csv


def write_inversion(pictures, values, names, about, out):
    """Print the table and write the files to the folder `out`; about: what inversion.json also says."""
    labels = {"start": about["start"], "inversion": "inversion"}
    print(f"{'':<16}" + "".join(f"{label:>20}" for label in METRICS_AND_FEATURE_ERROR.values()))
    for kind, columns in values.items():
        cells = [
            f"{columns[name].mean():.4f} ± {columns[name].std():.4f}" for name in METRICS_AND_FEATURE_ERROR
        ]
        print(f"{labels[kind]:<16}" + "".join(f"{cell:>20}" for cell in cells))
    (out / "inversion.json").unlink(missing_ok=True)
    header = ["image", *(f"{kind}_{name}" for kind in values for name in METRICS_AND_FEATURE_ERROR)]
    columns = [values[kind][name].tolist() for kind in values for name in METRICS_AND_FEATURE_ERROR]
    write_csv(out / "inversion.csv", header, zip(names, *columns, strict=True))
    chosen = from_worst_to_best(values["inversion"]["psnr"])
    rows = {"original": [(pictures["original"][i], names[i]) for i in chosen]}
    for kind, label in labels.items():
        rows[label] = [(pictures[kind][i], f"{values[kind]['psnr'][i]:.2f} dB") for i in chosen]
    draw_grid(rows, out / "inversion.png")
    means = {
        kind: {name: summary(values[kind][name]) for name in METRICS_AND_FEATURE_ERROR} for kind in values
    }
    write_result(out / "inversion.json", about | {"metrics": means})


def read_course(folder):
    """(label, {"step", "seconds", "psnr"}) of the inversion whose results are in `folder`."""
    file = Path(folder, "inversion.json")
    with reading(f"{file}: not a result of this invert.py", "invert again"):
        content = read_result(file)
        return f"{content['encoder']} {content['layer']} from {content['start']}", content["course"]


def draw_courses(courses, path):
    """PSNR against the seconds that an image takes, of each (label, course)."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for label, course in courses:
        axis.plot(course["seconds"], course["psnr"], marker=".", label=drawable(label))
    axis.set(xscale="log", xlabel="seconds an image", ylabel="PSNR (dB) ↑")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)
    print(f"{path} shows them")
