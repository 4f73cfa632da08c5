"""DIV2K, fetched: downloads that resume, are verified, and unpack safely."""

import http.client
import os
import shutil
import stat
import time
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from utils import UserError, digest, locked

SITE = "https://data.vision.ee.ethz.ch/cvl/DIV2K"
DIV2K = (  # url, md5, bytes (None: as the server says)
    (f"{SITE}/DIV2K_train_HR.zip", "bdc2d9338d4e574fe81bf7d158758658", 3_530_603_713),
    (f"{SITE}/DIV2K_valid_HR.zip", "9fcdda83005c5e5997799b69f955ff88", None),
)
ATTEMPTS = 5


def download_div2k(root, archives=DIV2K, bars=None):
    """Download, verify and unpack DIV2K into `root`; what is already there is not fetched again.

    An interrupted download goes on where it stopped. Raises UserError when the server can't be reached
    or what it sends is not the archive.
    """
    if root == "sample":
        raise UserError("--download --data sample: the sample needs no download; give a folder for DIV2K")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for url, md5, size in archives:
        path = root / url.rsplit("/", 1)[1]
        with locked(root / f".{path.name}.lock"):  # a second run waits for the first one's download
            if path.with_suffix("").is_dir():
                print(f"{path.with_suffix('')} is there")
                continue
            if not path.exists() or digest(path, "md5") != md5:
                fetch(url, path, md5, size, bars)
            unpack(path, root, bars)
            path.unlink()


def fetch(url, path, md5, size=None, bars=None):
    """Download `url` to `path` through `path`.part, in at most ATTEMPTS parts, and check size and MD5."""
    part = path.with_name(f"{path.name}.part")
    for attempt in range(ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                have = have if response.status == 206 else 0  # else the server sends all of it again
                total = have + int(response.headers["Content-Length"])
                if size and total != size:
                    raise UserError(f"{url}: {total} bytes there, {size} expected")
                bar = {"desc": path.name, "initial": have, "unit": "B", "unit_scale": True, "disable": bars}
                with open(part, "ab" if have else "wb") as file:
                    with tqdm.wrapattr(file, "write", total, **bar) as shown:
                        shutil.copyfileobj(response, shown, 1 << 20)
            if part.stat().st_size == total:
                break
            reason = f"connection closed after {part.stat().st_size} of {total} bytes"
        except (OSError, TypeError, http.client.HTTPException) as error:  # TypeError: without Content-Length
            if getattr(error, "code", None) == 416:  # nothing is left to send: what we have is whole or wrong
                break
            reason = str(error)
        time.sleep(attempt)
    else:
        raise UserError(f"{url}: {reason}; run again to go on from {part}")
    if (found := digest(part, "md5")) != md5:
        part.unlink()
        raise UserError(f"{url}: MD5 {found}, expected {md5}; deleted, run again")
    os.replace(part, path)


def unpack(path, root, bars=None):
    """Unpack the zip at `path` so that its one folder, named like it, appears in `root` whole or not at all.

    Raises UserError for members that are absolute, climb out with `..`, or are links.
    """
    temporary = root / f".{path.stem}.unpacking"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                parts = member.filename.replace("\\", "/").split("/")
                if parts[0] != path.stem or ".." in parts or stat.S_ISLNK(member.external_attr >> 16):
                    raise UserError(f"{path}: unsafe member {member.filename!r}; nothing was unpacked")
            for member in tqdm(archive.infolist(), f"Unpacking {path.name}", unit="file", disable=bars):
                archive.extract(member, temporary)
        os.replace(temporary / path.stem, root / path.stem)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: cannot be unpacked ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
