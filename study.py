"""What the study compares, and what it published: names and numbers for every file, without torch."""

from typing import NamedTuple

# Short names of encoders, and of their layers, shallow to deep: the network and the path of a module in it.
ENCODERS = {
    "vgg16": "torchvision/vgg16",
    "resnet34": "torchvision/resnet34",
    "vit_small": "timm/vit_small_patch16_224",
    "alexnet": "torchvision/alexnet",
}
LAYERS = {
    "vgg16": {f"block{i}": f"features.{place}" for i, place in enumerate((4, 9, 16, 23, 30), 1)},
    "resnet34": {f"layer{i}": f"layer{i}" for i in range(1, 5)},
    "vit_small": {f"block{i}": f"blocks.{i}" for i in range(12)},
    "alexnet": {f"conv{i}": f"features.{place}" for i, place in enumerate((2, 5, 7, 9, 12), 1)},
}
DECODERS = ["tconv", "frequency", "wavelet", "attention", "residual", "feedback"]  # models.py builds them
ITERATIONS = 3  # of the feedback decoder, if no other number is asked for
FORMAT = 1  # of best.pt and last.pt; a larger one is for what this version would read wrongly
INPUT = ("input_size", "mean", "std")  # flags of what an encoder's images are like
METRICS = {"psnr": "PSNR (dB) ↑", "ssim": "SSIM ↑", "lpips": "LPIPS ↓"}  # metrics.py measures them
DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3}  # of a table
FIGURES = METRICS | {"feature_error": "feature error ↓"}  # of what was made by looking at the encoder again
IMAGE_SIZE = 224  # of the study's images, and of those that most networks were trained with
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of the pixels, which encoders are normalised by
IMAGENET_STD = (0.229, 0.224, 0.225)


class Protocol(NamedTuple):
    """The recipe that a number was measured with (README, "Protocol")."""

    name: str
    squeezed: bool  # images are resized to 256×256; else their shorter side is 256, and their shape stays
    # Loss and metrics see the ImageNet-normalised image, the metrics clipped to [0, 1].
    normalized_target: bool
    ssim_window: dict  # options of scikit-image's structural_similarity
    lowest_lr: float  # that a plateau of the validation loss can lead to
    vit_shift: int  # blocks between the named one and the one whose features are taken, around all twelve
    # An encoder's input has the mean and deviation of its own training, else ImageNet's.
    own_normalization: bool


DOCUMENTED = Protocol(
    name="documented",
    squeezed=True,
    normalized_target=False,
    ssim_window={"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False},
    lowest_lr=1e-7,
    vit_shift=0,
    own_normalization=True,
)
PUBLISHED_CODE = Protocol(
    name="published",
    squeezed=False,
    normalized_target=True,
    ssim_window={"win_size": 7},
    lowest_lr=1e-6,
    vit_shift=-1,
    own_normalization=False,
)
PROTOCOLS = {protocol.name: protocol for protocol in (DOCUMENTED, PUBLISHED_CODE)}


class Published(NamedTuple):
    """What the study published of an experiment; None: nothing."""

    psnr: float
    ssim: float
    lpips: float | None = None
    parameters: str | None = None
    minutes: int | None = None  # of training
    inference: str = "12–15"  # milliseconds an image, on an RTX 3090


# By the names of the files in configs/; 05 and 15 are from the study's public repository, the rest from its
# text.
PUBLISHED = {
    "01_vgg16_block1_tconv": Published(17.35, 0.560, 0.398, "34K", 70),
    "02_vgg16_block2_tconv": Published(16.89, 0.512, 0.452),
    "03_vgg16_block3_tconv": Published(15.12, 0.421, 0.587, "75K"),
    "04_vgg16_block4_tconv": Published(13.76, 0.334, 0.724),
    "05_vgg16_block5_tconv": Published(12.26, 0.269),
    "06_vgg16_block1_attention": Published(16.92, 0.531, None, "12M", 180),
    "07_vgg16_block1_wavelet": Published(16.78, 0.524, None, "8M", 140),
    "08_vgg16_block1_frequency": Published(16.54, 0.518, None, "35M", 220),
    "09_vgg16_block1_tconv_mse": Published(17.12, 0.541, 0.445, "34K"),
    "10_vgg16_block1_tconv_lpips": Published(16.43, 0.538, 0.372, "34K"),
    "11_resnet34_layer1_tconv": Published(16.82, 0.506, 0.461, "50K"),
    "12_resnet34_layer2_tconv": Published(15.43, 0.428, 0.573),
    "13_vit_small_block0_tconv": Published(14.67, 0.412, 0.621),
    "14_vit_small_block1_tconv": Published(14.29, 0.389, 0.658),
    "15_resnet34_layer1_attention": Published(13.53, 0.376, 0.282),
}
# The flags that make an experiment what it is.
DEFINING = ("encoder", "layer", "decoder", "width", "mse_weight", "lpips_weight")
