""".ci/run, with a python3 that makes an environment of stubs."""

import os
import shutil
import subprocess

from conftest import REPOSITORY

PYTHON = """#!/bin/sh
mkdir -p "$3/bin"
echo "PATH=$PWD/$3/bin:$PATH" > "$3/bin/activate"
for name in pip python ruff; do
  printf '#!/bin/sh\\necho "${0##*/} $*" >> "$NOTES"; pwd >> "$NOTES"; ls >> "$NOTES"\\n' > "$3/bin/$name"
  chmod +x "$3/bin/$name"
done
"""


def test_tests_run_in_a_copy(tmp_path):
    """What is ignored stays behind, the developer's own environment is left alone."""
    checkout = tmp_path / "checkout"
    for name in (".ci/run", "README.md", ".gitignore"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, checkout / name)
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "mine").write_text("precious")
    (checkout / "new test.py").write_text("")
    (tmp_path / "shared").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(PYTHON)
    (tmp_path / "bin" / "python3").chmod(0o755)
    notes = tmp_path / "notes"
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "NOTES": str(notes)}
    for _ in range(2):
        done = subprocess.run([checkout / ".ci" / "run"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = [str(checkout / ".ci" / "fresh" / "repository"), "README.md", "new test.py"]
    commands = ("pip install -q -r requirements-dev.txt", "python -m pytest -q")
    commands += ("python -m pytest -q -m slow", "ruff check .", "ruff format --check .")
    assert notes.read_text().splitlines() == 2 * [line for command in commands for line in (command, *found)]
    assert (checkout / ".venv" / "mine").read_text() == "precious"
    assert sorted(path.name for path in (checkout / ".ci").iterdir()) == ["run"]
