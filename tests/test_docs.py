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
GUIDE = REPOSITORY / "docs" / "guide.md"
PAGES = sorted(path for folder in ("", "docs", "pretrained") for path in (REPOSITORY / folder).glob("*.md"))
WORDS = {  # of a page at most, outside code and tables
    "README.md": 1200,
    "docs/guide.md": 2000,
    "docs/your-network.md": 800,
    "docs/reading-the-numbers.md": 500,
    "docs/findings.md": 1800,
    "docs/erratum.md": 1000,
    "docs/method.md": 800,
    "pretrained/README.md": 250,
}
READ = [name for name in WORDS if (REPOSITORY / name).exists()]
MOST_IN_A_SENTENCE, MOST_ON_AVERAGE, MOST_IN_A_CELL = 40, 20, 12


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
    assert len(commands) > 15 or page != GUIDE
    for command in commands:
        script, *flags = shlex.split(command, comments=True)
        PARSERS[script](flags)


def without_code(name):
    """The text of a page outside its blocks of code, and the rows of its tables."""
    text = re.sub(r"```.*?```", "", (REPOSITORY / name).read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"^\|.*\n", "", text, flags=re.M), re.findall(r"^\|(.*)\|$", text, re.M)


def sentences(text):
    """The words of each sentence, in paragraphs and list items. Code in a line is one word."""
    text = re.sub(r"^#.*$", "", text, flags=re.M)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # links and pictures
    text = re.sub(r"`[^`]*`", "Code", text)
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text):
        parts = re.split(r"(?<=[.!?])[)\"*]*\s+(?=[A-Z0-9(\"*])", paragraph)
        yield from (part.split() for part in parts if part.split())


@pytest.mark.parametrize("name", READ)
def test_words_are_few(name):
    assert len(without_code(name)[0].split()) <= WORDS[name]


@pytest.mark.parametrize("name", READ)
def test_sentences_are_short(name):
    found = list(sentences(without_code(name)[0]))
    longest = max(found, key=len)
    assert len(longest) <= MOST_IN_A_SENTENCE, " ".join(longest)
    assert sum(map(len, found)) / len(found) < MOST_ON_AVERAGE


@pytest.mark.parametrize("name", READ)
def test_cells_of_tables_have_few_words(name):
    cells = [cell for row in without_code(name)[1] for cell in row.split("|")]
    assert [cell for cell in cells if len(cell.split()) > MOST_IN_A_CELL] == []


@pytest.mark.parametrize("name", sorted({"README.md", "docs/findings.md"} & set(READ)))
def test_words_have_no_footnote_marks(name):
    assert not set("§‡◊¶†") & set((REPOSITORY / name).read_text(encoding="utf-8"))


def test_files_of_the_guide_are_there():
    """Each file.py that the table of "How it works" names is there, and each file that is there is named."""
    text = GUIDE.read_text(encoding="utf-8").split("## How it works")[1].split("\n## ")[0]
    named = set(re.findall(r"\w+\.py", "".join(re.findall(r"^\| ([^|]*) \|", text, re.M))))
    assert named == {Path(path).name for path in REPOSITORY.glob("*.py")}


def test_python_of_the_guide(tmp_path, monkeypatch):
    """The lines under "Use from Python" run as they stand, on the sample."""
    guide = GUIDE.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained").symlink_to(REPOSITORY / "pretrained")
    measure, hub, keep = re.findall(r"```python\n(.*?)```", guide.split("## Use from Python")[1], re.S)
    exec(measure, found := {})
    assert found["features"].shape == (4, 64, 112, 112)
    pairs = zip(found["batch"].numpy(), found["output"].clamp(0, 1).detach().numpy(), strict=True)
    expected = [peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs]
    assert found["values"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert "torch.hub.load" in hub
    exec(keep, found := {})
    images = found["images"]
    assert images.shape == (4, 3, 224, 224) and 0 <= images.min() < images.max() <= 1
