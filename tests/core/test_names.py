"""Files of names, and the lecture's list from a local server: whole, or absent."""

import hashlib

import pytest

from wavenet_conv import names as names_module
from wavenet_conv.errors import DownloadError, NamesError
from wavenet_conv.names import download_lecture_names, lecture_names, read_names

LIST = b"emma\nolivia\nava"  # stands for the lecture's list


@pytest.mark.parametrize(
    "data",
    [b"emma\r\nolivia\r\nava\r\n", b"\xef\xbb\xbfemma\n\r\nolivia\nava\n\n"],
    ids=["CRLF", "byte-order mark and blank lines"],
)
def test_read_names_accepts(tmp_path, data):
    file = tmp_path / "names.txt"
    file.write_bytes(data)
    assert read_names(file) == ["emma", "olivia", "ava"]
    file.write_bytes(data + "\nzoë\n-x \u2028y".encode())
    assert read_names(str(file)) == ["emma", "olivia", "ava", "zoë", "-x \u2028y"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no names in it; give a text file with one name per line"),
        (b"emma\nol\xedvia\n", "line 2: byte 0xed at byte 2 of the line is not UTF-8; save the file as UTF-8"),
        (b"emma\rolivia\rava\r", "line 1 .*: a carriage return alone does not end a line"),
        (b"emma\n\nava \nmia\n", r"line 3 \('ava '\): white space around the name; remove it"),
        (b"emma\n \nava", r"line 2 \(' '\): white space around the name; remove it"),
        (b"emma\n\nava\no.k\n", r"line 4 \('o.k'\): '.' marks the end of a name; remove it"),
    ],
)
def test_read_names_rejects(tmp_path, data, message):
    file = tmp_path / "list.txt"
    file.write_bytes(data)
    with pytest.raises(NamesError, match=f"list.txt.*{message}"):
        read_names(file)
    with pytest.raises(NamesError, match="No such file.*one name per line"):
        read_names(tmp_path / "none")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache folder, and the stand-in in place of the lecture's list."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WAVENET_CONV_LECTURE_NAMES", raising=False)
    monkeypatch.setattr(names_module, "LECTURE_SHA256", hashlib.sha256(LIST).hexdigest())
    return tmp_path / "cache"


def test_whole_list_is_kept_and_verified_every_time(tmp_path, empty_cache, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(LIST)
    path = download_lecture_names(source.as_uri())
    assert path.read_bytes() == LIST and list(path.parent.iterdir()) == [path] and lecture_names() == path
    assert download_lecture_names("file:///none") == path  # asks no server
    path.write_bytes(LIST + b"!")
    assert lecture_names() is None
    assert download_lecture_names(source.as_uri()).read_bytes() == LIST
    for data, found in ((LIST, source), (LIST + b"\n", None)):
        source.write_bytes(data)
        monkeypatch.setenv("WAVENET_CONV_LECTURE_NAMES", str(source))
        assert lecture_names() == found
        if found:
            assert download_lecture_names("file:///none") == found
    with pytest.raises(DownloadError, match="WAVENET_CONV_LECTURE_NAMES=.*source: is not the lecture's list"):
        download_lecture_names(source.as_uri())


@pytest.mark.parametrize("data", [LIST[:7], None], ids=["broken", "missing"])
@pytest.mark.parametrize("before", [[], [b"half of it"]])
def test_failed_download_leaves_what_was_there(tmp_path, empty_cache, data, before):
    source, path = tmp_path / "source", empty_cache / "wavenet-conv" / "lecture-names.txt"
    if data is not None:
        source.write_bytes(data)
    for previous in before:
        path.parent.mkdir(parents=True)
        path.write_bytes(previous)
    with pytest.raises(DownloadError, match="source: .*try again.*set WAVENET_CONV_LECTURE_NAMES"):
        download_lecture_names(source.as_uri())
    assert [file.read_bytes() for file in empty_cache.rglob("*") if file.is_file()] == before
