"""The study's loop, written plainly, that `python -m bench` times ours against."""

import time
import warnings
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.managers import BaseManager

import lpips as lpips_package
import torch
import torchvision
from PIL import Image, ImageOps
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchvision import transforms as T

from encoders import imagenet_weights
from models import build_decoder
from utils import IMAGENET_MEAN, IMAGENET_STD, WANG_2004, UserError


class PlainImages(torch.utils.data.Dataset):
    """Image files, decoded, resized, cropped and flipped anew each time; the centre unless training."""

    def __init__(self, files, training=True):
        self.files = files
        crop = [T.RandomCrop(224), T.RandomHorizontalFlip()] if training else [T.CenterCrop(224)]
        self.transform = T.Compose([T.Resize((256, 256)), *crop, T.ToTensor()])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        with Image.open(self.files[index]) as image:
            return self.transform(ImageOps.exif_transpose(image).convert("RGB"))


class Plain:
    """Encoder, decoder, loss and optimiser of experiment 1."""

    def __init__(self, device):
        self.device = device
        self.encoder = torchvision.models.vgg16().features[:5].eval().requires_grad_(False).to(device)
        vgg16 = imagenet_weights("vgg16")
        self.encoder.load_state_dict({key: vgg16[f"features.{key}"] for key in self.encoder.state_dict()})
        self.decoder = build_decoder("tconv", (64, 112, 112)).to(memory_format=torch.contiguous_format)
        self.decoder.to(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's remarks on the lpips package's arguments
            self.lpips = lpips_package.LPIPS(net="alex", pnet_rand=True, verbose=False)
        alexnet = imagenet_weights("alexnet")
        keys = self.lpips.net.state_dict()  # such as slice1.0.weight
        self.lpips.net.load_state_dict({key: alexnet[f"features.{key.split('.', 1)[1]}"] for key in keys})
        self.lpips.requires_grad_(False).to(device)
        self.optimizer = torch.optim.Adam(self.decoder.parameters(), lr=1e-4)
        self.normalize = T.Normalize(IMAGENET_MEAN, IMAGENET_STD)

    def keep(self, batch):
        """Use this array in each `step` without a batch."""
        self.batch = torch.from_numpy(batch)

    def loss(self, batch):
        with torch.no_grad():
            features = self.encoder(self.normalize(batch))
        output = self.decoder(features)
        target = batch.clone().requires_grad_()  # its features are kept under autograd
        distance = self.lpips(output * 2 - 1, target * 2 - 1).mean()
        return 0.5 * torch.nn.functional.mse_loss(output, batch) + 0.5 * distance

    def step(self, batch=None):
        self.decoder.train()
        loss = self.loss((self.batch if batch is None else batch).to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def epoch(self, files, epochs=2):
        """Seconds for a step of the last of `epochs` on `files`."""
        options = {"batch_size": 4, "shuffle": True, "num_workers": 4, "persistent_workers": True}
        loader = torch.utils.data.DataLoader(PlainImages(files), **options)
        for _ in range(epochs):
            start = time.perf_counter()
            for batch in loader:
                self.step(batch)
            seconds = time.perf_counter() - start
        return seconds / len(loader)

    @torch.no_grad()
    def validate(self, files):
        """Seconds that the loss of `files` takes."""
        self.decoder.eval()
        start = time.perf_counter()
        images = PlainImages(files, training=False)
        for batch in torch.utils.data.DataLoader(images, batch_size=4, num_workers=4):
            self.loss(batch.to(self.device)).item()
        return time.perf_counter() - start

    @torch.no_grad()
    def evaluate(self, files):
        """[(PSNR, SSIM, LPIPS)] of the files, one image at a time."""
        self.decoder.eval()
        values = []
        for image in PlainImages(files, training=False):
            image = image[None].to(self.device)
            output = self.decoder(self.encoder(self.normalize(image))).clamp(0, 1)
            x, y = (picture[0].permute(1, 2, 0).cpu().numpy() for picture in (output, image))
            psnr = peak_signal_noise_ratio(y, x, data_range=1)
            ssim = structural_similarity(y, x, channel_axis=2, data_range=1, **WANG_2004)
            values.append((psnr, ssim, self.lpips(output, image, normalize=True).item()))
        return values


@contextmanager
def elsewhere(device):
    """A Plain in its own process, which ends with the `with`. Raises UserError if it ends before."""
    BaseManager.register("Plain", Plain)
    with BaseManager(ctx=get_context("spawn")) as manager:
        try:
            yield manager.Plain(device)
        except (EOFError, ConnectionError):
            raise UserError("the plain loop's process ended, as it says above") from None
