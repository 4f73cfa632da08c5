"""The Inverter, which joins a frozen encoder to a decoder: built, or loaded; and what every pair costs.

python models.py                                every layer and decoder of the study, with its cost
python models.py --encoder timm/convnext_tiny   every layer of another
"""

import math
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import decoders
from checkpoint import read_checkpoint
from decoders import FeedbackDecoder, Fused, upsamplings
from encoders import build_encoder, encoder_sha256, layers_of, load_network, pretrained_input_config
from utils import (
    DECODERS,
    DOCUMENTED,
    ENCODERS,
    IMAGE_SIZE,
    INPUT_FLAGS,
    LAYERS,
    PROTOCOLS,
    UserError,
    cli_main,
    digest,
    encoders_of,
    out_of_memory,
    user_files,
    weights_of_each,
)

# --- Decoders ------------------------------------------------------------------------------------------

BUILDERS = {name: getattr(decoders, kind) for name, kind in DECODERS.items()}


def build_decoder(decoder, shape, width=None, seed=42, **options):
    """Decoder `decoder` for features of `shape` (C, H, W), initialised from `seed`.

    Kaiming initialisation (paper 3.3.4) as PyTorch's own layers have it, uniform within ±1/√fan, but with a
    fan of 16 C for transposed convolutions, where PyTorch counts 16 times the channels that come out and an
    output pixel sees 4 C (docs/further.md). width: the decoder's main number of channels; options: those
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


# --- Encoder and decoder in one ------------------------------------------------------------------------


class Inverter(nn.Module):
    """A frozen encoder and a decoder: images (B, 3, size, size) in [0, 1] → features (B, C, H, W) → images.

    Other sizes too, where the encoder takes them. shape: (C, H, W) of the features of a size×size image. amp:
    compute both in bfloat16; what comes out is float32. normalized: images that come out are
    ImageNet-normalised, as the published loss wants them.
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
        """Side of the images of validation, test and pictures: 224, or what the encoder was trained with."""
        return self.encoder.input_size

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def base_decoder(self):
        """The decoder, without the Fused around it where there are several encoders."""
        return self.decoder.decoder if isinstance(self.decoder, Fused) else self.decoder

    @property
    def reencode(self):
        """What encodes the decoder's own images; normalised ones are not normalised again."""
        return self.encoder.trunk if self.normalized else self.encoder

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    @torch.no_grad()
    def encode(self, images):
        """Features (B, C, H, W) of images; bfloat16 with amp."""
        with self.autocast():
            return self.encoder(images)

    def decode(self, features, size=None):
        """Images from features, in float32 even with amp, as the losses want them; size: theirs, else own."""
        return self.decode_all(features, size)[-1]

    def decode_all(self, features, size=None):
        """The images after each iteration, of which `decode` gives the last; one where none iterates."""
        with self.autocast():
            if isinstance(self.base_decoder, FeedbackDecoder):
                images = self.decoder(features, size, self.reencode)
            else:
                images = [self.decoder(features, size)]
        return [image.float() for image in images]

    def forward(self, images, features=None, each=False):
        """Reconstructions of images, from `features` if known; each: a list, as decode_all."""
        if features is None:
            features = self.encode(images)
        iterates = self.decode_all(features, images.shape[2:])
        return iterates if each else iterates[-1]

    def shape_at(self, size):
        """(C, H, W) of the features of a size×size image."""
        return self.shape if size == self.size else feature_shape(self.encoder, size)

    @property
    def stride(self):
        """Pixels of an image from one position of the features to the next; of several layers, the most."""
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
    seed=42,
    protocol=DOCUMENTED,
    amp=False,
    input_size=None,
    mean=None,
    std=None,
    fusion=None,
    **options,
):
    """An Inverter of these names, its decoder untrained, on the CPU. Raises UserError.

    input_size, mean, std: of the encoder's images, where not its own. fusion: of several encoders, `concat`
    where None. options: build_decoder's.
    """
    images = {"input_size": input_size, "mean": mean, "std": std}
    frozen = build_encoder(encoder, layer, weights, seed, protocol, **images)
    channels, heights, widths = zip(*frozen.shapes, strict=True)
    shape = (sum(channels), max(heights), max(widths))
    net = build_decoder(decoder, shape, width, seed, size=frozen.input_size, **options)
    if len(channels) > 1:
        net = Fused(net, channels, fusion or "concat")
    return Inverter(frozen, net, shape, amp, protocol.normalized_target)


def inverter_of(config):
    """The Inverter that a run's configuration, {flag: value}, asks for. Raises UserError, and KeyError."""
    names = ("encoder", "layer", "decoder", "weights", "width", "seed", "amp", "iterations", "fusion")
    values = {name: config[name] for name in (*names, *INPUT_FLAGS)}
    return build_inverter(**values, protocol=PROTOCOLS[config["protocol"]])


def load_inverter(path, encoder=None, weights=None, trust_code=False):
    """(Inverter, checkpoint) of the best.pt at `path`, on the CPU, in eval mode, computing in float32.

    encoder, weights: those of its configuration, where files that they name lie elsewhere now. A FILE.py is
    run if `encoder` or trust_code says so, and it is what the decoder was trained with; nothing else of a
    checkpoint is. Raises UserError for another file, and for other weights of the encoder.
    """
    checkpoint = read_checkpoint(path)
    config, programs = checkpoint["config"], checkpoint["programs"]
    now = config | {"amp": False}
    try:
        for flag, given in (("encoder", encoder), ("weights", weights)):
            now[flag] = given or config[flag]
            if without_places(now)[flag] != without_places(config)[flag]:
                what = f"{path} was trained with {config[flag]}, of which a file alone may lie elsewhere"
                raise UserError(f"--{flag} {now[flag]}: {what}")
        before, files = user_files(config["encoder"]), user_files(now["encoder"])
        if files and not encoder and not trust_code:
            trust = f"if you trust it, give --trust-code, or --encoder {config['encoder']}"
            raise UserError(f"{path}: names a program that would be run, {', '.join(files)}; {trust}")
        wanted = {file: programs[old] for old, file in zip(before, files, strict=True)}
        wanted |= {} if encoder else programs
        changed = [file for file in wanted if not Path(file).is_file() or digest(file) != wanted[file]]
        if changed:
            others = f"{', '.join(changed)}: not what it was trained with; it was not run"
            raise UserError(f"{path}: {others} (--encoder says where it is now)")
        inverter = inverter_of(now)
        inverter.decoder.load_state_dict(checkpoint["decoder"])
        known = [found for found in programs.values() if found in inverter.encoder.programs.values()]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{path}: not a best.pt of this program ({error})") from None
    if checkpoint["encoder_sha256"] != encoder_sha256(inverter.encoder, known):
        names = f"{now['encoder']}'s {now['weights']} weights up to its layer"
        images = "another mean and std of its images, than those found here"
        raise UserError(f"{path}: was trained with other {names}, or {images}")
    return inverter.eval(), checkpoint


def without_places(config):
    """`encoder` and `weights` of a configuration, but for where files lie."""
    names = encoders_of(config["encoder"])
    sources = weights_of_each(len(names), config["weights"])
    files = ["" if source not in ("imagenet", "random", "own") else source for source in sources]
    return {"encoder": [name.rpartition(".py:")[2] for name in names], "weights": files}


def load_decoder(inverter, config):
    """Have training begin with the decoder of config["init"], another run's best.pt; that file's SHA-256.

    Nothing else of it is used, and no FILE.py run. Raises UserError for a decoder that does not fit.
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


def feature_shape(encoder, size=None):
    """(C, H, W) of `encoder`'s features of a size×size image, its own size where None."""
    size = size or encoder.input_size
    images = torch.zeros(1, 3, size, size, device=next(encoder.buffers()).device)
    with torch.no_grad():
        return tuple(encoder(images).shape[1:])


def count_parameters(module):
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --- The table -----------------------------------------------------------------------------------------


def describe(layers, size=IMAGE_SIZE, decoding=True):
    """Print `layers`: features, multiply-adds up to there, each decoder's parameters, and an image's cost.

    layers: {name: what layers_of says}, of size×size images. decoding: the cost, in multiply-adds of encoder
    and decoder together, half of what torch.utils.flop_counter counts. On the meta device: nothing is
    computed, but counting takes a second for three shapes of features.
    """
    longest = max(map(len, layers))
    of_decoder = f"{'parameters':>13}" + f"{'GMAC':>7}" * decoding
    print(f"{'':<{longest + 17}}{'encoder':>9}" + "".join(f"{name:>{len(of_decoder)}}" for name in BUILDERS))
    print(f"{'layer':<{longest}} {'features':<16}{'GMAC':>9}" + of_decoder * len(BUILDERS))
    built = {}  # for a shape, which layers share: each decoder's parameters and cost
    for name, (shape, encoding) in layers.items():
        if shape not in built:
            with torch.device("meta"):
                nets = [build(shape, size=size).eval() for build in BUILDERS.values()]
            built[shape] = [(count_parameters(net), decoding and decoder_cost(net, shape)) for net in nets]
        line = f"{name:<{longest}} {' × '.join(map(str, shape)):<16}{encoding / 1e9:>9.2f}"
        for parameters, cost in built[shape]:
            line += f"{parameters:>13,}"
            if cost:
                own, passes = cost
                line += f"{(passes * encoding + own) / 1e9:>7.2f}"
        print(line)


def decoder_cost(decoder, shape):
    """Multiply-adds of a decoder on the meta device, and passes of the encoder, the first included."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        features = torch.empty(1, *shape)
        if isinstance(decoder, FeedbackDecoder):
            decoder(features, None, lambda images: features)
            passes = 1 + decoder.iterations
        else:
            decoder(features)
            passes = 1
    return counter.get_total_flops() / 2, passes


def main():
    from flags import Parser, positive_int

    parser = Parser(__doc__)
    parser.add_argument("--encoder", help="its layers, as --layer takes them (default: the study's)")
    parser.add_argument("--input-size", type=positive_int, metavar="N", help="side of its images")
    args = parser.parse_args()
    if args.encoder:
        name = ENCODERS.get(args.encoder, args.encoder)
        size = args.input_size or pretrained_input_config(name)["input_size"]
        describe(layers_of(args.encoder, size), size, decoding=False)
    elif args.input_size:
        raise UserError("--input-size: of an --encoder; give one")
    else:
        layers = {}
        for encoder, names in LAYERS.items():
            found = layers_of(encoder, check=False)
            layers |= {f"{encoder} {layer}": found[path] for layer, path in names.items()}
        describe(layers)


if __name__ == "__main__":
    cli_main(main)
