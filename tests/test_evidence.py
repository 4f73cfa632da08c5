"""evidence.sh, with a python that only takes notes: what is trained, at which rates, and compared."""

import hashlib
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import REPOSITORY, status
from PIL import Image

from docs import figures
from docs.figures import DEPTH, INVERTED, PHOTOGRAPHS, RESOLUTION
from flags import completed, config_of, parse_evaluate, parse_invert, parse_train
from utils import load

STUB = """#!{python} -SE
import os, sys
_, first, *flags = sys.argv
if first == "-":
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
value = dict(zip(flags, flags[1:]))
with open(os.environ["CALLS"], "a") as file:
    print(first, *flags, sep="\\t", file=file)


def write(folder, name, text=""):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "w") as file:
        file.write(text)


if first == "train.py":
    loss = abs(float(value["--lr"]) - 2e-3)  # this rate is the best
    write(value["--out"], "history.csv", f"epoch,val_loss\\n1,9\\n2,{{loss}}\\n")
elif first == "invert.py":
    os.makedirs(value["--out"])
    write(value["--out"], "inversion.json")
elif "--ckpt" in value:
    write(value.get("--out", os.path.dirname(value["--ckpt"])), "metrics.json")
"""  # -SE: without site-packages it starts four times as fast


@pytest.fixture
def evidence(tmp_path):
    """Run evidence.sh with a stub of python: its result, and the (program, flags) that it called."""
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)

    def call(*groups, **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "CALLS": str(calls), "RUNS": str(tmp_path / "runs")}
        environment |= variables
        command = ["bash", "evidence.sh", *groups]
        result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        lines = [line.split("\t") for line in calls.read_text().splitlines()]
        return result, [(program, flags) for program, *flags in lines]

    return call


def test_what_the_shell_would_not_take_as_it_is(evidence, tmp_path):
    """RUNS is a folder's name, SEEDS numbers."""
    folder = f"{tmp_path}/r&d [1]"
    result, calls = evidence("weights", RUNS=folder, SEEDS="1")
    assert result.returncode == 0, result.stderr
    compared = [parse_evaluate(flags).compare for _, flags in calls if "--compare" in flags]
    assert compared == [[f"{folder}/loss/hybrid", f"{folder}/weights/block1"]]
    result, calls = evidence("weights", SEEDS="1 README.m?")
    assert result.returncode == 2 and 'SEEDS="1 README.m?"' in result.stderr and not calls


def test_everything_is_trained_evaluated_and_compared(evidence, tmp_path):
    result, calls = evidence()
    assert result.returncode == 0, result.stderr
    trained = [parse_train(flags) for program, flags in calls if program == "train.py"]
    evaluated = [
        parse_evaluate(flags) for program, flags in calls if "--ckpt" in flags and program == "evaluate.py"
    ]
    compared = [parse_evaluate(flags) for program, flags in calls if "--compare" in flags]
    runs = tmp_path / "runs"
    made = {args.out for args in trained}
    measured = {args.out or os.path.dirname(args.ckpt) for args in evaluated}
    three_seeds = 3 + 2 + 3 + 4 + 1 + 8 + 4
    assert len(measured) == len(evaluated) == 3 * three_seeds + 2 * 23 + 8 * 4 + 4 * 3 + 4 * 2 + 1
    tried = {out for out in made if "/rates/" in out}
    assert {os.path.dirname(args.ckpt) for args in evaluated} == made - tried
    for args in compared:
        for folder in args.compare:
            seeds = (42,) if re.search("/deep/|/lite0/", folder) else (1, 2, 3)
            assert folder in measured or {f"{folder}/seed{seed}" for seed in seeds} <= measured
    residual = [args for args in trained if args.out.startswith(str(runs / "decoders" / "residual"))]
    assert {(args.lr, args.seed, args.decoder) for args in residual} == {
        (0.002, seed, "residual") for seed in (1, 2, 3)
    }
    by_muon = {args.out for args in trained if args.optimizer == "muon"}
    assert by_muon == {out for out in made if re.search("/muon/|/feedback/block|/natural/|/lite0/", out)}
    assert len(by_muon) == (6 + 9) + (12 + 12) + 16 + 12 + 4
    weights = str(runs / "lite0.safetensors")
    assert [flags for program, flags in calls if program == "docs/lite0.py"] == [[weights]]
    assert sum(args.weights == weights for args in trained) == 4
    inverted = [parse_invert(flags) for program, flags in calls if program == "invert.py"]
    assert len({args.out for args in inverted}) == len(inverted) == 8 + 8
    for args in inverted:
        assert args.encoder or Path(REPOSITORY, args.ckpt).exists()
    drawn = {f"layers/{name}" for name in (*RESOLUTION.values(), *DEPTH.values())}
    drawn |= {f"inversion/{layer}" for layer in INVERTED}
    drawn |= {f"inversion/noise_{layer}" for layer in INVERTED}
    drawn |= {f"data/{count}" for count in PHOTOGRAPHS} | {"published/seed42"}
    assert drawn <= {str(path.relative_to(runs)) for path in runs.glob("*/*")}  # docs/figures.py finds them
    again, calls = evidence("decoders", "deep", "natural", "inversion")
    assert again.returncode == 0 and not [flags for program, flags in calls if "--ckpt" in flags]
    assert not [flags for program, flags in calls if program == "train.py"]  # no rate is tried again, either
    (runs / "decoders" / "residual" / "seed2" / "metrics.json").unlink()
    again, calls = evidence("decoders")
    assert again.returncode == 0
    repeated = [parse_train(flags) for program, flags in calls if program == "train.py"]
    assert {(args.out, args.lr) for args in repeated if "/rates/" not in args.out} == {
        (str(runs / "decoders" / "residual" / "seed2"), 0.002)
    }


def test_what_is_of_an_earlier_best_is_measured_again(evidence, tmp_path):
    result, _ = evidence("decoders", "deep", "inversion")
    assert result.returncode == 0, result.stderr
    runs = tmp_path / "runs"
    run, muon = runs / "decoders" / "residual" / "seed2", runs / "deep" / "muon" / "vgg16_block5"
    of = {"ckpt_sha256": hashlib.sha256(b"decoder").hexdigest()}
    places = (run, run), (muon / "imagenet", muon / "seed42"), (runs / "loss" / "mse" / "seed1",) * 2
    for place, folder in places:
        (place / "metrics.json").write_text(json.dumps(of))
        (folder / "best.pt").write_text("a better one" if folder != places[2][1] else "decoder")
    for name in ("vgg16_block1", "noise_vgg16_block1"):
        (runs / "inversion" / name / "inversion.json").write_text(json.dumps(of))  # not that of pretrained/
    result, calls = evidence("decoders", "deep", "inversion")
    assert result.returncode == 0, result.stderr
    again = [value for _, flags in calls for flag, value in pairwise(flags) if flag == "--ckpt"]
    assert again == [f"{run}/best.pt", f"{muon}/seed42/best.pt", "pretrained/vgg16_block1.pt"]


def test_the_pretrained_decoders_are_what_it_trains(evidence, tmp_path):
    """Each is of a run that pretrained/README.md names, with the configuration of the command told there."""
    text = (REPOSITORY / "pretrained" / "README.md").read_text()
    result, calls = evidence("deep")
    assert result.returncode == 0, result.stderr
    trained = [flags for program, flags in calls if program == "train.py"]
    trained.append(re.search(r"^python train.py (.*?) *(?:#.*)?$", text, re.M)[1].split())
    told = {}
    for flags in trained:
        config = config_of(parse_train(flags))
        config["out"] = config["out"].replace(str(tmp_path / "runs"), "runs/evidence")
        told[config["out"]] = config
    made = dict(re.findall(r"^half (\S+) (\S+)$", text, re.M))
    assert set(made) == {path.stem for path in (REPOSITORY / "pretrained").glob("*.pt")}
    for name, run in made.items():
        checkpoint = load(REPOSITORY / "pretrained" / f"{name}.pt")
        gone = {"feedback": None, "own_weights": False}  # flags that were there then
        assert completed(checkpoint["config"]) == told[run] | gone
        assert checkpoint["encoder_sha256"]


def test_an_unknown_group(evidence):
    result, calls = evidence("loss", "losses")
    assert (result.returncode, calls) == (2, [])
    names = "loss decoders muon feedback weights layers data deep natural lite0 published inversion"
    assert result.stderr == f"error: losses: is none of {names}\n"


def test_figures_of_what_it_measured(tmp_path, monkeypatch, error_line):
    runs = tmp_path / "runs"
    names = [f"layers/{name}" for name in (*RESOLUTION.values(), *DEPTH.values())]
    for name in (*names, *(f"data/{count}" for count in PHOTOGRAPHS)):
        for seed in (1, 2):
            run = runs / name / f"seed{seed}"
            run.mkdir(parents=True, exist_ok=True)
            about = {"data": "natural", "protocol": "documented", "images": 1, "size": 224}
            (run / "metrics.json").write_text(json.dumps(about))
            (run / "per_image.csv").write_text(f"image,psnr,ssim,lpips\na,{20 + seed},0.5,0.5\n")

    for name in (*INVERTED, *(f"noise_{layer}" for layer in INVERTED)):
        folder = runs / "inversion" / name
        folder.mkdir(parents=True)
        metrics = {"start": {"psnr": {"mean": 20}}, "inversion": {"psnr": {"mean": 25}}}
        (folder / "inversion.json").write_text(json.dumps({"metrics": metrics}))

    monkeypatch.setattr(sys, "argv", ["figures.py", str(runs), str(tmp_path)])
    history = runs / "published" / "seed42" / "history.csv"
    assert status(figures.main) == 2
    assert error_line().startswith(f"{history}: is not there")
    history.parent.mkdir(parents=True)
    history.write_text("epoch,val_loss,val_mse,val_lpips\n1,0.7,1.1,0.3\n2,0.5,0.8,0.2\n")
    inversion = runs / "inversion" / INVERTED[0] / "inversion.json"
    hidden = inversion.rename(inversion.with_suffix(".hidden"))
    assert status(figures.main) == 2
    assert error_line() == f"{inversion}: is not there; bash evidence.sh makes it"
    hidden.rename(inversion)
    before = inversion.read_text()
    old = {"ckpt": "best.pt", "ckpt_sha256": "0" * 64}
    inversion.write_text(json.dumps(json.loads(before) | old))
    inversion.with_name("best.pt").write_text("a better one")
    assert status(figures.main) == 2
    assert error_line() == f"{inversion} is of an earlier best.pt; invert again"
    inversion.write_text(before)
    assert status(figures.main) == 0
    for name in ("published.png", "answers.png"):
        with Image.open(tmp_path / name) as figure:
            assert figure.width > 1000
            assert len(figure.convert("RGB").getcolors(10**6)) > 50  # lines, points and letters
