"""--encoder FILE.py:FUNCTION: a user's own network, and the SHA-256 of the files that make it."""

import importlib.util
import os
import re
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from utils import UserError, digest, user_files

INSTALLED = re.compile(rf"{re.escape(sysconfig.get_path('stdlib'))}|.*(site|dist)-packages")
HERE = Path(__file__).resolve().parent.parent
PACKAGES = [HERE / name for name in ("extras", "report", "bench")]
NEIGHBOURS = {}  # {FILE.py: {path: SHA-256}} of the user's modules that it imports
BEFORE = set()  # the modules before the first FILE.py ran


def user_network(file, function):
    """The nn.Module that `function` of the Python file returns. Raises UserError."""
    name = f"--encoder {file}:{function}"
    spec = importlib.util.spec_from_file_location(f"own_{digest(file)}", file)  # a name of its own
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        with neighbours_first(file):
            spec.loader.exec_module(module)
            net = getattr(module, function)()
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise UserError(f"{name}: {type(error).__name__}: {error}") from None
    if not isinstance(net, nn.Module):
        raise UserError(f"{name}: returns {type(net).__name__}, should be an nn.Module")
    return net


@contextmanager
def neighbours_first(file):
    """Within `with`, imports look beside `file` first and in this project last.

    Then NEIGHBOURS has what was imported, and sys.modules has not: other modules may have the same names.
    """
    folder, path = Path(file).resolve().parent, sys.path[:]
    BEFORE.update(() if BEFORE else sys.modules)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if place_of(name)}
    sys.path[:] = [str(folder), *(place for place in path if Path(place).resolve() != HERE), str(HERE)]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        NEIGHBOURS[str(file)] = found = {}
        for name in sorted(filter(place_of, sys.modules)):
            place = place_of(name)
            shown = Path(file).parent / place.relative_to(folder) if folder in place.parents else place
            ours = [*PACKAGES, HERE] if name in hidden else PACKAGES  # FILE.py may lie in HERE
            if place.is_file() and place.parent not in ours:
                found[str(shown)] = digest(place)
            del sys.modules[name]
        sys.modules.update(hidden)
        sys.path[:] = [*path, *(place for place in sys.path if place not in (*path, str(folder), str(HERE)))]


def place_of(name):
    """The file, or folder, of an imported module that is neither built in nor installed, else None."""
    module = sys.modules[name]
    place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", None) or []), "")
    if os.path.exists(place) and not INSTALLED.match(place) and name != "__main__" and name[:4] != "own_":
        return Path(place).resolve()


def user_code_sha256(encoder):
    """{file: SHA-256} of each FILE.py, which has run, and of the user's modules that it imports."""
    found = {}
    for file in user_files(encoder):
        found |= {file: digest(file)} | NEIGHBOURS[file]
        for name in sorted(sys.modules.keys() - BEFORE):  # `forward` imports them
            if (place := place_of(name)) and place.is_file() and place.parent not in (*PACKAGES, HERE):
                found[str(place)] = digest(place)
    return found
