"""The parts of a training, built as train.py builds them, for tests that look at one of them."""

from types import SimpleNamespace

import torch

import data
import prepare
import train
from flags import config_of, parse_train
from metrics import TERMS, Loss, Meter
from models import inverter_of
from signals import Signals
from study import PROTOCOLS

CPU = torch.device("cpu")


def parse(*flags):
    return parse_train([str(flag) for flag in flags])


def parts_of(photos, *flags):
    """Configuration, images, networks, loss and State of a training on `photos`."""
    config = config_of(parse("--data", photos, *flags))
    protocol = PROTOCOLS[config["protocol"]]
    parts = SimpleNamespace(config=config, signals=Signals(CPU))
    parts.train = data.load_split(str(photos), "train", protocol=protocol)
    parts.val = data.load_split(str(photos), "val", protocol=protocol)
    parts.inverter = inverter_of(config)
    config["crop"] = config["crop"] or parts.inverter.size
    parts.loss = Loss(config["mse_weight"], config["lpips_weight"], protocol)
    parts.steps = prepare.steps_of_a_pass(len(parts.train), config["batch_size"], 1) * config["passes"]
    optimizer = prepare.make_optimizer(parts.inverter, config["lr"], config["optimizer"])
    scheduler = prepare.make_scheduler(optimizer, config, parts.steps, protocol.lowest_lr)
    parts.state = train.State(parts.inverter.decoder, optimizer, scheduler, Meter(TERMS))
    return parts


def wake(net, std=0.01):
    """Give the weights that are 0 at first others, so that every block changes something."""
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)


def batches_of(parts, rank=0, world=1, kept=None):
    """The (crops, features) of the rest of the epoch of parts.state, of one of `world` processes."""
    steps = parts.steps // world
    return train.epoch_batches(parts.train, kept, parts.config, parts.state, steps, rank, world, CPU)


def train_epoch(parts, kept=None):
    """The rest of the epoch of parts.state; averages of the loss's terms."""
    options = (parts.state, parts.config, parts.steps, parts.signals, True)
    return train.train_epoch(parts.inverter, batches_of(parts, kept=kept), parts.loss, *options)


def validate(parts, known=None):
    """(averages, targets, outputs) of the validation images."""
    known = {} if known is None else known
    options = (1, parts.signals, True)
    return train.validate(parts.inverter, parts.val, range(len(parts.val)), parts.loss, known, *options)
