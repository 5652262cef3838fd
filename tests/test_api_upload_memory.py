"""An upload of any size passes through the API in little memory, and goes on after an interruption.

VLM_DFT_TEST_UPLOAD_MIB=2048 measures the size that the README reports.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from api_process import ApiProcess, api_process

MIB = 2**20
SIZE_MIB = int(os.environ.get("VLM_DFT_TEST_UPLOAD_MIB", "64"))
PART_MIB = min(64, SIZE_MIB // 8)
GROWTH_MIB = 64

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[ApiProcess]:
    directory = tmp_path_factory.mktemp("upload")
    with api_process(directory, request.getfixturevalue("_sqlite_template")) as running:
        yield running


def part(number: int) -> bytes:
    """Bytes that no other part has."""
    block = hashlib.shake_256(str(number).encode()).digest(MIB)
    return block * PART_MIB


def break_off(url: str, upload_id: str) -> None:
    """Send half a part, then be gone."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    head = f"POST /v1/uploads/{upload_id}/parts HTTP/1.1\r\nhost: {host}\r\ncontent-length: {PART_MIB * MIB}\r\n"
    form = '--b\r\ncontent-disposition: form-data; name="data"; filename="upload"\r\n\r\n'
    with socket.create_connection((host, port)) as connection:
        connection.sendall(f"{head}content-type: multipart/form-data; boundary=b\r\n\r\n{form}".encode())
        connection.sendall(part(99)[: PART_MIB * MIB // 2])


def test_a_large_upload_takes_little_memory_and_is_resumed(api: ApiProcess) -> None:
    count = SIZE_MIB // PART_MIB
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", timeout=600)
    small = client.files.create(file=("small", b"x" * MIB), purpose="user_data")  # what is loaded once is loaded now
    client.files.content(small.id).read()
    before_mib = api.forget_peak()

    size = count * PART_MIB * MIB
    upload = client.uploads.create(bytes=size, filename="large.bin", mime_type="x", purpose="user_data")
    for number in range(count // 2):
        client.uploads.parts.create(upload.id, data=part(number))
    break_off(api.url, upload.id)

    stored = httpx.get(f"{api.url}/v1/uploads/{upload.id}").json()["parts"]
    assert sum(each["bytes"] for each in stored) == count // 2 * PART_MIB * MIB
    rest = [client.uploads.parts.create(upload.id, data=part(number)).id for number in range(count // 2, count)]
    md5, sha256 = hashlib.md5(), hashlib.sha256()
    for number in range(count):
        md5.update(part(number))
        sha256.update(part(number))
    part_ids = [each["id"] for each in stored] + rest
    done = client.uploads.complete(upload.id, part_ids=part_ids, md5=md5.hexdigest())
    growth_mib = api.peak_mib - before_mib
    print(f"{SIZE_MIB} MiB through the API: {before_mib:.0f} MiB before, peak {growth_mib:.0f} MiB above it")

    assert done.file is not None
    assert done.file.bytes == size
    assert httpx.get(f"{api.url}/v1/files/{done.file.id}").json()["sha256"] == sha256.hexdigest()
    assert growth_mib < GROWTH_MIB
    kept = {Path(api.settings.files_dir, small.id), Path(api.settings.files_dir, done.file.id)}
    assert set(api.settings.files_dir.iterdir()) == kept, "parts and what was broken off are gone"
    client.close()
