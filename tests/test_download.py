"""The DIV2K download: broken, resumed, verified, and unpacked safely."""

import hashlib
import http.server
import io
import os
import stat
import threading
import zipfile

import pytest

import download
from utils import UserError


class CuttingServer(http.server.BaseHTTPRequestHandler):
    """Serves `archive` and hangs up half-way through the first answers; honours Range."""

    archive, cuts, requests = b"", 0, []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        type(self).requests.append(start)
        if start >= len(self.archive):
            self.send_error(416)
            return
        body = self.archive[start:]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if type(self).cuts:
            type(self).cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def zipped(names, link=None):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, os.urandom(50_000))
        if link:
            member = zipfile.ZipInfo(link)
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(member, "/etc/passwd")
    return content.getvalue()


@pytest.fixture
def serve(monkeypatch):
    """Serve an archive; returns its entry for `download_div2k`."""
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(archive, cuts=0, md5=None, size=None):
        handler = type("Handler", (CuttingServer,), {"archive": archive, "cuts": cuts, "requests": []})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/DIV2K_valid_HR.zip"
        return (url, md5 or hashlib.md5(archive).hexdigest(), size or len(archive)), handler

    yield start
    for server in servers:
        server.shutdown()


def test_download_resumes_where_the_connection_was_cut(serve, tmp_path):
    archive = zipped(["DIV2K_valid_HR/0801.png", "DIV2K_valid_HR/0802.png"])
    entry, handler = serve(archive, cuts=2)
    download.download_div2k(tmp_path, [entry])
    assert handler.requests == [0, len(archive) // 2, len(archive) // 2 + (len(archive) + 1) // 4]
    with zipfile.ZipFile(io.BytesIO(archive)) as expected:
        for name in expected.namelist():
            assert (tmp_path / name).read_bytes() == expected.read(name)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["DIV2K_valid_HR"]
    download.download_div2k(tmp_path, [entry])  # nothing to do
    assert len(handler.requests) == 3


def test_download_goes_on_in_a_later_run(serve, tmp_path):
    archive = zipped(["DIV2K_valid_HR/0801.png"])
    entry, handler = serve(archive, cuts=9)
    with pytest.raises(UserError, match="run again to go on"):
        download.download_div2k(tmp_path, [entry])
    had = (tmp_path / "DIV2K_valid_HR.zip.part").stat().st_size
    assert 0 < had < len(archive)
    handler.cuts = 0
    handler.requests.clear()
    download.download_div2k(tmp_path, [entry])
    assert handler.requests == [had] and (tmp_path / "DIV2K_valid_HR" / "0801.png").stat().st_size == 50_000


def test_download_checks_size_and_md5(serve, tmp_path):
    archive = zipped(["DIV2K_valid_HR/0801.png"])
    entry, _ = serve(archive, size=len(archive) + 1)
    with pytest.raises(UserError, match=f"{len(archive)} bytes there, {len(archive) + 1} expected"):
        download.download_div2k(tmp_path, [entry])
    entry, _ = serve(archive, md5="0" * 32)
    with pytest.raises(UserError, match="MD5"):
        download.download_div2k(tmp_path, [entry])
    assert not [p for p in tmp_path.iterdir() if p.name[0] != "."]


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "DIV2K_valid_HR/../../evil.png", "other/evil.png"]
)
def test_unsafe_archive_is_refused(serve, tmp_path, name):
    entry, _ = serve(zipped(["DIV2K_valid_HR/0801.png", name]))
    with pytest.raises(UserError, match="unsafe member"):
        download.download_div2k(tmp_path / "root", [entry])
    assert not list(tmp_path.rglob("*.png"))


def test_link_in_an_archive_is_refused(serve, tmp_path):
    entry, _ = serve(zipped(["DIV2K_valid_HR/0801.png"], link="DIV2K_valid_HR/0802.png"))
    with pytest.raises(UserError, match="unsafe member 'DIV2K_valid_HR/0802.png'"):
        download.download_div2k(tmp_path, [entry])
    assert not list(tmp_path.rglob("*.png"))


def test_unreachable_server_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="127.0.0.1:9"):
        download.download_div2k(tmp_path, [("http://127.0.0.1:9/DIV2K_valid_HR.zip", "0" * 32, 1)])
