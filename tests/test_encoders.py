"""Any network up to any layer: against torchvision's and timm's own features, and what cannot be one."""

import hashlib
import math

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
from utils import IMAGENET_MEAN, IMAGENET_STD, LAYERS, UserError


def normalised(encoder, image):
    return (image - encoder.mean) / encoder.std


@pytest.mark.parametrize("layer", ["layer1.0", "layer3", "avgpool", "fc"])
def test_torchvision_features_are_its_own(layer, image):
    encoder = Encoder("torchvision/resnet18", layer, "random", seed=5)
    torch.manual_seed(5)
    net = torchvision.models.resnet18().eval().to(memory_format=torch.channels_last)
    own = create_feature_extractor(net, [layer])
    with torch.no_grad():
        expected = own(normalised(encoder, image))[layer]
        found = encoder(image)
    assert torch.equal(found.flatten(), expected.flatten()) and found.dim() == 4


@pytest.mark.parametrize(
    ("name", "layer", "index"),
    [
        ("vit_tiny_patch16_224", "blocks.3", 3),
        ("deit_tiny_distilled_patch16_224", "blocks.0", 0),
        ("swin_tiny_patch4_window7_224", "layers.1", 1),
        ("convnext_atto", "stages.2", 2),
        ("hiera_tiny_224", "blocks.0", 0),  # tokens in the order of mask units
    ],
)
def test_timm_features_are_its_own(name, layer, index, image):
    encoder = Encoder(f"timm/{name}", layer, "random", seed=5)
    torch.manual_seed(5)
    net = timm.create_model(name).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        x = normalised(encoder, image)
        (expected,) = net.forward_intermediates(x, indices=[index], intermediates_only=True, norm=False)
        assert torch.equal(encoder(image), expected)
    assert encoder.mean.flatten().tolist() == pytest.approx(timm.get_pretrained_cfg(name).mean)


KINDS = [
    ("timm/swin_tiny_patch4_window7_224", "layers.1", (192, 28, 28)),  # channels last
    ("timm/swin_tiny_patch4_window7_224", "layers.0.blocks.0.attn", (96, 56, 56)),  # windows
    ("timm/deit_tiny_distilled_patch16_224", "blocks.0", (192, 14, 14)),  # two tokens more
    ("timm/vit_small_patch14_reg4_dinov2", "blocks.0", (384, 37, 37)),  # five more, and 518 pixels
    ("torchvision/vit_b_16", "encoder.layers.encoder_layer_0", (768, 14, 14)),
    ("torchvision/swin_t", "features.1", (96, 56, 56)),
    ("torchvision/inception_v3", "Mixed_5b", (256, 35, 35)),  # of 299 pixels
]


@pytest.mark.parametrize(("name", "layer", "shape"), KINDS)
def test_every_kind_becomes_a_map(name, layer, shape):
    encoder = Encoder(name, layer, "random")
    x = encoder(torch.rand(1, 3, encoder.input_size, encoder.input_size))
    assert x.shape[1:] == encoder.shapes[0] == shape and x.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer", "shape"), KINDS)
def test_every_kind_is_listed(name, layer, shape):
    assert encoders.layers_of(name)[layer][0] == shape


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_that_normalise_again_get_what_they_make_of_it(name, image):
    """torchvision gives these two, with their weights, a `transform_input` behind ImageNet's own."""
    net = torchvision.models.get_model(name, transform_input=True, init_weights=False)
    own = encoders.pretrained_input_config(f"torchvision/{name}")
    numbers = (own["mean"], own["std"], IMAGENET_MEAN, IMAGENET_STD)
    mean, std, imagenet_mean, imagenet_std = (torch.tensor(three).view(3, 1, 1) for three in numbers)
    expected = net._transform_input((image - imagenet_mean) / imagenet_std)
    assert torch.allclose((image - mean) / std, expected, atol=1e-5)


def layout_in(output):
    return layers.find_layout(output, 84)


@pytest.mark.parametrize("encoder", LAYERS)
def test_the_studys_layers_move_with_the_image(encoder):
    """Which are not looked at when they are built."""
    own = Encoder(encoder, "+".join(LAYERS[encoder]), "random")
    for layer, maps in zip(LAYERS[encoder], own(layers.moving_spot(224)), strict=True):
        assert layers.find_layout(maps, 224).kind == "grid", layer


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
        net((image - encoder.mean) / encoder.std)
        expected = deblockify(found[0], 14).permute(0, 3, 1, 2)
        torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-4)


def test_channels_may_be_as_many_as_rows():
    """torchvision's Swin, whose features are channels last, at 384 pixels: 96 × 96 × 96."""
    encoder = Encoder("torchvision/swin_t", "features.1", "random", seed=5, input_size=384)
    torch.manual_seed(5)
    net = torchvision.models.swin_t().eval()
    image = torch.rand(1, 3, 384, 384)
    with torch.no_grad():
        expected = net.features[:2](normalised(encoder, image)).permute(0, 3, 1, 2)
        torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("timm/mixer_s32_224", "blocks.0.mlp_tokens.fc1"),  # 512 channels × 256 mixtures of positions
        ("timm/swin_tiny_patch4_window7_224", "layers.2.blocks.1.attn"),  # windows of a rolled image
    ],
)
def test_what_does_not_move_with_the_image_is_no_map(name, layer):
    with pytest.raises(UserError, match="it does not change where the image changes"):
        Encoder(name, layer, "random")


def test_tokens_of_other_sizes_are_positions_too():
    """MobileViT v2's, (B, C, 4 pixels of a patch, 64 patches): a decoder of it is built and small."""
    inverter = models.build_inverter("timm/mobilevitv2_050", "stages.3.1.transformer", "tconv", "random")
    assert inverter.shape == (4 * 96, 8, 8)
    assert inverter.decode(inverter.encode(torch.rand(1, 3, 256, 256))).shape == (1, 3, 256, 256)


def test_timm_builds_a_vit_for_another_size(tmp_path):
    """Positions of 518 pixels, resampled to 224 as timm does it."""
    whole = timm.create_model("vit_small_patch14_dinov2")
    state = {key: value for key, value in whole.state_dict().items() if not key.startswith("blocks.")}
    state |= {key: value for key, value in whole.state_dict().items() if key.startswith("blocks.0.")}
    from timm.layers import resample_abs_pos_embed

    file = tmp_path / "weights.pth"
    torch.save(state, file)
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
    ],
)
def test_what_is_no_feature_is_one_line(own, name, layer, message):
    with pytest.raises(UserError) as error:
        Encoder(name.replace("OWN", str(own)), layer)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_image_of_another_size_is_refused():
    with pytest.raises(UserError, match="takes no 10×10 images"):
        Encoder("timm/vit_tiny_patch16_224", "blocks.0", "random", input_size=10)


def test_heads_become_channels_and_are_no_windows():
    positions = F.adaptive_avg_pool2d(layers.moving_spot(84), 12).flatten(2)  # (6, 3, 144)
    heads = torch.cat([torch.zeros(6, 3, 1), positions], 2)[:, :, :, None].repeat(1, 1, 1, 9)
    x = layers.as_map(heads, layout_in(heads))  # with a class token before the positions
    assert x.shape == (6, 27, 12, 12) and torch.equal(x[1, 9:18, 2, 1], positions[1, 1, 25].expand(9))
    folded = heads[:, :, 1:].repeat(1, 3, 1, 1)[:, :4].flatten(0, 1)  # four heads of an image in the batch
    assert layout_in(folded) is None


FAMILIES = """
timm/cait_xxs24_224 timm/convit_tiny timm/convnext_atto timm/efficientnet_lite0 timm/gmlp_ti16_224
timm/mobilenetv3_small_050 timm/poolformer_s12 timm/regnetx_002 timm/repghostnet_050
timm/swin_tiny_patch4_window7_224 timm/xcit_nano_12_p8_224 torchvision/densenet121 torchvision/maxvit_t
torchvision/shufflenet_v2_x0_5 torchvision/squeezenet1_1
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.split())
def test_families_have_features_and_a_picture(name):
    """The middle layer; `python tests/families.py` asks all families, at three."""
    layers = encoders.layers_of(name)
    layer = families.three_of(list(layers))[1]
    assert families.picture_of(name, layer) == layers[layer][0]


def test_table_lists_the_layers_of_a_network(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["models.py", "--encoder", "timm/vit_tiny_patch16_224"])
    models.main()
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["blocks.3"][:5] == ["192", "×", "14", "×", "14"]
    embedding = 3 * 16**2 * 192 * 14**2
    assert lines["patch_embed"][5] == f"{embedding / 1e9:.2f}"
    tconv = models.build_decoder("tconv", (192, 14, 14))
    assert lines["blocks.3"][6] == f"{models.count_parameters(tconv):,}"


# --- Weights ----------------------------------------------------------------------------------------------


WRAPPINGS = "state_dict model model_state_dict net ema checkpoint/model state_dict/module. module. _orig_mod."
WRAPPINGS += " _orig_mod.module. backbone. a.b.c."


@pytest.mark.parametrize("wrapping", [*WRAPPINGS.split(), ""])
def test_weights_are_read_as_others_write_them(wrapping, image, tmp_path):
    """In dictionaries and behind a prefix, beside what else a training keeps: other tensors, other layers."""
    net = torchvision.models.resnet18()
    *around, prefix = wrapping.split("/") if wrapping[-1:] in (".", "") else [*wrapping.split("/"), ""]
    state = {prefix + key: value for key, value in net.state_dict().items()}
    state |= {f"{prefix}head.0.weight": torch.zeros(1), "head.conv1.weight": torch.zeros(64, 3, 7, 7)}
    beside = {"epoch": torch.tensor(3), "optimizer": {"state": {0: {"step": torch.tensor(1)}}}}
    for name in reversed(around):
        state = {name: state} | beside
    file = tmp_path / "x.pth"
    torch.save(state, file)
    encoder = Encoder("torchvision/resnet18", "layer1", str(file))
    net.eval().to(memory_format=torch.channels_last)
    expected = create_feature_extractor(net, ["layer1"])(normalised(encoder, image))["layer1"]
    assert torch.equal(encoder(image), expected)
    assert encoder.weights_sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def resnet18_of(file, layer="layer1"):
    return Encoder("torchvision/resnet18", layer, str(file))


def test_safetensors_are_read(tmp_path):
    net = torchvision.models.resnet18()
    state = {f"backbone.{key}": value for key, value in net.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    encoder = resnet18_of(tmp_path / "x.safetensors")
    assert torch.equal(encoder.trunk.net.conv1.weight, net.conv1.weight)


def test_which_weights_of_several_are_meant(tmp_path):
    """Those that stand for themselves, then `state_dict`, then `model`; where nothing says so, none."""
    file = tmp_path / "x.pth"
    a, b = (torchvision.models.resnet18().state_dict() for _ in range(2))
    for state, expected in (
        ({"state_dict": a, "state_dict_ema": b}, a),
        ({"model": a, "ema": b}, a),
        (a | {f"model.{key}": value for key, value in b.items()}, a),
        ({"student": a, "teacher": b}, None),
        ({f"{name}.{key}": state[key] for name, state in (("q", a), ("k", b)) for key in a}, None),
    ):
        torch.save(state, file)
        if expected:
            assert torch.equal(resnet18_of(file).trunk.net.conv1.weight, expected["conv1.weight"])
        else:
            with pytest.raises(UserError, match="both fit; save one of them"):
                resnet18_of(file)
    del a["layer1.0.conv1.weight"]
    torch.save({"model": a}, file)
    with pytest.raises(UserError, match="has no layer1.0.conv1.weight"):
        resnet18_of(file)


def test_a_convolution_and_its_relu_are_one_but_where_the_layer_lies_between(image, monkeypatch):
    """As for CUDA. features.10, before ReLU, has what features.11 sets to 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before, behind = (Encoder("torchvision/alexnet", f"features.{place}") for place in (10, 11))
    kinds = [[type(module) for module in encoder.trunk.net.features] for encoder in (before, behind)]
    assert [row.count(conv_relu.ConvReLU) for row in kinds] == [4, 5]
    assert kinds[0][10] is nn.Conv2d and nn.ReLU not in kinds[0] + kinds[1]
    assert before(image).min() < 0 and torch.equal(before(image).relu(), behind(image))
    net = torchvision.models.alexnet()
    net.features.load_state_dict(behind.trunk.net.features.state_dict())
    x = normalised(behind, image).contiguous(memory_format=torch.channels_last)
    expected = net.to(memory_format=torch.channels_last).features[:12](x)
    assert torch.equal(behind(image), expected)


def test_a_file_without_a_weight_or_of_no_weights_is_one_line(tmp_path):
    state = torchvision.models.resnet18().state_dict()
    del state["layer1.1.bn2.bias"]
    torch.save(state, tmp_path / "x.pth")
    resnet18_of(tmp_path / "x.pth", "layer1.0")  # needs none behind
    torch.save({0: state["conv1.weight"]}, tmp_path / "numbers.pth")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for name, layer, message in (
        ("x.pth", "layer2", "has no layer1.1.bn2.bias"),
        ("numbers.pth", "layer1", "not a state dict"),
        ("x.safetensors", "layer1", "not a safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            resnet18_of(tmp_path / name, layer)


# --- Several at once --------------------------------------------------------------------------------------


def test_layers_are_joined_in_one_pass(image):
    joint = build_encoder("vgg16+vgg16", "block2+block1", "random")
    passes = []
    joint.encoders[0].trunk.net.features[0].register_forward_pre_hook(lambda *_: passes.append(1))
    z = joint(image)
    deep, shallow = (Encoder("vgg16", layer, "random")(image) for layer in ("block2", "block1"))
    assert len(passes) == 1 and joint.shapes == [(128, 56, 56), (64, 112, 112)]
    assert torch.equal(z[:, 128:], shallow)
    expected = torch.nn.functional.interpolate(deep, (112, 112), mode="bilinear")
    torch.testing.assert_close(z[:, :128], expected)


def test_encoders_may_have_weights_of_their_own(image):
    joint = build_encoder("alexnet+vgg16+alexnet", "conv2+block2+conv2", "imagenet+random+random")
    z = joint(image)
    assert z.shape == (1, 192 + 128 + 192, 56, 56) and not torch.equal(z[:, :192], z[:, 320:])
    alone = nn.functional.interpolate(Encoder("alexnet", "conv2")(image), (56, 56), mode="bilinear")
    torch.testing.assert_close(z[:, :192], alone)


@pytest.mark.parametrize(
    ("encoder", "layer", "message"),
    [
        ("vgg16+alexnet", "block1", "2 encoders, 1 layers"),
        ("vgg16+vgg16", "block1+block1", "a layer of vgg16 twice"),
        ("vgg16+torchvision/inception_v3", "block1+Mixed_5b", "give an --input-size"),
    ],
)
def test_what_cannot_be_joined_is_one_line(encoder, layer, message):
    with pytest.raises(UserError, match=message):
        build_encoder(encoder, layer, "random")


@pytest.mark.parametrize("fusion", ["concat", "weighted", "attention"])
def test_sources_are_weighed(fusion):
    """Before a decoder that gives back what it gets."""

    class Same(nn.Module):
        def forward(self, z, size):
            return z

    z = torch.rand(2, 5, 4, 4)
    fused = Fused(Same(), [2, 3], fusion)
    fused.deviation.copy_(torch.tensor([2.0, 4.0]))
    training = z[:, :2] / 2, z[:, 2:] / 4
    if fusion == "weighted":
        fused.logits.data[0, 1] = math.log(3)  # shares of 1 and 3 in four, of two sources
        training = training[0] / 2, 3 * training[1] / 2
    if fusion == "attention":
        share = fused.weigh(torch.cat(training, 1)).softmax(1)
        assert share.shape == (2, 2, 4, 4) and share.std() > 0
        expected = torch.cat([2 * share[:, :1] * training[0], 2 * share[:, 1:] * training[1]], 1)
    else:
        expected = torch.cat(training, 1)
    torch.testing.assert_close(fused(z), expected)
    assert len(list(fused.parameters())) == {"concat": 0, "weighted": 1, "attention": 2}[fusion]


def test_each_source_is_divided_by_its_own_deviation(photos):
    training = training_on(photos, "--encoder", "vgg16+vgg16", "--layer", "block2+block1", "--crop", 32)
    train.measure_features(training.inverter, training.train_images, training.config)
    features = training.inverter.encode(torch.cat([batch for batch, _ in batches_of(training)])).numpy()
    deviation = training.inverter.decoder.deviation.numpy()
    np.testing.assert_allclose(deviation, [features[:, :128].std(), features[:, 128:].std()], rtol=1e-4)
    assert deviation[0] != pytest.approx(deviation[1], rel=0.01)


@pytest.mark.parametrize("dead", [slice(0, 128), slice(None)], ids=["one", "all"])
def test_a_source_that_never_changes(photos, monkeypatch, dead):
    """Its map is divided by no 0: what is decoded is finite."""
    names = ("--encoder", "vgg16+vgg16", "--layer", "block2+block1", "--decoder", "residual")
    training = training_on(photos, *names, "--crop", 32, "--width", 8)
    real = training.inverter.encode

    def encode(images):
        features = real(images).clone()
        features[:, dead] = 0
        return features

    monkeypatch.setattr(training.inverter, "encode", encode)
    train.measure_features(training.inverter, training.train_images, training.config)
    features = encode(torch.rand(2, 3, 32, 32))
    assert training.inverter.decoder.eval()(features).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["tconv", "residual", "feedback"])
def test_several_are_trained_resumed_and_measured(decoder, photos, tmp_path, run_train, run_evaluate):
    names = ("--encoder", "vgg16+vgg16", "--layer", "block3+block2", "--fusion", "weighted")
    options = ["--data", photos, "--decoder", decoder, "--crop", 32, "--out", tmp_path, "--quiet"]
    if decoder == "feedback":
        options += ["--iterations", 1]
    assert run_train(*names, *options, "--kept-crops", 1, "--epochs", 1) == 0
    assert run_train(*names, *options, "--kept-crops", 1, "--epochs", 1, "--resume") == 0
    assert run_evaluate("--ckpt", tmp_path / "best.pt", "--quiet") == 0
    found = torch.load(tmp_path / "best.pt", weights_only=True)
    assert found["shape"] == [384, 56, 56] and found["decoder"]["logits"].std() > 0


def test_joined_maps_have_the_stride_of_the_coarsest(photos, tmp_path, run_train, error_line):
    flags = ("--encoder", "vgg16+vgg16", "--layer", "block5+block1", "--weights", "random", "--data", photos)
    assert run_train(*flags, "--crop", 62, "--out", tmp_path) == 2
    assert "has a stride of 32 pixels" in error_line()
