"""Decoders: features (B, C, H, W) → images (B, 3, size, size), the study's four (paper 3.2) in [0, 1].

Each is built for size×size images; forward's `size`, (height, width), asks for others.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from layers import resize
from utils import IMAGE_SIZE, ITERATIONS


def upsamplings(height, size):
    """Number of 2× steps from `height` to about `size`."""
    return max(round(math.log2(size / height)), 0)


class TransposedConv(nn.Module):
    """The study's primary decoder (paper 3.2.1), of features (C, H, W) = shape.

    Per 2×: ConvTranspose2d(4, 2, 1) → BN → ReLU with max(c // 2, 32) channels, or always `width`.
    """

    local = True  # a pixel depends on the features around it alone

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
    """A convolution that keeps H×W, then BN, whose shift replaces the bias."""
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


def conv_block(channels, out, kernel=3):
    return conv_bn(channels, out, kernel).append(nn.ReLU(inplace=True))


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation (paper 3.2.2): a weight for each channel of (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        squeezed = max(channels // 16, 4)
        # SiLU: the few units of a narrow decoder could all die under ReLU.
        self.excite = nn.Sequential(nn.Linear(channels, squeezed), nn.SiLU(), nn.Linear(squeezed, channels))

    def forward(self, x):
        weights = torch.sigmoid(self.excite(x.mean((2, 3))))  # (B, C)
        return x * weights[:, :, None, None]


class SpatialAttention(nn.Module):
    """A weight for each position of (B, C, H, W), from the channels' mean and maximum (paper 3.2.2)."""

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
    """Upsampling with residual blocks (paper 3.2.2): (B, C, H, W) → (B, out, size, size).

    Each 2× halves the channels, but the last goes to `out` at once, since full size is slow.
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
        if not steps:
            self.blocks.append(conv_block(channels, out))

    def forward(self, x, size=None):
        return resize(self.blocks(x), size or self.size)


class MultiScaleRefinement(nn.Module):
    """Parallel 3×3, 5×5 and 7×7 convolutions, weighted by a softmax at each position (paper 3.2.2)."""

    def __init__(self, channels):
        super().__init__()
        self.scales = nn.ModuleList(conv_block(channels, channels, kernel) for kernel in (3, 5, 7))
        self.select = nn.Conv2d(3 * channels, 3, 1)

    def forward(self, x):
        scales = [scale(x) for scale in self.scales]
        weights = self.select(torch.cat(scales, 1)).softmax(1)  # (B, 3, H, W)
        return x + sum(weights[:, i : i + 1] * scale for i, scale in enumerate(scales))


class ColorEnhancement(nn.Module):
    """Instance normalisation and a learned colour transform of (B, C, H, W) (paper 3.2.2)."""

    def __init__(self, channels):
        super().__init__()
        self.transform = nn.Conv2d(channels, channels, 1)
        self.gain = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x):
        # A residual, since the norm removes the image's own mean colour. At a gain of 0 nothing would train.
        return x + self.gain * self.transform(F.instance_norm(x))


class ImageHead(nn.Module):
    """The last stages of FrequencyDecoder and WaveletDecoder."""

    def __init__(self, channels, out, height, size):
        super().__init__()
        self.upsample = ResidualUpsampling(channels, out, height, size)
        self.refine = MultiScaleRefinement(out)
        self.enhance = ColorEnhancement(out)
        self.to_rgb = nn.Conv2d(out, 3, 3, padding=1)

    def forward(self, x, size=None):
        return torch.sigmoid(self.to_rgb(self.enhance(self.refine(self.upsample(x, size)))))


class SpatialChannelAttention(nn.Module):
    """Both attentions and a 1×1 convolution, with a shortcut (paper 3.2.2)."""

    def __init__(self, channels):
        super().__init__()
        attention = ChannelAttention(channels), SpatialAttention()
        self.attend = nn.Sequential(*attention, conv_bn(channels, channels, 1))

    def forward(self, x):
        return x + self.attend(x)


class FrequencyDecoder(nn.Module):
    """Frequency-aware decoder (paper 3.2.2): two pathways of 3×3 convolutions, of width / 2 channels each."""

    local = False

    def __init__(self, shape, width=1280, size=IMAGE_SIZE):
        super().__init__()
        channels, height, _ = shape
        half = max(width // 2, 1)
        self.project = conv_block(channels, width, 1)
        self.low = nn.Sequential(*(conv_block(wide, half) for wide in (width, half, half)))
        self.high = nn.Sequential(*(conv_block(wide, half) for wide in (width, half, half)))
        self.fusion = nn.Sequential(ChannelAttention(2 * half), SpatialAttention())
        self.attention = nn.Sequential(SpatialChannelAttention(2 * half), SpatialChannelAttention(2 * half))
        self.head = ImageHead(2 * half, max(width // 32, 8), height, size)

    def forward(self, z, size=None):
        x = self.project(z)  # (B, width, H, W)
        smooth = F.avg_pool2d(x, 2, ceil_mode=True)  # a quarter of the cost
        low = resize(self.low(smooth), x.shape[2:])  # (B, width/2, H, W)
        high = self.high(x - resize(smooth, x.shape[2:]))  # (B, width/2, H, W)
        return self.head(self.attention(self.fusion(torch.cat([low, high], 1))), size)


class BandFusion(ResidualBlock):
    """A residual block with channel attention, which mixes and weighs wavelet bands (paper 3.2.2)."""

    def __init__(self, channels):
        super().__init__(channels)
        self.body.insert(1, ChannelAttention(channels))  # after ReLU: after BN a channel's mean is constant


class WaveletDecoder(nn.Module):
    """Wavelet frequency decoder (paper 3.2.2): four subbands of width / 4 channels each."""

    local = False

    def __init__(self, shape, width=256, size=IMAGE_SIZE):
        super().__init__()
        channels, height, _ = shape
        band = max(width // 4, 1)
        width, half = 4 * band, 2 * band
        self.bands = nn.ModuleDict()
        for name in ("LL", "LH", "HL", "HH"):  # without a last ReLU: coefficients have signs
            layers = conv_block(channels, width), conv_block(width, width), conv_bn(width, band)
            self.bands[name] = nn.Sequential(*layers)
        self.fusion = nn.Sequential(BandFusion(width), BandFusion(width))
        self.refinement = nn.Sequential(ResidualBlock(width), conv_block(width, half), ResidualBlock(half))
        self.head = ImageHead(half, max(width // 8, 8), height, size)

    def forward(self, z, size=None):
        x = torch.cat([band(z) for band in self.bands.values()], 1)  # (B, width, H, W)
        return self.head(self.refinement(self.fusion(x)), size)


class MultiHeadAttention(nn.Module):
    """softmax(QKᵀ/√d)V over all N positions, in heads of d = 64 (paper 3.2.2): (B, N, width) → the same."""

    def __init__(self, width):
        super().__init__()
        inner = 64 * max(width // 64, 1)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)  # softmax would cancel a key's bias
        self.out = nn.Linear(inner, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, -1, 64)).permute(2, 0, 3, 1, 4)  # (B, heads, N, 64) each
        x = F.scaled_dot_product_attention(q, k, v)  # in tiles: never an N×N matrix
        return self.out(x.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and MLP with residuals, pre-norm (paper 3.2.2): (B, width, H, W) → the same.

    A depthwise convolution encodes positions (Chu et al. 2021), for maps of any size alike.
    """

    def __init__(self, width):
        super().__init__()
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.attention = nn.Sequential(nn.LayerNorm(width), MultiHeadAttention(width))
        # 8 × width, not the usual 4: parameters cost less time here than in attention over 12,544 positions.
        wider, narrower = nn.Linear(width, 8 * width), nn.Linear(8 * width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), wider, nn.GELU(), narrower)

    def forward(self, x):
        map_size = x.shape[2:]
        x = (x + self.position(x)).flatten(2).transpose(1, 2)  # (B, H·W, width)
        x = x + self.attention(x)
        x = x + self.mlp(x)
        return x.transpose(1, 2).unflatten(2, map_size)


class AttentionDecoder(nn.Module):
    """Attention decoder (paper 3.2.2): four blocks of width `width`, then TransposedConv."""

    local = False

    def __init__(self, shape, width=384, size=IMAGE_SIZE):
        super().__init__()
        channels, height, breadth = shape
        mapped = min(channels, width)
        self.embed = conv_bn(channels, width, 1)
        self.blocks = nn.Sequential(*(TransformerBlock(width) for _ in range(4)))
        self.to_map = nn.Conv2d(width, mapped, 1, bias=False)  # BN follows
        self.decode = TransposedConv((mapped, height, breadth), size=size)

    def forward(self, z, size=None):
        return self.decode(self.to_map(self.blocks(self.embed(z))), size)


class Fused(nn.Module):
    """A decoder of several layers' concatenated maps; divides each map by its std, and may weigh it.

    channels: of each map. fusion: `concat`, without weights; `weighted`, a learned weight for each map;
    `attention`, a weight for each map and position. Their mean is 1. train.py measures the stds.
    """

    def __init__(self, decoder, channels, fusion="concat"):
        super().__init__()
        self.decoder = decoder
        self.channels = list(channels)
        self.register_buffer("deviation", torch.ones(len(channels)))
        self.fusion = fusion
        if fusion == "weighted":
            self.logits = nn.Parameter(torch.zeros(1, len(channels), 1, 1))
        elif fusion == "attention":
            self.weigh = nn.Conv2d(sum(channels), len(channels), 1)

    def fuse(self, z):
        maps = [x / std for x, std in zip(z.split(self.channels, 1), self.deviation, strict=True)]
        if self.fusion == "concat":
            return torch.cat(maps, 1)
        logits = self.logits if self.fusion == "weighted" else self.weigh(torch.cat(maps, 1))
        weights = len(maps) * logits.softmax(1)  # (B or 1, maps, H or 1, W or 1)
        return torch.cat([weights[:, i : i + 1] * x for i, x in enumerate(maps)], 1)

    def forward(self, z, size=None, encoder=None):
        feedback = [lambda images: self.fuse(encoder(images))] if encoder else []
        return self.decoder(self.fuse(z), size, *feedback)


# --- Beyond the study: residual and feedback ---

GAIN = 0.1  # scales the last convolution's output: with 1, Adam's steps change the images too much


class Refinement(nn.Module):
    """Convolution, GELU, convolution and a shortcut: (B, C, H, W) → the same, at first the identity."""

    def __init__(self, channels):
        super().__init__()
        first, last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.body = nn.Sequential(first, nn.GELU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x):
        return x + self.body(x)


class PixelShuffleHead(nn.Module):
    """A convolution and a pixel shuffle per 2×: (B, C, H, W) → (B, 3, *size), any real numbers.

    Each step halves the channels, down to 32. shade: the mean of its first images.
    """

    def __init__(self, channels, steps, shade=0.0):
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(steps - 1):
            out = max(channels // 2, 32)
            self.layers.extend([nn.Conv2d(channels, 4 * out, 3, padding=1), nn.PixelShuffle(2), nn.GELU()])
            channels = out
        scale = 2 if steps else 1  # 1: each pixel has its own position
        self.layers.extend([nn.Conv2d(channels, scale**2 * 3, 3, padding=1), nn.PixelShuffle(scale)])
        nn.init.constant_(self.last.bias, shade / GAIN)

    @property
    def last(self):
        return self.layers[-2]  # the last convolution

    def forward(self, x, size):
        x = resize(self.layers(x), size)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 is too coarse for feedback
        return GAIN * x


class ResidualDecoder(nn.Module):
    """`blocks` residual blocks of `width` channels at the features' resolution, then a PixelShuffleHead.

    No sigmoid, which slows the darkest and brightest pixels; metrics and pictures clamp the images. No batch
    norm: features are normalised by their mean and std over the training images, which train.py measures.
    """

    local = True

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
    """r (B, C, H, W) and h (B, width, H, W) → the next h, and a change of the image."""

    def __init__(self, channels, width, steps, blocks):
        super().__init__()
        self.compare = nn.Conv2d(channels + width, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Refinement(width) for _ in range(blocks)))
        self.head = PixelShuffleHead(width, steps)
        nn.init.zeros_(self.head.last.weight)  # at first nothing changes

    def forward(self, residual, h, size):
        h = h + self.blocks(self.compare(torch.cat([residual, h], 1)))
        return h, self.head(h, size)


class FeedbackDecoder(ResidualDecoder):
    """Re-encodes its image K times: features (B, C, H, W) → images after each iteration, [x₀, …, x_K].

    x₀ is ResidualDecoder's. Each iteration encodes the image, and the error of its features,
    r = (E(x) − z) / σ, updates a hidden map and the image, with shared weights: h ← h + blocks(conv[r, h]),
    x ← x + head(h). It learns the optimisation (Adler & Öktem 2017; Putzky and Welling 2017; Carreira et al.
    2016) that Mahendran & Vedaldi 2015 do by the gradient of ‖r‖².

    If `iterations` is set to more than K, each round of K starts with a new h. Half of the training batches
    are second rounds, so that these improve the image, too.
    """

    def __init__(self, shape, width=64, size=IMAGE_SIZE, blocks=1, iterations=ITERATIONS):
        super().__init__(shape, width, size, blocks)
        channels, height, _ = shape
        self.iterations = iterations
        self.iterations_per_round = iterations  # K
        self.warm_start = False  # whether the training batch is a second round
        self.steps = nn.ModuleList([FeedbackStep(channels, width, upsamplings(height, size), blocks)])

    def sample_warm_start(self):
        """Before a training step: decide whether its batch is a second round."""
        self.warm_start = bool(torch.rand(()) < 0.5)

    def forward(self, z, size, encoder):
        """encoder: images (B, 3, H, W) → features like z."""
        hidden = h = self.hidden(z)
        images = [image := self.head(h, size or self.size)]
        if self.training and self.warm_start:
            with torch.no_grad():
                for _ in range(self.iterations_per_round):
                    image, h = self.iterate(image, h, z, encoder)
        for done in range(self.iterations):
            h = h if done % self.iterations_per_round else hidden
            image, h = self.iterate(image, h, z, encoder)
            images.append(image)
        return images

    def iterate(self, image, h, z, encoder):
        """The next image (B, 3, H, W) and h."""
        h, change = self.steps[0]((encoder(image) - z) / self.deviation, h, image.shape[2:])
        return image + change, h
