"""On a CUDA GPU: the CPU's numbers, the same ones again, and memory that is too small said in one line."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import REPOSITORY, read_csv
from kill_resume import read_run, same
from training import batches_of, parse, training_on

import data
import train
from evaluate import evaluate_model
from extras.muon import Muon
from layers import resize
from models import load_inverter
from utils import select_device, set_determinism, tf32

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

SHORT = ("--batch-size", 3, "--crop", 64, "--lr", 1e-3, "--quiet", "--val-images", 1)  # 8 images: 3, 3 and 2
DECODERS = {
    "tconv": ("--freeze-bn", 8),
    "published": ("--protocol", "published"),
    "residual": ("--decoder", "residual", "--clip-grad", 0.05),
    "feedback": ("--decoder", "feedback", "--iterations", 2, "--clip-grad", 0.05),
    "muon": ("--decoder", "feedback", "--iterations", 2, "--optimizer", "muon", "--schedule", "onecycle"),
    "gradient": ("--decoder", "feedback", "--feedback", "gradient", "--width", 16),
    "attention": ("--layer", "block3", "--decoder", "attention", "--width", 64, "--amp"),
    "frequency": ("--decoder", "frequency", "--width", 32),
    "kept": ("--layer", "block4", "--kept-crops", 2),
    "vit": ("--encoder", "vit_small", "--crop", 224, "--weights", "random"),
}


def gradients_on(device, photos, *flags, fast=False):
    """(terms, gradients as one vector) of a step on `device`, in float64; fast: in TF32."""
    set_determinism()  # else no two steps need be the same
    training = training_on(photos, *SHORT, *flags)
    training.inverter.to(device).train()
    training.loss.to(device)
    select_device(device)  # float32 is float32
    if training.config["compile"]:
        training.inverter.compile()
    training.device = torch.device(device)
    training.optimizer = train.make_optimizer(training.inverter, 1e-3)
    images, features = next(batches_of(training))
    with tf32(fast):
        terms = train.forward_backward(training, images.to(device), features)
    found = [p.grad.flatten() for p in training.inverter.decoder.parameters() if p.grad is not None]
    return {name: value.double().cpu() for name, value in terms.items()}, torch.cat(found).double().cpu()


def difference(found, expected):
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ["tconv", "published", "residual", "feedback", "vit"])
def test_step_is_the_cpus(photos, name):
    """An H100's gradients differ by 3e-6; those of ViT, with random weights, by 3e-4."""
    flags = () if name == "tconv" else DECODERS[name]
    terms, found = gradients_on("cuda", photos, *flags)
    wanted, expected = gradients_on("cpu", photos, *flags)
    assert difference(found, expected) < (1e-3 if name == "vit" else 1e-4)
    assert all(difference(terms[key], wanted[key]) < 1e-5 for key in terms)


@pytest.mark.parametrize(
    ("flags", "least", "most"),
    [("", 1e-3, 0.05), ("--compile", 0, 1e-4), ("--amp", 1e-3, 0.15), ("--amp --compile", 1e-3, 0.15)],
)
def test_other_ways_to_compute_a_step(photos, flags, least, most):
    """Without a flag: TF32. An H100's gradients differ by 0.026, 5e-7, 0.070 and 0.077."""
    terms, found = gradients_on("cuda", photos, *flags.split(), fast=not flags)
    wanted, expected = gradients_on("cuda", photos)
    assert least <= difference(found, expected) < most
    assert difference(terms["loss"], wanted["loss"]) < most / 10


@pytest.mark.parametrize("name", DECODERS)
def test_training_with_graphs_is_bit_identical(photos, tmp_path, monkeypatch, name):
    flags = ("--data", photos, *SHORT, *DECODERS[name], "--epochs", 3, "--passes", 5)
    replay, replayed = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replayed.append(1) or replay(graph))
    train.train(parse(*flags, "--no-graphs", "--out", tmp_path / "eager"))
    assert not replayed
    train.train(parse(*flags, "--out", tmp_path / "graphs"))
    assert len(replayed) > 20  # of 45 steps, in two to six kinds
    assert same(read_run(tmp_path / "graphs"), read_run(tmp_path / "eager"))


def run_alone(*flags, before="pass"):
    """train.py with `flags`, after this statement, in a process of its own, because it fails on the GPU."""
    run = "train.cli_main(lambda: train.train(train.parse_train(sys.argv[1:])))"
    command = [sys.executable, "-c", f"import sys, torch, train; {before}; {run}", *map(str, flags)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def is_one_line(done, words):
    assert done.returncode == 2, done.stderr
    assert words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_what_cannot_be_recorded(photos, tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Looks(nn.Conv2d):\n"
        "    def forward(self, x):\n"
        "        x = super().forward(x)\n"
        "        return x if x.is_meta or float(x.sum()) else x + 1\n"
        "def build():\n"
        "    return nn.Sequential(Looks(3, 8, 3, 2, 1), nn.ReLU())\n"
    )
    flags = ["--data", photos, "--encoder", f"{tmp_path}/net.py:build", "--layer", "1", "--input-size", 64]
    flags += ["--batch-size", 2, "--epochs", 2, "--quiet", "--out", tmp_path / "out"]
    is_one_line(run_alone(*flags), "give --no-graphs")
    assert run_alone(*flags, "--resume", "--no-graphs").returncode == 0


def test_too_little_memory_is_said_in_one_line(photos, tmp_path):
    flags = ("--data", photos, "--batch-size", 8, "--decoder", "frequency", "--epochs", 1, "--quiet")
    total = "torch.cuda.get_device_properties(0).total_memory"
    limit = f"torch.cuda.set_per_process_memory_fraction(1e9 / {total})"
    is_one_line(run_alone(*flags, "--out", tmp_path, before=limit), "memory")


def test_images_live_on_the_gpu(photos):
    images = data.load_split(str(photos), "train")
    there = images.to(torch.device("cuda"))
    assert there.resident.is_cuda and there.resident.nbytes == 3 * 8 * 256**2
    plans = (data.epoch_plan(x.sizes, 1, 0, 96) for x in (images, there))
    here, found = (data.crops(x, plan, 96) for x, plan in zip((images, there), plans, strict=True))
    assert found.is_cuda and torch.allclose(found.cpu(), here, rtol=0, atol=1e-7)


def test_metrics_are_the_cpus(photos, trained):
    images = data.load_split(str(photos), "test")[:]
    found = evaluate_model(load_inverter(trained / "best.pt")[0].cuda(), images, bars=True).values
    expected = evaluate_model(load_inverter(trained / "best.pt")[0], images, bars=True).values
    for name, most in {"psnr": 1e-3, "ssim": 1e-4, "lpips": 1e-4}.items():
        assert np.abs(found[name] - expected[name]).max() < most


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_from_one_device_to_the_other(photos, tmp_path, run_train, run_evaluate, first, second):
    flags = ("--data", photos, *SHORT, "--width", 8, "--no-tf32", "--out")
    assert run_train(*flags, tmp_path / "whole", "--epochs", 2, "--device", "cpu") == 0
    assert run_train(*flags, tmp_path / "run", "--epochs", 1, "--device", first) == 0
    assert run_train(*flags, tmp_path / "run", "--epochs", 2, "--device", second, "--resume") == 0
    assert run_evaluate("--ckpt", tmp_path / "run" / "best.pt", "--device", first) == 0
    found, expected = (read_csv(tmp_path / name / "history.csv") for name in ("run", "whole"))
    for row, other in zip(found, expected, strict=True):
        assert float(row["val_loss"]) == pytest.approx(float(other["val_loss"]), rel=0.01)


def test_inversion_and_own_pictures(photos, trained, tmp_path, run_invert, run_evaluate):
    flags = ("--count", 2, "--steps", 5, "--device", "cuda", "--quiet")
    assert run_invert("--encoder", "vgg16", "--data", photos, *flags, "--out", tmp_path / "noise") == 0
    assert run_invert("--ckpt", trained / "best.pt", *flags, "--out", tmp_path / "from") == 0
    pictures = ("--images", photos / "test", "--device", "cuda", "--out", tmp_path / "own")
    assert run_evaluate("--ckpt", trained / "best.pt", *pictures) == 0
    assert len(list((tmp_path / "own" / "images").iterdir())) == 3


def randoms(device, *shapes):
    """Normal random tensors of these shapes, the same on each device, where float32 is float32."""
    select_device("cuda")
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def test_resizing_is_the_cpus():
    results = {}
    for device in ("cpu", "cuda"):
        x, weights = randoms(device, (2, 5, 27, 27), (2, 5, 56, 56))
        x.requires_grad_()
        found = resize(x, (56, 56))
        (gradient,) = torch.autograd.grad((found * weights).sum(), x)
        results[device] = torch.cat([found.flatten(), gradient.flatten()]).double().cpu().detach()
    assert difference(results["cuda"], results["cpu"]) < 1e-6


def test_muons_step_is_the_cpus():
    steps = {}
    for device in ("cpu", "cuda"):
        weight, gradient = randoms(device, (64, 32, 3, 3), (64, 32, 3, 3))
        before, weight.grad = weight.clone(), gradient
        optimizer = Muon([weight], 0.01)
        optimizer.orthogonalize_grads()
        optimizer.step()
        steps[device] = (weight - before).double().cpu()
    assert difference(steps["cuda"], steps["cpu"]) < 1e-4


def test_nccl(photos):
    """A step in a group of one process, with what several send each other, is the step without."""
    terms, found = gradients_on("cuda", photos)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        training = training_on(photos, *SHORT)
        inverter = training.inverter.cuda().train()
        inverter.decoder = torch.nn.SyncBatchNorm.convert_sync_batchnorm(inverter.decoder)
        training.model = torch.nn.parallel.DistributedDataParallel(inverter)
        training.loss.cuda()
        training.optimizer = train.make_optimizer(inverter, 1e-3)
        images, _ = next(batches_of(training))
        again = train.train_step(training, images.cuda())
        meter = train.Meter(train.TERMS, "cuda")
        meter.add(again)
        meter.add(again)
        train.Signals(torch.device("cuda")).check()
        contents = [{"epoch": 3}]
        dist.broadcast_object_list(contents)
        averages = meter.averages()
    finally:
        dist.destroy_process_group()
    gradients = torch.cat([p.grad.flatten() for p in inverter.decoder.parameters()]).double().cpu()
    assert difference(gradients, found) < 1e-4 and contents == [{"epoch": 3}]
    assert averages["loss"] == pytest.approx(float(terms["loss"].mean()), rel=1e-5)
