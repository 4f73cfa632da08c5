"""What evaluate.py measures, against scikit-image, the lpips package and by hand, and what it writes."""

import hashlib
import json
import math
import shutil
import sys
import warnings
import zipfile
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import read_csv, read_json
from PIL import Image
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn import functional
from torchvision.transforms import functional as tv

import data
import evaluate
import metrics
import train
from extras.classifier import classifier_of
from flags import parse_evaluate
from models import load_inverter
from report import compare, inversion, page, pictures
from utils import METRICS, UserError


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
    found, rows = read_json(tmp_path / "metrics.json"), read_csv(tmp_path / "per_image.csv")
    values = measured[0]
    for name in METRICS:
        expected = {kind: getattr(np, kind)(values[name]) for kind in ("mean", "std", "min", "max")}
        assert found[name] == pytest.approx(expected, abs=1e-4)
        assert f"{found[name]['mean']:.4f} ±" in screen and f"{found[name]['max']:.4f}" in screen
    assert (found["images"], found["data"], found["protocol"]) == (3, str(photos), "documented")
    assert (found["weights"], found["config"]["layer"]) == ("imagenet", "block1")
    assert found["inference_ms"] > 0
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
    found, (row, *_) = read_json(tmp_path / "metrics.json"), read_csv(tmp_path / "per_image.csv")
    assert found["protocol"] == found["config"]["protocol"] == "published"
    inverter, _ = load_inverter(tmp_path / "best.pt")
    with Image.open(photos / "test" / "00.jpg") as picture:
        image = tv.center_crop(tv.to_tensor(picture.convert("RGB")), 224)[None]
    target = tv.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).clamp(0, 1)[0].numpy()
    with torch.no_grad():
        output = inverter(image)[0].numpy()
    expected = peak_signal_noise_ratio(target, output, data_range=1)
    assert float(row["psnr"]) == pytest.approx(expected, abs=1e-3)
    expected = structural_similarity(target, output, data_range=1, channel_axis=0)
    assert float(row["ssim"]) == pytest.approx(expected, abs=1e-4)
    original = zipfile.ZipFile(tmp_path / "reconstructions.zip").open("00000-original.jpg")
    assert np.abs(np.asarray(Image.open(original)) / 255 - target.transpose(1, 2, 0)).mean() < 0.02
    tv.to_pil_image(image[0]).save(tmp_path / "crop.png")
    assert measure(tmp_path / "best.pt", "--images", tmp_path / "crop.png") == 0
    with Image.open(tmp_path / "images" / f"crop_{tmp_path.name}.png") as strip:
        assert np.abs(np.asarray(strip)[:224, :224] / 255 - target.transpose(1, 2, 0)).max() < 0.003


def test_only_so_many_images_are_drawn(trained, tmp_path, measure, monkeypatch):
    monkeypatch.setattr(evaluate, "PICTURES", 2)
    assert measure(trained / "best.pt", "--out", tmp_path, "--batch-size", 1) == 0
    with zipfile.ZipFile(tmp_path / "reconstructions.zip") as archive:
        assert {name[:5] for name in archive.namelist()} == {"00000", "00002"}
    assert len(read_csv(tmp_path / "per_image.csv")) == 3


def test_more_processes_than_test_images(trained, tmp_path, run_evaluate, error_line, monkeypatch):
    monkeypatch.setattr(evaluate, "processes", lambda device: nullcontext((0, 4, device)))
    assert run_evaluate("--ckpt", trained / "best.pt", "--out", tmp_path / "out") == 2
    assert "3 test images for 4 processes" in error_line()
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_an_error_before_the_work(
    trained, tmp_path, measure, refused, monkeypatch
):
    monkeypatch.setattr(evaluate, "evaluate_model", None)
    (tmp_path / "file").touch()
    assert "cannot write there" in refused(measure, trained / "best.pt", "--out", tmp_path / "file" / "out")


def test_mean_colour_and_thumbnail_beside_the_results(trained, photos, measure, tmp_path, capsys):
    assert measure(trained / "best.pt", "--out", tmp_path) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    images = data.center_crops(data.load_split(str(photos), "test")[:])
    small = functional.interpolate(functional.avg_pool2d(images, 2), scale_factor=2, mode="bicubic").clamp(
        0, 1
    )
    for kind, image in (("mean_colour", images.mean((2, 3), keepdim=True)), ("thumbnail", small)):
        psnr = -10 * (images - image).square().mean((1, 2, 3)).log10().mean()
        assert metrics["baselines"][kind]["psnr"]["mean"] == pytest.approx(psnr.item(), abs=1e-3)
    below = metrics["psnr"]["mean"] < metrics["baselines"]["mean_colour"]["psnr"]["mean"]
    assert ("below the mean colour" in capsys.readouterr().out) is below


CLASSIFIER = """
import torch
from torch import nn

def build():
    torch.manual_seed(1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 9)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(), *head)
"""


def test_top1_agreement_is_that_of_the_whole_network(photos, tmp_path, run_train, measure, capsys):
    (tmp_path / "net.py").write_text(CLASSIFIER)
    net = ("--encoder", f"{tmp_path}/net.py:build")
    flags = ("--layer", "1", "--input-size", 64, "--recipe", "study", "--epochs", 1, "--quiet")
    assert run_train(*net, *flags, "--data", photos, "--out", tmp_path / "run") == 0
    assert measure(tmp_path / "run" / "best.pt", *net) == 0
    inverter, _ = load_inverter(tmp_path / "run" / "best.pt", net[1])
    images = data.center_crops(data.load_split(str(photos), "test", size=64)[:], 64)
    scope = {}
    exec(CLASSIFIER, scope)
    with torch.no_grad():
        pair = [
            tv.normalize(x, inverter.encoder.mean.flatten(), inverter.encoder.std.flatten())
            for x in (images, inverter(images).clamp(0, 1))
        ]
        same = torch.eq(*(scope["build"]().eval()(x).argmax(1) for x in pair))
    found = read_json(tmp_path / "run" / "metrics.json")["top1_agreement"]
    assert found == same.float().mean().item() and f"top-1 agreement: {found:.0%}" in capsys.readouterr().out
    rows = read_csv(tmp_path / "run" / "per_image.csv")
    assert [row["same_label"] for row in rows] == [str(int(label)) for label in same]


@pytest.mark.parametrize(
    ("encoder", "weights"), [("OWN:build", "own"), ("timm/test_vit", "random"), ("vgg16+alexnet", "imagenet")]
)
def test_no_classifier(own, encoder, weights):
    config = {"encoder": encoder.replace("OWN", str(own)), "weights": weights, "protocol": "documented"}
    assert classifier_of(config | {"input_size": 160, "mean": None, "std": None}) is None


def test_a_few_images_are_points(figures_of, tmp_path):
    figures = figures_of(pictures)
    for count in (3, 100):
        values = dict.fromkeys(METRICS, np.linspace(30, 20, count))
        pictures.draw_histograms(values, tmp_path / "histograms.png")
    few, many = (figure.axes[0] for figure in figures)
    assert few.lines[0].get_xdata().tolist() == [20, 25, 30] and not few.patches
    assert sum(bar.get_height() for bar in many.patches) == 100


def test_pictures_are_from_worst_to_best_above_their_error(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(pictures, "draw_grid", lambda rows, path: drawn.append(rows))
    grey = torch.full((8, 8, 3), 100, dtype=torch.uint8)
    pairs = {number: (grey, grey + step) for number, step in enumerate((3, 60, 20))}
    psnr = np.array([38.6, 12.6, 22.1])
    found = evaluate.Evaluation([{"psnr": psnr}], {}, pairs, names=["a", "b", "c"])
    pictures.draw_reconstructions(found, tmp_path / "x.png")
    (rows,) = drawn
    assert [caption for _, caption in rows["original"]] == ["b", "c", "a"]
    assert [caption for _, caption in rows["reconstruction"]] == ["12.60 dB", "22.10 dB", "38.60 dB"]
    expected = [255 * math.log(step) / math.log(80) for step in (60, 20, 3)]
    assert [picture[0, 0, 0].item() for picture, _ in rows["error"]] == pytest.approx(expected, abs=0.5)


NAMES = {  # of files and folders, and how they are drawn
    "猫.jpg": "U+732B.jpg",
    "é🦊$x$.png": r"éU+1F98A\$x\$.png",
    "a\nb\t\x07": "aU+000AbU+0009U+0007",
    "abcdefghijklmnopqrstuvwxyz.jpg": "abcdefghijk…stuvwxyz.jpg",
}


def test_any_name_can_be_drawn(tmp_path, figures_of):
    """Without a warning: of a glyph that the font lacks, or of a panel that a long name leaves no room."""
    figures = figures_of(pictures)
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
    titles = [axis.get_title() for axis in figures[0].axes]
    assert titles[:4] == list(NAMES.values()) and max(map(len, titles)) <= 24


def test_interrupted_evaluation_leaves_no_old_numbers(trained, tmp_path, measure, monkeypatch):
    assert measure(trained / "best.pt", "--out", tmp_path) == 0
    monkeypatch.setattr(pictures, "draw_histograms", lambda *_: sys.exit(143))
    assert measure(trained / "best.pt", "--out", tmp_path) == 143
    assert (tmp_path / "per_image.csv").exists() and not (tmp_path / "metrics.json").exists()


# --- the checkpoint that a result is of --------------------------------------------------------------------


SHORT = ("--width", 8, "--mse-weight", 1, "--lpips-weight", 0, "--crop", 32, "--quiet", "--tracker", "none")
FEW = ("--count", 1, "--steps", 2, "--quiet")


def test_results_name_their_checkpoint_and_a_new_run_removes_its_own(
    trained, photos, own_photos, tmp_path, measure, run_invert, run_train
):
    """In its own folder and in those for other data, but nothing else."""
    run = shutil.copytree(trained, tmp_path / "run")
    seed = shutil.copytree(trained, run / "seed1")  # a run of its own
    digest = hashlib.sha256((run / "best.pt").read_bytes()).hexdigest()
    assert measure(run / "best.pt", "--data", own_photos) == 0
    assert measure(run / "best.pt", "--out", tmp_path / "out") == 0
    assert measure(seed / "best.pt") == 0
    assert run_invert("--ckpt", run / "best.pt", "--split", "val", *FEW) == 0
    results = {  # and whose they are
        run / "own_photos" / "metrics.json": run,
        run / "val" / "inversion.json": run,
        tmp_path / "out" / "metrics.json": run,
        seed / "metrics.json": seed,
    }
    for file, folder in results.items():
        content = read_json(file)
        assert content["ckpt_sha256"] == digest
        assert (file.parent / content["ckpt"]).samefile(folder / "best.pt")

    (run / "mine").mkdir()
    notes = [run / name for name in ("mine/metrics.json", "own_photos/notes.txt")]
    for file in notes:
        file.write_text('{"ckpt": "elsewhere.pt"}')
    assert run_train("--data", photos, "--out", run, *SHORT, "--epochs", 1, "--overwrite") == 0
    assert [file.exists() for file in results] == [False, False, True, True]
    assert all(file.exists() for file in notes)


def test_a_better_epoch_removes_the_results_of_the_one_before(photos, tmp_path, monkeypatch, run_train):
    """TensorBoard's too."""
    losses = iter([3.0, 1.0, 2.0])
    nothing = torch.empty(0, 3, 224, 224)
    terms = dict.fromkeys([*metrics.TERMS, "seconds"], 1.0)
    monkeypatch.setattr(train, "validate", lambda *_: (terms | {"loss": next(losses)}, nothing, nothing))
    result, events = tmp_path / "natural" / "metrics.json", tmp_path / "events.out.tfevents.1.test"
    result.parent.mkdir()
    there = []
    real = train.save_last

    def evaluated(training):
        real(training)
        there.append((result.exists(), events.exists()))
        result.write_text('{"ckpt": "../best.pt"}')
        events.touch()

    monkeypatch.setattr(train, "save_last", evaluated)
    assert run_train("--data", photos, "--out", tmp_path, "--epochs", 3, *SHORT) == 0
    assert there == [(False, False), (False, False), (True, True)]  # the second epoch is the best


# --- what it must not replace ----------------------------------------------------------------------------


def test_results_of_other_data_have_a_folder_of_their_own(trained, photos, own_photos, tmp_path, measure):
    run = shutil.copytree(trained, tmp_path / "run")
    (own_photos / "test" / "00.jpg").unlink()
    assert measure(run / "best.pt", "--data", own_photos) == 0
    assert not (run / "metrics.json").exists()
    found = read_json(run / "own_photos" / "metrics.json")
    assert (found["images"], found["data"]) == (2, str(own_photos))
    assert measure(run / "best.pt", "--data", f"{photos}/../{photos.name}") == 0  # its own by another name
    assert read_json(run / "metrics.json")["data"] == str(photos)


def test_the_folder_of_another_run_is_not_for_results(
    trained, checkpoint, tmp_path, measure, run_invert, refused
):
    """They would be read as that run's. A copy of its best.pt is its own."""
    run = shutil.copytree(trained, tmp_path / "run")
    torch.save(checkpoint | {"epoch": 9}, run / "other.pt")
    shutil.copy(run / "best.pt", run / "copy.pt")
    for call in (measure, lambda ckpt: run_invert("--ckpt", ckpt, *FEW)):
        assert f"{run / 'best.pt'}: is another than --ckpt" in refused(call, run / "other.pt")
        assert call(run / "copy.pt") == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [("metrics.json", '{"data": "sample"}'), ("metrics.json", "[1, 2]"), ("per_image.csv", "image")],
    ids=["of other data", "of another program", "of no evaluation"],
)
def test_results_of_another_are_not_replaced(trained, tmp_path, measure, refused, name, text):
    (tmp_path / name).write_text(text)
    assert name in (line := refused(measure, trained / "best.pt", "--out", tmp_path)) and "--out" in line
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == text


def test_a_checkpoint_whose_folders_are_gone(checkpoint, photos, tmp_path, measure, refused):
    """It wants other --data; where to write is nothing that it says."""
    folder = str(tmp_path / "gone")
    config = checkpoint["config"] | {"data": folder, "cache": folder, "out": folder}
    torch.save(checkpoint | {"config": config}, tmp_path / "best.pt")
    assert "gone" in (line := refused(measure, tmp_path / "best.pt")) and "--data" in line
    for file, text in (("best.json", '{"config": {"data": "wide"}}'), ("config.yaml", f"data: {folder}")):
        (tmp_path / file).write_text(text)  # what a look beside it can tell before it is read
        with pytest.raises(UserError, match="best.pt: was trained on (wide|.*gone), which is not here"):
            parse_evaluate(["--ckpt", str(tmp_path / "best.pt")])
    assert measure(tmp_path / "best.pt", "--data", photos) == 0
    assert (tmp_path / photos.name / "metrics.json").exists() and not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report", "runs", "--out", "elsewhere"], "--out: not with --report"),
        (["--images", "a.jpg", "--data", "sample"], "--data: not with --images"),
        (["--baselines", "--ckpt", "best.pt"], "--ckpt: not with --baselines"),
        (["--baselines", "--images", "a.jpg"], "--images: not allowed with argument --baselines"),
        (["--protocol", "published"], "--protocol: only with --baselines"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, run_evaluate, refused):
    assert message in refused(run_evaluate, *flags)


# --- baselines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["documented", "published"])
def test_baselines_by_hand(photos, tmp_path, run_evaluate, capsys, protocol):
    flags = ("--baselines", "--data", photos, "--out", tmp_path, "--protocol", protocol, "--batch-size", 2)
    assert run_evaluate(*flags, "--quiet") == 0
    screen = capsys.readouterr().out
    found = read_json(tmp_path / "baselines.json")
    assert (found["data"], found["protocol"], found["images"]) == (str(photos), protocol, 3)
    files = sorted((photos / "test").iterdir())
    images = np.stack([np.asarray(Image.open(file))[16:240, 16:240] / 255 for file in files])
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    if protocol == "published":
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        images = ((images - mean) / std).clip(0, 1)
        options = {"win_size": 7}
    colours = images.mean((1, 2), keepdims=True)
    fills = {"constant colour": colours.mean(0), "mean colour": colours}
    fills["thumbnail 14 × 14"] = np.stack([enlarged_thumbnail(image) for image in images])
    for name, fill in fills.items():
        pairs = list(zip(images, np.broadcast_to(fill, images.shape), strict=True))
        psnr = [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]
        ssim = [structural_similarity(*pair, channel_axis=2, data_range=1, **options) for pair in pairs]
        exact = "thumbnail" not in name  # Pillow's bicubic filter is another
        measured = found["baselines"][name]
        assert measured["psnr"]["mean"] == pytest.approx(np.mean(psnr), abs=1e-4 if exact else 0.5)
        assert measured["ssim"]["mean"] == pytest.approx(np.mean(ssim), abs=1e-4 if exact else 0.02)
        assert f"{measured['lpips']['mean']:.4f} ±" in screen
    folders = [tmp_path / "baselines" / name for name in ("mean_colour", "thumbnail_14x14")]
    assert run_evaluate("--compare", *folders, "--out", tmp_path) == 0
    assert "thumbnail_14x14  PSNR" in capsys.readouterr().out


def enlarged_thumbnail(image):
    thumbnail = Image.fromarray((255 * image).round().astype(np.uint8)).reduce(16)
    return np.asarray(thumbnail.resize((224, 224), Image.Resampling.BICUBIC)) / 255


def test_baselines_replace_only_their_own(photos, tmp_path, run_evaluate, refused):
    path = tmp_path / "baselines.json"
    flags = ("--baselines", "--data", photos, "--out", tmp_path, "--quiet")
    for content, message in (
        ([1, 2], "not a result of this program"),
        ({"data": "sample", "protocol": "documented"}, "is the result of another data"),
        ({"data": str(photos), "protocol": "published"}, "is the result of another protocol"),
    ):
        path.write_text(json.dumps(content))
        assert message in (line := refused(run_evaluate, *flags)) and "baselines.json" in line
        assert read_json(path) == content
    path.write_text(json.dumps({"data": f"{photos}/../{photos.name}", "protocol": "documented"}))
    assert run_evaluate(*flags) == 0
    assert read_json(path)["images"] == 3


# --- files that are no checkpoint ------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (open, ("owned", "w"))


@pytest.mark.parametrize("content", [None, {"decoder": Evil()}, [1, 2], {"model": torch.zeros(2)}])
def test_bad_checkpoint(content, tmp_path, monkeypatch, run_evaluate, refused):
    """Missing, with code that would run, or another program's."""
    monkeypatch.chdir(tmp_path)
    if content:
        torch.save(content, "bad.pt")
    assert "bad.pt: " in refused(run_evaluate, "--ckpt", "bad.pt")
    assert not (tmp_path / "owned").exists()


def test_checkpoint_whose_weights_do_not_fit(checkpoint, tmp_path, run_evaluate, refused):
    torch.save(checkpoint | {"config": checkpoint["config"] | {"width": 8}}, tmp_path / "best.pt")
    assert "size mismatch" in refused(run_evaluate, "--ckpt", tmp_path / "best.pt")
