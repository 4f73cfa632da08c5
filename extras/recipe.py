"""--recipe auto: what suits a layer and its images; and --minutes: as many steps as there is time for."""

import copy
from statistics import median

import torch
import torch.distributed as dist

from decoders import upsamplings
from utils import out_of_memory, synchronized_time, timed

# By stride. The rates are the best of three on validation images of VGG16's block1 to block3, and deeper of
# AlexNet's features.10 (docs/tables/tuning_other.csv). Crops were not compared.
CROPS = {2: 64, 4: 64, 8: 64, 16: 128, 32: 128}
RATES = {2: 7e-4, 4: 7e-4, 8: 7e-4}
DEEP_RATE = 2e-3
BATCH_SIZE = 8
KEPT_CROPS = 4  # of an image, from stride 16 on, where the encoder takes most of a step on the CPU
MOST_KEPT = 16
KEPT_SHARE = 0.5  # of --minutes, at most, to encode them
STEPS = 600  # of an epoch without --minutes
EPOCHS, EPOCHS_OF_MINUTES = 5, 3
VAL_IMAGES = 48  # at most; all would take longer than a short training
WARM_UP, TIMED = 4, 8  # steps, at most
MOST_STEPS = WARM_UP + TIMED
PROBE_SHARE = 0.05  # of the time, after which no more steps are timed


def choose_recipe(config, encoder, images):
    """Set the flags of `config` that are None, and return them as text.

    encoder: an Encoder; images: number of training images.
    """
    size = encoder.input_size
    stride = 2 ** upsamplings(min(height for _, height, _ in encoder.shapes), size)
    world = dist.get_world_size() if dist.is_initialized() else 1
    batch_size = config["batch_size"] or max(min(BATCH_SIZE, images // world), 1)
    epochs = EPOCHS_OF_MINUTES if config["minutes"] else EPOCHS
    steps_of_a_pass = -(-images // (batch_size * world))
    crop = config["crop"] or crop_of(encoder, CROPS.get(stride, size))
    kept_crops, device = 0, next(encoder.buffers()).device
    if stride >= 16 and device.type == "cpu":
        kept_crops = KEPT_CROPS
        if config["minutes"]:
            batch = torch.zeros(batch_size, 3, crop, crop)
            seconds = -(-images // batch_size) * timed(device, lambda: encoder(batch), 1)
            kept_crops = of_first(min(int(KEPT_SHARE * 60 * config["minutes"] / seconds), MOST_KEPT))
    chosen = {
        "decoder": "residual",
        "crop": crop,
        "kept_crops": kept_crops,
        "epochs": epochs,
        "passes": max(round(STEPS / steps_of_a_pass), 1),
        "batch_size": batch_size,
        "optimizer": "muon",
        "lr": RATES.get(stride, DEEP_RATE),
        "schedule": "onecycle",
        "clip_grad": 0.05,
        "mse_weight": 1.0,
        "lpips_weight": 0.0,
        "val_images": VAL_IMAGES,
    }
    chosen = {flag: value for flag, value in chosen.items() if config[flag] is None}
    if config["steps"] or config["minutes"]:
        chosen.pop("passes", None)
    config |= chosen
    return " ".join(f"--{flag.replace('_', '-')} {value}" for flag, value in chosen.items())


def crop_of(encoder, size):
    """`size` if the encoder takes such crops and gives a smaller feature map, else the encoder's own."""
    if size < encoder.input_size:
        try:
            maps = encoder(torch.zeros(1, 3, size, size, device=next(encoder.buffers()).device))
            heights = [x.shape[2] for x in (maps if isinstance(maps, list) else [maps])]
            if min(heights) > 1 and len(encoder.shapes) == len(heights):
                return size
        except Exception as error:  # each network has its own
            if out_of_memory(error):
                raise
    return encoder.input_size


def find_steps(training, batches, step):
    """Steps in an epoch with which all epochs, and their validations, take config["minutes"].

    batches: yields a step's images and features; step: train_step, which is called and undone.
    """
    config, inverter, device = training.config, training.inverter, training.device
    begun = synchronized_time(device)
    state = copy.deepcopy(inverter.decoder.state_dict())
    seconds, encoding = [], 0  # of each step; of a batch
    with torch.random.fork_rng(devices=[]):
        for images, features in batches:
            if config["kept_crops"]:  # encoded before the training
                start = synchronized_time(device)
                features = inverter.encode(images).float()
                encoding = synchronized_time(device) - start
            start = synchronized_time(device)
            step(training, images, features)
            seconds.append(synchronized_time(device) - start)
            late = synchronized_time(device) - begun > 60 * config["minutes"] * PROBE_SHARE
            if late and len(seconds) > 2 and training.world == 1:  # several processes take as many steps
                break
    seconds = median(seconds[min(WARM_UP, len(seconds) // 2) :])
    image = images.new_zeros(1, 3, inverter.size, inverter.size)
    with torch.no_grad():
        validation = timed(device, lambda: inverter.eval()(image), 1)
    validation *= len(training.val_indices) / training.world
    inverter.decoder.load_state_dict(state)
    training.optimizer.state.clear()
    training.optimizer.zero_grad()
    encoding *= config["kept_crops"] * training.steps_per_pass * training.world
    left = 60 * config["minutes"] - (synchronized_time(device) - begun) - encoding
    return of_first(max(int((left / config["epochs"] - validation) / seconds), 1))


def of_first(value):
    """The first process's `value`: each has a clock of its own."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]
