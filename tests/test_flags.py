"""The command line and YAML files: defaults, which wins, what is refused, and how fast --help is."""

import os
import subprocess
import sys

import pytest
import yaml
from conftest import REPOSITORY
from training import parse, parts_of

import bench
import flags as flags_module
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
    path.write_text("out: 2024-01-15\n")
    assert parse("--config", path).out == "2024-01-15"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown key 'learning_rate'; the keys are encoder, layer"),
        ("epochs: many", "epochs: 'many' is not a whole number"),
        ("epochs: 2.5", "epochs: '2.5' is not a whole number"),
        ("epochs: true", "epochs: 'true' is not a whole number"),
        ("epochs: [1]", "epochs: a sequence should be"),
        ("epochs: null", "epochs: null should be"),
        ("out: ~", "out: null should be"),
        ("weights: null", "weights: null should be"),
        ("lr: -1", "lr: -1 is not positive"),
        ("lr: .nan", "lr: '.nan' is not a number"),
        ("deterministic: 3", "deterministic: '3' should be true or false"),
        ("epochs: 1:30", "epochs: '1:30' is not a whole number"),
        ("epochs: 1_000", "epochs: '1_000' is not a whole number"),
        ("epochs: 0x10", "epochs: '0x10' is not a whole number"),
        ("epochs: १०", "epochs: '१०' is not a whole number"),
        ("lr: 1:30", "lr: '1:30' is not a number"),
        ("quiet: 1", "quiet: '1' should be true or false"),
        ("own_weights: true", "unknown key 'own_weights'"),
        ("feedback: gradient", "unknown key 'feedback'"),
        ("fast: &tuned\n  lr: 0.01\n<<: *tuned", "unknown key '<<'"),
        ("fast:\n  fast:\n    lr: 1", "unknown key 'fast'"),
        ("? [lr]\n: 1", "unknown key"),
        ("lr: 1\n---\nlr: 2", "expected a single document"),
        ("mean: [0.5, [0.5], 0.5]", "is not a number"),
        ("\tlr: 1", "cannot start any token"),
        ("encoder: vgg19", "--encoder vgg19: not an encoder; choose from vgg16"),
        ("mean: [0.5, 0.5]", "is not three numbers"),
        ("encoder: [vgg16]", "encoder: a sequence should be"),
        ("layer: block9", "choose from block1, block2"),
        ("- 1\n- 2", "should have lines of `key: value`"),
        ("just words", "should have lines of `key: value`"),
        ("", "should have lines of `key: value`"),
        ("a: b: c", "mapping values are not allowed"),
        ("lr: 1e-3\nepochs: 2\nlr: 1e-2", "has the key lr twice"),
        ("fast:\n  lr: 1e-3\n  lr: 1e-2", "has the key lr twice"),
        ("data: ''", "--data: is empty"),
        ("!!python/object/apply:os.system ['true']", "should have lines of `key: value`"),
        ("lr: !!python/object/apply:os.system ['true']", "a sequence should be a number or a word"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        parse("--config", tmp_path / "c.yaml")
    assert message in str(error.value)


def test_numbers_are_read_as_on_the_command_line(tmp_path):
    """YAML 1.1 would make 8 and 52 of them."""
    (tmp_path / "c.yaml").write_text("seed: 010\ncrop: 064\nlr: 1e-3\nmean: [0.5, 1e-1, 0]\n")
    args = parse("--config", tmp_path / "c.yaml")
    assert (args.seed, args.crop, args.lr, args.mean) == (10, 64, 1e-3, [0.5, 0.1, 0])
    assert args == parse(
        "--seed",
        "010",
        "--crop",
        "064",
        "--lr",
        "1e-3",
        "--mean",
        "0.5,1e-1,0",
        "--config",
        tmp_path / "c.yaml",
    )


@pytest.mark.parametrize("name", ["quiet", "bars", "download", "resume", "overwrite", "amp", "deterministic"])
def test_every_switch_can_be_negated(tmp_path, name):
    path = tmp_path / "c.yaml"
    for yes, no in (("true", "false"), ("True", "FALSE"), ("yes", "no"), ("on", "off")):
        path.write_text(f"{name}: {yes}\nfast:\n  {name}: {no}\n")
        assert getattr(parse("--config", path), name) is True
        assert getattr(parse("--config", path, f"--no-{name}"), name) is False
        assert getattr(parse("--config", path, "--fast"), name) is False


def test_null_under_fast_is_the_default(tmp_path):
    (tmp_path / "c.yaml").write_text("width: 16\nlr: 1\nfast:\n  width: null\n")
    args = parse("--config", tmp_path / "c.yaml", "--fast")
    assert args.width is None and args.lr == 1


@pytest.mark.parametrize(
    "odd",
    ["on", "010", "1e3", "null", "1:30", "0x10", "2024-01-15", "a: b", "- a", "#a", "é 中", "'", '"', "="],
)
def test_a_written_configuration_is_read_back(tmp_path, odd):
    """As config.yaml has it, by an independent writer: PyYAML."""
    flags = [
        "--out",
        odd,
        "--data",
        odd,
        "--weights",
        odd,
        "--lr",
        1e-5,
        "--mean",
        "0.5,1e-7,3",
        "--width",
        8,
    ]
    config = flags_module.config_of(parse(*flags, "--no-deterministic"))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    again = flags_module.config_of(parse("--config", tmp_path / "c.yaml"))
    assert again == config


def test_configurations_of_earlier_versions_are_read(tmp_path):
    text = "lr: 0.5\nfeedback: {}\nown_weights: false\n"
    for value in ("null", "residual"):
        (tmp_path / "c.yaml").write_text(text.format(value))
        assert parse("--config", tmp_path / "c.yaml").lr == 0.5


def test_home_is_found_where_no_shell_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text(
        "out: ~/runs\ndata: ~/photos\nencoder: ~/a.py:f+~/b.py:g\nweights: ~/w+~/v\n"
    )
    args = parse("--config=~/c.yaml", "--cache=~/cache", "--init=~/best.pt")
    assert args.out == f"{tmp_path}/runs" and args.data == f"{tmp_path}/photos"
    assert (
        args.encoder == f"{tmp_path}/a.py:f+{tmp_path}/b.py:g"
        and args.weights == f"{tmp_path}/w+{tmp_path}/v"
    )
    assert args.cache == f"{tmp_path}/cache" and args.init == f"{tmp_path}/best.pt"
    args = flags_module.parse_evaluate(["--ckpt=~/a.pt", "--images", "~/a.jpg", "b.jpg", "--out=~/x"])
    assert (args.ckpt, args.out) == (f"{tmp_path}/a.pt", f"{tmp_path}/x")
    assert args.images == [f"{tmp_path}/a.jpg", "b.jpg"]
    assert flags_module.parse_evaluate(["--report=~/runs"]).report == f"{tmp_path}/runs"
    assert flags_module.parse_invert(["--course", "~/a"]).course == [f"{tmp_path}/a"]
    assert bench.make_parser().parse_args(["--json=~/x.json"]).json == f"{tmp_path}/x.json"


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(UserError, match="--resume with --overwrite"):
        parse("--resume", "--overwrite")


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
