"""Two decoders beyond the study's: residual blocks, and one that looks at the encoder to correct itself."""

import torch
from torch import nn

from decoders import resize, upsamplings
from study import IMAGE_SIZE, ITERATIONS

GAIN = 0.1  # of what becomes pixels: a step of Adam moves all weights at once, and with 1 the images too far


class Refinement(nn.Module):
    """Convolution, GELU and convolution beside a shortcut: (B, C, H, W) → the same, at first unchanged."""

    def __init__(self, channels):
        super().__init__()
        first, last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.body = nn.Sequential(first, nn.GELU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x):
        return x + self.body(x)


class PixelShuffleHead(nn.Module):
    """Per 2× a convolution and a pixel shuffle: (B, C, H, W) → (B, 3, *size), any real numbers.

    Each step halves the channels, down to 32. shade: what it gives at first, about.
    """

    def __init__(self, channels, steps, shade=0.0):
        super().__init__()
        self.layers = nn.Sequential()
        scale = 2 if steps else 1  # where a pixel has a position of its own
        for step in range(1, max(steps, 1) + 1):
            out = max(channels // 2, 32) if step < steps else 3
            self.layers.extend([nn.Conv2d(channels, scale**2 * out, 3, padding=1), nn.PixelShuffle(scale)])
            if step < steps:
                self.layers.append(nn.GELU())
            channels = out
        nn.init.constant_(self.last.bias, shade / GAIN)

    @property
    def last(self):
        """The convolution whose channels become pixels."""
        return self.layers[-2]

    def forward(self, x, size):
        x = resize(self.layers(x), size)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 is too coarse to be corrected
        return GAIN * x


class ResidualDecoder(nn.Module):
    """Residual blocks at the features' resolution: features (B, C, H, W) → images (B, 3, size, size).

    Not held to [0, 1], where a sigmoid would slow the darkest and the brightest pixels down: what is measured
    or drawn is clamped. No batch norm: each channel has mean 0 and deviation 1 over training images, which
    prepare.py measures. width: channels of the blocks.
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
    """An iteration of FeedbackDecoder: r (B, C, H, W) and h (B, width, H, W) → h, and a change."""

    def __init__(self, channels, width, steps, blocks):
        super().__init__()
        self.compare = nn.Conv2d(channels + width, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Refinement(width) for _ in range(blocks)))
        self.head = PixelShuffleHead(width, steps)
        nn.init.zeros_(self.head.last.weight)  # at first it changes nothing

    def forward(self, residual, h, size):
        h = h + self.blocks(self.compare(torch.cat([residual, h], 1)))
        return h, self.head(h, size)


class FeedbackDecoder(ResidualDecoder):
    """A decoder that looks at the encoder: features (B, C, H, W) → images after each iteration, x₀ … x_K.

    x₀ is ResidualDecoder's. Then K times the image is encoded, and how its features differ from those wanted,
    r = (E(x) − z) / σ, changes a hidden map h and with it the image: h ← h + blocks(conv[r, h]), and
    x ← x + head(h), with the same weights each time. A learned optimisation (Adler & Öktem 2017; Putzky and
    Welling 2017; Carreira et al. 2016) of what Mahendran & Vedaldi 2015 do by the gradient of ‖r‖².

    More than K iterations, where `iterations` is set to more, are rounds of K, each with a new h. So that a
    second one improves what it is given, half of training's batches begin with what a first one made.
    """

    def __init__(self, shape, width=64, size=IMAGE_SIZE, blocks=1, iterations=ITERATIONS):
        super().__init__(shape, width, size, blocks)
        channels, height, _ = shape
        self.iterations = iterations
        self.in_a_round = iterations  # as many as training has, whatever `iterations` becomes
        self.again = False  # whether training begins with what a round made
        self.steps = nn.ModuleList([FeedbackStep(channels, width, upsamplings(height, size), blocks)])

    def draw(self):
        """Decide, before a step, whether its batch begins with what a first round made."""
        self.again = bool(torch.rand(()) < 0.5)

    def forward(self, z, size, encoder):
        """size: of the images, or None; encoder: images (B, 3, H, W) → features like z."""
        hidden = h = self.hidden(z)
        image = self.head(h, size or self.size)
        images = [image]
        if self.training and self.again:
            with torch.no_grad():
                for _ in range(self.in_a_round):
                    image, h = self.iterate(image, h, z, encoder)
        for done in range(self.iterations):
            h = h if done % self.in_a_round else hidden
            image, h = self.iterate(image, h, z, encoder)
            images.append(image)
        return images

    def iterate(self, image, h, z, encoder):
        """An image (B, 3, H, W) that is closer to z, and what h is then."""
        residual = (encoder(image) - z) / self.deviation
        h, change = self.steps[0](residual, h, image.shape[2:])
        return image + change, h
