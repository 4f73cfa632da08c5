"""The command line and YAML files: defaults, which wins, what is refused, and how fast --help is."""

import os
import subprocess
import sys

import pytest
import yaml
from conftest import REPOSITORY
from training import parse, training_on

import flags as flags_module
from report.results import EXPERIMENT_KEYS, PUBLISHED_RESULTS
from utils import UserError


@pytest.fixture
def config(tmp_path):
    """Write a YAML file: its path."""

    def write(text):
        (tmp_path / "c.yaml").write_text(text)
        return tmp_path / "c.yaml"

    return write


def outcome(*command, **environment):
    """A command that ran in the repository."""
    options = {"capture_output": True, "text": True, "timeout": 60, "env": os.environ | environment}
    return subprocess.run([sys.executable, *command], cwd=REPOSITORY, **options)


def test_defaults_are_the_papers(photos):
    args = vars(parse())
    paper = {"encoder": "vgg16", "layer": "block1", "decoder": "tconv", "weights": "imagenet", "epochs": 30}
    paper |= {"batch_size": 4, "lr": 1e-4, "schedule": "plateau", "patience": 15, "seed": 42, "out": "runs"}
    paper |= {"mse_weight": 0.5, "lpips_weight": 0.5, "data": None}
    assert {key: args[key] for key in paper} == paper
    training = training_on(photos)
    schedule = training.scheduler
    (group,) = training.optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-4, (0.9, 0.999), 1e-8, 0)
    assert (schedule.factor, schedule.patience, schedule.min_lrs) == (0.5, 5, [1e-7])
    assert sum(p.numel() for p in group["params"]) == 33_731  # the decoder alone


def test_command_line_wins_over_yaml_over_defaults(config):
    path = config("lr: 1e-3\nepochs: 5\nlayer: block2\ndeterministic: false\nwidth: null\namp: true\n")
    args = parse("--config", path, "--epochs", 7, "--no-amp")
    assert (args.lr, args.epochs, args.layer, args.batch_size) == (1e-3, 7, "block2", 4)
    assert (args.deterministic, args.width, args.amp) == (False, None, False)
    assert parse("--config", path).amp


def test_text_is_taken_as_on_the_command_line(config):
    """YAML would make 0.1, 20240115, 8, 52 and a date of it."""
    text = "encoder: torchvision/densenet121\nlayer: 0.10\nout: 2024_01_15\ndata: 2024-01-15\nseed: 010\n"
    path = config(f"{text}crop: 064\nlr: 1e-3\nmean: [0.5, 1e-1, 0]\nfast:\n  weights: 010\n")
    args = parse("--config", path, "--fast")
    assert (args.layer, args.out, args.data, args.weights) == ("0.10", "2024_01_15", "2024-01-15", "010")
    assert (args.seed, args.crop, args.lr, args.mean) == (10, 64, 1e-3, [0.5, 0.1, 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown key 'learning_rate'; the keys are encoder, layer"),
        ("epochs: many", "epochs: 'many' is not a whole number"),
        ("epochs: [1]", "epochs: ['1'] should be a number"),
        ("patience: null", "patience: null should be"),
        ("lr: -1", "lr: -1 is not positive"),
        ("lr: .nan", "lr: '.nan' is not a number"),
        ("deterministic: 3", "deterministic: '3' should be true or false"),
        ("epochs: 1_000", "epochs: '1_000' is not a whole number"),
        ("epochs: १०", "epochs: '१०' is not a whole number"),
        ("feedback: gradient", "unknown key 'feedback'"),
        ("fast: &tuned\n  lr: 0.01\n<<: *tuned", "unknown key '<<'"),
        ("? [lr]\n: 1", "unhashable key"),
        ("lr: 1\n---\nlr: 2", "expected a single document"),
        ("lr: 1e-3\nepochs: 2\nlr: 1e-2", "has the key lr twice"),
        ("fast:\n  lr: 1e-3\n  lr: 1e-2", "has the key lr twice"),
        ("fast: 3", "should have lines of `key: value`"),
        ("data: ''", "--data: is empty"),
        ("!!python/object/apply:os.system ['true']", "should have lines of `key: value`"),
        ("mean: [0.5, 0.5]", "is not three numbers"),
        ("\tlr: 1", "cannot start any token"),
        ("encoder: vgg19", "--encoder vgg19: not an encoder; choose from vgg16"),
        ("", "should have lines of `key: value`"),
        ("fast:\n  lr: quick", "'quick' is not a number"),
        ("lr: !!python/object/apply:os.system ['true']", "lr: ['true'] should be a number or a word"),
    ],
)
def test_bad_yaml(config, text, message):
    with pytest.raises(UserError) as error:
        parse("--config", config(text))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["quiet", "bars", "download", "resume", "overwrite", "amp", "deterministic"])
@pytest.mark.parametrize(("yes", "no"), [("true", "false"), ("True", "FALSE"), ("yes", "no"), ("on", "off")])
def test_every_switch_can_be_negated(config, name, yes, no):
    path = config(f"{name}: {yes}\nfast:\n  {name}: {no}\n")
    assert getattr(parse("--config", path), name) is True
    assert getattr(parse("--config", path, f"--no-{name}"), name) is False
    assert getattr(parse("--config", path, "--fast"), name) is False


@pytest.mark.parametrize(
    "odd", ["on", "010", "1e3", "null", "1:30", "a: b", "- a", "#a", "é 中", "'", '"', "="]
)
def test_a_written_configuration_is_read_back(config, odd):
    """As config.yaml has it, by an independent writer: PyYAML."""
    flags = ["--out", odd, "--data", odd, "--weights", odd, "--lr", 1e-5, "--mean", "0.5,1e-7,3"]
    expected = flags_module.config_of(parse(*flags, "--width", 8, "--no-deterministic"))
    path = config(yaml.safe_dump(expected, sort_keys=False, allow_unicode=True))
    assert flags_module.config_of(parse("--config", path)) == expected


def test_configurations_of_earlier_versions_are_read(config):
    for value in ("null", "residual"):
        path = config(f"lr: 0.5\nfeedback: {value}\nown_weights: false\n")
        assert parse("--config", path).lr == 0.5


def test_home_is_found_where_no_shell_looks(tmp_path, config, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config("out: ~/runs\ndata: ~/photos\nencoder: ~/a.py:f+~/b.py:g\nweights: ~/w+~/v\n")
    args = parse("--config=~/c.yaml", "--cache=~/cache", "--init=~/best.pt")
    found = (args.out, args.data, args.encoder, args.weights, args.cache, args.init)
    names = ("~/runs", "~/photos", "~/a.py:f+~/b.py:g", "~/w+~/v", "~/cache", "~/best.pt")
    assert found == tuple(name.replace("~", str(tmp_path)) for name in names)
    args = flags_module.parse_evaluate(["--ckpt=~/a.pt", "--images", "~/a.jpg", "b.jpg", "--out=~/x"])
    assert (args.ckpt, args.out) == (f"{tmp_path}/a.pt", f"{tmp_path}/x")
    assert args.images == [f"{tmp_path}/a.jpg", "b.jpg"]
    assert flags_module.parse_invert(["--course", "~/a"]).course == [f"{tmp_path}/a"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", "layer1"], "not a layer of vgg16; choose from block1, block2, block3, block4, block5"),
        (["--epochs", "0"], "--epochs: 0 is not positive"),
        (["--mse-weight", "-0.5"], "--mse-weight: -0.5 is not zero or positive"),
        (["--mse-weight", "0", "--lpips-weight", "0"], "nothing to minimise"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--config", ""], "--config: is empty"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "--overwrite"], "--resume with --overwrite"),
        (["--fast"], "--fast: uses the values under `fast:` in a --config; give one"),
    ],
)
def test_mistakes_on_the_command_line(flags, message):
    with pytest.raises(UserError) as error:
        parse(*flags)
    assert message in str(error.value)


def test_a_mistake_is_one_line_at_once(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")  # found before the real one
    done = outcome("train.py", "--encoder", "vgg19", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --encoder vgg19: not an encoder") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "invert.py"])
def test_help_is_instant_and_whole(script):
    """Nothing heavy is imported before the flags are read, which takes far less than a second."""
    done = outcome("-X", "importtime", script, "--help")
    timed = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rsplit("|", 1)[1].strip() for line in timed}
    assert done.returncode == 0 and "argparse" in imported
    assert not imported & {"torch", "torchvision", "numpy", "matplotlib", "skimage", "tensorboard", "wandb"}
    assert done.stdout.count("\n  python ") >= 3 and "(default: None)" not in done.stdout
    layers = "vgg16: block1…block5; resnet34: layer1…layer4; vit_small: block0…block11; alexnet: conv1…conv5"
    training = (layers, "--lr LR", "(study: 0.0001)", "python train.py --config configs/sample.yaml")
    assert script != "train.py" or all(part in " ".join(done.stdout.split()) for part in training)


def test_every_config_file_is_valid():
    files = sorted((REPOSITORY / "configs").glob("*.yaml"))
    assert {f"{name}.yaml" for name in PUBLISHED_RESULTS} < {file.name for file in files}
    for file in files:
        parse("--config", file)


# --- --fast ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED_RESULTS)
def test_every_experiment_has_an_optimisation_of_its_own(name):
    path = REPOSITORY / "configs" / f"{name}.yaml"
    tuned = yaml.safe_load(path.read_text())["fast"]
    general = yaml.safe_load((REPOSITORY / "configs" / "fast.yaml").read_text())
    assert not {*tuned, *general} & {*EXPERIMENT_KEYS, "data", "protocol", "seed", "weights"}
    study, fast = vars(parse("--config", path)), vars(parse("--config", path, "--fast"))
    assert all(float(fast[key]) == float(tuned[key]) for key in ("lr", "batch_size", "crop", "epochs"))
    assert (study["lr"], study["crop"], study["epochs"], study["batch_size"]) == (1e-4, None, 30, 4)
    assert parse("--config", path, "--fast", "--lr", 0.5).lr == 0.5  # the command line wins


def test_null_under_fast_is_the_default_and_fast_wants_values(config):
    args = parse("--config", config("width: 16\nlr: 1\nfast:\n  width: null\n"), "--fast")
    assert args.width is None and args.lr == 1
    with pytest.raises(UserError, match="has no lines of `key: value` under `fast:`"):
        parse("--config", config("layer: block2\n"), "--fast")


def test_a_terminal_that_knows_no_arrows():
    """ISO 8859-1, as some clusters have it: what it lacks is a ?, not a traceback."""
    code = "import utils; utils.cli_main(lambda: print('PSNR (dB) \\u2191 \\u2013'))"
    done = outcome("-c", code, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "PSNR (dB) ? ?\n", "")
