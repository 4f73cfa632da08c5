"""Small real photographs and networks, and ways to run a script in this process as its command line would."""

import csv
import json
import os
import shutil
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two tests run at a time

import lpips
import pytest
import torch
from PIL import Image

import data
import encoders
import evaluate
import invert
import survey
import train
import utils
from flags import parse_evaluate, parse_invert, parse_survey, parse_train

REPOSITORY = Path(__file__).parent.parent
NATURAL = REPOSITORY / "natural"
if not NATURAL.is_dir():
    NATURAL = REPOSITORY.parent / "shared" / "data" / "natural"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Every test's image cache is a temporary folder; the weights are the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(Path(torch.hub.get_dir()).parent))
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with 10 training and 3 test photographs in the train/ + test/ layout; not to be changed."""
    root = tmp_path_factory.mktemp("photos")
    tiles = {split: data.sample_tiles(split) for split in ("train", "test")}
    for split, count, suffix in (("train", 10, "png"), ("test", 3, "jpg")):
        (root / split).mkdir()
        pixels = tiles[split][:]
        for i in range(count):
            tile = pixels[i * len(pixels) // count]
            Image.fromarray(tile.numpy()).save(root / split / f"{i:02}.{suffix}")
    return root


@pytest.fixture(scope="session")
def image():
    """Noise, (1, 3, 224, 224) in [0, 1]."""
    return torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def reference_lpips():
    """The lpips package's own network, with the trunk weights that it would download."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = encoders.imagenet_weights("alexnet")
    weights = [tensor for key, tensor in state.items() if key.startswith("features.")]
    for parameter, weight in zip(net.net.parameters(), weights, strict=True):
        parameter.data.copy_(weight)
    return net


@pytest.fixture
def figures_of(monkeypatch):
    """Give the list to which the figures that a module saves from now on are added."""

    def watch(module):
        figures = []
        real = module.save_figure

        def save(figure, path):
            figures.append(figure)
            real(figure, path)

        monkeypatch.setattr(module, "save_figure", save)
        return figures

    return watch


@pytest.fixture
def own_photos(photos, tmp_path):
    """A copy of `photos` that a test may change."""
    return Path(shutil.copytree(photos, tmp_path / "own_photos"))


@pytest.fixture
def own():
    """The file of a network of one's own."""
    return REPOSITORY / "tests" / "own_network.py"


@pytest.fixture
def run_survey():
    """Run survey.py with these flags, here: the exit status, 0 if it ended well."""

    def call(*flags):
        return status(lambda: survey.survey(parse_survey([str(flag) for flag in flags])))

    return call


def status(main):
    """The exit status of a script's main, 0 if it ended well."""
    try:
        utils.cli_main(main)
    except SystemExit as exit:
        return exit.code
    return 0


def runner(main, parse):
    """A fixture: run a script with these flags, here; its exit status."""

    @pytest.fixture
    def run():
        return lambda *flags: status(lambda: main(parse([str(flag) for flag in flags])))

    return run


run_train = runner(train.train, parse_train)
run_evaluate = runner(evaluate.evaluate, parse_evaluate)
run_invert = runner(invert.main, parse_invert)


@pytest.fixture
def error_line(capsys):
    """The one line on stderr that a failed command left, without its `error: `; nothing else may be there."""

    def read():
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return read


@pytest.fixture
def refused(error_line):
    """Run a script that must end with status 2: its one line, without `error: `."""

    def call(run, *flags):
        assert run(*flags) == 2
        return error_line()

    return call


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory):
    """The folder of a short real training on `photos`; not to be changed."""
    out = tmp_path_factory.mktemp("trained")
    flags = ["--data", photos, "--out", out, "--epochs", 2, "--lr", 2e-3, "--quiet"]
    train.train(parse_train([str(flag) for flag in flags]))
    return out


@pytest.fixture(scope="session")
def checkpoint(trained):
    return torch.load(trained / "best.pt", weights_only=True)


def read_json(path):
    return json.loads(path.read_text())


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
