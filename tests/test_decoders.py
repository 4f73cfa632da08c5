"""The decoders: their sizes, every shape they must take, gradients, and whether they can learn."""

import pytest
import skimage.data
import torch
import torch.nn.functional as F
from training import wake

from decoders import FeedbackDecoder, MultiHeadAttention, TransformerBlock
from encoders import Encoder
from layers import resize_by_products
from models import BUILDERS, build_decoder, count_parameters
from utils import DECODERS

SHAPES = [  # every distinct feature shape of every encoder's layers
    *[(64, 112, 112), (128, 56, 56), (256, 28, 28), (512, 14, 14), (512, 7, 7)],  # VGG16
    *[(64, 56, 56), (128, 28, 28), (256, 14, 14), (384, 14, 14)],  # ResNet34, ViT
    *[(64, 27, 27), (192, 13, 13), (384, 13, 13), (256, 13, 13), (256, 6, 6)],  # AlexNet
]
HEAD = 64 * 12 * 9 + 12  # parameters of a head, from 64 channels to 2×2 pixels
# 33,731, with the biases that paper 3.2.1 leaves out
TCONV = (64 * 32 * 4 * 4 + 32) + 2 * 32 + (32 * 3 * 3 * 3 + 3)


def photographs(*names, size):
    """Photographs of scikit-image: (B, 3, size, size) in [0, 1]."""
    images = [torch.tensor(getattr(skimage.data, name)()).permute(2, 0, 1)[None] / 255 for name in names]
    return torch.cat([F.interpolate(x, (size, size), mode="bilinear", antialias=True) for x in images])


def iterates(decoder, features, encoder=None):
    """Images; without an encoder, feedback looks at the images themselves, reduced."""
    if not isinstance(decoder, FeedbackDecoder):
        return [decoder(features)]
    channels, *size = features.shape[1:]

    def reduced(images):
        return F.adaptive_avg_pool2d(images, size).repeat(1, channels, 1, 1)[:, :channels]

    return decoder(features, None, encoder or reduced)


@pytest.mark.parametrize(
    ("decoder", "shape", "width", "published", "tolerance"),
    [
        ("tconv", (64, 112, 112), None, TCONV, 0),
        # 3×3 convolutions of 64 channels: one and twelve; or one, two and two, and one of what is seen and h
        ("residual", (64, 112, 112), None, 13 * (64 * 64 * 9 + 64) + HEAD, 0),
        ("feedback", (64, 112, 112), None, 5 * (64 * 64 * 9 + 64) + (128 * 64 * 9 + 64) + 2 * HEAD, 0),
        ("frequency", (64, 112, 112), None, 35e6, 0.03),
        ("wavelet", (64, 112, 112), None, 8e6, 0.03),
        ("attention", (64, 112, 112), None, 12e6, 0.03),
        ("tconv", (64, 56, 56), None, 50.2e3, 0.001),
        ("tconv", (256, 28, 28), None, 689e3, 0.001),
        ("tconv", (256, 28, 28), 16, 75e3, 0.03),
    ],
)
def test_parameter_counts(decoder, shape, width, published, tolerance):
    with torch.device("meta"):
        count = count_parameters(build_decoder(decoder, shape, width))
    assert count == pytest.approx(published, rel=tolerance, abs=0)


@pytest.mark.parametrize(("old", "new"), [((56, 56), (112, 112)), ((13, 9), (31, 14)), ((30, 20), (13, 7))])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_resizing_by_products_is_bilinear(old, new, memory_format):
    """What a GPU does in place of F.interpolate, and its gradient."""
    x = torch.randn(2, 5, *old, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    weights = torch.randn(2, 5, *new, dtype=torch.float64)
    found = resize_by_products(x, new)
    expected = F.interpolate(x, new, mode="bilinear")
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    torch.testing.assert_close(gradient, *torch.autograd.grad((expected * weights).sum(), x))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("width", [1, 7, 8])
def test_images_from_every_shape(decoder, width):
    for shape in SHAPES if width == 8 else SHAPES[-1:]:
        net = build_decoder(decoder, shape, width)
        with torch.no_grad():
            images = iterates(net, 10 * torch.rand(1, *shape))[-1]
        assert images.shape == (1, 3, 224, 224), shape
        assert images.isfinite().all() and images.min() < images.max(), shape
        assert decoder in ("residual", "feedback") or 0 <= images.min() and images.max() <= 1


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("layer", ["block2", "block5"])
def test_every_parameter_gets_a_gradient(decoder, layer):
    """In float64, where a gradient of rounding errors alone is told from a small one."""
    features = Encoder("vgg16", layer)(photographs("astronaut", size=96)).double()
    net = BUILDERS[decoder](tuple(features.shape[1:]), 16, size=96).double()
    wake(net, std=0.1)
    if decoder == "feedback":
        net.eval()  # in training its first image may be of no consequence to the last
    target = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)).double()
    F.mse_loss(iterates(net, features)[-1], target).backward()
    # The study's transposed convolutions have biases, which count among the 33,731, but BN takes them away.
    idle = {f"{name}.{i}.bias" for name in ("upsample", "decode.upsample") for i in range(0, 15, 3)}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-10 or name in idle, (name, parameter.grad.abs().max())


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (128, 2)])
def test_attention_is_softmax_of_products(width, heads):
    attention = MultiHeadAttention(width)
    x = 3 * torch.randn(2, 5 * 6, width, generator=torch.Generator().manual_seed(0))
    outputs = []
    for matrices in attention.qkv.weight.view(3, heads, 64, width).unbind(1):
        query, key, value = (x @ matrix.T for matrix in matrices)
        outputs.append((query @ key.transpose(1, 2) / 64**0.5).softmax(2) @ value)
    expected = attention.out(torch.cat(outputs, 2))
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_keeps_no_matrix_of_all_pairs():
    positions, saved = 56 * 56, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        TransformerBlock(16)(torch.rand(1, 16, 56, 56))
    assert saved and max(saved) < positions**2 / 10


@pytest.mark.parametrize("decoder", DECODERS)
def test_decoder_overfits_four_photographs(decoder):
    images = photographs("astronaut", "chelsea", "coffee", "rocket", size=32)
    encoder = Encoder("vgg16", "block1")
    features = encoder(images)  # (4, 64, 16, 16)
    net = build_decoder(decoder, (64, 16, 16), 32, size=32)
    if normalises := hasattr(net, "deviation"):
        net.mean.copy_(features.mean((0, 2, 3))[:, None, None])
        net.deviation.copy_(features.std((0, 2, 3)).clamp_min(0.01)[:, None, None])
    optimiser = torch.optim.Adam(net.parameters(), 1e-3 if decoder == "feedback" else 3e-3)
    for step in range(1, 151):
        *earlier, last = iterates(net, features, encoder)
        loss = F.mse_loss(last, images) + 0.3 * sum(F.mse_loss(image, images) for image in earlier)
        optimiser.zero_grad()
        loss.backward()
        if normalises:  # no batch norm
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        optimiser.step()
        if step % 25 == 0:
            with torch.no_grad():
                error = (iterates(net.eval(), features, encoder)[-1] - images).square().mean((1, 2, 3))
            net.train()
            if (psnr := -10 * error.log10().mean()) >= 25:
                return
    pytest.fail(f"{psnr:.2f} dB after {step} steps")
