"""What evaluate.py measures, against scikit-image, the lpips package and by hand, and what it writes."""

import csv
import hashlib
import json
import math
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.transforms import functional as tv

import baselines
import compare
import data
import evaluate
import invert
import metrics
import pictures
import report
import train
from models import build_inverter, load_inverter
from study import METRICS


@pytest.fixture(scope="module")
def measured(trained, photos):
    """(values, inverter, pixels) of the trained checkpoint on the test photographs."""
    inverter, _ = load_inverter(trained / "best.pt")
    pixels = data.load_split(str(photos), "test")[:]
    return evaluate.evaluate_model(inverter, pixels, batch_size=2).values, inverter, pixels


@pytest.fixture(scope="module")
def pairs(measured):
    """(image, reconstruction) as float64 arrays (224, 224, 3), computed one at a time."""
    _, inverter, pixels = measured
    images = pixels[:, 16:240, 16:240].permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        outputs = torch.cat([inverter(image[None]) for image in images]).clamp(0, 1)
    pairs = zip(images, outputs, strict=True)
    return [tuple(picture.permute(1, 2, 0).double().numpy() for picture in pair) for pair in pairs]


def test_psnr_is_scikit_images(measured, pairs):
    expected = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in pairs]
    assert measured[0]["psnr"] == pytest.approx(expected, abs=1e-3)


def test_psnr_by_hand():
    a = torch.zeros(2, 3, 8, 8)
    b = torch.stack([torch.full((3, 8, 8), 0.1), torch.full((3, 8, 8), 0.5)])
    assert metrics.psnr(a, b).tolist() == pytest.approx([20, 20 * math.log10(2)], abs=1e-4)
    assert metrics.psnr(a, a).tolist() == [100, 100]


def test_ssim_is_wang_2004(measured, pairs):
    """Against the formula written out: Gaussian window of 11, σ 1.5, population covariance, no borders."""
    from scipy.ndimage import correlate1d

    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()

    def blur(a):
        return correlate1d(correlate1d(a, window, axis=0), window, axis=1)

    expected = []
    for x, y in pairs:
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        values = (2 * mx * my + 0.01**2) * (2 * cov + 0.03**2)
        values /= (mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)
        expected.append(values[5:-5, 5:-5].mean())
    assert measured[0]["ssim"] == pytest.approx(expected, abs=1e-5)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    skimage = [structural_similarity(x, y, channel_axis=2, **options) for x, y in pairs]
    assert measured[0]["ssim"] == pytest.approx(skimage, abs=1e-5)


def test_lpips_is_the_packages(measured, pairs, reference_lpips):
    with torch.no_grad():
        x, y = (torch.tensor(np.stack(part)).permute(0, 3, 1, 2).float() for part in zip(*pairs, strict=True))
        expected = reference_lpips(x, y, normalize=True).flatten().tolist()
    assert measured[0]["lpips"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_result_does_not_depend_on_the_batch_size(measured, batch_size):
    values, inverter, pixels = measured
    again = evaluate.evaluate_model(inverter, pixels, batch_size).values
    for name in values:
        assert again[name] == pytest.approx(values[name], abs=1e-4)


def test_files_and_table(measured, trained, photos, tmp_path, run_evaluate, capsys):
    shutil.copy(trained / "best.pt", tmp_path)
    assert (
        run_evaluate("--ckpt", tmp_path / "best.pt") == 0
    )  # data, encoder and decoder come from the checkpoint
    screen = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    values = measured[0]
    for name in ("psnr", "ssim", "lpips"):
        expected = {"mean": values[name].mean(), "std": values[name].std(), "min": values[name].min()}
        expected["max"] = values[name].max()
        assert metrics[name] == pytest.approx(expected, abs=1e-4)
        assert f"{metrics[name]['mean']:.4f} ±" in screen and f"{metrics[name]['max']:.4f}" in screen
    assert (metrics["images"], metrics["data"], metrics["protocol"]) == (3, str(photos), "documented")
    assert (metrics["weights"], metrics["config"]["layer"]) == ("imagenet", "block1") and metrics[
        "inference_ms"
    ] > 0
    with open(tmp_path / "per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["00.jpg", "01.jpg", "02.jpg"]
    assert [float(row["psnr"]) for row in rows] == pytest.approx(values["psnr"].tolist(), abs=1e-3)
    for name in ("reconstructions.png", "histograms.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_published_metrics(photos, tmp_path, run_train, run_evaluate):
    """Against the normalised image clipped to [0, 1], and with scikit-image's own SSIM window."""
    flags = ("--data", photos, "--out", tmp_path, "--epochs", 1, "--width", 8, "--protocol", "published")
    assert run_train(*flags) == 0 and run_evaluate("--ckpt", tmp_path / "best.pt") == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["protocol"] == metrics["config"]["protocol"] == "published"
    inverter, _ = load_inverter(tmp_path / "best.pt")
    with Image.open(photos / "test" / "00.jpg") as picture:
        image = tv.center_crop(tv.to_tensor(picture.convert("RGB")), 224)[None]
    target = tv.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).clamp(0, 1)[0].numpy()
    with torch.no_grad():
        output = inverter(image)[0].numpy()
    with open(tmp_path / "per_image.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["psnr"]) == pytest.approx(
        peak_signal_noise_ratio(target, output, data_range=1), abs=1e-3
    )
    expected = structural_similarity(target, output, data_range=1, channel_axis=0)
    assert float(row["ssim"]) == pytest.approx(expected, abs=1e-4)
    with (
        zipfile.ZipFile(tmp_path / "reconstructions.zip") as archive,
        archive.open("00000-original.jpg") as file,
    ):
        assert np.abs(np.asarray(Image.open(file)) / 255 - target.transpose(1, 2, 0)).mean() < 0.02
    tv.to_pil_image(image[0]).save(tmp_path / "crop.png")
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--images", tmp_path / "crop.png") == 0
    with Image.open(tmp_path / "images" / "crop.png") as strip:
        assert np.abs(np.asarray(strip)[:, :224] / 255 - target.transpose(1, 2, 0)).max() < 0.003


def test_samples_for_the_page(pairs, trained, tmp_path, run_evaluate):
    """JPEGs of the test images and of what the decoder makes of them, under their rows in per_image.csv."""
    assert run_evaluate("--ckpt", trained / "best.pt", "--out", tmp_path, "--quiet") == 0
    with zipfile.ZipFile(tmp_path / "reconstructions.zip") as archive:
        kinds = ("original", "reconstruction")
        assert sorted(archive.namelist()) == [f"{i:05}-{kind}.jpg" for i in range(3) for kind in kinds]
        for kind, expected in zip(kinds, pairs[2], strict=True):
            with Image.open(archive.open(f"00002-{kind}.jpg")) as picture:
                error = np.asarray(picture) / 255 - expected
            assert np.abs(error).mean() < 0.02


def test_many_images_are_never_held_at_once(trained, tmp_path, run_evaluate, monkeypatch):
    """A batch is read at a time, and only so many images' pixels are kept for the pictures."""
    read = []
    real = data.Images.__getitem__

    def counted(images, which):
        pixels = real(images, which)
        read.append(len(pixels))
        return pixels

    monkeypatch.setattr(data.Images, "__getitem__", counted)
    monkeypatch.setattr(evaluate, "PICTURES", 2)
    flags = ("--ckpt", trained / "best.pt", "--out", tmp_path, "--batch-size", 1, "--quiet")
    assert run_evaluate(*flags) == 0
    assert read == [1, 1, 1, 1]  # the last to be timed
    with zipfile.ZipFile(tmp_path / "reconstructions.zip") as archive:
        kinds = ("original", "reconstruction")
        assert archive.namelist() == [f"{i:05}-{kind}.jpg" for i in (0, 2) for kind in kinds]
    assert len((tmp_path / "per_image.csv").read_text().splitlines()) == 1 + 3


def test_more_processes_than_test_images(trained, tmp_path, run_evaluate, error_line, monkeypatch):
    monkeypatch.setattr(evaluate, "processes", lambda device: nullcontext((0, 4, device)))
    assert run_evaluate("--ckpt", trained / "best.pt", "--out", tmp_path / "out") == 2
    assert "3 test images for 4 processes" in error_line()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["checkpoint", "baselines"])
def test_a_folder_that_cannot_be_written_is_an_error_before_the_work(
    kind, trained, photos, tmp_path, run_evaluate, error_line, monkeypatch
):
    def measured(*_, **__):
        raise AssertionError("measured first")

    monkeypatch.setattr(evaluate, "evaluate_model", measured)
    monkeypatch.setattr(baselines, "measure_baselines", measured)
    (tmp_path / "file").touch()
    flags = {"checkpoint": ("--ckpt", trained / "best.pt"), "baselines": ("--baselines", "--data", photos)}
    assert run_evaluate(*flags[kind], "--out", tmp_path / "file" / "out", "--quiet") == 2
    assert "cannot write there" in error_line()


def test_python_of_the_readme():
    """The lines under "Use from Python" run as they stand, on the sample."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"### Use from Python\n.*?```python\n(.*?)```", readme, re.S)
    assert len(code.splitlines()) <= 10
    exec(code, names := {})
    assert names["features"].shape == (4, 64, 112, 112)
    assert names["output"].shape == names["batch"].shape == (4, 3, 224, 224)
    assert len(names["values"]["psnr"]) == 4
    pairs = zip(names["batch"].numpy(), names["output"].clamp(0, 1).detach().numpy(), strict=True)
    expected = [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]
    assert names["values"]["psnr"] == pytest.approx(expected, abs=1e-3)


def test_pictures_are_from_worst_to_best_above_five_times_the_difference(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(pictures, "draw_grid", lambda rows, path: drawn.append(rows))
    grey = torch.full((8, 8, 3), 100, dtype=torch.uint8)
    pairs = {number: (grey, grey + step) for number, step in enumerate((3, 60, 20))}
    psnr = np.array([38.6, 12.6, 22.1])
    pictures.draw_reconstructions(pairs, ["a", "b", "c"], psnr, tmp_path / "x.png")
    (rows,) = drawn
    assert [caption for _, caption in rows["original"]] == ["b", "c", "a"]
    assert [caption for _, caption in rows["reconstruction"]] == ["12.60 dB", "22.10 dB", "38.60 dB"]
    assert [picture[0, 0, 0] for picture, _ in rows["5 × difference"]] == [255, 100, 15]


NAMES = {  # of files and folders, and how they are drawn
    "猫.jpg": "U+732B.jpg",
    "é🦊$x$.png": r"éU+1F98A\$x\$.png",
    "a\nb\t\x07": "aU+000AbU+0009U+0007",
    "abcdefghijklmnopqrstuvwxyz.jpg": "abcdefghijk…uvwxyz.jpg",
}


def test_any_name_can_be_drawn(tmp_path, figures_of):
    """Without a warning: of a glyph that the font lacks, or of a panel that a long name leaves no room."""
    grid, table, chart, courses = map(figures_of, (pictures, compare, report, invert))
    picture = Image.new("RGB", (8, 8))
    names = [*NAMES, "猫" * 255, "x" * 4000]
    row = {"against": names[0], "difference": 0.5, "low": 0.1, "high": 1.0, "won": 1.0, "interval": "here"}
    rows = [row | {"run": name, "metric": metric} for name in names for metric in METRICS]
    values = {f"{prefix}{metric}": 0.5 for prefix in ("", "published_") for metric in METRICS}
    course = {"seconds": [1, 2], "psnr": [10, 20]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.draw_grid({name: [(picture, name)] for name in names}, tmp_path / "grid.png")
        compare.draw(rows, tmp_path / "compare.png")
        report.draw_results([values | {"experiment": name} for name in names], tmp_path / "results.png")
        invert.draw_courses([(name, course) for name in names], tmp_path / "course.png")
    titles = [axis.get_title() for axis in grid[0].axes]
    assert [title for title in titles[:4] if "…" not in title] == list(NAMES.values())[:3]
    short, far = titles[3].split("…")
    assert names[3].startswith(short) and names[3].endswith(far) and len(titles[3]) == 24
    assert all(len(title) <= 24 for title in titles)
    drawn = list(NAMES.values())[:3]
    for figure, labels in (
        (grid[0], [axis.get_ylabel() for axis in grid[0].axes]),
        (table[0], [label.get_text()[:-5] for label in table[0].axes[0].get_yticklabels()]),  # without \nhere
        (chart[0], [label.get_text() for label in chart[0].axes[0].get_yticklabels()]),
        (courses[0], [label.get_text() for label in courses[0].axes[0].get_legend().get_texts()]),
    ):
        assert labels[:4] == [*drawn, names[3]]
        assert all(axis.get_window_extent().width > 50 for axis in figure.axes)
    assert table[0].get_suptitle() == "against U+732B.jpg"


def test_interrupted_evaluation_leaves_no_old_numbers(trained, tmp_path, run_evaluate, monkeypatch):
    assert run_evaluate("--ckpt", trained / "best.pt", "--out", tmp_path, "--quiet") == 0
    monkeypatch.setattr(evaluate, "draw_histograms", lambda *_: sys.exit(143))
    assert run_evaluate("--ckpt", trained / "best.pt", "--out", tmp_path, "--quiet") == 143
    assert (tmp_path / "per_image.csv").exists() and not (tmp_path / "metrics.json").exists()


def test_networks_run_once(trained, photos, monkeypatch, tmp_path, run_evaluate):
    """Three test images in one batch; what is timed is one image by itself, six times."""
    batches = []
    real = evaluate.load_inverter

    def counted(*arguments):
        inverter, checkpoint = real(*arguments)
        inverter.encoder.register_forward_hook(lambda module, args, output: batches.append(len(output)))
        return inverter, checkpoint

    monkeypatch.setattr(evaluate, "load_inverter", counted)
    assert run_evaluate("--ckpt", trained / "best.pt", "--out", tmp_path, "--quiet") == 0
    assert batches == [3] + 6 * [1]


def test_feature_error_of_one_test_image(checkpoint, own_photos, tmp_path, run_evaluate, capsys):
    """Relative to the norm of that image's features; by hand of what is there before the first iteration."""
    for file in sorted((own_photos / "test").iterdir())[1:]:
        file.unlink()
    inverter = build_inverter(decoder="feedback", width=8)
    config = checkpoint["config"] | {"decoder": "feedback", "width": 8, "data": str(own_photos)}
    content = checkpoint | {"decoder": inverter.decoder.state_dict(), "config": config}
    torch.save(content, tmp_path / "best.pt")
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--quiet") == 0
    assert "relative to ‖φ‖" in capsys.readouterr().out
    found = json.loads((tmp_path / "metrics.json").read_text())
    inverter, _ = load_inverter(tmp_path / "best.pt")
    image = data.center_crops(data.load_split(str(own_photos), "test")[:])
    with torch.no_grad():
        features = inverter.encode(image)
        start = inverter.encode(inverter.iterates(features)[0])
    norm = np.linalg.norm(features.double().numpy().ravel())
    error = np.linalg.norm((start - features).double().numpy().ravel()) / norm
    assert found["feature_norm"] == pytest.approx(norm, rel=1e-5)
    assert found["iterates"][0]["feature_error"]["mean"] == pytest.approx(error, rel=1e-4)


# --- the checkpoint that a result is of --------------------------------------------------------------------


SHORT = ("--width", 8, "--mse-weight", 1, "--lpips-weight", 0, "--quiet", "--tracker", "none")


@pytest.fixture
def measured_everywhere(trained, own_photos, tmp_path, run_evaluate, run_invert):
    """(a run's folder, results of its best.pt: there, in folders there and elsewhere, and of a run there)."""
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(trained, run / "seed1")  # a run of its own
    places = {
        run: [],
        run / "own_photos": ["--data", own_photos],
        tmp_path / "out": ["--out", tmp_path / "out"],
    }
    for flags in (*places.values(), ["--ckpt", run / "seed1" / "best.pt"]):
        assert run_evaluate("--ckpt", run / "best.pt", *flags, "--quiet") == 0
    few = ("--count", 1, "--steps", 2, "--quiet")
    assert run_invert("--ckpt", run / "best.pt", "--split", "val", *few) == 0
    files = [place / "metrics.json" for place in places] + [run / "val" / "inversion.json"]
    return run, [*files, run / "seed1" / "metrics.json"]


def test_results_say_which_checkpoint_they_are_of(measured_everywhere):
    run, files = measured_everywhere
    digest = hashlib.sha256((run / "best.pt").read_bytes()).hexdigest()
    for file in files:
        content = json.loads(file.read_text())
        assert content["ckpt_sha256"] == digest
        checkpoint = run / "seed1" / "best.pt" if "seed1" in file.parts else run / "best.pt"
        assert (file.parent / content["ckpt"]).samefile(checkpoint)


def test_a_new_run_removes_the_results_of_the_one_before(
    measured_everywhere, photos, run_train, run_evaluate
):
    """In its own folder and in those for other data, but nothing else; others are known to be old."""
    run, (own, other, elsewhere, inversion, seed) = measured_everywhere
    for name in ("metrics.json", "notes.txt"):
        (run / "mine").mkdir(exist_ok=True)
        (run / "mine" / name).write_text('{"ckpt": "elsewhere.pt"}')
    (other.parent / "notes.txt").write_text("mine")
    flags = ("--data", photos, "--out", run, *SHORT, "--epochs", 1, "--overwrite")
    assert run_train(*flags) == 0
    assert not own.exists() and not inversion.exists()
    assert [path.name for path in other.parent.iterdir()] == ["notes.txt"]
    assert not list(inversion.parent.iterdir())
    assert len(list((run / "mine").iterdir())) == 2 and seed.exists() and elsewhere.exists()
    assert run_evaluate("--compare", seed.parent, elsewhere.parent, "--out", run) == 2


def test_a_better_epoch_removes_the_results_of_the_one_before(
    trained, photos, tmp_path, monkeypatch, run_train, run_evaluate
):
    """TensorBoard's too."""
    run = tmp_path / "run"
    losses = iter([3.0, 1.0, 2.0])
    nothing = torch.empty(0, 3, 224, 224)
    terms = dict.fromkeys(metrics.TERMS, 1.0)
    monkeypatch.setattr(train, "validate", lambda *_: (terms | {"loss": next(losses)}, nothing, nothing))
    there = []
    real = train.save_last

    def evaluated(state, same, out, rank):
        real(state, same, out, rank)
        if state.epoch:
            files = run / "natural" / "metrics.json", run / "events.out.tfevents.1.test"
            there.append([path.exists() for path in files])
            files[0].parent.mkdir(exist_ok=True)
            files[0].write_text('{"ckpt": "../best.pt"}')
            files[1].touch()

    monkeypatch.setattr(train, "save_last", evaluated)
    assert run_train("--data", photos, "--out", run, "--epochs", 3, "--crop", 32, *SHORT) == 0
    assert there == [[False, False], [False, False], [True, True]]  # the second epoch is the best


def test_a_checkpoint_that_is_replaced_while_it_is_measured(
    trained, checkpoint, tmp_path, monkeypatch, run_evaluate, error_line
):
    """Before its data is there it is refused; later it is measured, and its results are an earlier one's."""
    run = shutil.copytree(trained, tmp_path / "run")
    for number, (name, status) in enumerate((("load_inverter", 2), ("time_inference", 0))):
        real = getattr(evaluate, name)

        def replaced(*args, real=real, number=number):
            found = real(*args)
            torch.save(checkpoint | {"epoch": number}, run / "best.pt")
            return found

        with monkeypatch.context() as patch:
            patch.setattr(evaluate, name, replaced)
            assert run_evaluate("--ckpt", run / "best.pt", "--quiet") == status
        if status:
            assert "best.pt: is another than --ckpt, or newer by now" in error_line()
    assert run_evaluate("--compare", run, run, "--out", tmp_path) == 2
    assert error_line() == f"{run / 'metrics.json'} is of an earlier best.pt; evaluate again"
    assert run_evaluate("--ckpt", run / "best.pt", "--quiet") == 0
    assert run_evaluate("--compare", run, run, "--out", tmp_path) == 0


# --- what it must not replace ----------------------------------------------------------------------------


def test_results_of_other_data_have_a_folder_of_their_own(
    trained, photos, own_photos, tmp_path, run_evaluate
):
    run = shutil.copytree(trained, tmp_path / "run")
    assert run_evaluate("--ckpt", run / "best.pt", "--quiet") == 0
    before = (run / "metrics.json").read_bytes()
    (own_photos / "test" / "00.jpg").unlink()
    assert run_evaluate("--ckpt", run / "best.pt", "--data", own_photos, "--quiet") == 0
    assert (run / "metrics.json").read_bytes() == before
    found = json.loads((run / "own_photos" / "metrics.json").read_text())
    assert (found["images"], found["data"]) == (2, str(own_photos))
    assert run_evaluate("--ckpt", run / "best.pt", "--data", f"{photos}/../{photos.name}", "--quiet") == 0
    assert json.loads((run / "metrics.json").read_text())["data"] == str(
        photos
    )  # the same folder by another name


def test_the_folder_of_another_run_is_not_for_results(
    trained, checkpoint, tmp_path, run_evaluate, run_invert, error_line
):
    """They would be read as that run's. A copy of its best.pt is its own."""
    run = shutil.copytree(trained, tmp_path / "run")
    torch.save(checkpoint | {"epoch": 9}, run / "other.pt")
    shutil.copy(run / "best.pt", run / "copy.pt")
    for call, options in ((run_evaluate, ()), (run_invert, ("--count", 1, "--steps", 2))):
        assert call("--ckpt", run / "other.pt", *options, "--quiet") == 2
        assert f"{run / 'best.pt'}: is another than --ckpt" in error_line()
        assert call("--ckpt", run / "copy.pt", *options, "--quiet") == 0


@pytest.mark.parametrize("kind", ["of other data", "of another program", "of no evaluation"])
def test_results_of_another_are_not_replaced(trained, own_photos, tmp_path, run_evaluate, error_line, kind):
    out = tmp_path / "results"
    name = "per_image.csv" if kind == "of no evaluation" else "metrics.json"
    if kind == "of other data":
        assert run_evaluate("--ckpt", trained / "best.pt", "--data", own_photos, "--out", out, "--quiet") == 0
    else:
        out.mkdir()
        (out / name).write_text("[1, 2]")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert run_evaluate("--ckpt", trained / "best.pt", "--out", out, "--quiet") == 2
    assert name in (line := error_line()) and "--out" in line
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_nothing_of_a_checkpoint_says_where_to_write(checkpoint, tmp_path, run_evaluate):
    config = checkpoint["config"] | {"cache": str(tmp_path / "elsewhere"), "out": str(tmp_path / "elsewhere")}
    torch.save(checkpoint | {"config": config}, tmp_path / "best.pt")
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--quiet") == 0
    assert (tmp_path / "metrics.json").exists() and not (tmp_path / "elsewhere").exists()


def test_data_folder_that_is_gone(checkpoint, photos, tmp_path, run_evaluate, error_line):
    config = checkpoint["config"] | {"data": str(tmp_path / "gone")}
    torch.save(checkpoint | {"config": config}, tmp_path / "best.pt")
    assert run_evaluate("--ckpt", tmp_path / "best.pt") == 2
    assert "gone" in (line := error_line()) and "--data" in line
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--data", photos) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report", "runs", "--out", "elsewhere"], "--out: not with --report"),
        (["--images", "a.jpg", "--data", "sample"], "--data: not with --images"),
        (["--steps", "5"], "unrecognized arguments: --steps 5"),
        (["--baselines", "--ckpt", "best.pt"], "--ckpt: not with --baselines"),
        (["--baselines", "--images", "a.jpg"], "--images: not allowed with argument --baselines"),
        (["--baselines", "--report", "runs"], "--report: not allowed with argument --baselines"),
        (["--protocol", "published"], "--protocol: only with --baselines"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, run_evaluate, error_line):
    assert run_evaluate(*flags) == 2
    assert message in error_line()


# --- baselines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["documented", "published"])
def test_baselines_by_hand(photos, tmp_path, run_evaluate, capsys, protocol):
    flags = ("--baselines", "--data", photos, "--out", tmp_path, "--protocol", protocol, "--batch-size", 2)
    assert run_evaluate(*flags, "--quiet") == 0
    found = json.loads((tmp_path / "baselines.json").read_text())
    assert (found["data"], found["protocol"], found["images"]) == (str(photos), protocol, 3)
    images = [np.asarray(Image.open(photos / "test" / f"0{i}.jpg"))[16:240, 16:240] / 255 for i in range(3)]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    if protocol == "published":
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        images = [((image - mean) / std).clip(0, 1) for image in images]
        options = {"win_size": 7}
    options |= {"channel_axis": 2, "data_range": 1.0}
    colours = [image.mean((0, 1)) for image in images]
    distance = metrics.LPIPS()
    screen = capsys.readouterr().out
    for name, fills in (("constant colour", [np.mean(colours, 0)] * 3), ("mean colour", colours)):
        values = {"psnr": [], "ssim": [], "lpips": []}
        for image, colour in zip(images, fills, strict=True):
            flat = np.broadcast_to(colour, image.shape)
            values["psnr"].append(10 * np.log10(1 / np.mean((image - flat) ** 2)))
            values["ssim"].append(structural_similarity(image, flat, **options))
            pair = [torch.tensor(picture).permute(2, 0, 1)[None].float() for picture in (flat, image)]
            values["lpips"].append(distance(*pair).item())
        for metric, value in values.items():
            expected = {kind: getattr(np, kind)(value) for kind in ("mean", "std", "min", "max")}
            assert found["baselines"][name][metric] == pytest.approx(expected, abs=1e-4)
            assert f"{found['baselines'][name][metric]['mean']:.4f} ±" in screen
        assert f"\n{name} " in screen
        with open(tmp_path / "baselines" / name.replace(" ", "_") / "per_image.csv", newline="") as file:
            each = [float(row["psnr"]) for row in csv.DictReader(file)]
        assert each == pytest.approx(values["psnr"], abs=1e-4)
    folders = [tmp_path / "baselines" / name for name in ("mean_colour", "thumbnail_14x14")]
    assert run_evaluate("--compare", *folders, "--out", tmp_path) == 0
    assert "thumbnail_14x14  PSNR" in capsys.readouterr().out
    values = []
    for image in images:
        thumbnail = Image.fromarray((255 * image).round().astype(np.uint8)).reduce(16)
        enlarged = np.asarray(thumbnail.resize((224, 224), Image.Resampling.BICUBIC)) / 255
        values.append(10 * np.log10(1 / np.mean((image - enlarged) ** 2)))
    assert found["baselines"]["thumbnail 14 × 14"]["psnr"]["mean"] == pytest.approx(np.mean(values), abs=0.5)


def test_baselines_replace_only_their_own(photos, tmp_path, run_evaluate, error_line, capsys):
    path = tmp_path / "baselines.json"
    flags = ("--baselines", "--data", photos, "--out", tmp_path, "--quiet")
    for content, message in (
        ("[1, 2]", "not a result of this program"),
        ('{"data": 5, "protocol": "documented"}', "not a result of this program"),
        ('{"data": "sample", "protocol": "documented"}', "is the result of another data"),
        (json.dumps({"data": str(photos), "protocol": "published"}), "is the result of another protocol"),
    ):
        path.write_text(content)
        assert run_evaluate(*flags) == 2
        assert message in (line := error_line()) and "baselines.json" in line
        assert path.read_text() == content
    other_name = f"{photos}/../{photos.name}"
    path.write_text(json.dumps({"data": other_name, "protocol": "documented"}))
    assert run_evaluate(*flags) == 0
    assert json.loads(path.read_text())["images"] == 3


class Evil:
    def __reduce__(self):
        return (open, ("owned", "w"))


@pytest.mark.parametrize(
    "kind", ["missing", "truncated", "empty", "text", "pickle", "evil", "other", "no keys", "flipped"]
)
def test_bad_checkpoint(kind, trained, tmp_path, monkeypatch, run_evaluate, error_line):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    good = bytearray((trained / "best.pt").read_bytes())
    if kind == "truncated":
        path.write_bytes(good[:5000])
    elif kind == "flipped":
        good[len(good) // 2] ^= 1
        path.write_bytes(good)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("best.pt")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "evil":
        torch.save({"decoder": Evil()}, path)
    elif kind == "other":
        torch.save([1, 2], path)
    elif kind == "no keys":
        torch.save({"model": torch.zeros(2)}, path)
    assert run_evaluate("--ckpt", path) == 2
    assert "bad.pt: " in error_line()
    assert not (tmp_path / "owned").exists()


def test_checkpoint_whose_weights_do_not_fit(checkpoint, tmp_path, run_evaluate, error_line):
    torch.save(checkpoint | {"config": checkpoint["config"] | {"width": 8}}, tmp_path / "best.pt")
    assert run_evaluate("--ckpt", tmp_path / "best.pt") == 2
    assert "size mismatch" in error_line()
