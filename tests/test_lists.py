"""Files of names, and the lecture's list over a real connection: whole, or not there."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from wavenet_conv import WaveNetConvError, lists
from wavenet_conv.cli import main
from wavenet_conv.names import download_lecture_names, lecture_names, read_names

LIST = b"emma\nolivia\nava"


@pytest.mark.parametrize(
    "data",
    [
        b"emma\nolivia\nava",
        b"emma\nolivia\nava\n",
        b"emma\r\nolivia\r\nava\r\n",
        b"emma\rolivia\rava\r",
        b"\xef\xbb\xbfemma\n\nolivia\nava\n\n",
        b" emma\nolivia \n  \n\tava",
    ],
    ids=["plain", "newline at the end", "CRLF", "CR", "byte-order mark and blank lines", "white space"],
)
def test_lists_that_are_read(tmp_path, data):
    file = tmp_path / "names.txt"
    file.write_bytes(data)
    assert read_names(file) == ["emma", "olivia", "ava"]


def test_other_characters_are_kept(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("zoë\n-x \u2028y\n", encoding="utf-8")
    assert read_names(str(file)) == ["zoë", "-x \u2028y"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no names in it"),
        (b"\n\r\n\n", "no names in it"),
        (b"emma\nol\xedvia\n", "line 2: byte 0xed is not UTF-8; save the file as UTF-8"),
        (b"emma\nava\no.k\n", r"line 3 \('o.k'\): '.' marks the end of a name; remove it"),
    ],
)
def test_lists_that_are_refused(tmp_path, data, message):
    file = tmp_path / "list.txt"
    file.write_bytes(data)
    with pytest.raises(WaveNetConvError, match=f"list.txt.*{message}"):
        read_names(file)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(WaveNetConvError, match="missing.txt: No such file.*one name a line"):
        read_names(tmp_path / "missing.txt")
    with pytest.raises(WaveNetConvError, match="directory"):
        read_names(tmp_path)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(LIST)))
        self.end_headers()
        if self.path == "/whole":
            self.wfile.write(LIST)
        elif self.path == "/wrong":
            self.wfile.write(LIST.upper())
        elif self.path == "/broken":
            self.wfile.write(LIST[:7])
        elif self.path == "/headless":
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a stand-in for the lecture's list that the local server has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WAVENET_CONV_LECTURE_NAMES", raising=False)
    monkeypatch.setattr(lists, "LECTURE_SHA256", hashlib.sha256(LIST).hexdigest())
    return tmp_path / "cache"


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_whole_download_is_kept_and_verified_every_time(server, cache):
    path = download_lecture_names(f"{server.url}/whole")
    assert path.read_bytes() == LIST and files(cache) == [path] and lecture_names() == path
    assert download_lecture_names(f"{server.url}/whole") == path and server.asked == ["/whole"]
    path.write_bytes(LIST + b"!")  # somebody's editor
    assert lecture_names() is None
    assert download_lecture_names(f"{server.url}/whole").read_bytes() == LIST
    assert server.asked == ["/whole", "/whole"] and files(cache) == [path]


@pytest.mark.parametrize("what", ["wrong", "broken", "headless", "missing"])
def test_a_failed_download_leaves_nothing_behind(server, cache, what):
    with pytest.raises(WaveNetConvError, match=rf"{server.url}/{what}: .*try again"):
        download_lecture_names(f"{server.url}/{what}")
    assert server.asked == [f"/{what}"] and not cache.exists() and lecture_names() is None


def test_a_failed_download_leaves_what_was_there(server, cache):
    folder = cache / "wavenet-conv"
    folder.mkdir(parents=True)
    (folder / "lecture-names.txt").write_bytes(b"half of it")
    with pytest.raises(WaveNetConvError):
        download_lecture_names(f"{server.url}/broken")
    assert [path.read_bytes() for path in files(cache)] == [b"half of it"]


def test_no_server_at_all(cache):
    with pytest.raises(WaveNetConvError, match="127.0.0.1:9/names.txt: .*refused"):
        download_lecture_names("http://127.0.0.1:9/names.txt")
    assert not cache.exists()


def test_the_variable_names_a_list_and_is_verified(cache, tmp_path, monkeypatch):
    mine = tmp_path / "mine.txt"
    monkeypatch.setenv("WAVENET_CONV_LECTURE_NAMES", str(mine))
    assert lecture_names() is None
    mine.write_bytes(LIST)
    assert lecture_names() == mine
    mine.write_bytes(LIST + b"\n")
    assert lecture_names() is None


def test_the_command(server, cache, monkeypatch, capsys):
    monkeypatch.setattr("wavenet_conv.cli.LECTURE_URL", f"{server.url}/whole")
    assert main(["lecture-names"]) == 0
    assert capsys.readouterr().out == f"{cache}/wavenet-conv/lecture-names.txt\n"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "other"))
    monkeypatch.setattr("wavenet_conv.cli.LECTURE_URL", f"{server.url}/broken")
    assert main(["lecture-names"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("wavenet-conv: http") and printed.err.count("\n") == 1


def test_wrong_usage_is_exit_code_2():
    for arguments in ([], ["lectures"], ["lecture-names", "extra"]):
        command = [sys.executable, "-m", "wavenet_conv.cli", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert result.returncode == 2 and "usage: wavenet-conv" in result.stderr and not result.stdout
