"""docs/evidence.sh, with a python that only takes notes: what is trained, at which rates, and compared."""

import hashlib
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, read_csv, status
from PIL import Image

from docs import collect, figures, published
from docs.figures import DEPTH, INVERTED, PHOTOGRAPHS, RESOLUTION
from flags import config_of, parse_evaluate, parse_invert, parse_train, with_defaults
from utils import load

STUB = """#!/bin/sh
if [ "$1" = - ]; then exec "$PYTHON" -SE "$@"; fi
program=$1
shift
{ printf %s "$program"; printf '\\t%s' "$@"; echo; } >> "$CALLS"
while [ $# -gt 1 ]; do
  case $1 in
    --out) out=$2 ;;
    --ckpt) ckpt=$2 ;;
    --lr) lr=$2 ;;
  esac
  shift
done
case $lr in # 2e-3 is the best, 1.4e-3 the next
  2e-3) loss=1 ;;
  1.4e-3) loss=2 ;;
  *) loss=3 ;;
esac
case $program$ckpt in
  train.py) file=$out/history.csv ;;
  invert.py*) file=$out/inversion.json ;;
  evaluate.py?*) file=${out:-${ckpt%/*}}/metrics.json ;;
  *) exit ;;
esac
[ -d "${file%/*}" ] || mkdir -p "${file%/*}"
printf 'epoch,val_loss\\n1,9\\n2,%s\\n' $loss > "$file"
"""


@pytest.fixture
def evidence(tmp_path):
    """Run docs/evidence.sh with a stub of python: the flags of each program, and its errors."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def call(*groups, code=0, **variables):
        notes = tmp_path / "calls"
        notes.write_text("")
        there = {"CALLS": str(notes), "PYTHON": sys.executable, "RUNS": str(tmp_path / "runs")}
        there["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        options = {"cwd": REPOSITORY, "capture_output": True, "text": True}
        options["env"] = os.environ | there | variables
        result = subprocess.run(["bash", "docs/evidence.sh", *groups], **options)
        assert result.returncode == code, result.stderr
        calls = {"train.py": [], "evaluate.py": [], "invert.py": [], "docs/lite0.py": []}
        for line in notes.read_text().splitlines():
            program, *flags = line.split("\t")
            calls[program].append(flags)
        return calls, result.stderr

    return call


def test_what_the_shell_would_not_take_as_it_is(evidence, tmp_path):
    """RUNS is a folder's name, SEEDS numbers, and each group one of those that there are."""
    folder = f"{tmp_path}/r&d [1]"
    calls, _ = evidence("weights", RUNS=folder, SEEDS="1")
    compared = parse_evaluate(calls["evaluate.py"][-1]).compare
    assert compared == [f"{folder}/loss/hybrid", f"{folder}/weights/block1"]
    for groups, seeds, message in (
        (["loss"], "1 README.m?", 'error: SEEDS="1 README.m?": are whole numbers'),
        (["loss", "losses"], "1", "error: losses: is none of loss decoders "),
    ):
        calls, errors = evidence(*groups, code=2, SEEDS=seeds)
        assert errors.startswith(message) and errors.count("\n") == 1 and not any(calls.values())


def test_everything_is_trained_evaluated_and_compared(evidence, tmp_path):
    calls, _ = evidence()
    trained = [parse_train(flags) for flags in calls["train.py"]]
    evaluated = [parse_evaluate(flags) for flags in calls["evaluate.py"] if "--ckpt" in flags]
    inverted = [parse_invert(flags) for flags in calls["invert.py"]]
    runs = tmp_path / "runs"
    made = {args.out for args in trained if "/rates/" not in args.out}
    measured = {args.out or os.path.dirname(args.ckpt) for args in evaluated}
    assert len(measured) == len(evaluated) and {os.path.dirname(args.ckpt) for args in evaluated} == made
    for flags in calls["evaluate.py"]:
        for folder in parse_evaluate(flags).compare or []:
            seeds = (42,) if re.search("/deep/|/lite0/", folder) else (1, 2, 3)
            assert folder in measured or {f"{folder}/seed{seed}" for seed in seeds} <= measured
    residual = [args for args in trained if args.out.startswith(str(runs / "decoders" / "residual"))]
    found = {(args.lr, args.seed, args.decoder) for args in residual}
    assert found == {(0.002, seed, "residual") for seed in (1, 2, 3)}  # the best of two rates
    assert all(args.encoder or Path(REPOSITORY, args.ckpt).exists() for args in inverted)
    drawn = {f"layers/{name}" for name in (*RESOLUTION.values(), *DEPTH.values())}
    drawn |= {f"inversion/{start}{layer}" for layer in INVERTED for start in ("", "noise_")}
    drawn |= {f"data/{count}" for count in PHOTOGRAPHS} | {"published/seed42"}
    assert drawn <= {str(path.relative_to(runs)) for path in runs.glob("*/*")}  # docs/figures.py finds them


def test_what_is_done_is_not_done_again(evidence, tmp_path):
    """No rate is tried again, either; of runs one of which is gone, only that one is trained."""
    evidence("decoders", "inversion")
    calls, _ = evidence("decoders", "inversion")
    assert not any("--ckpt" in flags for flags in calls["evaluate.py"])
    assert not calls["train.py"] and not calls["invert.py"]
    run = tmp_path / "runs" / "decoders" / "residual" / "seed2"
    (run / "metrics.json").unlink()
    calls, _ = evidence("decoders")
    once = {(args.out, args.lr) for args in map(parse_train, calls["train.py"]) if "/rates/" not in args.out}
    assert once == {(str(run), 0.002)}


def test_what_is_of_an_earlier_best_is_measured_again(evidence, tmp_path):
    evidence("decoders", "inversion")
    runs = tmp_path / "runs"
    old, good = runs / "decoders" / "residual" / "seed2", runs / "loss" / "mse" / "seed1"
    of = json.dumps({"ckpt_sha256": hashlib.sha256(b"decoder").hexdigest()})
    for run, decoder in ((old, "a better one"), (good, "decoder")):
        (run / "metrics.json").write_text(of)
        (run / "best.pt").write_text(decoder)
    (runs / "inversion" / "vgg16_block1" / "inversion.json").write_text(of)  # not that of pretrained/
    calls, _ = evidence("decoders", "inversion")
    flags = [*calls["evaluate.py"], *calls["invert.py"]]
    again = [value for each in flags for flag, value in pairwise(each) if flag == "--ckpt"]
    assert again == [f"{old}/best.pt", "pretrained/vgg16_block1.pt"]


def test_the_pretrained_decoders_are_what_it_trains(evidence, tmp_path):
    """Each is of a run in docs/tables/pretrained.csv, by the command that pretrained/README.md tells."""
    text = (REPOSITORY / "pretrained" / "README.md").read_text()
    calls, _ = evidence("deep")
    written = re.search(r"^python train.py (.*?) *(?:#.*)?$", text, re.M)[1].split()
    told = {}
    for flags in (*calls["train.py"], written):
        config = config_of(parse_train(flags))
        config["out"] = config["out"].replace(str(tmp_path / "runs"), "runs/evidence")
        told[config["out"]] = config
    rows = read_csv(REPOSITORY / "docs" / "tables" / "pretrained.csv")
    made = {row["file"].removesuffix(".pt"): row["run"] for row in rows}
    assert set(made) == {path.stem for path in (REPOSITORY / "pretrained").glob("*.pt")}
    for name, run in made.items():
        checkpoint = load(REPOSITORY / "pretrained" / f"{name}.pt")
        gone = {"feedback": None, "own_weights": False}  # flags that were there then
        assert with_defaults(checkpoint["config"]) == told[run] | gone
        assert checkpoint["encoder_sha256"]


def test_figures_of_what_it_measured(tmp_path, monkeypatch, refused):
    runs = tmp_path / "runs"

    def write(name, text):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_text(text)

    layers = [f"layers/{name}" for name in (*RESOLUTION.values(), *DEPTH.values())]
    for name in (*layers, *(f"data/{count}" for count in PHOTOGRAPHS)):
        for seed in (1, 2):
            about = {"data": "natural", "protocol": "documented", "images": 1, "size": 224}
            write(f"{name}/seed{seed}/metrics.json", json.dumps(about))
            write(f"{name}/seed{seed}/per_image.csv", f"image,psnr,ssim,lpips\na,{20 + seed},0.5,0.5\n")
    found = {"metrics": {"start": {"psnr": {"mean": 20}}, "inversion": {"psnr": {"mean": 25}}}}
    for name in (*INVERTED, *(f"noise_{layer}" for layer in INVERTED)):
        write(f"inversion/{name}/inversion.json", json.dumps(found))

    monkeypatch.setattr(sys, "argv", ["figures.py", str(runs), str(tmp_path)])
    history = "published/seed42/history.csv"
    line = f"{runs / history}: is not there; bash docs/evidence.sh makes it"
    assert refused(status, figures.main) == line
    write(history, "epoch,val_loss,val_mse,val_lpips\n1,0.7,1.1,0.3\n2,0.5,0.8,0.2\n")
    assert status(figures.main) == 0
    for name in ("published.png", "answers.png"):
        with Image.open(tmp_path / name) as figure:
            assert figure.width > 1000
            assert len(figure.convert("RGB").getcolors(10**6)) > 50  # lines, points and letters


def test_beside_the_studys_table_and_log(tmp_path, monkeypatch, capsys, refused):
    """Correlations by numpy's own, of 100 images named as DIV2K's."""
    draws = np.random.default_rng(0)
    ours, study = draws.normal(17, 2, (2, 2, 100))  # PSNR and SSIM
    names = [f"{number:04}.png" for number in range(801, 901)]

    def write(name, head, *columns):
        lines = [",".join(map(str, row)) for row in zip(*columns, strict=True)]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join([head, *lines]))

    write("run/history.csv", "epoch,val_loss,val_mse,val_lpips", [1, 2], [0.7, 0.5], [1.1, 0.8], [0.3, 0.2])
    write("study/history.csv", "epoch,val_loss,val_mse,val_lpips", [1, 2], [0.8, 0.6], [1.2, 0.9], [0.4, 0.1])
    write("div2k/per_image.csv", "image,psnr,ssim", names, *ours)
    write("study/per_image.csv", "image_idx,psnr,ssim", range(100), *study)
    write("study/panels.csv", "psnr_to_normalised_clipped,psnr_to_photograph", [30] * 99 + [10], [12] * 100)
    (tmp_path / "tables").mkdir()
    monkeypatch.setattr(published, "DOCS", tmp_path)
    folders = [tmp_path / name for name in ("run", "div2k", "study")]
    published.compare(*folders)
    screen = capsys.readouterr().out
    assert f"psnr: correlation {np.corrcoef(ours[0], study[0])[0, 1]:.3f} over 100 images" in screen
    assert f"ssim difference: {(ours[1] - study[1]).mean():.3f} ±" in screen
    assert "MSE, epoch 2: here 0.8000, study 0.9000" in screen
    assert "panels nearer to the normalised image: 99 of 100" in screen
    rows = read_csv(tmp_path / "tables" / "published_images.csv")
    assert [float(row["psnr_study"]) for row in rows] == study[0].tolist() and rows[99]["image"] == "0900"
    assert (tmp_path / "erratum.png").exists()
    write("div2k/per_image.csv", "image,psnr,ssim", sorted(names, reverse=True), *ours)
    assert "should be of DIV2K 0801 to 0900, is of 0900" in refused(
        lambda *_: status(lambda: published.compare(*folders))
    )


def test_results_of_folders_as_one_table(trained, tmp_path, run_evaluate, monkeypatch):
    for name in ("a", "b"):
        assert run_evaluate("--ckpt", trained / "best.pt", "--out", tmp_path / name, "--quiet") == 0
    flags = [tmp_path / "table.csv", tmp_path / "a", tmp_path / "b"]
    monkeypatch.setattr(sys, "argv", ["collect.py", *map(str, flags)])
    assert status(collect.main) == 0
    found, rows = json.loads((tmp_path / "a" / "metrics.json").read_text()), read_csv(tmp_path / "table.csv")
    assert [row["run"] for row in rows] == ["a", "b"] and rows[0]["images"] == "3"
    assert float(rows[0]["psnr"]) == pytest.approx(found["psnr"]["mean"], abs=1e-5)
