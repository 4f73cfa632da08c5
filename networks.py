"""Networks by name, torchvision's, timm's or one's own: built, and given their weights."""

import difflib
import importlib.util
import os
import re
import sys
import sysconfig
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from flags import check_encoder, encoders_of
from study import IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD
from utils import UserError, digest
from weights import official

# torchvision's that, with their weights, turn ImageNet's normalisation into that of their training.
TRANSFORMING = ("googlenet", "inception_v3")
INSTALLED = re.compile(rf"{re.escape(sysconfig.get_path('stdlib'))}|.*(site|dist)-packages")
HERE = Path(__file__).resolve().parent
NEIGHBOURS = {}  # {FILE.py: {path: SHA-256}} of users' modules that it imported
BEFORE = set()  # names of the modules that were there when the first FILE.py ran


def parse(name):
    """(source, rest) of a network's name: `timm/…`, `torchvision/…` or `FILE.py:FUNCTION`.

    Raises UserError for a name that is none.
    """
    check_encoder(name)
    if ".py:" in name:
        file, function = name.rsplit(":", 1)
        if not Path(file).is_file():
            raise UserError(f"--encoder {name}: no such file")
        return file, function
    source, _, rest = name.partition("/")
    if source == "timm":
        import timm  # here, because it takes a second and torchvision's networks don't need it

        known = [*timm.list_models(), *timm.list_pretrained()]  # the latter name their weights too
    else:
        known = torchvision.models.list_models(module=torchvision.models)
    if rest not in known:
        raise UserError(f"--encoder {name}: {source} has no such model; near: {near(rest, known)}")
    return source, rest


def build_network(name, size=None):
    """The network `name`, with its own random weights. Raises UserError.

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
    return own_network(source, rest)


def own_network(file, function):
    """What `function` of the Python file returns, a user's own nn.Module. Raises UserError."""
    name = f"--encoder {file}:{function}"
    spec = importlib.util.spec_from_file_location(f"own_{digest(file)}", file)  # no name that is taken
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    try:
        with neighbours_first(file):
            spec.loader.exec_module(module)
            net = getattr(module, function)()
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise UserError(f"{name}: {type(error).__name__}: {error}") from None
    if not isinstance(net, nn.Module):
        raise UserError(f"{name}: returns {type(net).__name__}, should be an nn.Module")
    return net


@contextmanager
def neighbours_first(file):
    """Within `with`, imports find what lies beside `file` first, and this project's modules last.

    What is imported is in NEIGHBOURS then, and out of the way: other modules may have the same names.
    """
    folder, path = Path(file).resolve().parent, sys.path[:]
    BEFORE.update(() if BEFORE else sys.modules)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if place_of(name)}
    sys.path[:] = [str(folder), *(place for place in path if Path(place).resolve() != HERE), str(HERE)]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        NEIGHBOURS[str(file)] = found = {}
        for name in sorted(filter(place_of, sys.modules)):
            place = place_of(name)
            shown = Path(file).parent / place.relative_to(folder) if folder in place.parents else place
            if place.is_file() and (name not in hidden or place.parent != HERE):
                found[str(shown)] = digest(place)
            del sys.modules[name]
        sys.modules.update(hidden)
        ours = (*path, str(folder), str(HERE))
        sys.path[:] = [*path, *(place for place in sys.path if place not in ours)]


def place_of(name):
    """The file, or folder, of an imported module that is neither built in nor installed, else None."""
    module = sys.modules[name]
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", None) or []), "")
    if os.path.exists(place) and not INSTALLED.match(place) and name != "__main__" and name[:4] != "own_":
        return Path(place).resolve()


def own_files(encoder):
    """The users' own files that an encoder's name, or several names joined by `+`, say."""
    return [name.rpartition(":")[0] for name in encoders_of(encoder) if ".py:" in name]


def programs_of(encoder):
    """{file: its SHA-256} of `own_files` and, once these have run, of the users' modules that they import."""
    found = {}
    for file in own_files(encoder):
        found |= {file: digest(file)} | NEIGHBOURS[file]
        for name in sorted(sys.modules.keys() - BEFORE):  # that `forward` imports
            if (place := place_of(name)) and place.is_file() and place.parent != HERE:
                found[str(place)] = digest(place)
    return found


def near(name, names):
    """A few of `names` that resemble `name`, or that come first."""
    return ", ".join(difflib.get_close_matches(name, names, 5, 0.3) or names[:5])


class NoInitialisation(TorchFunctionMode):
    """Leaves parameters as they are allocated, since load_network replaces all; buffers are initialised."""

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


def own_input(name):
    """{"input_size", "mean", "std"} that the network `name` was trained with, where it is known."""
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


def resampled(net, state):
    """`state` with positions for the image size that `net` was built for, where timm knows how to do that."""
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    own = net.state_dict()
    fits = all(own[key].shape == state[key].shape for key in own.keys() & state.keys())
    return state if fits or convert is None else convert(state, net)


def load_network(net, state, source):
    """Load `state` into `net`; raise UserError if something of it is missing or misshapen."""
    own = net.state_dict()
    counters = [key for key in own if key.endswith("num_batches_tracked")]  # which old files lack
    state = dict.fromkeys(counters, torch.tensor(0)) | state
    for key, tensor in own.items():
        if key not in state:
            raise UserError(f"{source}: has no {key}")
        if state[key].shape != tensor.shape:
            raise UserError(f"{source}: {key} is {tuple(state[key].shape)}, should be {tuple(tensor.shape)}")
    net.load_state_dict({key: state[key].to(own[key].dtype) for key in own}, assign=True)
