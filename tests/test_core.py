"""The core trains and measures the headline experiment without extras/, report/ and bench/."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_core_alone(tmp_path):
    for file in REPOSITORY.glob("*.py"):
        shutil.copy(file, tmp_path)

    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    few = ["--train-images", "4", "--val-images", "2", "--crop", "32"]
    headline = ["--encoder", "vgg16", "--layer", "block1", "--decoder", "tconv", "--data", "sample"]
    run("train.py", *headline, "--epochs", "1", *few)
    table = run("evaluate.py", "--ckpt", "runs/best.pt")
    metrics = json.loads((tmp_path / "runs" / "metrics.json").read_text())
    assert all(f"{metrics[name]['mean']:.4f}" in table for name in ("psnr", "ssim", "lpips"))
    names = "best.pt config.yaml history.csv last.pt metrics.json per_image.csv"
    assert sorted(path.name for path in (tmp_path / "runs").glob("[!.]*")) == names.split()
