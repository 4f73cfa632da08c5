"""The Inverter, a frozen encoder and a decoder: built or loaded; and a table of layers and costs.

python models.py                                every layer and decoder of the study, with its cost
python models.py --encoder timm/convnext_tiny   every layer of another
"""

import math
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from string import ascii_lowercase

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import decoders
from checkpoint import MALFORMED, read_checkpoint, reading
from decoders import FeedbackDecoder, Fused, upsamplings
from encoders import build_encoder, encoder_sha256, layers_of, load_network, pretrained_input_config
from utils import (
    DECODERS,
    DOCUMENTED,
    ENCODERS,
    IMAGE_SIZE,
    INPUT_FLAGS,
    ITERATIONS,
    LAYERS,
    PROTOCOLS,
    UserError,
    cli_main,
    digest,
    user_files,
)

# --- Decoders ------------------------------------------------------------------------------------------

BUILDERS = {name: getattr(decoders, kind) for name, kind in DECODERS.items()}


def build_decoder(decoder, shape, width=None, seed=42, **options):
    """Decoder `decoder` for features of `shape` (C, H, W), initialised from `seed`.

    Kaiming initialisation (paper 3.3.4) as in PyTorch's layers, but of transposed convolutions with a fan of
    16 C (docs/tables). width: the decoder's main number of channels; options: of FeedbackDecoder; None:
    the decoder's own. Raises UserError for an unknown name.
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


# --- Encoder and decoder in one ------------------------------------------------------------------------


class Inverter(nn.Module):
    """A frozen encoder and a decoder: images (B, 3, size, size) in [0, 1] → features (B, C, H, W) → images.

    shape: (C, H, W) of the features of a size×size image. amp: compute both in bfloat16; the images are
    float32. normalized: the decoder's images are ImageNet-normalised, for the published loss.
    """

    def __init__(self, encoder, decoder, shape, amp=False, normalized=False):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.normalized = normalized
        self.shape = tuple(shape)
        self.amp = amp

    @property
    def size(self):
        """Side of images for validation and tests: 224, or the encoder's own."""
        return self.encoder.input_size

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def base_decoder(self):
        """The decoder without its Fused, if any."""
        return self.decoder.decoder if isinstance(self.decoder, Fused) else self.decoder

    @property
    def reencode(self):
        """Encodes the decoder's images; does not normalise normalised ones again."""
        return self.encoder.trunk if self.normalized else self.encoder

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    @torch.no_grad()
    def encode(self, images):
        """Features (B, C, H, W) of images; bfloat16 with amp."""
        with self.autocast():
            return self.encoder(images)

    def decode(self, features, size=None):
        """Images in float32 from features; size: (height, width) of the images, None for the own size."""
        return self.decode_all(features, size)[-1]

    def decode_all(self, features, size=None):
        """A list: the images after each iteration, or the only ones."""
        with self.autocast():
            if isinstance(self.base_decoder, FeedbackDecoder):
                images = self.decoder(features, size, self.reencode)
            else:
                images = [self.decoder(features, size)]
        return [image.float() for image in images]

    def forward(self, images, features=None, each=False):
        """Reconstructions of images, from `features` if known; each: a list, as decode_all."""
        features = self.encode(images) if features is None else features
        iterates = self.decode_all(features, images.shape[2:])
        return iterates if each else iterates[-1]

    def shape_at(self, size):
        """(C, H, W) of the features of a size×size image."""
        if size == self.size:
            return self.shape
        return tuple(self.encode(torch.zeros(1, 3, size, size, device=self.device)).shape[1:])

    @property
    def stride(self):
        """Pixels between two positions of the features, of the coarsest layer."""
        return 2 ** upsamplings(min(height for _, height, _ in self.encoder.shapes), self.size)

    def compile(self):
        """torch.compile both networks, in place."""
        self.encoder.compile()
        self.decoder.compile()


def build_inverter(
    encoder="vgg16",
    layer="block1",
    decoder="tconv",
    weights="imagenet",
    *,
    width=None,
    iterations=None,
    seed=42,
    protocol=DOCUMENTED,
    amp=False,
    fusion=None,
    **images,
):
    """An Inverter with an untrained decoder, on the CPU; images: input_size, mean and std. Raises UserError.

    The arguments are Encoder's, build_decoder's, Inverter's and Fused's; `encoder` may be built already.
    """
    frozen = encoder
    if not isinstance(encoder, nn.Module):
        frozen = build_encoder(encoder, layer, weights, seed, protocol, **images)
    channels, heights, widths = zip(*frozen.shapes, strict=True)
    shape = (sum(channels), max(heights), max(widths))
    net = build_decoder(decoder, shape, width, seed, size=frozen.input_size, iterations=iterations)
    if len(channels) > 1:
        net = Fused(net, channels, fusion or "concat")
    return Inverter(frozen, net, shape, amp, protocol.normalized_target)


def encoder_of(config):
    """The encoder for a run's configuration {flag: value}. Raises UserError, and KeyError."""
    values = {name: config[name] for name in ("encoder", "layer", "weights", "seed", *INPUT_FLAGS)}
    return build_encoder(**values, protocol=PROTOCOLS[config["protocol"]])


def inverter_of(config, encoder=None):
    """The Inverter for a run's configuration, with its encoder, if that is built. UserError, KeyError."""
    names = ("layer", "decoder", "weights", "width", "seed", "amp", "iterations", "fusion", *INPUT_FLAGS)
    values = {name: config[name] for name in names}
    encoder = encoder or config["encoder"]
    return build_inverter(encoder, **values, protocol=PROTOCOLS[config["protocol"]])


def load_inverter(path, encoder=None, weights=None, trust_code=False):
    """(Inverter, checkpoint) of the best.pt at `path`, on the CPU, in eval mode and float32.

    encoder, weights: as in its configuration, if files lie elsewhere now. A FILE.py, and no other code, runs
    if `encoder` or trust_code allows it and its hash is the checkpoint's. Raises UserError for another file,
    and for other weights of the encoder.
    """
    checkpoint = read_checkpoint(path)
    config, programs = checkpoint["config"], checkpoint["programs"]
    now = config | {"amp": False}
    with reading(f"{path}: not a best.pt of this program", "give another", MALFORMED):
        now |= {"encoder": encoder or config["encoder"], "weights": weights or config["weights"]}
        before, files = user_files(config["encoder"]), user_files(now["encoder"])
        if len(before) != len(files):
            what = f"{path} was trained with {config['encoder']}, of which a file alone may lie elsewhere"
            raise UserError(f"--encoder {encoder}: {what}")
        if files and not encoder and not trust_code:
            trust = f"if you trust it, give --trust-code, or --encoder {config['encoder']}"
            raise UserError(f"{path}: names a program that would be run, {', '.join(files)}; {trust}")
        wanted = {file: programs[old] for old, file in zip(before, files, strict=True)}
        wanted |= {} if encoder else programs
        changed = [file for file in wanted if not Path(file).is_file() or digest(file) != wanted[file]]
        if changed:
            what = f"{', '.join(changed)}: not what it was trained with; it was not run"
            raise UserError(f"{path}: {what} (--encoder says where it is now)")
        inverter = inverter_of(now)
        inverter.decoder.load_state_dict(checkpoint["decoder"])
        known = [found for found in programs.values() if found in inverter.encoder.programs.values()]
    if checkpoint["encoder_sha256"] != encoder_sha256(inverter.encoder, known):
        names = f"{now['encoder']}'s {now['weights']} weights up to its layer"
        raise UserError(f"{path}: was trained with other {names}, or another mean and std of its images")
    return inverter.eval(), checkpoint


def load_decoder(inverter, config):
    """Load the decoder of config["init"], another run's best.pt, and return the file's SHA-256.

    Runs no FILE.py. Raises UserError for a decoder that does not fit.
    """
    path = config["init"]
    checkpoint = read_checkpoint(path)
    other = checkpoint["config"]
    theirs = f"{other['decoder']} decoder of {tuple(checkpoint['shape'])}"
    ours = f"a {config['decoder']} decoder of {inverter.shape} here"
    load_network(inverter.decoder, checkpoint["decoder"], f"--init {path}, a {theirs}, for {ours}")
    if checkpoint["encoder_sha256"] != encoder_sha256(inverter.encoder) or other["layer"] != config["layer"]:
        print(f"*** --init {path}: was trained on other features: {other['encoder']} {other['layer']} ***")
    return digest(path)


def count_parameters(module):
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --- The table -----------------------------------------------------------------------------------------


def describe(layers, size=IMAGE_SIZE, decoding=True):
    """Print a table of `layers`: features, multiply-adds up to there, and each decoder's parameters.

    layers: {name: (features' shape, multiply-adds or their range as text)}, for size×size images. decoding:
    print each decoder's own multiply-adds, too.
    """
    longest = max(map(len, layers))
    each = f"{'params':>7}{'GMAC':>6}" if decoding else f"{'params':>10}"
    print(f"{'':<{longest + 12}}{'encoder':>9}" + "".join(f"{name:>{len(each)}}" for name in BUILDERS))
    print(f"{'layer':<{longest}} {'features':<11}{'GMAC':>9}" + each * len(BUILDERS))
    built = {}  # {shape: each decoder's columns}
    for name, (shape, encoding) in layers.items():
        if shape not in built:
            with torch.device("meta"):
                nets = [build(shape, size=size).eval() for build in BUILDERS.values()]
            built[shape] = ""
            for net in nets:
                parameters, cost = compact(count_parameters(net)), decoding and decoder_cost(net, shape) / 1e9
                built[shape] += f"{parameters:>7}{cost:>6.3g}" if decoding else f"{parameters:>10}"
        print(f"{name:<{longest}} {'×'.join(map(str, shape)):<11}{encoding:>9}{built[shape]}")


def compact(count):
    """`count` as 33.7K or 2.8M."""
    return f"{count / 1e3:.1f}K" if count < 1e6 else f"{count / 1e6:.1f}M"


def decoder_cost(decoder, shape):
    """Multiply-adds of a decoder on the meta device, without the encoder that a FeedbackDecoder calls."""
    features = torch.empty(1, *shape, device="meta")
    feedback = isinstance(decoder, FeedbackDecoder)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        decoder(features, None, *[lambda images: features] * feedback)
    return counter.get_total_flops() / 2


def study_layers():
    """The rows of `describe` for the study's encoders. Layers of one shape in a row, as a ViT's, are one."""
    rows = {}
    for encoder, names in LAYERS.items():
        found = layers_of(encoder, check=False)
        layers = [(found[path][0], layer, f"{found[path][1] / 1e9:.2f}") for layer, path in names.items()]
        for shape, group in groupby(layers, itemgetter(0)):
            (_, name, cost), *others = group
            if others:
                name, cost = f"{name}–{others[-1][1].lstrip(ascii_lowercase)}", f"{cost}–{others[-1][2]}"
            rows[f"{encoder} {name}"] = shape, cost
    return rows


def main():
    from flags import Parser, positive_int

    parser = Parser(__doc__)
    parser.add_argument("--encoder", help="its layers, as --layer takes them (default: the study's)")
    parser.add_argument("--input-size", type=positive_int, metavar="N", help="side of its images")
    args = parser.parse_args()
    if args.encoder:
        name = ENCODERS.get(args.encoder, args.encoder)
        size = args.input_size or pretrained_input_config(name)["input_size"]
        found = layers_of(args.encoder, size)
        found = {path: (shape, f"{cost / 1e9:.2f}") for path, (shape, cost) in found.items()}
        describe(found, size, decoding=False)
    elif args.input_size:
        raise UserError("--input-size: of an --encoder; give one")
    else:
        describe(study_layers())
        print(f"GMAC: billions of multiply-adds for an image; feedback encodes {ITERATIONS} images more")


if __name__ == "__main__":
    cli_main(main)
