"""The trained decoders, features (B, C, H, W) → images (B, 3, 224, 224): the study's (paper 3.2), two more.

Each is built for the features of 224×224 images, and takes those of others too: forward's `size` is theirs.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from study import DECODERS
from utils import UserError

IMAGE_SIZE = 224
ITERATIONS = 3  # of FeedbackDecoder


def upsamplings(height, size):
    """Number of 2× steps from `height` to about `size`."""
    return round(math.log2(size / height))


def resize(x, size):
    """`x` (B, C, H, W) as (B, C, *size), bilinear: for AlexNet's 27, 13 and 6, no power of two below 224."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear")


class TransposedConv(nn.Module):
    """The study's primary decoder (paper 3.2.1): features (B, C, H, W) → images (B, 3, size, size) in [0, 1].

    shape: (C, H, W). Per 2×: ConvTranspose2d(4, 2, 1) → BN → ReLU with max(c // 2, 32) channels, or
    `width` channels throughout where it is given; then Conv3×3 → 3 and a sigmoid.
    """

    def __init__(self, shape, width=None, size=IMAGE_SIZE):
        super().__init__()
        channels, height, _ = shape
        layers = []
        for _ in range(upsamplings(height, size)):
            out = width or max(channels // 2, 32)
            layers += [nn.ConvTranspose2d(channels, out, 4, 2, 1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        self.size = (size, size)
        self.upsample = nn.Sequential(*layers)
        self.to_rgb = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z, size=None):
        return torch.sigmoid(self.to_rgb(resize(self.upsample(z), size or self.size)))


def conv_bn(channels, out, kernel=3):
    """A convolution that keeps H×W, then BN, whose own shift makes a bias idle."""
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out)
    )


def conv_block(channels, out, kernel=3):
    return conv_bn(channels, out, kernel).append(nn.ReLU(inplace=True))


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation (paper 3.2.2): (B, C, H, W) scaled by a weight per channel."""

    def __init__(self, channels):
        super().__init__()
        squeezed = max(channels // 16, 4)
        # SiLU, because the few units of a narrow decoder could all be dead under ReLU
        self.excite = nn.Sequential(nn.Linear(channels, squeezed), nn.SiLU(), nn.Linear(squeezed, channels))

    def forward(self, x):
        weights = torch.sigmoid(self.excite(x.mean((2, 3))))  # (B, C)
        return x * weights[:, :, None, None]


class SpatialAttention(nn.Module):
    """(B, C, H, W) scaled by a weight per position, of the channels' mean and maximum (paper 3.2.2)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        statistics = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)  # (B, 2, H, W)
        return x * torch.sigmoid(self.conv(statistics))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(conv_block(channels, channels), conv_bn(channels, channels))

    def forward(self, x):
        return F.relu(x + self.body(x))


class ResidualUpsampling(nn.Module):
    """Progressive upsampling with residual blocks (paper 3.2.2): (B, C, H, W) → (B, out, size, size).

    Each 2× halves the channels, down to `out`, and the last one goes to `out` at once: a convolution at
    full size costs four times what its parameters cost one step earlier.
    """

    def __init__(self, channels, out, height, size):
        super().__init__()
        self.size = (size, size)
        self.blocks = nn.Sequential()
        steps = upsamplings(height, size)
        for step in range(1, steps + 1):
            narrower = max(channels // 2, out) if step < steps else out
            self.blocks.append(nn.ConvTranspose2d(channels, narrower, 4, 2, 1, bias=False))
            self.blocks.extend([nn.BatchNorm2d(narrower), nn.ReLU(inplace=True), ResidualBlock(narrower)])
            channels = narrower

    def forward(self, x, size=None):
        return resize(self.blocks(x), size or self.size)


class MultiScaleRefinement(nn.Module):
    """Parallel 3×3, 5×5 and 7×7 convolutions, weighted against each other at every position (paper 3.2.2).

    (B, C, H, W) → (B, C, H, W), a residual correction.
    """

    def __init__(self, channels):
        super().__init__()
        self.scales = nn.ModuleList(conv_block(channels, channels, kernel) for kernel in (3, 5, 7))
        self.select = nn.Conv2d(3 * channels, 3, 1)

    def forward(self, x):
        scales = [scale(x) for scale in self.scales]
        weights = self.select(torch.cat(scales, 1)).softmax(1)  # (B, 3, H, W)
        return x + sum(weights[:, i : i + 1] * scale for i, scale in enumerate(scales))


class ColorEnhancement(nn.Module):
    """Instance normalisation and a learned colour transform (paper 3.2.2): (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels)
        self.transform = nn.Conv2d(channels, channels, 1)
        self.gain = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x):
        # A correction beside x, because the norm takes away the picture's own mean colour; on features,
        # because the paper has it before RGB. The gain begins small but not at 0, where nothing would train.
        return x + self.gain * self.transform(self.norm(x))


class ImageHead(nn.Module):
    """The last stages of FrequencyDecoder and WaveletDecoder: (B, C, H, W) → images (B, 3, size, size)."""

    def __init__(self, channels, out, height, size):
        super().__init__()
        self.upsample = ResidualUpsampling(channels, out, height, size)
        self.refine = MultiScaleRefinement(out)
        self.enhance = ColorEnhancement(out)
        self.to_rgb = nn.Conv2d(out, 3, 3, padding=1)

    def forward(self, x, size=None):
        x = self.enhance(self.refine(self.upsample(x, size)))
        return torch.sigmoid(self.to_rgb(x))


class FrequencyFusion(nn.Module):
    """Which band and which place matter (paper 3.2.2): low and high (B, C/2, H, W) each → (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.attend = nn.Sequential(ChannelAttention(channels), SpatialAttention())

    def forward(self, low, high):
        return self.attend(torch.cat([low, high], 1))


class SpatialChannelAttention(nn.Module):
    """Both attentions and a 1×1 convolution beside a shortcut (paper 3.2.2): (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.attend = nn.Sequential(
            ChannelAttention(channels), SpatialAttention(), conv_bn(channels, channels, 1)
        )

    def forward(self, x):
        return x + self.attend(x)


class FrequencyDecoder(nn.Module):
    """Frequency-aware decoder (paper 3.2.2): features (B, C, H, W) → images (B, 3, size, size) in [0, 1].

    width: channels that the features are projected to, and that each pathway of 3×3 convolutions halves.
    Nearly all parameters are in the pathways, at the features' resolution or half of it.
    """

    def __init__(self, shape, width=1280, size=IMAGE_SIZE):
        super().__init__()
        channels, height, _ = shape
        half = max(width // 2, 1)
        layers = ((width, half), (half, half), (half, half))
        self.project = conv_block(channels, width, 1)
        self.low = nn.Sequential(*(conv_block(*layer) for layer in layers))
        self.high = nn.Sequential(*(conv_block(*layer) for layer in layers))
        self.fusion = FrequencyFusion(2 * half)
        self.attention = nn.Sequential(SpatialChannelAttention(2 * half), SpatialChannelAttention(2 * half))
        self.head = ImageHead(2 * half, max(width // 32, 8), height, size)

    def forward(self, z, size=None):
        x = self.project(z)  # (B, width, H, W)
        smooth = F.avg_pool2d(x, 2, ceil_mode=True)  # low frequencies need no more, at a quarter of the cost
        low = resize(self.low(smooth), x.shape[2:])  # (B, width/2, H, W)
        high = self.high(x - resize(smooth, x.shape[2:]))  # (B, width/2, H, W)
        return self.head(self.attention(self.fusion(low, high)), size)


class BandFusion(ResidualBlock):
    """Wavelet bands mixed and weighted by channel attention (paper 3.2.2): (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__(channels)
        # Behind ReLU, because behind BN the mean of a channel is its shift, whatever the picture.
        self.body.insert(1, ChannelAttention(channels))


class WaveletDecoder(nn.Module):
    """Wavelet frequency decoder (paper 3.2.2): features (B, C, H, W) → images (B, 3, size, size) in [0, 1].

    width: channels of the four subbands together, 64 each by default.
    """

    def __init__(self, shape, width=256, size=IMAGE_SIZE):
        super().__init__()
        channels, height, _ = shape
        band = max(width // 4, 1)
        width, half = 4 * band, 2 * band
        self.bands = nn.ModuleDict()
        for name in ("LL", "LH", "HL", "HH"):  # no ReLU at their ends: wavelet coefficients have signs
            layers = conv_block(channels, width), conv_block(width, width), conv_bn(width, band)
            self.bands[name] = nn.Sequential(*layers)
        self.fusion = nn.Sequential(BandFusion(width), BandFusion(width))
        self.refinement = nn.Sequential(ResidualBlock(width), conv_block(width, half), ResidualBlock(half))
        self.head = ImageHead(half, max(width // 8, 8), height, size)

    def forward(self, z, size=None):
        x = torch.cat([band(z) for band in self.bands.values()], 1)  # (B, width, H, W)
        return self.head(self.refinement(self.fusion(x)), size)


class MultiHeadAttention(nn.Module):
    """softmax(QKᵀ/√d)V over all positions, in heads of d = 64 (paper 3.2.2): (B, N, width) → the same."""

    def __init__(self, width):
        super().__init__()
        inner = 64 * max(width // 64, 1)
        # No bias: a key's moves all scores of a query alike, and the softmax takes that away.
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)  # (B, heads, N, 64) each
        x = F.scaled_dot_product_attention(q, k, v)  # in tiles: never an N×N matrix
        return self.out(x.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and MLP with residuals, pre-norm (paper 3.2.2): a map (B, width, H, W) → the same.

    Where a position lies is said by a depthwise convolution over its neighbours (Chu et al. 2021), relative
    and the same in a map of any size: what is learnt on crops holds on whole images.
    """

    def __init__(self, width):
        super().__init__()
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.attention = nn.Sequential(nn.LayerNorm(width), MultiHeadAttention(width))
        # 8 × width rather than the usual 4: attention over 12,544 positions costs far more time per
        # channel than the MLP, so the parameters of a 512-wide transformer are cheaper here.
        hidden = 8 * width
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )

    def forward(self, x):
        map_size = x.shape[2:]
        x = x + self.position(x)
        x = x.flatten(2).transpose(1, 2)  # (B, H·W, width)
        x = x + self.attention(x)
        x = x + self.mlp(x)
        return x.transpose(1, 2).unflatten(2, map_size)


class AttentionDecoder(nn.Module):
    """Attention decoder (paper 3.2.2): features (B, C, H, W) → images (B, 3, size, size) in [0, 1].

    width: channels of a token; the map goes to TransposedConv with the features' own channels, or `width` if
    fewer.
    """

    def __init__(self, shape, width=384, size=IMAGE_SIZE):
        super().__init__()
        channels, height, breadth = shape
        mapped = min(channels, width)
        self.embed = conv_bn(channels, width, 1)
        self.blocks = nn.Sequential(*(TransformerBlock(width) for _ in range(4)))
        self.to_map = nn.Conv2d(width, mapped, 1, bias=False)  # a bias would end in TransposedConv's BN
        self.decode = TransposedConv((mapped, height, breadth), size=size)

    def forward(self, z, size=None):
        return self.decode(self.to_map(self.blocks(self.embed(z))), size)


class Refinement(nn.Module):
    """Convolution, GELU and convolution beside a shortcut: (B, C, H, W) → the same, at first unchanged."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x):
        return x + self.body(x)


class PixelShuffleHead(nn.Module):
    """Per 2× a convolution and a pixel shuffle: (B, C, H, W) → (B, 3, *size), any real numbers.

    Each step halves the channels, down to 32. shade: what it gives at first, about.
    """

    def __init__(self, channels, steps, shade=0.0):
        super().__init__()
        self.layers = nn.Sequential()
        for step in range(1, steps + 1):
            out = max(channels // 2, 32) if step < steps else 3
            self.layers.extend([nn.Conv2d(channels, 4 * out, 3, padding=1), nn.PixelShuffle(2)])
            if step < steps:
                self.layers.append(nn.GELU())
            channels = out
        nn.init.constant_(self.last.bias, shade)

    @property
    def last(self):
        """The convolution whose channels become pixels."""
        return self.layers[-2]

    def forward(self, x, size):
        return resize(self.layers(x), size)


class ResidualDecoder(nn.Module):
    """Residual blocks at the features' resolution: features (B, C, H, W) → images (B, 3, size, size).

    Not held to [0, 1], where a sigmoid would slow the darkest and the brightest pixels down: what is measured
    or drawn is clamped. No batch norm: each channel has mean 0 and deviation 1 over training images, which
    train.py measures. width: channels of the blocks.
    """

    def __init__(self, shape, width=64, size=IMAGE_SIZE, blocks=6):
        super().__init__()
        channels, height, _ = shape
        self.size = (size, size)
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("deviation", torch.ones(channels, 1, 1))
        self.embed = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Refinement(width) for _ in range(blocks)))
        self.head = PixelShuffleHead(width, upsamplings(height, size), shade=0.5)

    def hidden(self, z):
        return self.blocks(self.embed((z - self.mean) / self.deviation))

    def forward(self, z, size=None):
        return self.head(self.hidden(z), size or self.size)


class FeedbackStep(nn.Module):
    """An iteration of FeedbackDecoder: what it sees (B, S, H, W) and h (B, width, H, W) → h, and a change."""

    def __init__(self, seen, width, steps, blocks):
        super().__init__()
        self.compare = nn.Conv2d(seen + width, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Refinement(width) for _ in range(blocks)))
        self.head = PixelShuffleHead(width, steps)
        nn.init.zeros_(self.head.last.weight)  # at first it changes nothing

    def forward(self, seen, h, size):
        h = h + self.blocks(self.compare(torch.cat([seen, h], 1)))
        return h, self.head(h, size)


class FeedbackDecoder(ResidualDecoder):
    """A decoder that looks at the encoder: features (B, C, H, W) → images after each iteration, x₀ … x_K.

    x₀ is ResidualDecoder's. Then K times the image is encoded, and how its features differ from those wanted,
    r = (E(x) − z) / σ, changes a hidden map h and with it the image: h ← h + blocks(conv[r, h]), and
    x ← x + head(h). A learned optimisation (Adler & Öktem 2017; Putzky & Welling 2017; Carreira et al. 2016)
    of what Mahendran & Vedaldi 2015 do by hand, with the gradient of ‖r‖². feedback: what an iteration sees,
    the `residual` r, that `gradient`, or `both`. own_weights: of each iteration; else the same in all.

    More than K iterations are rounds of K, each with a new h. So that a second one improves what it is given,
    half of the training's batches begin with what a first one made.
    """

    def __init__(
        self,
        shape,
        width=64,
        size=IMAGE_SIZE,
        blocks=1,
        iterations=ITERATIONS,
        feedback="residual",
        own_weights=False,
    ):
        super().__init__(shape, width, size, blocks)
        channels, height, _ = shape
        steps = upsamplings(height, size)
        self.iterations = iterations
        self.feedback = feedback
        self.factor = 2**steps
        pixels = 3 * self.factor**2
        seen = {"residual": channels, "gradient": pixels, "both": channels + pixels}[feedback]
        count = iterations if own_weights else 1
        self.steps = nn.ModuleList(FeedbackStep(seen, width, steps, blocks) for _ in range(count))

    def forward(self, z, encoder, size=None, iterations=None):
        """iterations: rather than the decoder's own. encoder: images (B, 3, H, W) → features like z."""
        count = self.iterations if iterations is None else iterations
        h = self.hidden(z)
        start = self.head(h, size or self.size)
        images = [start]
        if self.training and torch.rand(()) < 0.5:
            with torch.no_grad():
                start = self.round(start, h, z, encoder, count)[-1]
        for done in range(0, count, self.iterations):
            images += self.round(start, h, z, encoder, min(count - done, self.iterations))
            start = images[-1]
        return images

    def round(self, image, h, z, encoder, count):
        """What `count` iterations make of `image` (B, 3, H, W), one after the other."""
        images = []
        for number in range(count):
            step = self.steps[number % len(self.steps)]
            h, change = step(self.look(image, z, encoder), h, image.shape[2:])
            image = image + change
            images.append(image)
        return images

    def look(self, images, z, encoder):
        """What an iteration sees, (B, S, H, W), of images (B, 3, h, w)."""
        seen = []
        if self.feedback != "gradient":
            seen.append((encoder(images) - z) / self.deviation)
        if self.feedback != "residual":
            with torch.enable_grad():  # also in validation; training does not differentiate it again
                x = images.detach().requires_grad_()
                error = ((encoder(x) - z.detach()) / self.deviation).square().mean((1, 2, 3)).sqrt().sum()
                (gradient,) = torch.autograd.grad(error, x)
            gradient = resize(gradient, (self.factor * z.shape[2], self.factor * z.shape[3]))
            seen.append(F.pixel_unshuffle(gradient, self.factor))  # to the features' resolution
        return torch.cat(seen, 1)


BUILDERS = {
    "tconv": TransposedConv,
    "frequency": FrequencyDecoder,
    "wavelet": WaveletDecoder,
    "attention": AttentionDecoder,
    "residual": ResidualDecoder,
    "feedback": FeedbackDecoder,
}


def build_decoder(decoder, shape, width=None, seed=42, **options):
    """Decoder `decoder` for features of `shape` (C, H, W), initialised from `seed`.

    Kaiming initialisation (paper 3.3.4) as PyTorch's own layers have it, uniform within ±1/√fan, but with a
    fan of 16 C for transposed convolutions, where PyTorch counts 16 times the channels that come out and an
    output pixel sees 4 C (docs/conclusions.md). width: the decoder's main number of channels; options: those
    of FeedbackDecoder; each the decoder's own where None. Raises UserError for an unknown name.
    """
    if decoder not in DECODERS:
        raise UserError(f"--decoder {decoder}: not a decoder; choose from {', '.join(DECODERS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {name: value for name, value in {"width": width, **options}.items() if value}
        net = BUILDERS[decoder](shape, **options)
        for layer in net.modules():
            if isinstance(layer, nn.ConvTranspose2d):
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), mode="fan_out")
    return net.to(memory_format=torch.channels_last)
