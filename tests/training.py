"""A Training, built as train.py builds it, for tests that look at one of its parts."""

import copy

import torch

import train
from flags import parse_train

CPU = torch.device("cpu")


def parse(*flags):
    return parse_train([str(flag) for flag in flags])


def training_on(photos, *flags):
    """The Training on `photos`, before its first step."""
    return train.Training(parse("--data", photos, "--quiet", *flags))


def wake(net, std=0.01):
    """Give the weights that are 0 at first others, so that every block changes something."""
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)


def batches_of(training, rank=0, world=1, kept=None):
    """The (crops, features) of the rest of the epoch, of one of `world` processes."""
    part = copy.copy(training)
    part.rank, part.world, part.feature_cache = rank, world, kept
    part.steps = training.steps // world
    part.steps_per_pass = part.steps // training.config["passes"]
    return train.epoch_batches(part)


train_epoch = train.train_epoch  # trains the rest of the epoch; the means of the loss's terms


def validate(training, known=None):
    """(means, targets, outputs) of the validation images; known: {first image of a batch: features}."""
    training.val_feature_cache = {} if known is None else known
    means, *images = train.validate(training)
    del means["seconds"]
    return means, *images
