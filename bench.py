"""Time experiment 1's training and evaluation against a plain implementation of the study's loop, in one run.

  python bench.py
  python bench.py --json bench.json
  python bench.py --data FOLDER            on its training images, rather than on 2K PNGs made here

Plain: eager, NCHW, 2K PNGs decoded and resized every epoch by four workers, LPIPS from the lpips package,
which computes the target's features under autograd, and a look at the loss every step. It has a process of
its own, and both run in one go, the steps by turns, so that what else the machine does slows both: ratios can
be compared between machines, times cannot. On CUDA the step is timed with bfloat16, channels last and
torch.compile on and off too.
"""

from flags import Parser, config_of, parse_train, positive_int
from utils import UserError, run, select_device, write_text


def make_parser():
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--data", help="folder whose training images to take (default: 2K PNGs, made here)")
    parser.add_argument("--images", type=positive_int, default=60, help="photographs to train on")
    parser.add_argument(
        "--rounds", type=positive_int, default=5, help="of six steps, plain and ours by turns"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


if __name__ == "__main__":
    ARGS = run(lambda: make_parser().parse_args())

import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import lpips as lpips_package
import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T

import data
import train
from decoders import build_decoder
from evaluate import evaluate_model, time_inference, wait
from metrics import TERMS, Loss, Meter, measure
from models import inverter_of
from signals import Signals
from study import IMAGENET_MEAN, IMAGENET_STD
from weights import imagenet_weights

ATTENTION = """
import resource, torch
from decoders import build_decoder
build_decoder("attention", (64, 112, 112))(torch.rand(1, 64, 112, 112)).mean().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def make_photographs(folder, count):
    """Fill train/ and test/ in `folder` with `count` PNGs like DIV2K's: enlarged tiles of the sample."""
    draw = np.random.RandomState(0)
    tiles = data.sample_tiles("train").pixels
    for i in range(count):
        name = Path(folder, "test" if i % 10 == 0 else "train", f"{i:04}.png")
        name.parent.mkdir(exist_ok=True)
        picture = Image.fromarray(tiles[i % len(tiles)].numpy()).resize(
            (2040, 1356), Image.Resampling.BICUBIC
        )
        grain = draw.normal(0, 4, (1356, 2040, 1))  # a photograph's, which makes PNGs large
        Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)).save(
            name, compress_level=6
        )


def link_photographs(source, folder, count):
    """Link `count` training images of `source` in `folder`/train. Raises UserError if there are fewer."""
    folders = [Path(source, train) for train, _ in data.LAYOUTS if Path(source, train).is_dir()]
    files = data.image_files(folders[0])[:count] if folders else []
    if len(files) < count:
        raise UserError(f"--data {source}: {len(files)} training images; --images {count} are wanted")
    Path(folder, "train").mkdir()
    for file in files:
        Path(folder, "train", file.name).symlink_to(file.resolve())


class PlainImages(torch.utils.data.Dataset):
    """PNG files, decoded, resized, cropped and flipped anew each time."""

    def __init__(self, folder):
        self.files = sorted(Path(folder).iterdir())
        crop = [T.Resize((256, 256)), T.RandomCrop(224), T.RandomHorizontalFlip(), T.ToTensor()]
        self.transform = T.Compose(crop)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        with Image.open(self.files[index]) as image:
            return self.transform(ImageOps.exif_transpose(image).convert("RGB"))


class Plain:
    """The study's loop, written as its text has it."""

    def __init__(self, device):
        self.device = device
        net = torchvision.models.vgg16()
        trunk = {
            key: value for key, value in imagenet_weights("vgg16").items() if key.startswith("features.")
        }
        net.features.load_state_dict({key.removeprefix("features."): value for key, value in trunk.items()})
        self.encoder = net.features[:5].eval().requires_grad_(False).to(device)
        self.decoder = (
            build_decoder("tconv", (64, 112, 112)).to(memory_format=torch.contiguous_format).to(device)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's remarks on the lpips package's arguments
            self.lpips = lpips_package.LPIPS(net="alex", pnet_rand=True, verbose=False)
        places = {key.split(".", 1)[1]: key for key in self.lpips.net.state_dict()}
        trunk = {
            key: value for key, value in imagenet_weights("alexnet").items() if key.startswith("features.")
        }
        self.lpips.net.load_state_dict({places[key.removeprefix("features.")]: trunk[key] for key in trunk})
        self.lpips.requires_grad_(False).to(device)
        self.optimizer = torch.optim.Adam(self.decoder.parameters(), lr=1e-4)
        self.normalize = T.Normalize(IMAGENET_MEAN, IMAGENET_STD)

    def keep(self, batch):
        """Take this array as the batch of `step`s without one."""
        self.batch = torch.from_numpy(batch)

    def step(self, batch=None):
        batch = (self.batch if batch is None else batch).to(self.device)
        with torch.no_grad():
            features = self.encoder(self.normalize(batch))
        output = self.decoder.train()(features)
        target = batch.clone().requires_grad_()  # what keeps its features under autograd
        distance = self.lpips(output * 2 - 1, target * 2 - 1).mean()
        loss = 0.5 * torch.nn.functional.mse_loss(output, batch) + 0.5 * distance
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def epoch(self, folder):
        """Seconds a step of the second epoch on the PNGs in `folder`."""
        options = {"batch_size": 4, "shuffle": True, "num_workers": 4, "persistent_workers": True}
        loader = torch.utils.data.DataLoader(PlainImages(folder), **options)
        for _ in range(2):
            start = time.perf_counter()
            for batch in loader:
                self.step(batch)
            seconds = time.perf_counter() - start
        return seconds / len(loader)

    @torch.no_grad()
    def evaluate(self, files):
        """PSNR, SSIM and LPIPS of each file: one image at a time, metrics in sequence."""
        self.decoder.eval()
        values = []
        transform = T.Compose([T.Resize((256, 256)), T.CenterCrop(224), T.ToTensor()])
        for file in files:
            with Image.open(file) as picture:
                image = transform(ImageOps.exif_transpose(picture).convert("RGB"))[None].to(self.device)
            output = self.decoder(self.encoder(self.normalize(image))).clamp(0, 1)
            x, y = (picture[0].permute(1, 2, 0).cpu().numpy() for picture in (output, image))
            psnr = peak_signal_noise_ratio(y, x, data_range=1)
            window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
            ssim = structural_similarity(y, x, channel_axis=2, data_range=1, **window)
            values.append((psnr, ssim, self.lpips(output, image, normalize=True).item()))
        return values

    def weights(self):
        return {key: value.cpu().numpy() for key, value in self.decoder.state_dict().items()}


class Elsewhere:
    """A Plain in a process of its own: `Elsewhere(device)("step")` is its `step()`. End it with `close`."""

    def __init__(self, device):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, device))
        self.process.start()

    def __call__(self, method, *args):
        self.pipe.send((method, args))
        return self.pipe.recv()

    def close(self):
        self.pipe.send(None)
        self.process.join()


def serve(pipe, device):
    plain = Plain(device)
    while message := pipe.recv():
        pipe.send(getattr(plain, message[0])(*message[1]))


def timed(device, function, repeats=5):
    """Median seconds of `function`, after one call that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = wait(device)
        function()
        seconds.append(wait(device) - start)
    return median(seconds[1:])


def by_turns(device, functions, rounds, times=6):
    """{name: median seconds} of `functions`, called by turns, `times` in a row without the first."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            for turn in range(times):
                start = wait(device)
                function()
                if turn:
                    seconds[name].append(wait(device) - start)
    return {name: median(values) for name, values in seconds.items()}


def peak_flops(device):
    """Floating-point operations a second of the best of three float32 matrix products."""
    best = 0
    for n in (1024, 2048, 4096):
        a, b = torch.rand(2, n, n, device=device)
        best = max(best, 2 * n**3 / timed(device, lambda a=a, b=b: a @ b))
    return best


class Ours:
    """Experiment 1 on the photographs in `folder`, trained as train.py does; flags: `amp`, `compile`."""

    def __init__(self, folder, device, *flags):
        flags = [f"--{flag}" for flag in flags]
        args = parse_train(["--data", folder, "--out", folder, *flags])
        self.config = config_of(args)
        self.device = device
        self.images = data.load_split(folder, "train", f"{folder}/cache", bars=True).to(device)
        self.inverter = inverter_of(self.config).to(device)
        self.loss = Loss().to(device)
        if self.config["compile"]:
            self.inverter.compile()
        self.optimizer = torch.optim.Adam(self.inverter.decoder.parameters(), lr=1e-4)

    def batch(self, size=4):
        """The first batch, (B, 3, 224, 224) in [0, 1]."""
        plan = data.epoch_plan(self.images.sizes, 42, 0)
        return data.crops(self.images, *(part[:size] for part in plan))

    def step(self, batch):
        """One step; the loss."""
        return train.train_step(self.inverter.train(), batch, self.loss, self.optimizer)["loss"].mean()

    def epoch(self):
        """Seconds a step of an epoch."""
        steps = train.steps_of_an_epoch(len(self.images.names), 4, world=1)
        scheduler = train.make_scheduler(self.optimizer, self.config, steps, 1e-7)
        state = train.State(self.inverter.decoder, self.optimizer, scheduler, Meter(TERMS, self.device))
        start = wait(self.device)
        batches = train.epoch_batches(self.images, self.config, state, steps, rank=0, world=1)
        options = (self.config, steps, Signals(self.device), True)
        train.train_epoch(self.inverter, batches, self.loss, state, *options)
        return (wait(self.device) - start) / steps


def step_parts(ours, batch):
    """{part: milliseconds} of a step, each measured by itself; decoder and lpips forwards and backwards."""
    features = ours.inverter.encode(batch)
    gradient = torch.rand_like(batch)
    output = torch.rand_like(batch).requires_grad_()
    functions = {
        "data": lambda: ours.batch(len(batch)),
        "encoder": lambda: ours.inverter.encode(batch),
        "decoder": lambda: ours.inverter.decode(features).backward(gradient),
        "lpips": lambda: ours.loss.lpips(output, batch).mean().backward(),
        "optimiser": ours.optimizer.step,
    }
    return {name: 1000 * timed(ours.device, function) for name, function in functions.items()}


def evaluation_parts(ours, pixels):
    """{part: milliseconds an image} of the evaluation of `pixels`, each measured by itself."""
    images = data.center_crops(pixels).to(ours.device)
    output = ours.inverter(images)
    functions = {
        "encoder and decoder": lambda: ours.inverter(images),
        "lpips": lambda: ours.loss.lpips(output, images),
        "ssim, psnr and lpips": lambda: measure(output, images, ours.loss.lpips),
    }
    return {name: 1000 * timed(ours.device, function) / len(images) for name, function in functions.items()}


def child_gib(*command):
    """Peak memory in GiB of the largest child so far, after running `command`."""
    command = [sys.executable, *map(str, command)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def bench_step(plain, ours, folder, rounds, show):
    """A training step: plain and ours, and on CUDA its variants; its parts; its share of the peak."""
    device = ours.device
    batch = ours.batch()
    plain("keep", batch.cpu().contiguous().numpy())
    functions = {"plain": lambda: plain("step"), "ours": lambda: ours.step(batch)}
    if device.type == "cuda":
        ours.step(batch)
        show("peak memory on the GPU, GiB", cuda_peak_gib=torch.cuda.max_memory_allocated(device) / 2**30)
        for flags in (("amp",), ("compile",), ("amp", "compile")):
            other = Ours(folder, device, *flags)
            functions[f"ours, {' and '.join(flags)}"] = lambda other=other: other.step(batch)
        nchw = Ours(folder, device)
        planes = batch.contiguous()
        for net in (nchw.inverter, nchw.loss):
            net.to(memory_format=torch.contiguous_format)
        functions["ours, NCHW"] = lambda: nchw.step(planes)
    seconds = by_turns(device, functions, rounds)
    for name, value in seconds.items():
        show(
            f"training step, {name}",
            **{f"step_ms {name}": 1000 * value, f"images_per_second {name}": 4 / value},
        )
    fast = seconds["ours"]
    show("", step_ms=1000 * fast, step_speedup=seconds["plain"] / fast)
    show("its parts, each by itself, ms", parts_ms=step_parts(ours, batch))
    with FlopCounterMode(display=False) as counter:
        ours.step(batch)
    flops = counter.get_total_flops()
    peak = peak_flops(device)
    show("its floating-point operations", gflop=flops / 1e9, gflops=flops / fast / 1e9)
    show("of this machine's best matrix product", peak_gflops=peak / 1e9, peak_share=flops / fast / peak)


def bench_epoch(plain, ours, folder, show):
    """A step of the second epoch: ours leaves a fifth of the photographs for validation."""
    slow = plain("epoch", f"{folder}/train")
    ours.epoch()
    fast = ours.epoch()
    show("second epoch, a step", plain_epoch_step_ms=1000 * slow, epoch_step_ms=1000 * fast)
    show("", epoch_speedup=slow / fast)


def bench_evaluation(plain, ours, folder, show):
    """All three metrics of the photographs, the same in both; ours has seen the images before."""
    files = data.image_files(Path(folder, "train"))
    Path(folder, "again").mkdir()
    Path(folder, "again", "test").symlink_to(Path(folder, "train"))
    source = (f"{folder}/again", "test", f"{folder}/cache")
    data.load_split(*source)
    ours.inverter.decoder.load_state_dict(
        {key: torch.from_numpy(value) for key, value in plain("weights").items()}
    )
    start = wait(ours.device)
    expected = np.mean(plain("evaluate", files), 0)
    slow = (wait(ours.device) - start) / len(files)
    start = wait(ours.device)
    pixels = data.load_split(*source).pixels
    values = evaluate_model(ours.inverter, pixels, bars=True).values
    fast = (wait(ours.device) - start) / len(files)
    found = [values[name].mean() for name in ("psnr", "ssim", "lpips")]
    if not np.allclose(found, expected, rtol=1e-3):
        raise RuntimeError(f"the metrics differ: plain {expected}, ours {found}")
    show("evaluation, images/s", plain_eval_images_per_second=1 / slow, eval_images_per_second=1 / fast)
    show("", eval_speedup=slow / fast)
    with torch.no_grad():
        show("its parts, each by itself, ms an image", eval_parts_ms=evaluation_parts(ours, pixels[:4]))
    with FlopCounterMode(display=False) as counter:
        evaluate_model(ours.inverter, pixels[:1], bars=True)
    show("its floating-point operations, an image", eval_gflop=counter.get_total_flops() / 1e9)
    show("inference of one image", inference_ms=time_inference(ours.inverter, pixels, 20))


def bench(args):
    """Measure, print and, with --json, write."""
    device = select_device(args.device)
    figures = {}
    if args.images < 6:
        raise UserError(f"--images {args.images}: at least 6, for a batch of 4 and validation")

    def show(title, **values):
        figures.update(values)
        words = []
        for name, value in values.items():
            for part, figure in value.items() if isinstance(value, dict) else [(name, value)]:
                words.append(f"{part} {figure:.4g}" if isinstance(figure, float) else f"{part} {figure}")
        print(f"{title:<40}{', '.join(words)}", flush=True)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    show("machine", device=name, threads=torch.get_num_threads(), torch=torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            link_photographs(args.data, folder, args.images)
        else:
            make_photographs(folder, args.images)
        # In processes of their own, and first, since what can be asked for is the peak of the largest child
        # so far.
        flags = (
            "--data",
            folder,
            "--cache",
            f"{folder}/cache",
            "--out",
            f"{folder}/run",
            "--epochs",
            1,
            "--quiet",
        )
        show("peak memory of a training, GiB", training_peak_gib=child_gib("train.py", *flags))
        show("of a step of the attention decoder", attention_peak_gib=child_gib("-c", ATTENTION))
        plain = Elsewhere(device)
        train.set_up()
        ours = Ours(folder, device)
        try:
            bench_step(plain, ours, folder, args.rounds, show)
            bench_epoch(plain, ours, folder, show)
            bench_evaluation(plain, ours, folder, show)
            step = figures["gflop"] / figures["peak_gflops"]  # seconds
            image = figures["eval_gflop"] / figures["peak_gflops"]
            bounds = {"epoch": figures["plain_epoch_step_ms"] / 1000 / step}
            bounds["evaluation"] = 1 / figures["plain_eval_images_per_second"] / image
            show("speedups if all ran at the peak", speedup_bound=bounds)
        finally:
            plain.close()
    if args.json:
        write_text(args.json, json.dumps(figures, indent=2))


if __name__ == "__main__":
    run(lambda: bench(ARGS))
