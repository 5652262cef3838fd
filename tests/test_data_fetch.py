"""https images: off unless asked for, and never a way into the private network."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from data_samples import image_part, jsonl, openai_row, picture, validated

from vlm_dft.data.fetch import Fetcher, is_public
from vlm_dft.data.problems import RowError

PICTURE = picture()


class Site(BaseHTTPRequestHandler):
    """A picture, redirects of several kinds, and slow or endless answers."""

    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self._body()

    def _body(self) -> None:
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(bytes(1 << 16))
            if self.path == "/drip":
                for _ in range(600):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            self.wfile.write(PICTURE)
        except OSError:
            pass  # the client has gone, as it should

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[tuple[str, list[str]]]:
    handler = type("OneSite", (Site,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", handler.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def site() -> Iterator[tuple[str, list[str]]]:
    with serving() as address:
        yield address


def local(**changes) -> Fetcher:
    """A fetcher that may reach the test's own server."""
    return Fetcher(**({"max_bytes": 1 << 20, "schemes": ("http",), "allowed": lambda address: True} | changes))


def code(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(RowError) as caught:
        fetcher.fetch(url, "url")
    return caught.value.reason_code


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "224.0.0.1",
        ),
        *("255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::1"),
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "0x7f000001", "2130706433", "[::1]", "[::ffff:127.0.0.1]"])
def test_a_server_on_this_machine_is_never_dialled(site: tuple[str, list[str]], name: str) -> None:
    address, requests = site
    url = f"http://{name}:{address.split(':')[1]}/a.png"
    assert code(Fetcher(1 << 20, schemes=("http",)), url) == "image_url_private"
    assert requests == []


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "ftp://example.org/a",
        "https://",
        "https://user:pw@example.org/",
        "https://[::1/",
        "https://ex\u00e4mple.org/",
    ],
)
def test_only_plain_https_urls_are_taken(url: str) -> None:
    assert code(Fetcher(1 << 20), url) == "image_url_refused"


def test_a_picture_comes_through_redirects(site: tuple[str, list[str]]) -> None:
    address, requests = site
    assert local().fetch(f"http://{address}/to//to//to//a.png", "url") == PICTURE
    assert len(requests) == 4


def test_a_fourth_redirect_is_refused(site: tuple[str, list[str]]) -> None:
    address, requests = site
    assert code(local(), f"http://{address}/to/" + "/to/" * 3 + "/a.png") == "image_url_redirects"
    assert len(requests) == 4


def test_each_redirect_is_checked_again(site: tuple[str, list[str]]) -> None:
    """The first address is allowed, where it leads is not: nothing may arrive there."""
    address, _ = site
    with serving() as (inner, inner_requests):
        seen: list[str] = []

        def only_once(resolved: str) -> bool:
            seen.append(resolved)
            return len(seen) == 1

        assert code(local(allowed=only_once), f"http://{address}/to/http://{inner}/secret") == "image_url_private"
        assert code(local(), f"http://{address}/to/ftp://{inner}/secret") == "image_url_refused"
        assert inner_requests == []


def test_size_time_and_status_are_limited(site: tuple[str, list[str]]) -> None:
    address, _ = site
    assert code(local(max_bytes=100_000), f"http://{address}/endless") == "image_too_large"
    started = time.monotonic()
    assert code(local(timeout_seconds=0.5), f"http://{address}/drip") == "image_url_failed"
    assert time.monotonic() - started < 5
    assert code(local(), f"http://{address}/missing") == "image_url_failed"


def test_the_address_that_was_checked_is_the_one_dialled(
    site: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that resolves to another address the second time (rebinding) gains nothing: there is no second time."""
    port = int(site[0].split(":")[1])
    resolved: list[str] = []
    real = socket.getaddrinfo

    def resolve(host, *arguments, **options):
        resolved.append(host)
        return real("127.0.0.1" if host == "rebinding.test" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert local().fetch(f"http://rebinding.test:{port}/a.png", "url") == PICTURE
    assert resolved.count("rebinding.test") == 1


def test_a_name_that_does_not_resolve_is_a_problem_of_the_row() -> None:
    assert code(local(), "http://nowhere.invalid/a.png") == "image_url_failed"


def test_nothing_listens() -> None:
    assert code(local(), "http://127.0.0.1:1/a.png") == "image_url_failed"


@pytest.mark.parametrize(("allowed", "expected"), [(False, "image_url_refused"), (True, "image_url_private")])
def test_validation_fetches_only_when_asked_and_never_privately(
    tmp_path: Path, site: tuple[str, list[str]], allowed: bool, expected: str
) -> None:
    address, requests = site
    row = openai_row([image_part(f"https://{address}/a.png")], "A circle.")
    found = validated(tmp_path, jsonl(row), allow_image_urls=allowed)
    assert found.codes == [expected]
    assert found.report.problems[0].field == "messages.0.content.0.image_url.url"
    assert requests == []


def test_only_named_hosts_are_asked_when_there_are_names(site: tuple[str, list[str]]) -> None:
    address, requests = site
    port = address.split(":")[1]
    named = local(domains=("127.0.0.1", "pictures.example"))
    assert named.fetch(f"http://127.0.0.1:{port}/a.png", "url") == PICTURE
    before = len(requests)
    for host in ("localhost", "example", "notpictures.example", "pictures.example.evil.test"):
        assert code(named, f"http://{host}:{port}/a.png") == "image_url_refused"
    assert len(requests) == before
