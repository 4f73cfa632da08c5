"""Any network up to any layer: against torchvision's and timm's own features, and what cannot be one."""

import math
from contextlib import nullcontext

import families
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from training import batches_of, training_on

import encoders
import layers
import models
import train
from decoders import Fused
from encoders import Encoder, build_encoder
from extras import conv_relu
from utils import DOCUMENTED, ENCODERS, LAYERS, PUBLISHED, UserError, weights_of_each

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalized(image, mean, std):
    return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("name", "layers", "size", "turned"),
    [
        *[(name, list(LAYERS[name]), 224, None) for name in ("vgg16", "resnet34", "alexnet")],
        ("torchvision/resnet18", ["layer1.0"], 224, None),
        ("torchvision/resnet18", ["layer1.0", "avgpool", "fc"], 224, None),
        # channels are as many as rows: 96 × 96 × 96
        ("torchvision/swin_t", ["features.1"], 384, lambda x: x.movedim(3, 1)),
        ("torchvision/vit_b_16", ["encoder.layers.encoder_layer_0"], 224, lambda x: x[:, 1:].mT),
    ],
)
def test_torchvision_features_are_its_own(name, layers, size, turned, image):
    encoder = Encoder(name, "+".join(layers), "random", seed=5, input_size=size)
    torch.manual_seed(5)
    net = torchvision.models.get_model(ENCODERS.get(name, name).removeprefix("torchvision/")).eval()
    own = create_feature_extractor(net, [LAYERS.get(name, {}).get(layer, layer) for layer in layers])
    image = F.interpolate(image, size)
    found = encoder(image) if len(layers) > 1 else [encoder(image)]
    for ours, theirs in zip(found, own(normalized(image, *IMAGENET)).values(), strict=True):
        expected = (turned(theirs) if turned else theirs).detach().flatten()
        assert ours.dim() == 4 and not ours.requires_grad
        torch.testing.assert_close(ours.flatten(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    if turned is None:
        assert parameters(encoder) == parameters(own)  # nothing behind the layer takes memory


@pytest.mark.parametrize(
    ("name", "layer", "index", "protocol"),
    [
        *[("vit_small", f"block{index}", index, DOCUMENTED) for index in (0, 6, 11)],
        *[("vit_small", "block1", 0, PUBLISHED), ("vit_small", "block0", 11, PUBLISHED)],  # never stops
        ("timm/deit_tiny_distilled_patch16_224", "blocks.0", 0, DOCUMENTED),
        ("timm/swin_tiny_patch4_window7_224", "layers.1", 1, DOCUMENTED),
        ("timm/convnext_atto", "stages.2", 2, DOCUMENTED),
        ("timm/hiera_tiny_224", "blocks.0", 0, DOCUMENTED),  # tokens in the order of mask units
    ],
)
def test_timm_features_are_its_own(name, layer, index, protocol, image):
    encoder = Encoder(name, layer, "random", seed=5, protocol=protocol)
    name = ENCODERS.get(name, name).removeprefix("timm/")
    torch.manual_seed(5)
    net = timm.create_model(name).eval()
    config = timm.get_pretrained_cfg(name)
    x = normalized(image, *(IMAGENET if protocol is PUBLISHED else (config.mean, config.std)))
    with torch.no_grad():
        (expected,) = net.forward_intermediates(x, indices=[index], intermediates_only=True, norm=False)
    torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-4)
    if name.startswith("vit_small"):
        assert parameters(encoder) <= parameters(net) - (11 - index) * parameters(net.blocks[0])


@pytest.mark.parametrize(
    ("name", "layer", "size", "shape"),
    [
        ("timm/convit_tiny", "blocks.5", 112, (192, 7, 7)),
        ("timm/swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn", 112, (96, 28, 28)),  # windows
        ("timm/test_byobnet", "stages.2.0.attn", 160, (32, 10, 10)),
        ("timm/test_convnext", "stages.2.blocks.1.mlp", 160, (48, 10, 10)),
        ("timm/test_vit3", "blocks.1.attn.q_norm", 160, (96, 10, 10)),  # heads become channels
        ("timm/vit_small_patch14_reg4_dinov2", "blocks.1", 112, (384, 8, 8)),  # five tokens more
        ("torchvision/squeezenet1_1", "features.9.squeeze", 96, (48, 5, 5)),
    ],
)
def test_families_are_listed_and_have_a_picture(name, layer, size, shape):
    """Some, small; `python tests/families.py` asks all, at three layers."""
    torch.manual_seed(0)  # layers_of's network is a random one
    assert families.picture_of(name, layer, size) == encoders.layers_of(name, size)[layer][0] == shape


def test_channels_as_many_as_rows(image):
    """Of 128×128 images block1 has 64×64×64 features, in which a shape alone shows no channels."""
    net = torchvision.models.vgg16().features[:5]
    state = encoders.imagenet_weights("vgg16")
    net.load_state_dict({key: state[f"features.{key}"] for key in net.state_dict()})
    found = Encoder(input_size=128)(image[..., :128, :128])
    expected = net(normalized(image[..., :128, :128], *IMAGENET))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_normalise_again_get_what_they_make_of_it(name, image):
    """torchvision gives these two, with their weights, a `transform_input` behind ImageNet's own."""
    net = torchvision.models.get_model(name, transform_input=True, init_weights=False)
    own = encoders.pretrained_input_config(f"torchvision/{name}")
    assert own["input_size"] == {"googlenet": 224, "inception_v3": 299}[name]
    found = normalized(image, own["mean"], own["std"])
    expected = net._transform_input(normalized(image, *IMAGENET))
    assert torch.allclose(found, expected, atol=1e-5)


def layout_in(output):
    return layers.find_layout(output, 84)


def test_windows_lie_side_by_side():
    """As timm cuts them."""
    from timm.models.maxxvit import grid_partition
    from timm.models.swin_transformer import window_partition

    images = layers.moving_spot(84).permute(0, 2, 3, 1)
    for windows in (window_partition(images, (7, 7)), window_partition(images, (7, 7)).flatten(1, 2)):
        assert torch.equal(layers.as_map(windows, layout_in(windows)), images.permute(0, 3, 1, 2))
        assert layers.find_layout(windows, 84, any_size=True) is None  # as many as an image of this size has
    assert layout_in(grid_partition(images, (7, 7)).flatten(1, 2)) is None  # every twelfth pixel


def test_blocks_of_tokens_lie_side_by_side():
    """NesT's, as timm puts them together."""
    from timm.models.nest import deblockify

    torch.manual_seed(0)
    net = timm.create_model("nest_tiny").eval()
    encoder = Encoder("timm/nest_tiny", "levels.0.transformer_encoder", "random", seed=0)
    assert encoder.shapes == [(96, 56, 56)]
    found = []
    net.levels[0].transformer_encoder.register_forward_hook(lambda *args: found.append(args[2]))
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        net(normalized(image, *IMAGENET))
        expected = deblockify(found[0], 14).permute(0, 3, 1, 2)
        torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-4)


def test_tokens_of_other_sizes_are_positions_too():
    """MobileViT v2's, (B, C, 4 pixels of a patch, 64 patches): a decoder of it is built and small."""
    inverter = models.build_inverter("timm/mobilevitv2_050", "stages.3.1.transformer", "tconv", "random")
    assert inverter.shape == (4 * 96, 8, 8)
    assert inverter.decode(inverter.encode(torch.rand(1, 3, 256, 256))).shape == (1, 3, 256, 256)


def test_timm_builds_a_vit_for_another_size(tmp_path):
    """Positions of 518 pixels, resampled to 224 as timm does it."""
    from timm.layers import resample_abs_pos_embed

    whole = timm.create_model("vit_small_patch14_dinov2")
    file = tmp_path / "weights.pth"
    torch.save(whole.state_dict(), file)
    encoder = Encoder("timm/vit_small_patch14_dinov2", "blocks.0", file, input_size=224)
    assert encoder.input_size == 224 and encoder.shapes == [(384, 16, 16)]
    expected = resample_abs_pos_embed(whole.pos_embed, [16, 16], num_prefix_tokens=1)
    torch.testing.assert_close(encoder.trunk.net.pos_embed.data, expected.data)


def test_nothing_behind_the_layer_runs_or_changes_it(own, image):
    """`last` raises; `again` would make the features positive in place."""
    encoder = Encoder(f"{own}:build", "first.1")
    assert encoder(image).min() < 0
    assert Encoder("torchvision/alexnet", "features.10")(image).min() < 0
    assert isinstance(encoder.trunk.net.last, nn.Identity)  # nor takes memory


NOT_MOVING = "it does not change where the image changes"


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("OWN:build", "again", "--layer again: runs 2 times for an image"),
        ("OWN:build", "never", "--layer never: never runs for an image"),
        ("OWN:build", "both", "gives a tuple, not one tensor"),
        ("OWN:build", "frist", "has no such module; near: first"),
        ("OWN:three", "first", "returns int, should be an nn.Module"),
        ("OWN:four", "first", "AttributeError"),
        ("nowhere.py:build", "first", "no such file"),
        ("timm/resnet99", "layer1", "timm has no such model; near: resnet"),
        ("torchvision/resnet99", "layer1", "torchvision has no such model; near: resnet"),
        ("resnet99", "layer1", "not an encoder; choose from vgg16"),
        ("vgg16", "block6", "not a layer of vgg16"),
        ("vgg16+alexnet", "block1", "2 encoders, 1 layers"),
        ("vgg16+vgg16", "block1+block1", "a layer of vgg16 twice"),
        # 512 channels × 256 mixtures of positions; windows of a rolled image
        ("timm/mixer_s32_224", "blocks.0.mlp_tokens.fc1", NOT_MOVING),
        ("timm/swin_tiny_patch4_window7_224", "layers.2.blocks.1.attn", NOT_MOVING),
        ("vgg16+torchvision/inception_v3", "block1+Mixed_5b", "give an --input-size"),
    ],
)
def test_what_is_no_feature_is_one_line(own, name, layer, message):
    with pytest.raises(UserError) as error:
        build_encoder(name.replace("OWN", str(own)), layer, "random")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_image_of_another_size_is_refused():
    with pytest.raises(UserError, match="takes no 10×10 images"):
        Encoder("timm/vit_tiny_patch16_224", "blocks.0", "random", input_size=10)


def test_table_lists_the_layers_of_a_network(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["models.py", "--encoder", "timm/vit_tiny_patch16_224"])
    models.main()
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["blocks.3"][0] == "192×14×14"
    embedding = 3 * 16**2 * 192 * 14**2
    assert lines["patch_embed"][1] == f"{embedding / 1e9:.2f}"
    tconv = models.build_decoder("tconv", (192, 14, 14))
    assert lines["blocks.3"][2] == f"{models.count_parameters(tconv) / 1e3:.1f}K"


# --- Weights ----------------------------------------------------------------------------------------------


WRAPPINGS = "state_dict model model_state_dict net ema checkpoint/model state_dict/module. module. _orig_mod."
WRAPPINGS += " _orig_mod.module. backbone. a.b.c."


@pytest.mark.parametrize("wrapping", [*WRAPPINGS.split(), "", "safetensors"])
def test_weights_are_read_as_others_write_them(wrapping, image, tmp_path):
    """In dictionaries and behind a prefix, beside what else a training keeps: other tensors, other layers."""
    net = torchvision.models.resnet18()
    net.bn1.running_mean.uniform_(-0.1, 0.1)  # must be loaded, too
    *around, prefix = wrapping.split("/") if wrapping[-1:] in (".", "") else [*wrapping.split("/"), ""]
    own = net.state_dict()
    state = {prefix + key: own[key] for key in own if "num_batches" not in key}  # as in old files
    state |= {f"{prefix}head.0.weight": torch.zeros(1), "head.conv1.weight": torch.zeros(64, 3, 7, 7)}
    if wrapping == "safetensors":
        file = tmp_path / "x.safetensors"
        safetensors.torch.save_file(state, file)
    else:
        file = tmp_path / "x.pth"
        beside = {"epoch": torch.tensor(3), "optimizer": {"state": {0: {"step": torch.tensor(1)}}}}
        for name in reversed(around):
            state = {name: state} | beside
        torch.save(state, file, _use_new_zipfile_serialization=wrapping != "")
    encoder = Encoder("torchvision/resnet18", "layer1", str(file))
    expected = create_feature_extractor(net.eval(), ["layer1"])(normalized(image, *IMAGENET))["layer1"]
    torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-4)


def test_which_weights_of_several_are_meant(tmp_path):
    """Those that stand for themselves, then `state_dict`, then `model`; where nothing says so, none."""
    file = tmp_path / "x.pth"
    a, b = (torchvision.models.resnet18().state_dict() for _ in range(2))
    lacking = {key: value for key, value in a.items() if key != "layer1.1.bn2.bias"}
    for state, message in (
        ({"state_dict": a, "state_dict_ema": b}, None),
        ({"model": a, "ema": b}, None),
        (a | {f"model.{key}": value for key, value in b.items()}, None),
        ({"student": a, "teacher": b}, "both fit; save one of them"),
        ({f"{name}.{key}": state[key] for name, state in (("q", a), ("k", b)) for key in a}, "both fit"),
        ({0: a["conv1.weight"]}, "not a state dict"),
        (a | {"conv1.weight": torch.zeros(1)}, r"conv1.weight is \(1,\), should be \(64, 3, 7, 7\)"),
        ({"model": lacking}, "has no layer1.1.bn2.bias"),
    ):
        torch.save(state, file)
        with pytest.raises(UserError, match=message) if message else nullcontext():
            found = Encoder("torchvision/resnet18", "layer1", str(file)).trunk.net.conv1.weight
            assert torch.equal(found, a["conv1.weight"])
    Encoder("torchvision/resnet18", "layer1.0", str(file))  # needs none behind
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a safetensors file"):
        Encoder("torchvision/resnet18", "layer1", str(tmp_path / "x.safetensors"))


def test_a_convolution_and_its_relu_are_one_but_where_the_layer_lies_between(image, monkeypatch):
    """As for CUDA. features.10, before ReLU, has what features.11 sets to 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before, behind = (Encoder("torchvision/alexnet", f"features.{place}") for place in (10, 11))
    kinds = [type(module) for module in before.trunk.net.features]
    assert kinds.count(conv_relu.ConvReLU) == 4 and kinds[10] is nn.Conv2d
    assert before(image).min() < 0 and torch.equal(before(image).relu(), behind(image))
    net = torchvision.models.alexnet()
    net.features.load_state_dict(behind.trunk.net.features.state_dict())
    expected = net.features[:12](normalized(image, *IMAGENET))
    torch.testing.assert_close(behind(image), expected, rtol=1e-4, atol=1e-4)


# --- Several at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "layer", "weights", "side"),
    [
        ("vgg16+vgg16", "block2+block1", "random", 112),
        ("alexnet+vgg16+alexnet", "conv2+block2+conv2", "imagenet+random+random", 56),
    ],
)
def test_layers_are_joined(image, encoder, layer, weights, side):
    """Resized to the largest; encoders may have weights of their own."""
    names, layers = encoder.split("+"), layer.split("+")
    parts = zip(names, layers, weights_of_each(len(names), weights), strict=True)
    alone = [F.interpolate(Encoder(*part)(image), (side, side), mode="bilinear") for part in parts]
    found = build_encoder(encoder, layer, weights)(image)
    torch.testing.assert_close(found, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fusion", ["concat", "weighted", "attention"])
def test_sources_are_weighed(fusion):
    """Before a decoder that gives back what it gets."""
    fused = Fused(Same(), [2, 3], fusion)
    fused.deviation.copy_(torch.tensor([2.0, 4.0]))
    z = torch.rand(2, 5, 4, 4)
    sources = z[:, :2] / 2, z[:, 2:] / 4
    shares = torch.full((2, 2, 1, 1), 0.5)
    if fusion == "weighted":
        fused.logits.data[0, 1] = math.log(3)
        shares = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
    if fusion == "attention":
        shares = fused.weigh(torch.cat(sources, 1)).softmax(1)  # of each position
        assert shares.shape == (2, 2, 4, 4) and shares.std() > 0
    expected = [2 * share * source for share, source in zip(shares.split(1, 1), sources, strict=True)]
    torch.testing.assert_close(fused(z), torch.cat(expected, 1))


class Same(nn.Module):
    def forward(self, z, size):
        return z


SOURCES = ("--encoder", "vgg16+vgg16", "--layer", "block2+block1", "--crop", 32, "--width", 8)


def test_each_source_is_divided_by_its_own_deviation(photos):
    training = training_on(photos, *SOURCES)
    train.measure_features(training.inverter, training.train_images, training.config)
    features = training.inverter.encode(torch.cat([batch for batch, _ in batches_of(training)])).numpy()
    deviation = training.inverter.decoder.deviation.numpy()
    np.testing.assert_allclose(deviation, [features[:, :128].std(), features[:, 128:].std()], rtol=1e-4)
    assert deviation[0] != pytest.approx(deviation[1], rel=0.01)


@pytest.mark.parametrize("dead", [slice(0, 128), slice(None)], ids=["one", "all"])
def test_a_source_that_never_changes(photos, dead):
    """Its map is divided by no 0: what is decoded is finite."""
    training = training_on(photos, *SOURCES, "--decoder", "residual")
    inverter = training.inverter
    inverter.encoder.register_forward_hook(
        lambda *hooked: hooked[2].index_fill(1, torch.arange(192)[dead], 0)
    )
    train.measure_features(inverter, training.train_images, training.config)
    assert inverter.eval()(torch.rand(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("decoder", ["tconv", "feedback"])
def test_several_are_trained_resumed_and_measured(decoder, photos, tmp_path, run_train, run_evaluate):
    names = ("--encoder", "vgg16+vgg16", "--layer", "block3+block2", "--fusion", "weighted")
    flags = (*names, "--data", photos, "--decoder", decoder, "--width", 16, "--input-size", 64, "--crop", 32)
    flags += ("--kept-crops", 1, "--epochs", 1, "--out", tmp_path, "--quiet")
    assert run_train(*flags) == 0
    assert run_train(*flags, "--resume") == 0
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--quiet") == 0
    found = torch.load(tmp_path / "best.pt", weights_only=True)
    assert found["shape"] == [384, 16, 16] and found["decoder"]["logits"].std() > 0


def test_joined_maps_have_the_stride_of_the_coarsest(photos, tmp_path, run_train, error_line):
    flags = ("--encoder", "vgg16+vgg16", "--layer", "block5+block1", "--weights", "random", "--data", photos)
    assert run_train(*flags, "--crop", 62, "--out", tmp_path) == 2
    assert "has a stride of 32 pixels" in error_line()
