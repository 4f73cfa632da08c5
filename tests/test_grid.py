"""run_all.sh: what it starts, what it leaves out, and what it says."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import REPOSITORY, read_csv

from flags import parse_train
from report.baselines import BASELINES
from report.results import EXPERIMENT_KEYS, PUBLISHED_RESULTS
from utils import INPUT_FLAGS

NAME = "01_vgg16_block1_tconv"


@pytest.fixture
def start(tmp_path):
    """Start run_all.sh on experiment 1 with a script in the place of python, by default one that notes."""

    def call(*flags, script=f'echo "$@" >> "{tmp_path}/calls"\n', **environment):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{script}")
        (tmp_path / "python").chmod(0o755)
        there = {"RUNS": str(tmp_path / "runs"), "PATH": f"{tmp_path}:{os.environ['PATH']}", "ONLY": NAME}
        return subprocess.Popen(
            ["bash", "run_all.sh", *flags],
            cwd=REPOSITORY,
            env=os.environ | there | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else ignored, behind nohup
        )

    return call


@pytest.fixture
def finish(start):
    """The status, output and errors of run_all.sh, started so."""

    def call(*flags, **options):
        process = start(*flags, **options)
        output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    return call


@pytest.fixture
def calls(tmp_path):
    """What python was asked for since the last look."""

    def read():
        lines = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        return lines

    return read


def test_grid_goes_on_past_a_failure_and_says_so(photos, tmp_path, run_train, run_evaluate, finish, calls):
    """What it asks python for is done here, afterwards."""
    script = f"""echo "$@" >> {tmp_path}/calls
case "$*" in train.py*{NAME}*) echo "error: no memory" >&2 && exit 2 ;; esac
"""
    flags = ("--data", str(photos), "--weights", "random", "--epochs", "1", "--crop", "32", "--quiet")
    status, output, errors = finish(*flags, script=script, ONLY="vgg16_block[12]_tconv")
    assert status == 1 and f"{NAME}: failed with status 2" in errors
    assert "02_vgg16_block2_tconv (experiment 2 of 2, about " in output and " min left for all)" in output
    scripts = {"train.py": run_train, "evaluate.py": run_evaluate}
    for line in calls()[1:]:
        script, *flags = line.split()
        assert scripts[script](*flags) == 0

    rows = {row["experiment"]: row for row in read_csv(tmp_path / "runs" / "results.csv")}
    assert len(rows) == 15 + len(BASELINES) and rows["mean colour"]["data"] == photos.name
    bad, good = rows[NAME], rows["02_vgg16_block2_tconv"]
    by_hand = (128 * 64 * 16 + 64) + 2 * 64 + (64 * 32 * 16 + 32) + 2 * 32 + (32 * 3 * 9 + 3)
    assert float(good["published_psnr"]) == 16.89 and 5 < float(good["psnr"]) < 40
    assert good["parameters"] == str(by_hand) and "random weights" in good["note"]
    assert bad["psnr"] == "" and bad["note"] == "failed: error: no memory"
    assert rows["03_vgg16_block3_tconv"]["note"] == "not run"


def test_array_task_killed_half_way_goes_on(start, finish, calls, tmp_path):
    script = f"echo $* >> {tmp_path}/calls\n[ $1 = train.py ] && kill -9 $PPID $$\n"
    task = {"ONLY": "*", "SLURM_ARRAY_TASK_ID": "11"}
    run = f"{tmp_path}/runs/11_resnet34_layer1_tconv"
    command = f"train.py --config configs/11_resnet34_layer1_tconv.yaml --out {run} --resume"
    process = start(script=script, **task)
    process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL and calls() == [command]
    assert finish(**task)[0] == 0
    assert calls()[:2] == [command, f"evaluate.py --ckpt {run}/best.pt"]


@pytest.mark.parametrize(("status", "code"), [(0, 0), (3, 1), (143, 143)])
def test_baselines_are_measured_on_the_same_data(finish, calls, tmp_path, status, code):
    """Their failure does not hide the report, a signal ends all."""
    runs = tmp_path / "runs"
    script = f'echo "$@" >> {tmp_path}/calls\n[ "$2" != --baselines ] || exit {status}\n'
    flags = ["--data", "my photos", "--epochs=1", "--protocol=published", "--device", "cpu", "--quiet"]
    assert finish(*flags, script=script)[0] == code
    train, evaluate, baselines, *report = calls()
    assert train == f"train.py --config configs/{NAME}.yaml --out {runs}/{NAME} --resume {' '.join(flags)}"
    assert evaluate == f"evaluate.py --ckpt {runs}/{NAME}/best.pt --device cpu --quiet"
    wanted = f"--out {runs} --data my photos --protocol=published --device cpu --quiet"
    assert baselines == f"evaluate.py --baselines {wanted}"
    assert report == ([] if code == 143 else [f"evaluate.py --report {runs}"])


def test_grid_does_what_is_missing(finish, calls, tmp_path):
    """Or of an earlier best.pt."""
    run = tmp_path / "runs" / NAME
    run.mkdir(parents=True)
    (run.parent / "baselines.json").write_text(json.dumps({"data": "my photos", "images": 3}, indent=2))
    of = {"ckpt": "best.pt", "ckpt_sha256": hashlib.sha256(b"decoder").hexdigest()}
    for result, decoder, kinds in (
        ({}, "decoder", ["--report"]),
        (of, "decoder", ["--report"]),
        (of, "a better one", ["--config", "--ckpt", "--report"]),
    ):
        (run / "best.pt").write_text(decoder)
        (run / "metrics.json").write_text(json.dumps(result, indent=2))
        status, output, _ = finish()
        assert status == 0 and "=== baselines: done, of my photos (rm " in output
        assert [line.split()[1] for line in calls()] == kinds


def test_seeds_have_folders_of_their_own(finish, calls, tmp_path):
    status, output, _ = finish(SEEDS="1\n7")  # as seq has them
    assert status == 0 and "seed7 (experiment 2 of 2" in output
    lines = calls()
    for seed, line, evaluation in zip((1, 7), lines[0:4:2], lines[1:4:2], strict=True):
        out = f"{tmp_path}/runs/{NAME}/seed{seed}"
        assert line == f"train.py --config configs/{NAME}.yaml --out {out} --resume --seed {seed}"
        assert evaluation == f"evaluate.py --ckpt {out}/best.pt"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_the_shell_alone_is_passed_on(start, calls, tmp_path, number):
    """As a batch system sends it: the training saves, and the shell ends with its status."""
    script = f"echo $1 >> {tmp_path}/calls\ntrap 'echo saved; exit {128 + number}' INT TERM USR1\n"
    script += f"exec 2> /dev/null\ntouch {tmp_path}/ready\nwhile :; do sleep 0.1; done\n"
    process = start(script=script)
    while process.poll() is None and not (tmp_path / "ready").exists():
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and calls() == ["train.py"]
    assert output.endswith("saved\n")


DEFINING = [name.replace("_", "-") for name in (*EXPERIMENT_KEYS, *INPUT_FLAGS, "fusion", "encoder=alexnet")]


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        *(([f"--{name}", "8"], {}, "is what makes an experiment") for name in DEFINING),
        (["--out", "elsewhere"], {}, "RUNS=FOLDER names"),
        (["--seed", "3"], {"SEEDS": "1 7"}, 'error: --seed: SEEDS="1 7" has them already\n'),
        ([], {"SEEDS": "1 README.m?"}, 'SEEDS="1 README.m?"'),
        ([], {"SLURM_ARRAY_TASK_ID": "16"}, "is not 1 to 15"),
        # in an salloc shell SLURM_SUBMIT_DIR is wherever salloc was called
        ([], {"ONLY": "vgg19*", "SLURM_SUBMIT_DIR": "/"}, "matches none of: configs/01_"),
    ],
)
def test_mistakes(finish, tmp_path, flags, environment, message):
    status, _, errors = finish(*flags, **environment)
    assert status == 2 and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "runs").exists() and not (tmp_path / "calls").exists()


def test_a_copy_of_the_script_works_in_the_folder_of_the_allocation(tmp_path):
    copy = shutil.copy(REPOSITORY / "run_all.sh", tmp_path / "slurm_script")
    for folder, message in ((tmp_path, b"has no train.py"), (REPOSITORY, b"matches none of: configs/01_")):
        environment = os.environ | {"SLURM_SUBMIT_DIR": str(folder), "ONLY": "vgg19*"}
        done = subprocess.run(["bash", copy], env=environment, capture_output=True)
        assert message in done.stderr and done.returncode == 2


def test_configs_are_the_fifteen_experiments():
    names = [path.stem for path in sorted((REPOSITORY / "configs").glob("[0-9]*.yaml"))]
    assert names == list(PUBLISHED_RESULTS)
    for name in names:
        args = parse_train(["--config", str(REPOSITORY / "configs" / f"{name}.yaml")])
        assert name.split("_", 1)[1].startswith(f"{args.encoder}_{args.layer}_{args.decoder}")
        weights = {"mse": (1, 0), "lpips": (0, 1)}.get(name.rsplit("_", 1)[1], (0.5, 0.5))
        assert (args.mse_weight, args.lpips_weight) == weights
        assert (args.epochs, args.lr, args.batch_size) == (30, 1e-4, 4)


def test_a_run_that_goes_on_or_was_stopped_has_not_failed(finish, tmp_path):
    """Its standard error is in error.txt once it has failed, and only then."""
    runs = tmp_path / "runs"
    script = f"""if [ "$1" = evaluate.py ]; then exit 0; fi
echo "error: what $STATUS says" >&2
sleep 0.1
ls {runs}/*/ >> {tmp_path}/seen
exit $STATUS
"""
    found = {}
    for status in (3, 143, 0):
        code, _, errors = finish(script=script, STATUS=str(status))
        assert code == (1 if status == 3 else status) and f"what {status} says" in errors
        assert (f"{NAME}: failed with status 3" in errors) == (status == 3)
        found[status] = {file.name: file.read_text() for file in (runs / NAME).iterdir()}
    assert (tmp_path / "seen").read_text() == ""
    assert found == {3: {"error.txt": "error: what 3 says\n"}, 143: {}, 0: {}}


@pytest.mark.parametrize(
    ("run", "seeds", "message"),
    [("", "1 2", "holds a run without SEEDS"), ("seed1", "", "holds runs of SEEDS")],
)
def test_runs_with_seeds_and_without_do_not_hide_each_other(finish, tmp_path, run, seeds, message):
    """RUNS is a folder's name as it is, no pattern."""
    result = tmp_path / "o[1]" / NAME / run / "metrics.json"
    result.parent.mkdir(parents=True)
    result.write_text("{}")
    status, _, errors = finish(RUNS=str(tmp_path / "o[1]"), SEEDS=seeds)
    assert status == 2 and message in errors and errors.count("\n") == 1


def test_help_is_help(finish, tmp_path):
    status, shown, _ = finish("--help")
    assert status == 0 and 'SEEDS="1 2 3" bash run_all.sh' in shown
    assert not shown.count("#") and not (tmp_path / "runs").exists()
