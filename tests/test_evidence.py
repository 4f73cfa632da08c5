"""evidence.sh, with a python that only takes notes: what is trained, at which rates, and compared."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from flags import parse_evaluate, parse_train

STUB = """#!{python}
import os, subprocess, sys
from pathlib import Path
_, first, *flags = sys.argv
value = dict(zip(flags, flags[1:]))
if first == "-":
    sys.exit(subprocess.run([{python!r}, *sys.argv[1:]]).returncode)
with open(os.environ["CALLS"], "a") as file:
    print(first, *flags, sep="\\t", file=file)
if first == "train.py":
    out = Path(value["--out"])
    out.mkdir(parents=True, exist_ok=True)
    loss = abs(float(value["--lr"]) - 2e-3)  # this rate is the best
    out.joinpath("history.csv").write_text(f"epoch,val_loss\\n1,9\\n2,{{loss}}\\n")
elif "--ckpt" in value:
    Path(value["--ckpt"]).with_name("metrics.json").touch()
"""


@pytest.fixture
def evidence(tmp_path):
    """Run evidence.sh with a stub of python: its result, and the (program, flags) that it called."""
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)

    def call(*groups):
        calls = tmp_path / "calls"
        calls.write_text("")
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "CALLS": str(calls), "RUNS": str(tmp_path / "runs")}
        command = ["bash", "evidence.sh", *groups]
        result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        lines = [line.split("\t") for line in calls.read_text().splitlines()]
        return result, [(program, flags) for program, *flags in lines]

    return call


def test_everything_is_trained_evaluated_and_compared(evidence, tmp_path):
    result, calls = evidence()
    assert result.returncode == 0, result.stderr
    trained = [parse_train(flags) for program, flags in calls if program == "train.py"]
    evaluated = [flags for program, flags in calls if program == "evaluate.py" and "--ckpt" in flags]
    compared = [parse_evaluate(flags) for program, flags in calls if "--compare" in flags]
    runs = tmp_path / "runs"
    measured = {os.path.dirname(parse_evaluate(flags).ckpt) for flags in evaluated}
    assert len(measured) == len(evaluated) == 3 * (3 + 2 + 1 + 8 + 4) + 1
    assert measured < {args.out for args in trained}
    for args in compared:
        for folder in args.compare:
            assert {f"{folder}/seed{seed}" for seed in (1, 2, 3)} <= measured
    residual = [args for args in trained if args.out.startswith(str(runs / "decoders" / "residual"))]
    assert {(args.lr, args.seed, args.decoder) for args in residual} == {
        (0.002, seed, "residual") for seed in (1, 2, 3)
    }
    again, calls = evidence("decoders")
    assert again.returncode == 0 and not [flags for program, flags in calls if "--ckpt" in flags]


def test_an_unknown_group(evidence):
    result, calls = evidence("loss", "losses")
    assert (result.returncode, calls) == (2, [])
    assert result.stderr == "error: losses: is none of loss decoders weights layers data published\n"
