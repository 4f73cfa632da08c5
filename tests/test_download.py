"""The DIV2K download: broken, resumed, verified, and unpacked safely."""

import hashlib
import http.server
import io
import os
import stat
import threading
import zipfile

import pytest

from extras import div2k
from utils import UserError


class CuttingServer(http.server.BaseHTTPRequestHandler):
    """Serves `archive` and hangs up half-way through the first `cuts` answers; honours Range."""

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.requests.append(start)
        body = self.server.archive[start:]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def zipped(*names, link=None):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, os.urandom(50_000))
        if link:
            member = zipfile.ZipInfo(link)
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(member, "/etc/passwd")
    return content.getvalue()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(div2k.time, "sleep", lambda seconds: None)


@pytest.fixture
def server(monkeypatch):
    """A server of an archive that a test gives it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), CuttingServer) as server:
        server.archive, server.cuts, server.requests = zipped("DIV2K_valid_HR/0801.png"), 0, []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def fetch(server, root, md5=None, size=None):
    url = f"http://127.0.0.1:{server.server_port}/DIV2K_valid_HR.zip"
    md5 = md5 or hashlib.md5(server.archive).hexdigest()
    div2k.download_div2k(root, [(url, md5, size or len(server.archive))])


def test_download_resumes_where_the_connection_was_cut(server, tmp_path):
    server.archive, server.cuts = zipped("DIV2K_valid_HR/0801.png", "DIV2K_valid_HR/0802.png"), 2
    fetch(server, tmp_path)
    length = len(server.archive)
    assert server.requests == [0, length // 2, length // 2 + (length + 1) // 4]
    with zipfile.ZipFile(io.BytesIO(server.archive)) as expected:
        for name in expected.namelist():
            assert (tmp_path / name).read_bytes() == expected.read(name)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["DIV2K_valid_HR"]
    fetch(server, tmp_path)  # nothing to do
    assert len(server.requests) == 3


def test_download_goes_on_in_a_later_run(server, tmp_path):
    server.cuts = 5
    with pytest.raises(UserError, match="run again to go on"):
        fetch(server, tmp_path)
    had = (tmp_path / "DIV2K_valid_HR.zip.part").stat().st_size
    assert 0 < had < len(server.archive)
    fetch(server, tmp_path)
    assert server.requests[5:] == [had]
    assert (tmp_path / "DIV2K_valid_HR" / "0801.png").stat().st_size == 50_000


def test_download_checks_size_and_md5(server, tmp_path):
    size = len(server.archive)
    with pytest.raises(UserError, match=f"{size} bytes there, {size + 1} expected"):
        fetch(server, tmp_path, size=size + 1)
    with pytest.raises(UserError, match="MD5"):
        fetch(server, tmp_path, md5="0" * 32)
    assert not [path for path in tmp_path.iterdir() if path.name[0] != "."]


@pytest.mark.parametrize(
    "unsafe",
    [
        zipped("DIV2K_valid_HR/0801.png", "../evil.png"),
        zipped("DIV2K_valid_HR/0801.png", "/evil.png"),
        zipped("other/evil.png"),
        zipped("DIV2K_valid_HR/0801.png", link="DIV2K_valid_HR/evil.png"),
    ],
    ids=["above", "absolute", "another folder", "link"],
)
def test_unsafe_archive_is_refused(server, tmp_path, unsafe):
    server.archive = unsafe
    with pytest.raises(UserError, match="unsafe member .*evil.png'; nothing was unpacked"):
        fetch(server, tmp_path / "root")
    assert not list(tmp_path.rglob("*.png"))


def test_unreachable_server_is_one_error(tmp_path):
    with pytest.raises(UserError, match="127.0.0.1:9"):
        div2k.download_div2k(tmp_path, [("http://127.0.0.1:9/DIV2K_valid_HR.zip", "0" * 32, 1)])
