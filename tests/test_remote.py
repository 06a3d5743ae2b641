"""Every kind of remote keeps the same promises; what a server does wrong is told in one line."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import s3

from softcache.errors import DamageError, SoftcacheError, SpecError, StoreError
from softcache.remote import Remote, connect, shown
from softcache.remote.folder import Folder
from softcache.remote.hf import MOST_FILES, HuggingFace
from softcache.testing import FailingDisk, FullDisk

KINDS = ("folder", "hf", "s3")


@pytest.fixture(params=KINDS)
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "s3":
        return connect(request.getfixturevalue("bucket") + "/some/where")
    return connect({"folder": str(tmp_path / "r"), "hf": f"hf:{tmp_path / 'r'}"}[request.param])


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Faulty]:
    """A store that fails as told; this process speaks to it."""
    store = s3.Faulty()
    with store.serve() as endpoint:
        s3.use(monkeypatch, endpoint)
        yield store


def test_what_was_put_is_got_and_listed_and_deleted(remote: Remote):
    assert remote.get("blobs/ab/cd/x", 10) is None and list(remote.list("blobs")) == []
    remote.put("blobs/ab/cd/x", b"12345")
    remote.put("blobs/ab/cd/x", b"1234567")
    remote.put("blobs/ab/ce/y", b"")
    remote.put("tags/t", b"1")
    assert remote.get("blobs/ab/cd/x", 7) == b"1234567" and remote.get("blobs/ab/ce/y", 0) == b""
    found = {item.name: item.bytes for item in remote.list("blobs")}
    assert found == {"blobs/ab/cd/x": 7, "blobs/ab/ce/y": 0}
    assert all(-5 < item.age < 60 for item in remote.list("blobs"))
    remote.delete("blobs/ab/cd/x")
    remote.delete("blobs/ab/cd/x")
    assert [item.name for item in remote.list("blobs")] == ["blobs/ab/ce/y"]


def test_never_more_is_read_than_allowed(remote: Remote):
    remote.put("a", bytes(100))
    with pytest.raises(DamageError, match="99"):
        remote.get("a", 99)


def test_what_is_replaced_must_be_what_it_was(remote: Remote):
    assert not remote.replace("tags/t", b"2", b"1") and remote.get("tags/t", 9) is None
    assert remote.replace("tags/t", b"1", None)
    assert not remote.replace("tags/t", b"2", None) and remote.get("tags/t", 9) == b"1"
    assert not remote.replace("tags/t", b"2", b"0") and remote.get("tags/t", 9) == b"1"
    assert remote.replace("tags/t", b"2", b"1") and remote.get("tags/t", 9) == b"2"


def test_of_many_who_replace_at_once_in_an_object_store_one_succeeds(bucket: str):
    remote, done = connect(bucket), []
    threads = [
        threading.Thread(target=lambda i=i: done.append(remote.replace("tags/t", b"%d" % i, None)))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done.count(True) == 1


def test_writers_of_one_name_in_a_folder_never_show_a_part(tmp_path: Path):
    """Without a temporary name of its own, one would rename what the other is still writing."""
    remote, wrong = Folder(tmp_path), []
    bodies = [bytes([i]) * 300_000 for i in range(4)]
    stop = threading.Event()

    def write(data: bytes) -> None:
        for _ in range(15):
            remote.put("a/b", data)

    def read() -> None:
        while not stop.is_set():
            if (found := remote.get("a/b", 1 << 20)) is not None and found not in bodies:
                wrong.append(len(found))

    reader, writers = (
        threading.Thread(target=read),
        [threading.Thread(target=write, args=(b,)) for b in bodies],
    )
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not wrong and [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("make", [FullDisk, lambda n: FailingDisk(3)])
def test_a_folder_that_cannot_be_written_keeps_what_was_there(
    tmp_path: Path, make: Callable[[int], FullDisk]
):
    Folder(tmp_path).put("a", b"old")
    with pytest.raises(StoreError, match="run the same command again"):
        Folder(tmp_path, make(4)).put("a", b"newer")
    assert Folder(tmp_path).get("a", 9) == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_links_and_pipes_in_a_folder_are_refused(tmp_path: Path):
    (tmp_path / "secret").write_bytes(b"s")
    root = tmp_path / "r"
    (root / "tags").mkdir(parents=True)
    (root / "tags" / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(root / "tags" / "pipe")
    (root / "blobs").symlink_to(tmp_path)
    for name in ("tags/link", "tags/pipe", "blobs/secret", "../secret", "/etc/hostname"):
        with pytest.raises(DamageError):
            Folder(root).get(name, 100)
    with pytest.raises(DamageError):
        Folder(root).put("blobs/x", b"")


def test_a_dataset_repository_sends_blobs_to_lfs_and_keeps_its_own_rules(tmp_path: Path):
    (tmp_path / ".gitattributes").write_bytes(b"*.bin filter=lfs")
    for _ in range(2):
        HuggingFace(tmp_path).put("blobs/ab/cd/x", b"1")
    lines = (tmp_path / ".gitattributes").read_text().splitlines()
    assert lines == ["*.bin filter=lfs", "blobs/** filter=lfs diff=lfs merge=lfs -text"]


def test_a_dataset_repository_holds_no_folder_of_more_files_than_is_allowed(tmp_path: Path):
    (tmp_path / "manifests").mkdir()
    for i in range(MOST_FILES):
        (tmp_path / "manifests" / str(i)).touch()
    HuggingFace(tmp_path).put("manifests/0", b"over what is there")
    with pytest.raises(StoreError, match="gc"):
        HuggingFace(tmp_path).put("manifests/new", b"")


# -- addresses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "s3://",
        "s3:x",
        "gs://bucket/a",
        "https://host/a",
        "hf:",
        "hf://me/x",
        "hf:https://huggingface.co/me/x",
        "file:///tmp/x",
        "s3://b/a?x=1",
        "me:pass@host:/a",
    ],
)
def test_what_is_no_address_is_refused(address: str):
    with pytest.raises(SpecError) as e:
        connect(address)
    assert "pass" not in str(e.value)


@pytest.mark.parametrize(
    "address", ["s3://me:pass/word@bucket/a", "s3://word@bucket", "https://me:word@host/a", "hf://a:word@b"]
)
def test_user_info_is_refused_and_not_repeated(address: str):
    with pytest.raises(SpecError) as e:
        connect(address)
    assert "word@" not in str(e.value) and "AWS_ACCESS_KEY_ID" in str(e.value)
    assert shown(f"see {address}\n") == f"see {address.split('://')[0]}://{address.split('@')[1]} "


def test_a_folder_may_have_a_colon_in_its_name(tmp_path: Path):
    folder = tmp_path / "a:b"
    assert isinstance(connect(str(folder)), Folder) and isinstance(connect(folder), Folder)
    assert isinstance(connect("./s3:x"), Folder)


# -- what a server does --------------------------------------------------------------------------------------


def refusal(do: Callable[[], object]) -> str:
    with pytest.raises(StoreError) as e:
        do()
    text = str(e.value)
    assert "\n" not in text and "of-a-test" not in text and "127.0.0.1" not in text, text
    return text


@pytest.mark.parametrize("status", [500, 503])
def test_a_failing_server_is_asked_again(faulty: s3.Faulty, status: int):
    faulty.objects["p/a"] = b"1"
    faulty.faults = {"p/a": [status, status], "p/b": [status], "LIST": [status]}
    remote = connect("s3://bucket/p")
    assert remote.get("a", 1) == b"1"
    remote.put("b", b"2")
    assert {item.name for item in remote.list("")} == {"a", "b"}


def test_a_server_that_fails_for_ever_is_given_up(faulty: s3.Faulty):
    remote = connect("s3://bucket/p")
    faulty.always = {"p/a": 503}
    text = refusal(lambda: remote.get("a", 1))
    assert "s3://bucket/p/a" in text and "503" in text and "it goes on where it stopped" in text
    assert 2 < len(faulty.asked) < 12


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_names_the_keys(faulty: s3.Faulty, status: int):
    remote = connect("s3://bucket/p")
    faulty.always = {"p/a": status, "LIST": status}
    for do in (lambda: remote.get("a", 1), lambda: remote.put("a", b""), lambda: list(remote.list("x"))):
        text = refusal(do)
        assert str(status) in text and "AWS_SECRET_ACCESS_KEY" in text


def test_a_body_that_stops_in_the_middle_is_fetched_again_or_told(faulty: s3.Faulty):
    faulty.objects["p/a"] = bytes(range(200))
    faulty.always = {"p/a": "stop"}
    refusal(lambda: connect("s3://bucket/p").get("a", 200))


def test_an_endless_body_is_left(faulty: s3.Faulty):
    faulty.objects["p/a"], faulty.always = b"1", {"p/a": "endless"}
    with pytest.raises(DamageError, match="longer than 1,000"):
        connect("s3://bucket/p").get("a", 1000)


def test_a_server_that_hangs_up_is_unreachable(faulty: s3.Faulty):
    faulty.objects["p/a"], faulty.always = b"1", {"p/a": "hang up"}
    assert "cannot be reached" in refusal(lambda: connect("s3://bucket/p").get("a", 1))


def test_a_wrong_bucket_is_named(endpoint: str, monkeypatch: pytest.MonkeyPatch):
    s3.use(monkeypatch, endpoint)
    remote = connect("s3://nobodys-bucket/p")
    for do in (lambda: remote.get("a", 1), lambda: remote.put("a", b""), lambda: list(remote.list("x"))):
        text = refusal(do)
        assert "no such bucket" in text and "s3://nobodys-bucket" in text


def test_without_credentials_it_says_which_are_missing(endpoint: str, monkeypatch: pytest.MonkeyPatch):
    s3.use(monkeypatch, endpoint, keys={})
    assert "AWS_ACCESS_KEY_ID" in refusal(lambda: connect("s3://bucket/p").get("a", 1))


def test_http_is_spoken_where_the_endpoint_says_so_only(monkeypatch: pytest.MonkeyPatch):
    s3.use(monkeypatch, s3.NOWHERE)
    assert "cannot be reached" in refusal(lambda: connect("s3://bucket/p").get("a", 1))
    asked = connect("s3://bucket/p")._store.client_options  # type: ignore[attr-defined]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    plain = connect("s3://bucket/p")._store.client_options  # type: ignore[attr-defined]
    assert str(asked["allow_http"]).lower() == "true" and str(plain["allow_http"]).lower() == "false"


def test_user_info_of_an_endpoint_is_in_no_message(monkeypatch: pytest.MonkeyPatch):
    s3.use(monkeypatch, "http://me:word@127.0.0.1:9")
    with pytest.raises(SoftcacheError) as e:
        connect("s3://bucket/p").get("a", 1)
    assert "word" not in str(e.value)


@pytest.mark.parametrize(
    "address",
    [
        "s3://me:pass word@bucket/a",
        "s3://me:pass\tword @bucket",
        "s3://b/a?X-Amz-Signature=word",
        "https://h/a?t=word",
    ],
)
def test_what_is_refused_is_not_echoed(address: str):
    with pytest.raises(SpecError) as e:
        connect(address)
    assert "word" not in str(e.value).replace("password", "") and "word" not in shown(address)


@pytest.mark.parametrize(
    "endpoint",
    ["not a url", "host:9000", "http://", "http://h:port", "http://a b/", "ftp://host", "http://me:word@h"],
)
def test_an_endpoint_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, endpoint: str):
    s3.use(monkeypatch, endpoint)
    with pytest.raises(SpecError, match="AWS_ENDPOINT") as e:
        list(connect("s3://bucket/a").list("tags"))
    assert "word" not in str(e.value)


def test_a_home_folder_and_hints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert connect("~/r").where == str(tmp_path / "r")
    with pytest.raises(SpecError, match="by its path alone"):
        connect("file:///tmp/x")
    with pytest.raises(SpecError, match="s3://BUCKET"):
        connect("s3:bucket/x")


def test_a_folder_that_is_no_clone_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("a", "b"):
        remote = connect(f"hf:{tmp_path / name}")
        (tmp_path / "b" / ".git").mkdir(parents=True, exist_ok=True)
        remote.put("blobs/x", b"1")
        remote.put("blobs/y", b"2")
    assert caplog.text.count("no git clone") == 1 and str(tmp_path / "a") in caplog.text
