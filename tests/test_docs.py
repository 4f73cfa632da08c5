"""What the Markdown files link to is there, and what they tell to run is understood."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import REPOSITORY
from skimage.metrics import peak_signal_noise_ratio

from flags import parse_evaluate, parse_invert, parse_survey, parse_train

PARSERS = {"train.py": parse_train, "evaluate.py": parse_evaluate, "invert.py": parse_invert}
PARSERS["survey.py"] = parse_survey
PAGES = sorted(path for folder in ("", "docs", "pretrained") for path in (REPOSITORY / folder).glob("*.md"))


def anchors(page):
    """What GitHub calls the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page, monkeypatch):
    """Those without a shell's variables or patterns."""
    monkeypatch.chdir(REPOSITORY)
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    text = "".join(blocks).replace("\\\n", " ")
    commands = re.findall(r"\bpython ((?:train|evaluate|invert|survey)\.py [^\n&|;]*)", text)
    commands = [command for command in commands if not set(command) & set("$*{?")]
    assert len(commands) > 20 or page != REPOSITORY / "README.md"
    for command in commands:
        script, *flags = shlex.split(command, comments=True)
        PARSERS[script](flags)


def test_files_of_the_readme_are_there():
    """Each file.py that the table of "How it works" names is there, and each file that is there is named."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("### How it works")[1].split("###")[0]
    named = set(re.findall(r"\w+\.py", "".join(re.findall(r"^\| ([^|]*) \|", text, re.M))))
    assert named == {Path(path).name for path in REPOSITORY.glob("*.py")}


def test_python_of_the_readme(tmp_path, monkeypatch):
    """The lines under "Use from Python" run as they stand, on the sample."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(REPOSITORY / "pretrained")
    measure, hub, keep = re.findall(r"```python\n(.*?)```", readme.split("### Use from Python")[1], re.S)
    exec(measure, found := {})
    assert found["features"].shape == (4, 64, 112, 112)
    pairs = zip(found["batch"].numpy(), found["output"].clamp(0, 1).detach().numpy(), strict=True)
    expected = [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]
    assert found["values"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert "torch.hub.load" in hub
    exec(keep, found := {})
    images = found["images"]
    assert images.shape == (4, 3, 224, 224) and 0 <= images.min() < images.max() <= 1
