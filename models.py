"""The networks: frozen encoders, and the Inverter that joins one to a decoder; built, or loaded.

python models.py                every layer and decoder, with its cost
"""

import hashlib
import math

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decoders import (
    IMAGE_SIZE,
    AttentionDecoder,
    FrequencyDecoder,
    TransposedConv,
    WaveletDecoder,
    upsamplings,
)
from feedback import FeedbackDecoder, ResidualDecoder
from flags import check_layer
from study import DECODERS, DOCUMENTED, FEEDBACK_OPTIONS, IMAGENET_MEAN, IMAGENET_STD, LAYERS, PROTOCOLS
from utils import UserError, digest, load, out_of_memory
from weights import VIT_SMALL, imagenet_weights, weights_from_file

# --- Encoders ----------------------------------------------------------------------------------------


def build_network(name):
    """The whole network of encoder `name`, torchvision's or timm's, with its own random weights."""
    if name == "vit_small":
        import timm  # here, because it takes a second and the other networks don't need it

        return timm.create_model(VIT_SMALL)
    return torchvision.models.get_model(name)


def features_trunk(net, depth):
    return net.features[:depth]


def resnet34_trunk(net, depth):
    stages = (net.layer1, net.layer2, net.layer3, net.layer4)
    return nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, *stages[:depth])


class ViTTrunk(nn.Module):
    """The first blocks of a timm ViT: image → tokens without the class token, as a (B, 384, 14, 14) map."""

    def __init__(self, vit, depth):
        super().__init__()
        vit.blocks = vit.blocks[:depth]
        vit.norm = nn.Identity()
        vit.head = nn.Identity()
        self.vit = vit

    def forward(self, x):
        tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :]  # (B, 196, 384)
        return tokens.transpose(1, 2).unflatten(2, (14, 14))


# encoder → the part of its network up to a depth, which study.LAYERS has for each layer
TRUNKS = {
    "vgg16": features_trunk,
    "resnet34": resnet34_trunk,
    "vit_small": ViTTrunk,
    "alexnet": features_trunk,
}


class Encoder(nn.Module):
    """A frozen network up to one layer: images (B, 3, 224, 224) in [0, 1] → features (B, C, H, W).

    encoder, layer: names in study.LAYERS. weights: `imagenet`; `random`, torchvision's or timm's own
    initialisation from `seed`, the control; or the path of a state dict, whose SHA-256 is then
    `weights_sha256`. Always in eval mode, parameters without gradient (paper 3.1.3); images may have one.
    Raises UserError for unknown names and weights that can't be had or don't fit.
    """

    def __init__(self, encoder="vgg16", layer="block1", weights="imagenet", seed=42, protocol=DOCUMENTED):
        super().__init__()
        check_layer(encoder, layer)
        cut = TRUNKS[encoder]
        depth = LAYERS[encoder][layer]
        if encoder == "vit_small":
            blocks = len(LAYERS[encoder])
            depth = (depth - 1 + protocol.vit_shift) % blocks + 1
        self.weights_sha256 = None
        if weights == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                net = build_network(encoder)
        else:
            with torch.device("meta"):  # no memory or time for the parts that are cut off
                net = build_network(encoder)
            if weights == "imagenet":
                state = imagenet_weights(encoder)
            else:
                state = weights_from_file(weights)
                self.weights_sha256 = digest(weights)
            load_trunk(net, cut(net, depth), state, f"--weights {weights}")
        self.trunk = cut(net, depth).to(memory_format=torch.channels_last)
        own = getattr(net, "pretrained_cfg", None)  # timm's networks know their own
        if own is None or not protocol.own_normalization:
            own = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        self.register_buffer("mean", torch.tensor(own["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(own["std"]).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, images):
        return self.trunk((images - self.mean) / self.std)

    def key(self):
        """The SHA-256 of all that it computes with."""
        found = hashlib.sha256()
        for tensor in self.state_dict().values():
            found.update(tensor.cpu().contiguous().numpy())
        return found.hexdigest()


def load_trunk(net, trunk, state, source):
    """Load into `net` what `trunk` needs of `state`; raise UserError if something is missing or misshapen."""
    needed = {id(tensor) for tensor in [*trunk.parameters(), *trunk.buffers()]}
    own = {key: value for key, value in net.state_dict(keep_vars=True).items() if id(value) in needed}
    state = {
        key: torch.tensor(0) for key in own if key.endswith("num_batches_tracked")
    } | state  # old files lack it
    for key, tensor in own.items():
        if key not in state:
            raise UserError(f"{source}: has no {key}")
        if state[key].shape != tensor.shape:
            raise UserError(f"{source}: {key} is {tuple(state[key].shape)}, should be {tuple(tensor.shape)}")
    net.load_state_dict({key: state[key].to(own[key].dtype) for key in own}, strict=False, assign=True)


# --- Decoders ------------------------------------------------------------------------------------------

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


# --- Encoder and decoder in one ------------------------------------------------------------------------


class Inverter(nn.Module):
    """A frozen encoder and a decoder: images (B, 3, 224, 224) in [0, 1] → features (B, C, H, W) → images.

    Other sizes too, where the encoder takes them. shape: (C, H, W) of the features of a 224×224 image. amp:
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
    def device(self):
        return next(self.parameters()).device

    @property
    def look(self):
        """The encoder, as what the decoder makes is shown to it."""
        return self.encoder.trunk if self.normalized else self.encoder

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    @torch.no_grad()
    def encode(self, images):
        """Features (B, C, H, W) of images; bfloat16 with amp."""
        with self.autocast():
            return self.encoder(images)

    def decode(self, features, size=None):
        """Images from features, in float32 even with amp, as the losses want them; size: theirs, else 224."""
        return self.iterates(features, size)[-1]

    def iterates(self, features, size=None):
        """Images from features, as `decode` gives the last, after each iteration; one where there is none."""
        with self.autocast():
            if isinstance(self.decoder, FeedbackDecoder):
                images = self.decoder(features, self.look, size)
            else:
                images = [self.decoder(features, size)]
        return [image.float() for image in images]

    def forward(self, images, features=None, each=False):
        """Reconstructions of images, from their features where these are known; each: a list, `iterates`."""
        if features is None:
            features = self.encode(images)
        iterates = self.iterates(features, images.shape[2:])
        return iterates if each else iterates[-1]

    def shape_at(self, size):
        """(C, H, W) of the features of a size×size image."""
        return self.shape if size == IMAGE_SIZE else feature_shape(self.encoder, size)

    @property
    def stride(self):
        """Pixels of an image from one position of the features to the next."""
        return 2 ** upsamplings(self.shape[1], IMAGE_SIZE)

    def compile(self):
        """torch.compile both networks, in place."""
        self.encoder.compile()
        self.decoder.compile()


def build_inverter(
    encoder="vgg16",
    layer="block1",
    decoder="tconv",
    weights="imagenet",
    width=None,
    seed=42,
    protocol=DOCUMENTED,
    shape=None,
    amp=False,
    **options,
):
    """An Inverter of these names, its decoder untrained, on the CPU. Raises UserError.

    shape: (C, H, W) of the features, where it is known, which spares a trial pass. options: build_decoder's.
    """
    frozen = Encoder(encoder, layer, weights, seed, protocol)
    shape = shape or feature_shape(frozen)
    net = build_decoder(decoder, shape, width, seed, **options)
    return Inverter(frozen, net, shape, amp, protocol.normalized_target)


def inverter_of(config, shape=None):
    """The Inverter that a run's configuration, {flag: value}, asks for. Raises UserError, and KeyError."""
    names = ("encoder", "layer", "decoder", "weights", "width", "seed", "amp")
    values = {name: config[name] for name in names}
    values |= {name: config.get(name) for name in FEEDBACK_OPTIONS}  # older checkpoints have none
    return build_inverter(**values, protocol=PROTOCOLS[config["protocol"]], shape=shape)


def load_inverter(path):
    """(Inverter, checkpoint) of the best.pt at `path`, on the CPU, in eval mode, computing in float32.

    The checkpoint, a dictionary, has `decoder`, `config`, `shape`, `weights_sha256`, `encoder_sha256`,
    `epoch` and `val_loss`; only what rebuilds the networks is taken from it. Raises UserError for another
    file, and where the encoder's weights are not those that the decoder was trained with.
    """
    checkpoint = load(path)
    wanted = {"decoder", "config", "shape", "weights_sha256", "epoch", "val_loss"}
    missing = wanted - set(checkpoint if type(checkpoint) is dict else ())
    if missing:
        raise UserError(f"{path}: not a best.pt of this train.py (it has no {', '.join(sorted(missing))})")
    try:
        inverter = inverter_of(checkpoint["config"] | {"amp": False}, checkpoint["shape"])
        inverter.decoder.load_state_dict(checkpoint["decoder"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{path}: not a best.pt of this program ({error})") from None
    found = inverter.encoder.weights_sha256
    if found != checkpoint["weights_sha256"]:
        file = checkpoint["config"]["weights"]
        raise UserError(
            f"{file}: SHA-256 is {found}, the decoder was trained with {checkpoint['weights_sha256']}"
        )
    expected = checkpoint.get("encoder_sha256")  # older checkpoints have none
    if expected and expected != inverter.encoder.key():
        names = "{encoder}'s {weights} weights".format(**checkpoint["config"])
        raise UserError(f"{path}: was trained with other {names} up to its layer than those found here")
    return inverter.eval(), checkpoint


def feature_shape(encoder, size=IMAGE_SIZE):
    """(C, H, W) of `encoder`'s features of a size×size image."""
    images = torch.zeros(1, 3, size, size, device=encoder.mean.device)
    with torch.no_grad():
        return tuple(encoder(images).shape[1:])


def count_parameters(module):
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# --- The table -----------------------------------------------------------------------------------------


def describe():
    """Print every encoder and layer: feature shape, and each decoder's parameters and multiply-adds an image.

    On the meta device: nothing is loaded or computed. Multiply-adds are those of encoder and decoder
    together, half of what torch.utils.flop_counter counts.
    """
    print(
        f"{'encoder':<10}{'layer':<9}{'features':<15}{'encoder':>8}"
        + "".join(f"{name:>19}" for name in BUILDERS)
    )
    print(f"{'':<34}{'GMAC':>8}" + f"{'parameters   GMAC':>19}" * len(BUILDERS))
    plain = [build for build in BUILDERS.values() if build is not FeedbackDecoder]
    decoders = {}  # (parameters, multiply-adds) of each of these for a shape, which layers share
    with torch.device("meta"):
        images = torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        for name, layers in LAYERS.items():
            for layer, depth in layers.items():
                encoder = TRUNKS[name](build_network(name), depth)
                features, encoding = with_cost(encoder, images)
                shape = tuple(features.shape[1:])
                if shape not in decoders:
                    decoders[shape] = [decoder_cost(build, features) for build in plain]
                costs = [*decoders[shape], decoder_cost(FeedbackDecoder, features, encoder)]
                line = f"{name:<10}{layer:<9}{' × '.join(map(str, shape)):<15}{encoding / 1e9:>8.2f}"
                for parameters, decoding in costs:
                    line += f"{parameters:>12,}{(encoding + decoding) / 1e9:>7.2f}"
                print(line)


def decoder_cost(build, *inputs):
    """(trainable parameters, multiply-adds) of the decoder that `build` makes for features, an encoder."""
    decoder = build(tuple(inputs[0].shape[1:]))
    _, cost = with_cost(decoder, *inputs)
    return count_parameters(decoder), cost


def with_cost(network, *inputs):
    """What `network` makes of the inputs in eval mode, and the multiply-adds that it takes."""
    with FlopCounterMode(display=False) as counter:
        y = network.eval()(*inputs)
    return y, counter.get_total_flops() / 2


if __name__ == "__main__":
    describe()
