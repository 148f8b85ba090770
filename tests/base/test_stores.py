"""Stores: local paths, a real HTTP S3, fsspec's schemes, and messages when something is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from nextpt.base.errors import StoreError
from nextpt.base.stores import STORE_ERRORS, is_uri, open_store, store_problem
from tests.support.object_store import s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server("bucket") as address:
        yield address


def test_local_locations_are_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b%20c?.txt").write_text("x")
    locations = [
        "a b%20c?.txt",
        Path("a b%20c?.txt"),
        str(tmp_path / "a b%20c?.txt"),
        (tmp_path / "a b%20c?.txt").as_uri(),
    ]
    for location in locations:
        filesystem, path = open_store(location)
        assert path == str(tmp_path / "a b%20c?.txt")
        assert filesystem.get_file_info(path).size == 1
    assert [is_uri(p) for p in locations] == [False, False, False, True]
    assert not is_uri("C:/folder") and is_uri("s3://bucket") and not is_uri("folder/s3://bucket")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    ["plain.txt", "folder/with space/ü.txt", "percent%20sign", "glob[1]*?", "question?mark.txt"],
)
def test_an_s3_key_is_used_literally(s3: str, name: str) -> None:
    import boto3

    filesystem, path = open_store(f"s3://bucket/{name}")
    assert path == f"bucket/{name}"
    boto3.client("s3", endpoint_url=s3).put_object(Bucket="bucket", Key=name, Body=name.encode())
    with filesystem.open_input_stream(path) as file:
        assert file.read() == name.encode()


def test_a_uri_may_be_a_bucket_or_end_with_a_slash(s3: str) -> None:
    assert [open_store(f"s3://bucket{end}")[1] for end in ("", "/", "/folder/")] == [
        "bucket",
        "bucket",
        "bucket/folder",
    ]
    assert open_store("s3://bucket/a")[0] is open_store("s3://bucket/b")[0]  # one lookup


def test_options_of_pyarrow_may_follow_the_path(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S3_ENDPOINT_URL")
    filesystem, path = open_store(
        f"s3://bucket/a/b?endpoint_override={s3.removeprefix('http://')}"
        "&scheme=http&region=eu-west-1"
    )
    assert path == "bucket/a/b" and filesystem.region == "eu-west-1"
    assert filesystem.get_file_info(path).type is fs.FileType.NotFound


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_may_have_the_names_of_aws(
    s3: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv("S3_ENDPOINT_URL")
    monkeypatch.setenv(variable, s3 + "/")
    filesystem, path = open_store("s3://bucket/none")
    assert filesystem.get_file_info(path).type is fs.FileType.NotFound


def test_other_schemes_go_through_fsspec() -> None:
    filesystem, path = open_store("memory://folder/file.txt")
    with filesystem.open_output_stream(path) as file:
        file.write(b"text")
    filesystem, path = open_store("memory://folder")
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    assert [(i.base_name, i.size) for i in infos] == [("file.txt", 4)]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nosuch://bucket/file", "expected a path, s3://"),
        ("s3:///file", "expected s3://BUCKET/PATH"),
        ("dropbox://file", "not installed"),
        ("abfs://container/file", "account name"),
    ],
)
def test_a_location_that_cannot_be_opened_is_refused_by_name(location: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as refused:
        open_store(location)
    assert location in str(refused.value)


def test_store_errors_are_explained_in_one_line(s3: str) -> None:
    filesystem, path = open_store("s3://elsewhere/file")
    with pytest.raises(STORE_ERRORS) as raised:
        filesystem.get_file_info(fs.FileSelector(path))
    problem = store_problem(raised.value, "s3://elsewhere/file")
    assert isinstance(
        problem, StoreError
    ) and "s3://elsewhere/file: there is no such bucket" in str(problem)
    denied = OSError(
        "When reading information for key 'x' in bucket 'b':\n AWS Error ACCESS_DENIED during"
        " HeadObject operation: No response body."
    )
    assert "credentials" in str(store_problem(denied, "s3://b/x")) and "\n" not in str(
        store_problem(denied, "s3://b/x")
    )
    unreachable = OSError(
        "AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 6, Could not resolve"
        " hostname"
    )
    assert "cannot be reached" in str(store_problem(unreachable, "s3://b/x"))
    assert str(store_problem(OSError("something else"), "s3://b/x")) == "s3://b/x: something else"
