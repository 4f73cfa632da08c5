"""survey.py, --minutes, --recipe and hubconf.py."""

import csv
import json
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import REPOSITORY
from training import parse, training_on

import survey
from flags import parse_survey
from utils import UserError, load

TINY = ("--width", 8, "--crop", 32, "--tracker", "none", "--quiet")


def test_minutes_find_the_steps_which_train_as_if_they_were_given(photos, tmp_path, run_train):
    flags = ("--data", photos, "--epochs", 2, "--decoder", "feedback", *TINY)
    assert run_train(*flags, "--minutes", 0.1, "--out", tmp_path / "a") == 0
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert config["recipe"] == "auto" and config["steps"] >= 1
    assert run_train(*flags, "--recipe", "auto", "--steps", config["steps"], "--out", tmp_path / "b") == 0
    a, b = (load(tmp_path / name / "last.pt") for name in "ab")
    assert a["epoch"] == b["epoch"] == 2 and a["best_loss"] == b["best_loss"]
    assert all(torch.equal(a["decoder"][key], b["decoder"][key]) for key in a["decoder"])
    assert run_train(*flags, "--minutes", 0.1, "--out", tmp_path / "a", "--resume") == 0  # as many steps
    assert run_train(*flags, "--minutes", 0.2, "--out", tmp_path / "a", "--resume") == 2


def test_recipes(photos):
    assert parse().recipe == parse("--encoder", "vit_small", "--layer", "block1").recipe == "study"
    other = ("--encoder", "timm/resnet18", "--layer", "layer1")
    assert parse(*other).recipe == parse("--minutes", 1).recipe == "auto"
    assert parse(*other, "--recipe", "study").lr == 1e-4
    kinds = {"block1": ("feedback", 64, 4), "block3": ("residual", 64, 4), "block5": ("residual", 160, 8)}
    for layer, expected in kinds.items():
        config = training_on(photos, "--recipe", "auto", "--layer", layer, "--lr", 5e-4, "--steps", 1).config
        assert (config["decoder"], config["crop"], config["batch_size"]) == expected and config["lr"] == 5e-4
    config = training_on(photos, "--recipe", "auto", "--lpips-weight", 1, "--steps", 1).config
    assert (config["mse_weight"], config["lpips_weight"]) == (0.5, 1)
    with pytest.raises(UserError, match="give one of them"):
        parse("--steps", 3, "--passes", 1)


def test_survey_of_an_own_network(own, photos, tmp_path, run_survey, capsys):
    flags = ("--encoder", f"{own}:build", "--layers", "first.0", "nowhere", "first.1", "--input-size", 64)
    flags += ("--data", photos, "--minutes", 0.02, "--out", tmp_path, "--quiet")
    assert run_survey(*flags) == 0
    with open(tmp_path / "survey.csv", encoding="utf-8") as file:
        first, nowhere, second = csv.DictReader(file)
    assert "no such module" in nowhere["note"] and nowhere["psnr"] == "–"
    metrics = json.loads((tmp_path / "first.1" / "metrics.json").read_text())
    assert second["psnr"] == f"{metrics['psnr']['mean']:.3f}"
    assert all((tmp_path / name).exists() for name in ("survey.png", "survey.md", "report.html"))
    assert "not run" not in (tmp_path / "results.md").read_text()  # of the study's experiments
    before = (tmp_path / "first.1" / "best.pt").stat().st_mtime_ns
    capsys.readouterr()
    assert run_survey(*flags, "--images", next((photos / "test").iterdir())) == 0  # finished: only drawn
    assert (tmp_path / "first.1" / "best.pt").stat().st_mtime_ns == before
    assert "finished after epoch" in capsys.readouterr().out
    assert run_survey(*flags[:-1], "--images", photos / "nowhere.jpg") == 2


@pytest.mark.parametrize(
    ("encoder", "expected"),
    [
        ("vgg16", ["block1", "block2", "block3", "block4", "block5"]),
        ("vit_small", ["block0", "block2", "block4", "block7", "block9", "block11"]),
        ("torchvision/resnet18", ["relu", "layer1.0", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_layers_are_chosen_over_the_depth(encoder, expected):
    assert survey.choose_layers(parse_survey(["--encoder", encoder])) == expected


def test_layers_between_are_chosen_where_all_shapes_are_alike():
    args = parse_survey(["--encoder", "timm/test_vit"])
    first, *blocks, last = survey.choose_layers(args)
    assert first.startswith("patch_embed") and last == "norm" and len(blocks) == 4
    assert all(name.startswith("blocks.") for name in blocks)
    assert survey.choose_layers(args) == [first, *blocks, last]


def test_hub_in_a_process_of_its_own(tmp_path):
    code = (
        "import sys, torch\n"
        "load = lambda *names: torch.hub.load(sys.argv[1], *names, source='local')\n"
        "net = load('vgg16_block3')\n"
        "print(net(torch.rand(1, 3, 224, 224)).shape, net.training)\n"
        "print(load('inverter', 'vgg16', 'block5', 'residual').shape)\n"
    )
    command = [sys.executable, "-c", code, str(REPOSITORY)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "torch.Size([1, 3, 224, 224]) False\n(512, 7, 7)\n", done.stderr
