"""The command line and YAML files: defaults, which wins, what is refused, and how fast --help is."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from training import parse, parts_of

from utils import UserError


def test_defaults_are_the_papers():
    args = vars(parse())
    paper = {"encoder": "vgg16", "layer": "block1", "decoder": "tconv", "weights": "imagenet", "epochs": 30}
    paper |= {"batch_size": 4, "lr": 1e-4, "schedule": "plateau", "patience": 15, "seed": 42, "out": "runs"}
    paper |= {"mse_weight": 0.5, "lpips_weight": 0.5, "data": None}
    assert {key: args[key] for key in paper} == paper


def test_optimiser_and_schedule_are_the_papers(photos):
    state = parts_of(photos).state
    (group,) = state.optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-4, (0.9, 0.999), 1e-8, 0)
    assert (state.scheduler.factor, state.scheduler.patience, state.scheduler.min_lrs) == (0.5, 5, [1e-7])
    assert sum(p.numel() for p in group["params"]) == 33_731  # the decoder alone


def test_command_line_wins_over_yaml_over_defaults(tmp_path):
    text = "lr: 1e-3\nepochs: 5\nlayer: block2\ndeterministic: false\nwidth: null\namp: true\nfreeze_bn: 20\n"
    (tmp_path / "c.yaml").write_text(text)
    args = parse("--config", tmp_path / "c.yaml", "--epochs", 7, "--no-amp", "--freeze-bn", 0)
    assert (args.lr, args.epochs, args.layer, args.batch_size, args.deterministic) == (
        1e-3,
        7,
        "block2",
        4,
        False,
    )
    assert (args.amp, args.freeze_bn) == (False, 0) and parse("--config", tmp_path / "c.yaml").amp


def test_words_are_taken_as_they_are_written(tmp_path):
    """YAML would make 0.1, 20240115, 8 and a date of them."""
    path = tmp_path / "c.yaml"
    path.write_text("encoder: torchvision/densenet121\nlayer: 0.10\nout: 2024_01_15\nfast:\n  weights: 010\n")
    args = parse("--config", path, "--fast")
    assert (args.layer, args.out, args.weights) == ("0.10", "2024_01_15", "010")
    path.write_text("fast: &tuned\n  lr: 0.01\n<<: *tuned\n")  # which only YAML's own rules put together
    assert parse("--config", path).lr == 0.01
    path.write_text("out: 2024-01-15\n")
    assert parse("--config", path).out == "2024-01-15"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown key 'learning_rate'; the keys are encoder, layer"),
        ("epochs: many", "epochs: 'many' is not a whole number"),
        ("epochs: 2.5", "epochs: '2.5' is not a whole number"),
        ("epochs: true", "epochs: True should be a number or a word"),
        ("epochs: [1]", "epochs: [1] should be"),
        ("epochs: null", "epochs: None should be"),
        ("out: ~", "out: None should be"),
        ("weights: null", "weights: None should be"),
        ("lr: -1", "lr: -1 is not positive"),
        ("lr: .nan", "lr: nan is not positive"),
        ("deterministic: 3", "deterministic: 3 should be true or false"),
        ("encoder: vgg19", "--encoder vgg19: not an encoder; choose from vgg16"),
        ("mean: [0.5, 0.5]", "is not three numbers"),
        ("encoder: [vgg16]", "encoder: ['vgg16'] should be"),
        ("layer: block9", "choose from block1, block2"),
        ("- 1\n- 2", "is list, should be"),
        ("just words", "is str, should be"),
        ("", "is NoneType, should be"),
        ("a: b: c", "mapping values are not allowed"),
        ("lr: 1e-3\nepochs: 2\nlr: 1e-2", "has the key lr twice"),
        ("fast:\n  lr: 1e-3\n  lr: 1e-2", "has the key lr twice"),
        ("data: ''", "--data: is empty"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        parse("--config", tmp_path / "c.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--encoder", "vgg19"], "vgg16"),
        (["--layer", "block6"], "choose from block1, block2, block3, block4, block5"),
        (["--layer", "layer1"], "not a layer of vgg16"),
        (["--decoder", "unet"], "tconv"),
        (["--epochs", "0"], "--epochs: 0 is not positive"),
        (["--batch-size", "1" + 20 * "0"], "--batch-size: 100000000000000000000 is too large"),
        (["--width", "1" + 20 * "0"], "--width: 100000000000000000000 is too large"),
        (["--lr", "-0.1"], "--lr: -0.1 is not positive"),
        (["--batch-size", "-1"], "--batch-size: -1 is not positive"),
        (["--mse-weight", "-0.5"], "--mse-weight: -0.5 is not zero or positive"),
        (["--mse-weight", "0", "--lpips-weight", "0"], "nothing to minimise"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--config", ""], "--config: is empty"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistake_on_the_command_line_is_one_line_at_once(flags, message, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")  # found before the real one
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    options = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([sys.executable, "train.py", *flags], **options)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_help_names_every_layer_and_default():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    text = " ".join(done.stdout.split())
    assert done.returncode == 0
    for part in (
        "vgg16: block1…block5; resnet34: layer1…layer4; vit_small: block0…block11; alexnet: conv1…conv5",
        "--lr LR",
        "(default: 0.0001)",
        "python train.py --config configs/sample.yaml",
    ):
        assert part in text


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "invert.py"])
def test_help_is_instant(script):
    """Nothing heavy is imported before the flags are read, which takes far less than a second."""
    command = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    imported = {
        line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")
    }
    assert done.returncode == 0 and "argparse" in imported
    assert not imported & {"torch", "torchvision", "numpy", "matplotlib", "skimage", "tensorboard", "wandb"}
    commands = [line for line in done.stdout.splitlines() if line.startswith("  python ")]
    assert len(commands) >= 3 and "(default: None)" not in done.stdout


def test_every_config_file_is_valid():
    files = sorted((REPOSITORY / "configs").glob("*.yaml"))
    assert files
    for file in files:
        parse("--config", file)


def test_a_terminal_that_knows_no_arrows():
    """ISO 8859-1, as some clusters have it: what it lacks is a ?, not a traceback."""
    code = "import utils; utils.run(lambda: print('PSNR (dB) \\u2191 \\u2013'))"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    options = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "PSNR (dB) ? ?\n", "")
