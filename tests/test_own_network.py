"""An encoder of one's own, in a FILE.py: trained, measured, inverted, and what is wrong with one."""

import hashlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from torch import nn

import data
from encoders import Encoder, build_encoder
from extras import user_network
from models import load_inverter
from utils import UserError


def test_the_readmes_own_network(
    photos, tmp_path, monkeypatch, run_survey, run_train, run_evaluate, run_invert
):
    """As docs/your-network.md has it: the file, weights of one's own, and the commands."""
    page = (REPOSITORY / "docs" / "your-network.md").read_text(encoding="utf-8")
    program, commands = (part.split("```")[0] for part in re.split("```python\n|```bash\n", page)[1:3])
    monkeypatch.chdir(tmp_path)
    Path("mynet.py").write_text(program)
    net = user_network.user_network("mynet.py", "build")
    net(torch.rand(10, 3, 96, 96))  # batch norm sees some images
    torch.save(net.state_dict(), "mynet.pth")
    calls = {"survey.py": (run_survey, "--minutes", 0.01)}
    calls |= {"train.py": (run_train, "--epochs", 1, "--steps", 2), "evaluate.py": (run_evaluate,)}
    calls["invert.py"] = (run_invert, "--steps", 2, "--count", 2)
    lines = commands.replace("FOLDER", str(photos)).splitlines()
    for line, (script, (call, *more)) in zip(lines, calls.items(), strict=True):
        python, name, *flags = shlex.split(line)
        assert (python, name) == ("python", script) and call(*flags, *more, "--quiet") == 0
    found = torch.load("runs/mynet/best.pt", weights_only=True)
    config = found["config"]
    assert (found["shape"], config["crop"], config["std"]) == ([32, 24, 24], 64, [1, 1, 1])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--weights random", "a FILE.py's function decides that"),
        ("--weights imagenet --std 1,0,1", "give three numbers above 0"),
        ("--weights own --encoder vgg16 --layer block1", "own: only for a FILE.py"),
        ("--weights own --encoder OWN:build+vgg16 --layer first.0+block1", "--weights own"),
        ("--mean 0,0,0 --protocol published", "--protocol published uses ImageNet's"),
        ("--encoder vgg17+alexnet --layer a+b", "--encoder vgg17: not an encoder"),
        ("--encoder alexnet+my+net.py --layer a+b", "--encoder my: not an encoder"),
    ],
)
def test_flags_that_cannot_be(own, photos, tmp_path, run_train, error_line, more, message):
    flags = ("--encoder", f"{own}:build", "--layer", "first.0", "--data", photos, "--out", tmp_path)
    assert run_train(*flags, *more.replace("OWN", str(own)).split()) == 2
    assert message in error_line()


def test_inversion_of_ones_own_network(own, photos, tmp_path, run_invert, error_line):
    flags = ("--encoder", f"{own}:build", "--layer", "first.0", "--data", photos, "--out", tmp_path)
    flags += ("--steps", 1, "--count", 2)
    assert run_invert(*flags, "--input-size", 64) == 0
    about = json.loads((tmp_path / "inversion.json").read_text())
    assert (about["weights"], about["input_size"]) == ("own", 64)
    assert run_invert(*flags) == 2
    assert "is the result of another input_size" in error_line()
    assert run_invert("--ckpt", "best.pt", "--mean", "0,0,0") == 2
    assert error_line() == "--mean: only with --encoder and without --ckpt"


# --- What it imports ------------------------------------------------------------------------------------

NET = """
from torch import nn
from layers import WIDTH
from models import Scale
from blocks.deep import SIDE
import common
def build():
    from utils import late
    return nn.Sequential(nn.Conv2d(3, WIDTH, SIDE, 2, padding=1), Scale())
"""
SCALE = "from torch import nn\nclass Scale(nn.Module):\n    def forward(self, x):\n        return {} * x\n"


def write_network(folder, width=4, scale=2):
    """A network that imports five modules, two of which have names of this project's; mynet.py's path."""
    (folder / "blocks").mkdir(parents=True, exist_ok=True)
    (folder / "mynet.py").write_text(NET)
    (folder / "layers.py").write_text(f"WIDTH = {width}\n")
    (folder / "models.py").write_text(SCALE.format(scale))
    (folder / "utils.py").write_text("late = True\n")
    (folder / "blocks" / "deep.py").write_text("SIDE = 3\n")
    return folder / "mynet.py"


@pytest.fixture
def common(tmp_path, monkeypatch):
    """A module that PYTHONPATH brings."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "common.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    return tmp_path / "lib" / "common.py"


def test_neighbours_are_its_own(tmp_path, common):
    """Of two networks whose neighbours have the same names, too; this project's stay what they are."""
    a, b = write_network(tmp_path / "a"), write_network(tmp_path / "b", width=6, scale=5)
    before = {name: sys.modules[name] for name in ("utils", "models", "layers")}
    path = list(sys.path)
    encoder = build_encoder(f"{a}:build+{b}:build", "1+1", "own", input_size=32)
    images = torch.rand(1, 3, 32, 32)
    for part, width, scale in zip(encoder.encoders, (4, 6), (2, 5), strict=True):
        conv = part.trunk.net[0]
        normal = (images - part.mean) / part.std
        expected = scale * nn.functional.conv2d(normal, conv.weight, conv.bias, 2, 1)
        torch.testing.assert_close(part(images), expected)
        assert conv.out_channels == width
    assert {name: sys.modules[name] for name in before} == before and sys.path == path
    assert not {"blocks", "blocks.deep", "common"} & sys.modules.keys()
    names = ("mynet.py", "layers.py", "models.py", "utils.py", "blocks/deep.py")
    files = {str(tmp_path / folder / name) for folder in "ab" for name in names} | {str(common)}
    assert encoder.programs == {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


def test_a_changed_neighbour_is_refused(tmp_path, common, photos, run_train, run_evaluate, error_line):
    """One beside the file, one from PYTHONPATH, and one that only `forward` imports."""
    net = write_network(tmp_path / "a")
    (tmp_path / "lib" / "lazy.py").write_text("ZERO = 0\n")
    models = SCALE.format("__import__('lazy').ZERO + 2")
    (net.parent / "models.py").write_text(models)
    flags = ("--encoder", f"{net}:build", "--layer", "1", "--input-size", 64, "--lpips-weight", 0)
    out = tmp_path / "run"
    flags += ("--data", photos, "--recipe", "study", "--epochs", 1, "--out", out, "--quiet")
    assert run_train(*flags) == 0
    ckpt = ("--ckpt", out / "best.pt", "--quiet", "--trust-code")
    assert run_evaluate(*ckpt) == 0
    for file in (net.parent / "models.py", net.parent / "layers.py", common, tmp_path / "lib" / "lazy.py"):
        before = file.read_text()
        file.write_text(before + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
        assert run_evaluate(*ckpt) == 2
        assert f"{file}: not what it was trained with; it was not run" in error_line()
        file.write_text(before)
    assert not (tmp_path / "ran").exists()
    assert run_evaluate(*ckpt) == 0
    assert run_train(*flags, "--resume") == 0
    (net.parent / "models.py").write_text(models + "\n")
    assert run_train(*flags, "--resume") == 2
    assert "--resume: encoder_sha256 is" in error_line()


def test_a_file_with_the_name_of_a_module_here(tmp_path):
    """It imports another of them, which gets no part in its hash, and its dataclass looks for its module."""
    (tmp_path / "data.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
        "from extras.weights import Path\n"
        "@dataclass\nclass Config:\n    width: int = 4\n"
        "build = lambda: nn.Conv2d(3, Config().width, 3)\n"
    )
    file = f"{tmp_path}/data.py"
    assert user_network.user_network(file, "build").out_channels == 4 and sys.modules["data"] is data
    programs = user_network.user_code_sha256(f"{file}:build")
    assert file in programs and not any(str(REPOSITORY) in name for name in programs)


LATE = """
from torch import nn
class Net(nn.Conv2d):
    def forward(self, x):
        import beside
        return super().forward(x)
build = lambda: nn.Sequential(Net(3, 4, 1))
"""


@pytest.mark.parametrize(
    ("program", "message"),
    [(LATE, "No module named 'beside'"), ("from .layers import WIDTH\n", "attempted relative import")],
)
def test_imports_that_fail_are_one_line(tmp_path, program, message):
    """A neighbour that only `forward` imports; and a relative import."""
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "net.py").write_text(program)
    with pytest.raises(UserError, match=message):
        Encoder(f"{tmp_path}/net.py:build", "0", "own", input_size=8)


def test_what_its_own_path_brings(tmp_path):
    """As a file that is used to being run from elsewhere sets it; for `forward`, too."""
    (tmp_path / "src").mkdir()
    files = [f"{tmp_path}/{name}" for name in ("net.py", "src/models.py", "src/late.py")]
    late = LATE.replace("beside", "late")
    programs = (f"import sys\nsys.path.insert(0, '{tmp_path}/src')\nimport models\n{late}", "", "")
    for file, program in zip(files, programs, strict=True):
        Path(file).write_text(program)
    encoder = Encoder(f"{files[0]}:build", "0", "own", input_size=8)
    sys.path.remove(f"{tmp_path}/src")
    assert [file for file in encoder.programs if str(tmp_path) in file] == files
    assert encoder(torch.rand(1, 3, 8, 8)).shape == (1, 4, 8, 8)


# --- Checkpoints that name a program ------------------------------------------------------------------------


@pytest.fixture
def of_mynet(own, photos, tmp_path, run_train):
    """The folder of a run of net.py and net.pth, which lie in it."""
    (tmp_path / "net.py").write_text(own.read_text().replace("Raising()", "nn.Identity()"))
    net = user_network.user_network(tmp_path / "net.py", "build")
    net.first[1].running_var.fill_(2)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    flags = ("--encoder", f"{tmp_path}/net.py:build", "--weights", tmp_path / "net.pth", "--layer", "first.1")
    flags += ("--data", photos, "--input-size", 64, "--recipe", "study", "--epochs", 1, "--quiet")
    assert run_train(*flags, "--out", tmp_path / "run") == 0
    return flags, tmp_path


def test_a_program_is_run_if_the_user_says_so(of_mynet, run_evaluate, run_invert, error_line):
    """Whoever ships a checkpoint may ship the file that it names, and its hash."""
    _, folder = of_mynet
    ckpt = ("--ckpt", folder / "run" / "best.pt", "--quiet")
    for call in (run_evaluate, run_invert):
        assert call(*ckpt) == 2
        line = error_line()
        assert f"names a program that would be run, {folder}/net.py" in line and "--trust-code" in line
    with pytest.raises(UserError, match="--trust-code"):
        load_inverter(folder / "run" / "best.pt")
    load_inverter(folder / "run" / "best.pt", trust_code=True)
    assert run_evaluate(*ckpt, "--encoder", f"{folder}/net.py:build") == 0
    assert run_invert(*ckpt, "--trust-code", "--steps", 1, "--count", 2) == 0


def test_files_of_a_checkpoint_may_move(of_mynet, run_train, run_evaluate, run_invert, error_line, capsys):
    flags, folder = of_mynet
    ckpt = ("--ckpt", folder / "run" / "best.pt", "--quiet")
    resume = (*flags, "--out", folder / "run", "--resume")
    assert run_evaluate(*ckpt, "--trust-code") == 0
    before = json.loads((folder / "run" / "metrics.json").read_text())
    (moved := folder / "moved").mkdir()
    for name in ("net.py", "net.pth"):
        (folder / name).rename(moved / name)
    network = ("--encoder", f"{moved}/net.py:build")
    places = (*network, "--weights", moved / "net.pth")
    assert run_evaluate(*ckpt, *places) == 0
    after = json.loads((folder / "run" / "metrics.json").read_text())
    assert (after["psnr"], after["config"]) == (before["psnr"], before["config"])
    assert run_invert(*ckpt, *places, "--steps", 1, "--count", 2) == 0
    assert run_train(*resume, *places) == 0
    capsys.readouterr()

    def refused(message, *flags, call=run_evaluate):
        assert call(*flags) == 2
        assert message in error_line()

    refused("net.py: not what it was trained with", *ckpt, "--trust-code")
    for wrong in (("--encoder", "vgg16"), (*network, "--weights", "own")):
        refused("was trained with", *ckpt, *wrong)
    torch.save(user_network.user_network(moved / "net.py", "build").state_dict(), moved / "net.pth")
    refused("was trained with other", *ckpt, *places)
    refused("not the same content", *resume, *places, call=run_train)
    (moved / "net.py").write_text((moved / "net.py").read_text() + "\n")
    refused("net.py: not what it was trained with; it was not run", *ckpt, *places)


def test_checkpoints_of_one_file_are_read(of_mynet):
    """As earlier versions wrote them: the hash of the encoder is of the file alone."""
    _, folder = of_mynet
    net = folder / "net.py"
    net.write_text("import beside\n" + net.read_text())
    (folder / "beside.py").write_text("")
    sha = hashlib.sha256(net.read_bytes()).hexdigest()
    encoder = Encoder(f"{net}:build", "first.1", str(folder / "net.pth"), input_size=64)
    key = hashlib.sha256(sha.encode())
    for tensor in encoder.state_dict().values():
        key.update(tensor.contiguous().numpy())
    checkpoint = torch.load(folder / "run" / "best.pt", weights_only=True)
    old = {name: value for name, value in checkpoint.items() if name not in ("format", "init_sha256")}
    old |= {"programs": {str(net): sha}, "encoder_sha256": key.hexdigest()}
    torch.save(old, folder / "old.pt")
    load_inverter(folder / "old.pt", trust_code=True)
