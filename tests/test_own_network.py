"""An encoder of one's own, in a FILE.py: trained, measured, inverted, and what is wrong with one."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import REPOSITORY
from torch import nn

import data
import encoders
import networks
from encoders import Encoder
from flags import weights_of_each


def test_the_readmes_own_network(
    photos, tmp_path, monkeypatch, run_train, run_evaluate, run_invert, capsys, error_line
):
    """As written there: the file, a short training of it as one's own, and the commands."""
    section = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("#### Your own network")[1]
    program, commands = (part.split("```")[0] for part in re.split("```python\n|```bash\n", section)[1:3])
    monkeypatch.chdir(tmp_path)
    Path("mynet.py").write_text(program)
    net = networks.own_network("mynet.py", "build")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):  # which of ten shades is the picture?
        shade = torch.arange(10)
        loss = nn.functional.cross_entropy(net(shade.view(10, 1, 1, 1).expand(10, 3, 96, 96) / 10), shade)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(net.state_dict(), "mynet.pth")
    train, evaluate, invert = commands.replace("FOLDER", str(photos)).splitlines()
    for line, script, call in ((train, "train", run_train), (evaluate, "evaluate", run_evaluate)):
        assert line.startswith(f"python {script}.py ")
        more = ["--epochs", 1, "--quiet"] if script == "train" else ["--quiet"]
        assert call(*shlex.split(line)[2:], *more) == 0
    assert run_invert(*shlex.split(invert)[2:], "--steps", 2, "--count", 2, "--quiet") == 0
    found = torch.load("runs/mynet/best.pt", weights_only=True)
    assert found["config"]["input_size"] == 96 and found["weights_sha256"]
    torch.save(networks.own_network("mynet.py", "build").state_dict(), "mynet.pth")
    capsys.readouterr()
    assert run_evaluate("--ckpt", "runs/mynet/best.pt") == 2
    assert "mynet.pth: SHA-256 is" in error_line()
    Path("mynet.py").write_text(program + "\nopen('ran', 'w')\n")
    assert run_evaluate("--ckpt", "runs/mynet/best.pt") == 2
    assert "mynet.py: not what it was trained with; it was not run" in error_line()
    assert not Path("ran").exists()


def test_own_network_is_trained_and_measured(own, photos, tmp_path, run_train, run_evaluate):
    flags = ("--encoder", f"{own}:build", "--layer", "first.0", "--input-size", 96, "--mean", "0.5,0.5,0.5")
    options = ("--data", photos, "--epochs", 1, "--out", tmp_path, "--quiet")
    assert run_train(*flags, "--std", "1,1,1", *options) == 0
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--quiet") == 0
    found = torch.load(tmp_path / "best.pt", weights_only=True)
    assert found["shape"] == [8, 48, 48] and found["config"]["crop"] == 96
    assert found["config"]["mean"] == [0.5, 0.5, 0.5]


def test_flags_of_ones_own_network(own, photos, tmp_path, run_train, run_invert, error_line, capsys):
    flags = ("--encoder", f"{own}:build", "--layer", "first.0", "--data", photos)
    for more, message in (
        (("--weights", "random"), "a FILE.py's function decides that"),
        (("--weights", "imagenet", "--std", "1,0,1"), "give three numbers above 0"),
        (("--weights", "own", "--encoder", "vgg16", "--layer", "block1"), "--weights own: what a FILE.py"),
        (
            ("--weights", "own", "--encoder", f"{own}:build+vgg16", "--layer", "first.0+block1"),
            "--weights own: what a FILE.py's function gives; here imagenet, random or a file",
        ),
        (("--mean", "0.5,0.5"), "is not three numbers"),
        (("--mean", "0,0,0", "--protocol", "published"), "--protocol published has ImageNet's"),
        (("--input-size", 16), "LPIPS wants at least"),
    ):
        assert run_train(*flags, *more, "--out", tmp_path / "a") == 2
        assert message in error_line()
    assert run_invert("--ckpt", "best.pt", "--mean", "0,0,0") == 2
    assert error_line() == "--mean: only with --encoder"
    assert run_invert(*flags, "--input-size", 64, "--steps", 1, "--count", 2, "--out", tmp_path / "b") == 0
    about = json.loads((tmp_path / "b" / "inversion.json").read_text())
    assert (about["weights"], about["input_size"]) == ("own", 64)
    assert run_invert(*flags, "--steps", 1, "--count", 2, "--out", tmp_path / "b") == 2
    assert "is the result of another input_size" in error_line()


def test_a_file_with_a_dataclass(tmp_path):
    """Which looks for its module by name, where its annotations are strings."""
    path = tmp_path / "data.py"  # a name that is taken
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "@dataclass\n"
        "class Config:\n"
        "    width: int = 4\n"
        "def build():\n"
        "    return nn.Conv2d(3, Config().width, 3)\n"
    )
    assert networks.own_network(path, "build").out_channels == 4
    assert sys.modules["data"] is data


def test_another_file_is_another_encoder(own, tmp_path):
    """Whose weights are the same."""
    before = encoders.weights_key(Encoder(f"{own}:build", "first.1", "own"))
    other = tmp_path / "net.py"
    other.write_text(own.read_text() + "\n")
    assert encoders.weights_key(Encoder(f"{other}:build", "first.1", "own")) != before


def test_plus_in_a_path(own, photos, tmp_path, monkeypatch, run_train, run_evaluate, image):
    """A + joins encoders, and their weights, but where the name of a file has it."""
    monkeypatch.chdir(tmp_path)
    Path("my+nets").mkdir()
    shutil.copy(own, "my+nets/net.py")
    name, options = "my+nets/net.py:build", ("first.1", "own")
    wanted = Encoder(f"{own}:build", *options)(image)
    assert torch.equal(encoders.build_encoder(name, *options)(image), wanted)
    for both in (f"{name}+{own}:build", f"{own}:build+{name}"):
        found = encoders.build_encoder(both, "first.1+first.1", "own")(image)
        assert torch.equal(found, torch.cat([wanted, wanted], 1))

    torch.save(networks.own_network(own, "build").state_dict(), "a+b.pth")
    torch.save(torchvision.models.alexnet().state_dict(), "c+d+e.pth")
    flags = ("--data", photos, "--epochs", 1, "--crop", 32, "--width", 8, "--val-images", 1, "--quiet")
    one = ("--encoder", name, "--layer", "first.1", "--weights", "a+b.pth", "--out", "one")
    two = ("--encoder", f"{name}+alexnet", "--layer", "first.1+conv1", "--out", "two", "--fusion", "weighted")
    for more in (one, (*two, "--weights", "a+b.pth+c+d+e.pth")):
        assert run_train(*flags, *more) == 0
        assert run_evaluate("--ckpt", f"{more[-1] if more is one else 'two'}/best.pt", "--quiet") == 0
    for weights, files in (("a+b.pth", ["a+b.pth"] * 2), ("own+c+d+e.pth", ["own", "c+d+e.pth"])):
        assert weights_of_each(2, weights) == files


@pytest.mark.parametrize(("name", "wrong"), [("vgg17+alexnet", "vgg17"), ("alexnet+my+net.py", "my")])
def test_the_encoder_that_is_wrong_is_named(tmp_path, run_train, error_line, name, wrong):
    assert run_train("--encoder", name, "--layer", "a+b", "--out", tmp_path) == 2
    assert error_line().startswith(f"--encoder {wrong}: not an encoder")
