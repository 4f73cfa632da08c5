"""What evaluate.py measures, against scikit-image, the lpips package and by hand, and what it writes."""

import csv
import hashlib
import json
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
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision.transforms import functional as tv

import data
import evaluate
import metrics
import train
from models import build_inverter, load_inverter
from report import baselines, compare, inversion, page, pictures
from utils import METRICS


@pytest.fixture
def measure(run_evaluate, monkeypatch):
    """Evaluate a checkpoint without a picture being drawn: the exit status."""
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: path.touch())
    return lambda ckpt, *flags: run_evaluate("--ckpt", ckpt, "--quiet", *flags)


@pytest.fixture(scope="module")
def measured(trained, photos):
    """(values, inverter, pixels) of the trained checkpoint on the test photographs, two at a time."""
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
    black = torch.zeros(1, 3, 8, 8)
    assert metrics.psnr(black, black + 0.1).item() == pytest.approx(20, abs=1e-4)
    assert metrics.psnr(black, black).item() == 100


def test_ssim_is_wang_2004(measured, pairs):
    """Against the formula written out: Gaussian window of 11, σ 1.5, population covariance, no borders."""
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


def test_lpips_is_the_packages(measured, pairs, reference_lpips):
    with torch.no_grad():
        x, y = (torch.tensor(np.stack(part)).permute(0, 3, 1, 2).float() for part in zip(*pairs, strict=True))
        expected = reference_lpips(x, y, normalize=True).flatten().tolist()
    assert measured[0]["lpips"] == pytest.approx(expected, abs=1e-5)


def test_files_and_table(measured, pairs, trained, photos, tmp_path, run_evaluate, capsys):
    """Data, encoder and decoder come from the checkpoint."""
    shutil.copy(trained / "best.pt", tmp_path)
    assert run_evaluate("--ckpt", tmp_path / "best.pt") == 0
    screen = capsys.readouterr().out
    found = json.loads((tmp_path / "metrics.json").read_text())
    values = measured[0]
    for name in METRICS:
        expected = {kind: getattr(np, kind)(values[name]) for kind in ("mean", "std", "min", "max")}
        assert found[name] == pytest.approx(expected, abs=1e-4)
        assert f"{found[name]['mean']:.4f} ±" in screen and f"{found[name]['max']:.4f}" in screen
    assert (found["images"], found["data"], found["protocol"]) == (3, str(photos), "documented")
    assert (found["weights"], found["config"]["layer"]) == ("imagenet", "block1")
    assert found["inference_ms"] > 0
    with open(tmp_path / "per_image.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["00.jpg", "01.jpg", "02.jpg"]
    assert [float(row["psnr"]) for row in rows] == pytest.approx(values["psnr"].tolist(), abs=1e-3)
    for name in ("reconstructions.png", "histograms.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 10
    with zipfile.ZipFile(tmp_path / "reconstructions.zip") as archive:
        kinds = ("original", "reconstruction")
        assert sorted(archive.namelist()) == [f"{i:05}-{kind}.jpg" for i in range(3) for kind in kinds]
        for kind, expected in zip(kinds, pairs[2], strict=True):
            with Image.open(archive.open(f"00002-{kind}.jpg")) as picture:
                assert np.abs(np.asarray(picture) / 255 - expected).mean() < 0.02


def test_published_metrics(photos, tmp_path, run_train, measure):
    """Against the normalised image clipped to [0, 1], and with scikit-image's own SSIM window."""
    flags = ("--data", photos, "--out", tmp_path, "--epochs", 1, "--width", 8, "--protocol", "published")
    assert run_train(*flags, "--crop", 32, "--quiet") == 0 and measure(tmp_path / "best.pt") == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["protocol"] == found["config"]["protocol"] == "published"
    inverter, _ = load_inverter(tmp_path / "best.pt")
    with Image.open(photos / "test" / "00.jpg") as picture:
        image = tv.center_crop(tv.to_tensor(picture.convert("RGB")), 224)[None]
    target = tv.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).clamp(0, 1)[0].numpy()
    with torch.no_grad():
        output = inverter(image)[0].numpy()
    with open(tmp_path / "per_image.csv", newline="") as file:
        row = next(csv.DictReader(file))
    expected = peak_signal_noise_ratio(target, output, data_range=1)
    assert float(row["psnr"]) == pytest.approx(expected, abs=1e-3)
    expected = structural_similarity(target, output, data_range=1, channel_axis=0)
    assert float(row["ssim"]) == pytest.approx(expected, abs=1e-4)
    original = zipfile.ZipFile(tmp_path / "reconstructions.zip").open("00000-original.jpg")
    assert np.abs(np.asarray(Image.open(original)) / 255 - target.transpose(1, 2, 0)).mean() < 0.02
    tv.to_pil_image(image[0]).save(tmp_path / "crop.png")
    assert measure(tmp_path / "best.pt", "--images", tmp_path / "crop.png") == 0
    with Image.open(tmp_path / "images" / "crop.png") as strip:
        assert np.abs(np.asarray(strip)[:, :224] / 255 - target.transpose(1, 2, 0)).max() < 0.003


def test_many_images_are_never_held_at_once(trained, tmp_path, measure, monkeypatch):
    """A batch is read at a time, and only so many images' pixels are kept for the pictures."""
    read = []
    real = data.Images.__getitem__

    def counted(images, which):
        read.append(real(images, which))
        return read[-1]

    monkeypatch.setattr(data.Images, "__getitem__", counted)
    monkeypatch.setattr(evaluate, "PICTURES", 2)
    assert measure(trained / "best.pt", "--out", tmp_path, "--batch-size", 1) == 0
    assert list(map(len, read)) == [1, 1, 1, 1]  # the last to be timed
    with zipfile.ZipFile(tmp_path / "reconstructions.zip") as archive:
        assert {name[:5] for name in archive.namelist()} == {"00000", "00002"}
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
    monkeypatch.setattr(evaluate, "evaluate_model", None)
    monkeypatch.setattr(baselines, "measure_baselines", None)
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
    pairs = zip(names["batch"].numpy(), names["output"].clamp(0, 1).detach().numpy(), strict=True)
    expected = [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]
    assert names["values"]["psnr"] == pytest.approx(expected, abs=1e-3)


def test_pictures_are_from_worst_to_best_above_five_times_the_difference(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(pictures, "draw_grid", lambda rows, path: drawn.append(rows))
    grey = torch.full((8, 8, 3), 100, dtype=torch.uint8)
    pairs = {number: (grey, grey + step) for number, step in enumerate((3, 60, 20))}
    psnr = np.array([38.6, 12.6, 22.1])
    found = evaluate.Evaluation({"psnr": psnr}, [], pairs, ["a", "b", "c"])
    pictures.draw_reconstructions(found, tmp_path / "x.png")
    (rows,) = drawn
    assert [caption for _, caption in rows["original"]] == ["b", "c", "a"]
    assert [caption for _, caption in rows["reconstruction"]] == ["12.60 dB", "22.10 dB", "38.60 dB"]
    assert [picture[0, 0, 0] for picture, _ in rows["5 × difference"]] == [255, 100, 15]


NAMES = {  # of files and folders, and how they are drawn
    "猫.jpg": "U+732B.jpg",
    "é🦊$x$.png": r"éU+1F98A\$x\$.png",
    "a\nb\t\x07": "aU+000AbU+0009U+0007",
    "abcdefghijklmnopqrstuvwxyz.jpg": "abcdefghijklmnopqrstuvwxyz.jpg",
}


def test_any_name_can_be_drawn(tmp_path, figures_of):
    """Without a warning: of a glyph that the font lacks, or of a panel that a long name leaves no room."""
    drawn = list(map(figures_of, (pictures, compare, page, inversion)))
    names, dot = [*NAMES, "猫" * 255, "x" * 4000], Image.new("RGB", (8, 8))
    row = {"against": names[0], "difference": 0.5, "low": 0.1, "high": 1.0, "won": 1.0, "interval": "here"}
    rows = [row | {"run": name, "metric": metric} for name in names for metric in METRICS]
    values = {f"{prefix}{metric}": 0.5 for prefix in ("", "published_") for metric in METRICS}
    courses = [(name, {"seconds": [1], "psnr": [9]}) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.draw_grid({name: [(dot, name)] for name in names}, tmp_path / "grid.png")
        compare.draw(rows, tmp_path / "compare.png")
        page.draw_results([values | {"experiment": name} for name in names], tmp_path / "results.png")
        inversion.draw_courses(courses, tmp_path / "course.png")
    (grid,), (table,), (chart,), (course,) = drawn
    titles = [axis.get_title() for axis in grid.axes]
    assert titles[:4] == [*list(NAMES.values())[:3], "abcdefghijk…stuvwxyz.jpg"]
    assert all(len(title) <= 24 for title in titles)
    for figure, labels in (
        (grid, [axis.get_ylabel() for axis in grid.axes]),
        (table, [label.get_text()[:-5] for label in table.axes[0].get_yticklabels()]),  # without \nhere
        (chart, [label.get_text() for label in chart.axes[0].get_yticklabels()]),
        (course, [label.get_text() for label in course.axes[0].get_legend().get_texts()]),
    ):
        assert labels[:4] == list(NAMES.values())
        assert all(axis.get_window_extent().width > 50 for axis in figure.axes)
    assert table.get_suptitle() == "against U+732B.jpg"


def test_interrupted_evaluation_leaves_no_old_numbers(trained, tmp_path, measure, monkeypatch):
    assert measure(trained / "best.pt", "--out", tmp_path) == 0
    monkeypatch.setattr(pictures, "draw_histograms", lambda *_: sys.exit(143))
    assert measure(trained / "best.pt", "--out", tmp_path) == 143
    assert (tmp_path / "per_image.csv").exists() and not (tmp_path / "metrics.json").exists()


def test_feature_error_of_one_test_image(checkpoint, own_photos, tmp_path, measure, capsys):
    """Relative to the norm of that image's features; by hand of what is there before the first iteration."""
    for file in sorted((own_photos / "test").iterdir())[1:]:
        file.unlink()
    inverter = build_inverter(decoder="feedback", width=8)
    config = checkpoint["config"] | {"decoder": "feedback", "width": 8, "data": str(own_photos)}
    content = checkpoint | {"decoder": inverter.decoder.state_dict(), "config": config}
    torch.save(content, tmp_path / "best.pt")
    assert measure(tmp_path / "best.pt") == 0
    assert "relative to ‖φ‖" in capsys.readouterr().out
    found = json.loads((tmp_path / "metrics.json").read_text())
    inverter, _ = load_inverter(tmp_path / "best.pt")
    image = data.center_crops(data.load_split(str(own_photos), "test")[:])
    with torch.no_grad():
        features = inverter.encode(image)
        start = inverter.encode(inverter.decode_all(features)[0])
    norm = np.linalg.norm(features.double().numpy().ravel())
    error = np.linalg.norm((start - features).double().numpy().ravel()) / norm
    assert found["feature_norm"] == pytest.approx(norm, rel=1e-5)
    assert found["iterates"][0]["feature_error"]["mean"] == pytest.approx(error, rel=1e-4)


# --- the checkpoint that a result is of --------------------------------------------------------------------


SHORT = ("--width", 8, "--mse-weight", 1, "--lpips-weight", 0, "--crop", 32, "--quiet", "--tracker", "none")


def test_results_name_their_checkpoint_and_a_new_run_removes_its_own(
    trained, photos, own_photos, tmp_path, measure, run_invert, run_train, run_evaluate
):
    """In its own folder and in those for other data, but nothing else; others are known to be old."""
    run = shutil.copytree(trained, tmp_path / "run")
    seed = shutil.copytree(trained, run / "seed1")  # a run of its own
    for ckpt, *flags in (
        (run / "best.pt",),
        (run / "best.pt", "--data", own_photos),
        (run / "best.pt", "--out", tmp_path / "out"),
        (seed / "best.pt",),
    ):
        assert measure(ckpt, *flags) == 0
    few = ("--split", "val", "--count", 1, "--steps", 2, "--quiet")
    assert run_invert("--ckpt", run / "best.pt", *few) == 0
    places = (run, run / "own_photos", tmp_path / "out", seed)
    files = [*(place / "metrics.json" for place in places), run / "val" / "inversion.json"]
    digest = hashlib.sha256((run / "best.pt").read_bytes()).hexdigest()
    for file in files:
        content = json.loads(file.read_text())
        assert content["ckpt_sha256"] == digest
        checkpoint = seed / "best.pt" if file.parent == seed else run / "best.pt"
        assert (file.parent / content["ckpt"]).samefile(checkpoint)

    (run / "mine").mkdir()
    for name in ("mine/metrics.json", "mine/notes.txt", "own_photos/notes.txt"):
        (run / name).write_text('{"ckpt": "elsewhere.pt"}')
    assert run_train("--data", photos, "--out", run, *SHORT, "--epochs", 1, "--overwrite") == 0
    assert [file.exists() for file in files] == [False, False, True, True, False]
    assert [path.name for path in (run / "own_photos").iterdir()] == ["notes.txt"]
    assert not list((run / "val").iterdir()) and len(list((run / "mine").iterdir())) == 2
    assert run_evaluate("--compare", seed, tmp_path / "out", "--out", run) == 2


def test_a_better_epoch_removes_the_results_of_the_one_before(photos, tmp_path, monkeypatch, run_train):
    """TensorBoard's too."""
    run = tmp_path / "run"
    losses = iter([3.0, 1.0, 2.0])
    nothing = torch.empty(0, 3, 224, 224)
    terms = dict.fromkeys([*metrics.TERMS, "seconds"], 1.0)
    monkeypatch.setattr(train, "validate", lambda *_: (terms | {"loss": next(losses)}, nothing, nothing))
    there = []
    real = train.save_last

    def evaluated(training):
        real(training)
        if training.epoch:
            files = run / "natural" / "metrics.json", run / "events.out.tfevents.1.test"
            there.append([path.exists() for path in files])
            files[0].parent.mkdir(exist_ok=True)
            files[0].write_text('{"ckpt": "../best.pt"}')
            files[1].touch()

    monkeypatch.setattr(train, "save_last", evaluated)
    assert run_train("--data", photos, "--out", run, "--epochs", 3, *SHORT) == 0
    assert there == [[False, False], [False, False], [True, True]]  # the second epoch is the best


def test_a_checkpoint_that_is_replaced_while_it_is_measured(
    trained, checkpoint, tmp_path, monkeypatch, measure, run_evaluate, error_line
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
            assert measure(run / "best.pt") == status
        if status:
            assert "best.pt: is another than --ckpt, or newer by now" in error_line()
    assert run_evaluate("--compare", run, run, "--out", tmp_path) == 2
    assert error_line() == f"{run / 'metrics.json'} is of an earlier best.pt; evaluate again"
    assert measure(run / "best.pt") == 0
    assert run_evaluate("--compare", run, run, "--out", tmp_path) == 0


# --- what it must not replace ----------------------------------------------------------------------------


def test_results_of_other_data_have_a_folder_of_their_own(trained, photos, own_photos, tmp_path, measure):
    run = shutil.copytree(trained, tmp_path / "run")
    (own_photos / "test" / "00.jpg").unlink()
    assert measure(run / "best.pt", "--data", own_photos) == 0
    assert not (run / "metrics.json").exists()
    found = json.loads((run / "own_photos" / "metrics.json").read_text())
    assert (found["images"], found["data"]) == (2, str(own_photos))
    assert measure(run / "best.pt", "--data", f"{photos}/../{photos.name}") == 0  # its own by another name
    assert json.loads((run / "metrics.json").read_text())["data"] == str(photos)


def test_the_folder_of_another_run_is_not_for_results(
    trained, checkpoint, tmp_path, measure, run_invert, error_line
):
    """They would be read as that run's. A copy of its best.pt is its own."""
    run = shutil.copytree(trained, tmp_path / "run")
    torch.save(checkpoint | {"epoch": 9}, run / "other.pt")
    shutil.copy(run / "best.pt", run / "copy.pt")

    def optimise(ckpt):
        return run_invert("--ckpt", ckpt, "--count", 1, "--steps", 2, "--quiet")

    for call in (measure, optimise):
        assert call(run / "other.pt") == 2
        assert f"{run / 'best.pt'}: is another than --ckpt" in error_line()
        assert call(run / "copy.pt") == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [("metrics.json", '{"data": "sample"}'), ("metrics.json", "[1, 2]"), ("per_image.csv", "image")],
    ids=["of other data", "of another program", "of no evaluation"],
)
def test_results_of_another_are_not_replaced(trained, tmp_path, measure, error_line, name, text):
    (tmp_path / name).write_text(text)
    assert measure(trained / "best.pt", "--out", tmp_path) == 2
    assert name in (line := error_line()) and "--out" in line
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == text


def test_a_checkpoint_whose_folders_are_gone(checkpoint, photos, tmp_path, measure, error_line):
    """It wants other --data; where to write is nothing that it says."""
    folder = str(tmp_path / "gone")
    config = checkpoint["config"] | {"data": folder, "cache": folder, "out": folder}
    torch.save(checkpoint | {"config": config}, tmp_path / "best.pt")
    assert measure(tmp_path / "best.pt") == 2
    assert "gone" in (line := error_line()) and "--data" in line
    assert measure(tmp_path / "best.pt", "--data", photos) == 0
    assert (tmp_path / photos.name / "metrics.json").exists() and not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report", "runs", "--out", "elsewhere"], "--out: not with --report"),
        (["--images", "a.jpg", "--data", "sample"], "--data: not with --images"),
        (["--steps", "5"], "unrecognized arguments: --steps 5"),
        (["--baselines", "--ckpt", "best.pt"], "--ckpt: not with --baselines"),
        (["--baselines", "--images", "a.jpg"], "--images: not allowed with argument --baselines"),
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
    screen = capsys.readouterr().out
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
        with open(tmp_path / "baselines" / name.replace(" ", "_") / "per_image.csv", newline="") as file:
            each = [float(row["psnr"]) for row in csv.DictReader(file)]
        assert each == pytest.approx(values["psnr"], abs=1e-4)
    values = []
    for image in images:
        thumbnail = Image.fromarray((255 * image).round().astype(np.uint8)).reduce(16)
        enlarged = np.asarray(thumbnail.resize((224, 224), Image.Resampling.BICUBIC)) / 255
        values.append(10 * np.log10(1 / np.mean((image - enlarged) ** 2)))
    assert found["baselines"]["thumbnail 14 × 14"]["psnr"]["mean"] == pytest.approx(np.mean(values), abs=0.5)
    folders = [tmp_path / "baselines" / name for name in ("mean_colour", "thumbnail_14x14")]
    assert run_evaluate("--compare", *folders, "--out", tmp_path) == 0
    assert "thumbnail_14x14  PSNR" in capsys.readouterr().out


def test_baselines_replace_only_their_own(photos, tmp_path, run_evaluate, error_line):
    path = tmp_path / "baselines.json"
    flags = ("--baselines", "--data", photos, "--out", tmp_path, "--quiet")
    for content, message in (
        ([1, 2], "not a result of this program"),
        ({"data": 5, "protocol": "documented"}, "not a result of this program"),
        ({"data": "sample", "protocol": "documented"}, "is the result of another data"),
        ({"data": str(photos), "protocol": "published"}, "is the result of another protocol"),
    ):
        path.write_text(json.dumps(content))
        assert run_evaluate(*flags) == 2
        assert message in (line := error_line()) and "baselines.json" in line
        assert json.loads(path.read_text()) == content
    path.write_text(json.dumps({"data": f"{photos}/../{photos.name}", "protocol": "documented"}))
    assert run_evaluate(*flags) == 0
    assert json.loads(path.read_text())["images"] == 3


# --- files that are no checkpoint ------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (open, ("owned", "w"))


BAD = {  # what is in the file: bytes made of those of a checkpoint, or an object to save
    "truncated": lambda good: good[:5000],
    "flipped": lambda good: good[:70_000] + bytes([good[70_000] ^ 1]) + good[70_001:],
    "text": lambda good: b"best.pt",
    "pickle": lambda good: pickle.dumps(Evil()),
    "evil": lambda good: {"decoder": Evil()},
    "other": lambda good: [1, 2],
    "no keys": lambda good: {"model": torch.zeros(2)},
}


@pytest.mark.parametrize("kind", ["missing", *BAD])
def test_bad_checkpoint(kind, trained, tmp_path, monkeypatch, run_evaluate, error_line):
    monkeypatch.chdir(tmp_path)
    if kind != "missing":
        content = BAD[kind]((trained / "best.pt").read_bytes())
        if isinstance(content, bytes):
            (tmp_path / "bad.pt").write_bytes(content)
        else:
            torch.save(content, "bad.pt")
    assert run_evaluate("--ckpt", "bad.pt") == 2
    assert "bad.pt: " in error_line()
    assert not (tmp_path / "owned").exists()


def test_checkpoint_whose_weights_do_not_fit(checkpoint, tmp_path, run_evaluate, error_line):
    torch.save(checkpoint | {"config": checkpoint["config"] | {"width": 8}}, tmp_path / "best.pt")
    assert run_evaluate("--ckpt", tmp_path / "best.pt") == 2
    assert "size mismatch" in error_line()
