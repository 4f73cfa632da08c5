"""run_all.sh and what it reports; reconstructing one's own pictures."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from baselines import BASELINES
from flags import parse_train
from study import DEFINING, INPUT, PUBLISHED

FLAGS = ["--weights", "random", "--epochs", "1", "--batch-size", "1", "--quiet"]


def run_all(flags, environment, path, stderr):
    """The started run_all.sh; environment: more variables; path: the folder whose python it takes."""
    return subprocess.Popen(
        ["bash", "run_all.sh", *flags],
        cwd=REPOSITORY,
        env=os.environ | environment | {"PATH": f"{path}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else ignored, behind nohup
    )


@pytest.fixture
def grid(photos, tmp_path):
    """Start run_all.sh on two training photographs, with a folder of results of its own."""
    folder = tmp_path / "few"
    for split, names in (("train", ("00.png", "05.png")), ("test", ("00.jpg",))):
        (folder / split).mkdir(parents=True)
        for name in names:
            shutil.copy(photos / split / name, folder / split)

    def start(only, *flags, **environment):
        environment = {"RUNS": str(tmp_path / "runs"), "ONLY": only} | environment
        flags = ["--data", str(folder), *FLAGS, *flags]
        return run_all(flags, environment, Path(sys.executable).parent, subprocess.STDOUT)

    return start


@pytest.fixture
def stubbed(tmp_path):
    """Start run_all.sh on experiment 1 with a shell script in the place of python."""

    def start(script, *flags, **environment):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}")
        (tmp_path / "python").chmod(0o755)
        environment = {"RUNS": str(tmp_path / "runs"), "ONLY": "vgg16_block1_tconv"} | environment
        return run_all(flags, environment, tmp_path, subprocess.PIPE)

    return start


def results(tmp_path):
    with open(tmp_path / "runs" / "results.csv", newline="") as file:
        return {row["experiment"]: row for row in csv.DictReader(file)}


def test_grid_goes_on_past_a_failure_and_says_so(grid, tmp_path, run_evaluate):
    runs = tmp_path / "runs"
    blocker = runs / "01_vgg16_block1_tconv" / "last.pt"
    blocker.parent.mkdir(parents=True)
    blocker.write_text("not a checkpoint")
    assert run_evaluate("--baselines", "--data", tmp_path / "few", "--out", runs, "--quiet") == 0
    process = grid("vgg16_block[12]_tconv")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    rows = results(tmp_path)
    assert len(rows) == 15 + len(BASELINES) and rows["mean colour"]["data"] == "few"
    bad, good = rows["01_vgg16_block1_tconv"], rows["02_vgg16_block2_tconv"]
    by_hand = (128 * 64 * 16 + 64) + 2 * 64 + (64 * 32 * 16 + 32) + 2 * 32 + (32 * 3 * 9 + 3)
    assert float(good["published_psnr"]) == 16.89 and 5 < float(good["psnr"]) < 40
    assert good["parameters"] == str(by_hand)
    assert float(good["minutes"]) > 0 and "random weights" in good["note"]
    below = float(good["psnr"]) < float(rows["mean colour"]["psnr"])
    assert ("below mean colour" in good["note"]) == below
    assert bad["psnr"] == "" and "last.pt: not a checkpoint" in bad["note"]
    assert rows["03_vgg16_block3_tconv"]["note"] == "not run"
    table = (tmp_path / "runs" / "results.md").read_text()
    assert f"16.89 → {float(good['psnr']):.2f}" in table and "protocol documented" in table
    assert "| few |" in table and str(tmp_path / "few") not in table
    assert "01_vgg16_block1_tconv: failed" in output and table.splitlines()[-1] in output
    assert "=== baselines: done, of " in output
    assert "02_vgg16_block2_tconv (experiment 2 of 2, about " in output and " min left for all)" in output
    page = (tmp_path / "runs" / "report.html").read_text()
    assert '"note": "random weights (control)' in page and "last.pt: not a checkpoint" in page
    with Image.open(tmp_path / "runs" / "results.png") as picture:
        assert picture.width > 1000


def test_array_task_killed_half_way_goes_on(grid, tmp_path):
    name = "11_resnet34_layer1_tconv"

    def start():
        return grid("*", "--epochs", "4", SLURM_ARRAY_TASK_ID="11")

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "baselines.json").touch()  # those of the grid have a test of their own
    process = start()
    while process.poll() is None and not (tmp_path / "runs" / name / "history.csv").exists():
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    process.kill()
    process.communicate()
    process = start()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "resumed after epoch" in output, output
    measured = [experiment for experiment, row in results(tmp_path).items() if row["psnr"]]
    assert measured == [name]


@pytest.mark.parametrize("status", [0, 3, 143])
def test_grid_does_what_is_missing(stubbed, tmp_path, status):
    """Baselines too, once, on the same data; their failure does not hide the report, a signal ends all."""
    runs = tmp_path / "runs"
    notes = f'echo "$@" >> "{tmp_path}/calls"\n'  # of its arguments
    stub = notes + f'if [ "$2" = --baselines ]; then exit {status}; fi\n'
    flags = ["--data", "my photos", "--epochs=1", "--protocol=published", "--device", "cpu", "--quiet"]

    def calls():
        process = stubbed(stub, *flags)
        process.communicate()
        lines = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        return process.returncode, [line.split()[1] for line in lines], lines

    code, kinds, lines = calls()
    assert kinds[:3] == ["--config", "--ckpt", "--baselines"]
    run = f"{runs}/01_vgg16_block1_tconv"
    config = "configs/01_vgg16_block1_tconv.yaml"
    assert lines[0] == f"train.py --config {config} --out {run} --resume {' '.join(flags)}"
    assert lines[1] == f"evaluate.py --ckpt {run}/best.pt --device cpu --quiet"
    wanted = f"--out {runs} --data my photos --protocol=published --device cpu --quiet"
    assert lines[2] == f"evaluate.py --baselines {wanted}"
    assert (code, kinds[3:]) == {0: (0, ["--report"]), 3: (1, ["--report"]), 143: (143, [])}[status]
    (runs / "baselines.json").write_text("{}")
    assert calls()[:2] == (0, ["--config", "--ckpt", "--report"])
    (runs / "01_vgg16_block1_tconv" / "metrics.json").write_text("{}")  # what is done is not done again
    assert calls()[:2] == (0, ["--report"])
    best = runs / "01_vgg16_block1_tconv" / "best.pt"
    of = {"ckpt": "best.pt", "ckpt_sha256": hashlib.sha256(b"decoder").hexdigest()}
    for content, kinds in (("decoder", ["--report"]), ("a better one", ["--config", "--ckpt", "--report"])):
        best.write_text(content)
        best.with_name("metrics.json").write_text(json.dumps(of, indent=2))
        assert calls()[:2] == (0, kinds)
    (runs / "baselines.json").write_text(json.dumps({"data": "my photos", "images": 3}, indent=2))
    assert "=== baselines: done, of my photos (rm " in stubbed(stub, *flags).communicate()[0]


def test_seeds_have_folders_of_their_own(stubbed, tmp_path):
    notes = f'echo "$@" >> "{tmp_path}/calls"\n'  # of its arguments
    process = stubbed(notes, SEEDS="1 7")
    process.communicate()
    assert process.returncode == 0
    lines = (tmp_path / "calls").read_text().splitlines()
    for seed, line, evaluation in zip((1, 7), lines[0:4:2], lines[1:4:2], strict=True):
        out = f"{tmp_path}/runs/01_vgg16_block1_tconv/seed{seed}"
        file = "configs/01_vgg16_block1_tconv.yaml"
        assert line == f"train.py --config {file} --out {out} --resume --seed {seed}"
        assert evaluation == f"evaluate.py --ckpt {out}/best.pt"
    process = stubbed(notes, "--seed", "3", SEEDS="1 7")
    assert process.communicate()[1] == 'error: --seed: SEEDS="1 7" has them already\n'
    assert process.returncode == 2


def test_array_has_fifteen_tasks(grid):
    process = grid("*", SLURM_ARRAY_TASK_ID="16")
    assert "is not 1 to 15" in process.communicate(timeout=60)[0] and process.returncode == 2


def test_signal_to_the_shell_alone_is_passed_on(grid, tmp_path):
    """As a batch system sends it: the training saves, and the shell ends with its status."""
    process = grid("vgg16_block1_tconv", "--epochs", "500")
    history = tmp_path / "runs" / "01_vgg16_block1_tconv" / "history.csv"
    while process.poll() is None and not history.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGUSR1
    assert "go on with: python train.py" in output


def test_interrupt_to_the_shell_alone_is_passed_on(stubbed, tmp_path):
    script = f"echo $1 >> {tmp_path}/calls\ntrap 'exit 130' INT\ntouch {tmp_path}/ready\n"
    process = stubbed(f"{script}while :; do sleep 0.1; done\n")
    while process.poll() is None and not (tmp_path / "ready").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and (tmp_path / "calls").read_text() == "train.py\n"


@pytest.mark.parametrize(
    "flag", ["--encoder=alexnet", *(f"--{name.replace('_', '-')}" for name in (*DEFINING, *INPUT, "fusion"))]
)
def test_flags_that_make_an_experiment_are_refused(grid, tmp_path, flag):
    process = grid("*", flag, "8")
    assert "is what makes an experiment" in process.communicate(timeout=60)[0] and process.returncode == 2
    assert not (tmp_path / "runs").exists()


def test_flags_that_would_mix_the_experiments_are_refused(grid):
    process = grid("*", "--out", "elsewhere")
    assert "RUNS=FOLDER names" in process.communicate(timeout=60)[0] and process.returncode == 2


def test_folder_of_the_script_comes_before_that_of_the_allocation(grid, tmp_path):
    """In an salloc shell SLURM_SUBMIT_DIR is wherever salloc was called."""
    process = grid("vgg19*", SLURM_SUBMIT_DIR=str(tmp_path))
    assert "matches none of: configs/01_" in process.communicate(timeout=60)[0] and process.returncode == 2
    copy = shutil.copy(REPOSITORY / "run_all.sh", tmp_path / "slurm_script")
    done = subprocess.run(
        ["bash", copy], env=os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)}, capture_output=True
    )
    assert b"has no train.py" in done.stderr and done.returncode == 2
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(REPOSITORY), "ONLY": "vgg19*"}
    done = subprocess.run(["bash", copy], env=environment, capture_output=True)
    assert b"matches none of: configs/01_" in done.stderr


def test_only_that_matches_nothing(grid):
    process = grid("vgg19*")
    assert "matches none" in process.communicate(timeout=60)[0] and process.returncode == 2


def test_configs_are_the_fifteen_experiments():
    names = [path.stem for path in sorted((REPOSITORY / "configs").glob("[0-9]*.yaml"))]
    assert names == list(PUBLISHED)
    for name in names:
        args = parse_train(["--config", str(REPOSITORY / "configs" / f"{name}.yaml")])
        number, rest = name.split("_", 1)
        assert rest.startswith(f"{args.encoder}_{args.layer}_{args.decoder}")
        weights = {"mse": (1, 0), "lpips": (0, 1)}.get(name.rsplit("_", 1)[1], (0.5, 0.5))
        assert (args.mse_weight, args.lpips_weight) == weights
        assert (args.epochs, args.lr, args.batch_size) == (30, 1e-4, 4)


# --- one's own pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["native", "224"])
def test_own_pictures(trained, tmp_path, run_evaluate, capsys, size):
    (tmp_path / "dir").mkdir()
    wide = Image.effect_mandelbrot((500, 90), (-2, -1, 1, 1), 20).convert("CMYK")
    wide.save(tmp_path / "wide.jpg")
    Image.new("LA", (7, 300), (128, 40)).save(tmp_path / "dir" / "thin.png")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "dir" / "wide.png")
    flags = [
        "--ckpt",
        trained / "best.pt",
        "--out",
        tmp_path / "out",
        "--images",
        tmp_path / "wide.jpg",
        tmp_path / "dir",
        *(["--size", "224"] if size == "224" else []),
    ]
    assert run_evaluate(*flags) == 0
    files = sorted((tmp_path / "out" / "images").iterdir())
    how = "-224" if size == "224" else ""
    assert [file.name for file in files] == [f"{name}{how}.png" for name in ("thin", "wide-1", "wide-3")]
    assert capsys.readouterr().out.count(" dB, ") == 3
    own = ((7, 300), (500, 90), (20, 20))
    for file, (width, height) in zip(files, own if size == "native" else 3 * [(224, 224)], strict=True):
        with Image.open(file) as picture:
            assert picture.size == (3 * width, height)
            original, output, difference = (
                part.astype(int) for part in np.split(np.asarray(picture), 3, axis=1)
            )
        expected = (5 * np.abs(original - output)).clip(0, 255)
        assert np.array_equal(difference, expected)
    before = {file: file.read_bytes() for file in files}
    assert run_evaluate(*flags) == 0  # its own pictures it may write again
    assert {file: file.read_bytes() for file in files} == before


def test_unrelated_picture_is_never_replaced(trained, tmp_path, run_evaluate, error_line):
    """Neither a person's own images/cat.png, nor one that is damaged, nor the strip of another cat.jpg."""
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "cat.jpg")
    flags = ("--ckpt", trained / "best.pt", "--out", tmp_path, "--images", tmp_path / "cat.jpg", "--quiet")
    (tmp_path / "images").mkdir()
    strip = tmp_path / "images" / "cat.png"
    Image.new("RGB", (20, 20), "red").save(strip)
    before = strip.read_bytes()
    assert run_evaluate(*flags) == 2
    assert "cat.png: would be overwritten" in error_line() and strip.read_bytes() == before
    strip.unlink()
    assert run_evaluate(*flags) == 0
    whole = strip.read_bytes()
    for damaged in (b"no picture", whole[:20], whole[:30] + bytes(12) + whole[42:]):
        strip.write_bytes(damaged)
        assert run_evaluate(*flags) == 2
        assert "cat.png: would be overwritten" in error_line() and strip.read_bytes() == damaged
    strip.write_bytes(whole)
    Image.new("RGB", (20, 20), "green").save(tmp_path / "cat.jpg")
    assert run_evaluate(*flags) == 2
    assert "cat.png: would be overwritten" in error_line() and strip.read_bytes() == whole


def test_own_pictures_are_never_overwritten(trained, tmp_path, run_evaluate, error_line):
    names = ["wide.jpg", "wide.png", "wide-1.jpg"]
    (tmp_path / "images").mkdir()
    for name in names:
        Image.new("RGB", (20, 20), "red").save(tmp_path / "images" / name)
    before = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    for pictures, status in ((names[1:2], 2), (names, 0)):  # the picture itself, and two of one name
        paths = [tmp_path / "images" / name for name in pictures]
        flags = ("--ckpt", trained / "best.pt", "--out", tmp_path, "--quiet", "--images", *paths)
        assert run_evaluate(*flags) == status
        if status:
            assert "would be overwritten" in error_line()
        assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("kind", ["missing", "bad", "empty"])
def test_bad_picture_is_named(trained, tmp_path, run_evaluate, error_line, kind):
    path = tmp_path / ("folder" if kind == "empty" else "picture.png")
    if kind == "bad":
        path.write_text("no picture")
    elif kind == "empty":
        path.mkdir()
    assert run_evaluate("--ckpt", trained / "best.pt", "--out", tmp_path / "out", "--images", path) == 2
    assert path.name in error_line()
    assert not list(tmp_path.glob("out/images/*"))


def test_a_run_that_goes_on_or_was_stopped_has_not_failed(stubbed, tmp_path):
    """Its standard error is in error.txt once it has failed, and only then."""
    runs = tmp_path / "runs"
    script = f"""if [ "$1" = evaluate.py ]; then exit 0; fi
echo "error: what $STATUS says" >&2
sleep 0.5
ls {runs}/*/ >> {tmp_path}/seen
exit $STATUS
"""
    found = {}
    for status in (3, 143, 0):
        process = stubbed(script, STATUS=str(status))
        process.communicate()
        assert process.returncode == (1 if status == 3 else status)
        files = list((runs / "01_vgg16_block1_tconv").iterdir())
        found[status] = {file.name: file.read_text() for file in files}
    assert (tmp_path / "seen").read_text() == ""
    assert found == {3: {"error.txt": "error: what 3 says\n"}, 143: {}, 0: {}}


def test_seeds_want_a_folder_without_a_run(stubbed, tmp_path):
    """What lies in RUNS/NAME itself would be shown in their place; nor is a run put before them."""
    for run in ("01_vgg16_block1_tconv", "02_vgg16_block2_tconv/seed1"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "metrics.json").write_text("{}")
    for number, seeds, message in ((1, "1 2", "holds a run without SEEDS"), (2, "", "holds runs of SEEDS")):
        process = stubbed("exit 1\n", SEEDS=seeds, ONLY=f"vgg16_block{number}_tconv")
        (line,) = process.communicate()[1].splitlines()
        assert process.returncode == 2 and message in line


def test_what_the_shell_would_take_for_a_pattern(stubbed, tmp_path):
    """RUNS is a folder's name as it is, SEEDS numbers."""
    run = tmp_path / "o[1]" / "01_vgg16_block1_tconv" / "seed1"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text("{}")
    process = stubbed("exit 1\n", RUNS=str(tmp_path / "o[1]"))
    (line,) = process.communicate()[1].splitlines()
    assert process.returncode == 2 and "holds runs of SEEDS" in line
    for seeds in ("*", "1 README.m?", "one"):
        process = stubbed(f"touch {tmp_path}/called\n", SEEDS=seeds)
        (line,) = process.communicate()[1].splitlines()
        assert process.returncode == 2 and f'SEEDS="{seeds}"' in line and not (tmp_path / "called").exists()
    process = stubbed("exit 0\n", SEEDS="1\n2")  # as seq has them
    assert "seed2 (experiment 2 of 2" in process.communicate()[0] and process.returncode == 0


def test_help_is_help(stubbed, tmp_path):
    process = stubbed("exit 1\n", "--help")
    shown = process.communicate()[0]
    assert process.returncode == 0 and 'SEEDS="1 2 3" bash run_all.sh' in shown
    assert not shown.count("#") and not (tmp_path / "runs").exists()
