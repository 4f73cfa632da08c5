"""The decoder that looks at the encoder: its loop, its loss, what a run of it writes, and its flags."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training import batches_of, parse, training_on, wake

import data
import evaluate
import train
from decoders import FeedbackDecoder
from flags import parse_evaluate
from metrics import Loss
from models import load_inverter
from report import pictures
from utils import METRICS_AND_FEATURE_ERROR, UserError

SMALL = ["--decoder", "feedback", "--width", 16, "--crop", 32, "--mse-weight", 1, "--lpips-weight", 0]
SMALL += ["--lr", 2e-3, "--clip-grad", 0.3]


@pytest.fixture(scope="module")
def feedback(photos, tmp_path_factory):
    """The folder of a short training of a small feedback decoder with two iterations, evaluated."""
    out = tmp_path_factory.mktemp("feedback")
    running = ["--data", photos, "--out", out, "--passes", 40, "--epochs", 1, "--batch-size", 2, "--quiet"]
    train.train(parse(*SMALL, "--iterations", 2, "--schedule", "onecycle", "--val-images", 1, *running))
    evaluate.evaluate(parse_evaluate(["--ckpt", str(out / "best.pt"), "--quiet"]))
    return out


def test_an_iteration_sees_what_the_features_lack():
    """An encoder that only unfolds pixels, weights by hand: h ← h + r / σ, x ← x − h / 2, in rounds of 3."""
    net = FeedbackDecoder((12, 7, 7), width=12, size=14, blocks=0, iterations=3).eval()
    identity = torch.eye(12)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.deviation.fill_(2)
        net.head.layers[0].bias.fill_(5)  # a tenth is what it adds to pixels
        net.steps[0].compare.weight[:, :12, 1, 1] = identity
        net.steps[0].head.last.weight[:, :, 1, 1] = -5 * identity
    wanted = torch.rand(2, 3, 14, 14)
    net.iterations = 5
    images = net(F.pixel_unshuffle(wanted, 2), None, lambda x: F.pixel_unshuffle(x, 2))
    x, h = np.full(wanted.shape, 0.5), 0
    for number, image in enumerate(images):
        np.testing.assert_allclose(image.detach(), x, atol=1e-5)
        if number == 3:
            h = 0
        h = h + (x - wanted.numpy()) / 2
        x = x - h / 2
    assert len(images) == 6


def test_metrics_of_each_iteration(feedback, run_evaluate, figures_of):
    """A third of two is another round."""
    found = json.loads((feedback / "metrics.json").read_text())
    iterates = found["iterates"]
    assert found["iterations"] == 2 and len(iterates) == 3
    assert all(iterates[2][name] == found[name] for name in ("psnr", "ssim", "lpips"))
    assert iterates[2]["feature_error"]["mean"] < iterates[0]["feature_error"]["mean"]
    assert (feedback / "iterations.png").exists()
    figures = figures_of(pictures)
    for number in (1, 3):
        assert run_evaluate("--ckpt", feedback / "best.pt", "--iterations", number, "--quiet") == 0
        other = json.loads((feedback / f"iterations-{number}" / "metrics.json").read_text())["iterates"]
        assert len(other) == number + 1 and other[:3] == iterates[: number + 1]
        drawn = [list(axis.lines[0].get_ydata()) for axis in figures[-1].axes]
        assert drawn == [[after[name]["mean"] for after in other] for name in METRICS_AND_FEATURE_ERROR]


def test_feature_error_by_hand(feedback, photos):
    inverter, _ = load_inverter(feedback / "best.pt")
    images = data.center_crops(data.load_split(str(photos), "test")[:])
    with torch.no_grad():
        wanted = inverter.encode(images)
        made = inverter.encode(inverter.decode(wanted))
    expected = (made - wanted).flatten(1).norm(dim=1).mean() / torch.pdist(wanted.flatten(1)).mean()
    metrics = json.loads((feedback / "metrics.json").read_text())
    assert metrics["iterates"][2]["feature_error"]["mean"] == pytest.approx(expected.item(), rel=1e-3)


def test_a_step_trains_all_weights(photos):
    training = training_on(photos, *SMALL, "--clip-grad", 1e-3)
    wake(training.inverter.decoder)
    train.train_step(training, *next(batches_of(training)))
    gradients = [parameter.grad for parameter in training.inverter.decoder.parameters()]
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert norm == pytest.approx(1e-3, rel=0.01)


def test_checkpoints_of_earlier_versions(feedback, tmp_path):
    """Those of another choice of what an iteration sees are refused, those of what is done now are read."""
    checkpoint = torch.load(feedback / "best.pt", weights_only=True)
    config = checkpoint["config"] | {"feedback": "residual", "own_weights": False}
    torch.save(checkpoint | {"config": config}, tmp_path / "best.pt")
    assert load_inverter(tmp_path / "best.pt")[0].decoder.iterations == 2
    torch.save(checkpoint | {"config": config | {"feedback": "gradient"}}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="trained with feedback 'gradient', which this version does not have"):
        load_inverter(tmp_path / "best.pt")


def test_loss_counts_earlier_iterates():
    outputs, images = torch.rand(3, 2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    terms = Loss(0.5, 0)(outputs[2], images, list(outputs[:2]))
    errors = (outputs - images).square().mean((2, 3, 4))
    torch.testing.assert_close(terms["loss"], 0.5 * (errors[2] + 0.3 * (errors[0] + errors[1])))
    torch.testing.assert_close(terms["mse"], errors[2])


def test_features_are_normalised_by_their_mean_and_deviation(photos):
    training = training_on(photos, *SMALL)
    decoder = training.inverter.decoder
    train.measure_features(training.inverter, training.train_images, training.config)
    crops = torch.cat([batch for batch, _ in batches_of(training)])
    channels = training.inverter.encode(crops).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(decoder.mean.flatten().double(), channels.mean(1), rtol=1e-4, atol=1e-6)
    expected = channels.std(1).clamp_min(0.01 * channels.std(1).mean())
    torch.testing.assert_close(decoder.deviation.flatten().double(), expected, rtol=1e-4, atol=0)


def test_published_images_are_shown_to_the_encoder_as_they_are_normalised(photos):
    inverter = training_on(photos, *SMALL, "--protocol", "published").inverter.eval()
    wake(inverter.decoder)
    features = inverter.encode(torch.rand(1, 3, 64, 64))
    seen = []
    inverter.encoder.trunk.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = inverter.decode_all(features, (64, 64))
    assert len(seen) == 3 and all(map(torch.equal, seen, images))


def test_other_decoders_do_not_iterate(trained, run_train, run_evaluate, error_line, photos, tmp_path):
    assert run_train("--iterations", 2, "--data", photos, "--out", tmp_path) == 2
    assert "--iterations: only with --decoder feedback" in error_line()
    assert run_evaluate("--ckpt", trained / "best.pt", "--iterations", 2) == 2
    assert f"the tconv decoder of {trained / 'best.pt'} does not iterate" in error_line()
