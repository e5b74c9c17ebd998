"""Downloads from a local server that cuts, lies, forgets and refuses."""

import errno
import hashlib
import http.server
import os
import threading

import pytest

from jaxcap import download, locks
from jaxcap.errors import UserError

CONTENT = bytes(range(256)) * 1200  # 300 kB


class Server:
    """An HTTP server on this machine that sends `content` whatever is asked for, as its attributes say."""

    def __init__(self, content: bytes = CONTENT):
        self.content = content
        self.ranges: list[str | None] = []  # Range header of every request
        self.resumes = True
        self.sends = "length"  # or "chunks", or "" until it closes the connection
        self.cut_after: list[int] = []  # bytes after which the next responses break off
        self.status = 200
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/zips/file.zip"

    def answer(self, handler):
        asked = handler.headers.get("Range")
        self.ranges.append(asked)
        if self.status != 200:
            handler.send_error(self.status)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.resumes else 0
        if start and start >= len(self.content):
            handler.send_error(416)
            return
        body = self.content[start:]
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.sends == "length":
            handler.send_header("Content-Length", str(len(body)))
        elif self.sends == "chunks":
            handler.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in [body[:99_000], body[99_000:]]) + b"0\r\n\r\n"
        handler.end_headers()
        handler.wfile.write(body[: self.cut_after.pop(0)] if self.cut_after else body)

    def close(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_PAUSE_S", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.close()


def remote(server, **changes):
    values = {"url": server.url, "size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    return download.Remote(**(values | changes))


def test_a_file_arrives_whole_and_only_once(server, tmp_path):
    path = download.fetch(remote(server), tmp_path / "new")
    assert path == tmp_path / "new" / "file.zip" and path.read_bytes() == CONTENT
    assert download.fetch(remote(server), tmp_path / "new") == path
    assert server.ranges == [None] and os.listdir(tmp_path / "new") == ["file.zip"]


def test_a_cut_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.cut_after = [100_000, 0, 70_000]
    assert download.fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=170000-"]


def test_the_next_command_takes_up_what_the_last_one_left(server, tmp_path):
    server.cut_after = [120_000] + [0] * download._ATTEMPTS
    with pytest.raises(UserError, match="cannot download file.zip from 127.0.0.1 .*; 39% of it is here: run the same"):
        download.fetch(remote(server), tmp_path)
    assert os.listdir(tmp_path) == ["file.zip.part"]
    server.ranges.clear()
    server.cut_after.clear()
    assert download.fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=120000-"]


def test_a_server_that_cannot_resume_starts_again(server, tmp_path):
    server.cut_after, server.resumes = [100_000], False
    assert download.fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-"]


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match="is not the published file .*SHA-256 is not 0000000000000000"):
        download.fetch(remote(server, sha256="0" * 64), tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_part_of_something_else_is_found_out(server, tmp_path):
    (tmp_path / "file.zip.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="is not the published file"):
        download.fetch(remote(server), tmp_path)
    assert download.fetch(remote(server), tmp_path).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_found_out(server, tmp_path):
    (tmp_path / "file.zip.part").write_bytes(CONTENT + b"more")
    with pytest.raises(UserError, match="is not the published file"):
        download.fetch(remote(server), tmp_path)


def test_another_length_is_refused_at_once(server, tmp_path):
    with pytest.raises(UserError, match=r"is 307,200 bytes long, not the published 307,201"):
        download.fetch(remote(server, size=len(CONTENT) + 1), tmp_path)
    assert not (tmp_path / "file.zip").exists()


@pytest.mark.parametrize("status, requests", [(404, 1), (403, 1), (503, download._ATTEMPTS)])
def test_a_refusal_is_final_and_trouble_is_not(server, tmp_path, status, requests):
    server.status = status
    with pytest.raises(UserError, match=str(status)):
        download.fetch(remote(server), tmp_path)
    assert len(server.ranges) == requests


def test_no_network_is_one_sentence(server, tmp_path):
    with pytest.raises(UserError, match="cannot download file.zip from no.such.host.invalid .* put the file into .*new"):
        download.fetch(remote(server, url="http://no.such.host.invalid/file.zip"), tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []
    server.close()
    with pytest.raises(UserError, match="cannot download file.zip from 127.0.0.1 .Connection refused"):
        download.fetch(remote(server), tmp_path / "x")


def test_a_silent_server_is_given_up(tmp_path, monkeypatch, server):
    monkeypatch.setattr(download, "_TIMEOUT_S", 0.05)
    monkeypatch.setattr(server, "answer", lambda _: threading.Event().wait(0.3))
    with pytest.raises(UserError, match="timed out|closed connection"):
        download.fetch(remote(server), tmp_path)


def test_a_full_disk_keeps_what_has_arrived(server, tmp_path, monkeypatch):
    transfer = download._transfer

    def full(remote, file, offset, bar):
        file.write(CONTENT[:5000])
        file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(download, "_transfer", full)
    with pytest.raises(UserError, match="No space left on device; what has arrived is kept, free the disk or choose"):
        download.fetch(remote(server), tmp_path)
    monkeypatch.setattr(download, "_transfer", transfer)
    assert download.fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=5000-"]


def test_a_place_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file/below: .*kept, choose a directory that can be written and run"):
        download.fetch(remote(server), tmp_path / "file" / "below")


def test_two_at_once_are_refused(server, tmp_path):
    with open(tmp_path / "file.zip.part", "ab") as other:
        locks.hold(other, "none")
        with pytest.raises(UserError, match="another process is downloading file.zip"):
            download.fetch(remote(server), tmp_path)


# --- what is published of a file may be less than its size and SHA-256 ---------------------------------------------


def unsized(server, **changes):
    return remote(server, size=0, **changes)


def test_an_unknown_size_is_what_the_server_says(server, tmp_path):
    server.cut_after = [100_000, 0, 70_000]
    assert download.fetch(unsized(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=170000-"]
    assert os.listdir(tmp_path) == ["file.zip"]


def test_the_next_command_takes_up_what_is_left_of_an_unknown_size(server, tmp_path):
    server.cut_after = [120_000] + [0] * download._ATTEMPTS
    with pytest.raises(UserError, match="; 0.1 MB of it is here: run the same command again to go on, or put the file into"):
        download.fetch(unsized(server), tmp_path)
    assert (tmp_path / "file.zip.part").read_bytes() == CONTENT[:120_000]
    server.ranges.clear()
    server.cut_after.clear()
    assert download.fetch(unsized(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=120000-"]


def test_an_unknown_size_starts_again_where_the_server_cannot_resume(server, tmp_path):
    server.cut_after, server.resumes = [100_000], False
    assert download.fetch(unsized(server), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [0, len(CONTENT)])
def test_a_part_that_is_whole_is_not_asked_for_again(size, server, tmp_path):
    (tmp_path / "file.zip.part").write_bytes(CONTENT)
    assert download.fetch(remote(server, size=size), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [] and os.listdir(tmp_path) == ["file.zip"]


@pytest.mark.parametrize("part", [b"x" * 1000, b"x" * len(CONTENT), CONTENT + b"more"])
def test_a_part_of_something_else_is_found_out_whatever_the_size(part, server, tmp_path):
    """Where nothing follows it, the server answers 416, which must not last for ever."""
    (tmp_path / "file.zip.part").write_bytes(part)
    with pytest.raises(UserError, match="is not the published file .*; it was deleted, run the same command"):
        download.fetch(unsized(server), tmp_path)
    assert os.listdir(tmp_path) == []
    assert download.fetch(unsized(server), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("sends", ["chunks", ""])
def test_a_length_that_nobody_says_is_found_at_the_end(sends, server, tmp_path):
    server.sends = sends
    assert download.fetch(unsized(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None]


def test_chunks_that_break_off_are_taken_up(server, tmp_path):
    server.sends, server.cut_after = "chunks", [200_000]
    assert download.fetch(unsized(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges[0] is None and len(server.ranges) == 2 and int(server.ranges[1][6:-1]) >= 99_000


def test_an_empty_answer_is_not_asked_for_without_end(server, tmp_path):
    server.content = b""
    with pytest.raises(UserError, match="is not the published file"):
        download.fetch(unsized(server), tmp_path)
    assert server.ranges == [None] and os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, len(CONTENT)])
def test_an_md5_may_be_all_that_is_published(size, server, tmp_path):
    md5 = hashlib.md5(CONTENT).hexdigest()
    assert download.fetch(remote(server, size=size, sha256="", md5=md5), tmp_path / "a").read_bytes() == CONTENT
    with pytest.raises(UserError, match=f"its MD5 is not {'0' * 16}…"):
        download.fetch(remote(server, size=size, sha256="", md5="0" * 32), tmp_path / "b")
    assert os.listdir(tmp_path / "b") == []


@pytest.mark.parametrize("size", [0, len(CONTENT)])
def test_a_sha256_may_be_known_by_its_beginning(size, server, tmp_path):
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert download.fetch(remote(server, size=size, sha256=sha256[:8]), tmp_path / "a").read_bytes() == CONTENT
    for wrong in (sha256[1:9], sha256[:7] + ("0" if sha256[7] != "0" else "1"), sha256 + "0"):
        with pytest.raises(UserError, match=f"its SHA-256 is not {wrong[:16]}…"):
            download.fetch(remote(server, size=size, sha256=wrong), tmp_path / "b")
        assert os.listdir(tmp_path / "b") == []


def test_a_caller_may_know_what_to_do_otherwise(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match="^http.*/file.zip answers 404 Not Found; ask a friend$"):
        download.fetch(unsized(server), tmp_path, "ask a friend")
    server.status = 500
    with pytest.raises(UserError, match="^cannot download file.zip from 127.0.0.1 .500 .*; run the same .* again, or ask a friend$"):
        download.fetch(unsized(server), tmp_path, "ask a friend")
    assert os.listdir(tmp_path) == []
