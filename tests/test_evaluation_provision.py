"""Benchmarks are added whole and checked, or not at all; what is absent is named with the place it goes to."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from conftest import skip
from PIL import Image
from typer.testing import CliRunner

from cli.main import app
from vlm_dft.config import EvalConfig
from vlm_dft.errors import BenchmarkError
from vlm_dft.evaluation import backends, provision
from vlm_dft.evaluation.provision import PUBLISHED, add, find_benchmarks, kind_of, where_it_goes
from vlm_dft.run_dir import RunDir


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file in the place of VLMEvalKit's MathVision_MINI.tsv, whose md5 is known."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    image = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    path = tmp_path / "MathVision_MINI.tsv"
    path.write_text(f"index\tquestion\tchoices\tanswer\tcategory\timage\n1\tWhat?\t[]\t12\talgebra\t{image}\n")
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, "MathVision_MINI", (PUBLISHED["MathVision_MINI"][0], md5))
    return path


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_published_sums_are_those_of_vlmevalkit() -> None:
    assert PUBLISHED["MathVerse_MINI"][1] == "5017caca32b7fa110c350a1bea861b65"
    assert PUBLISHED["MathVision"][1] == "93f6de14f7916e598aa1b7165589831e"
    assert PUBLISHED["WeMath"][1] == "b5e969a075f01290a542411fb7766388"
    assert {kind_of(name) for name in PUBLISHED} == {"mathverse", "mathvision", "wemath"}


def test_an_official_file_is_checked_by_its_md5(official: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    name, manifest = add(str(official), home)
    assert (name, manifest.kind, manifest.items, manifest.pictures) == ("MathVision_MINI", "mathvision", 1, 1)
    assert manifest.published is True
    official.write_text(official.read_text().replace("12", "13"))
    with pytest.raises(BenchmarkError, match="already in"):
        add(str(official), home)
    with pytest.raises(BenchmarkError, match=r"VLMEvalKit publishes MathVision_MINI\.tsv with"):
        add(str(official), home, replace=True)
    assert find_benchmarks(home)["MathVision_MINI"].manifest == manifest, "the old one stands"
    assert add(str(official), home, replace=True, modified=True)[1].published is False
    other = official.rename(official.with_name("my-mathvision.tsv"))
    assert add(str(other), home)[1].published is None
    assert sorted(path.name for path in home.iterdir()) == ["MathVision_MINI", "my-mathvision"]


def test_a_file_put_there_by_hand_is_checked_before_it_is_scored(official: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(official, home / official.name)
    found = find_benchmarks(home)["MathVision_MINI"]
    provision.check_published(found.config("MathVision_MINI"))
    changed = home / official.name
    changed.write_text(official.read_text().replace("12", "13"))
    config = EvalConfig(model="m", benchmarks=(found.config("MathVision_MINI"),))
    with pytest.raises(BenchmarkError, match="the md5 is") as caught:
        backends.evaluate(config, RunDir(tmp_path), tuned="/no/model", base=None)
    assert "--modified --replace" in (caught.value.hint or "")
    add(str(changed), home, modified=True, replace=True)
    provision.check_published(find_benchmarks(home)["MathVision_MINI"].config("MathVision_MINI"))


def test_a_file_under_its_published_name_gets_vlmevalkits(official: Path, tmp_path: Path) -> None:
    published = official.rename(official.with_name("WeMath.tsv"))
    with pytest.raises(BenchmarkError, match="the md5 is"):
        add(str(published), tmp_path / "home")
    assert list((tmp_path / "home").iterdir()) == [], "nothing of a refused file stays"
    assert provision._usual_name(Path("MathVerse_MINIVOnly.tsv")) == "MathVerse_MINI_Vision_Only"


def test_a_directory_comes_with_its_pictures_and_a_file_alone_says_what_is_missing(
    shared_data: Path, tmp_path: Path
) -> None:
    name, manifest = add(str(shared_data / "wemath_nc"), tmp_path / "home", name="we-math")
    assert (name, manifest.kind, manifest.items, manifest.pictures) == ("we-math", "wemath", 268, 268)
    found = find_benchmarks(tmp_path / "home")["we-math"]
    assert (found.kind, found.config("we-math").path.name) == ("wemath", "testmini_subset.json")
    with pytest.raises(BenchmarkError, match="does not exist: put the image at") as caught:
        add(str(shared_data / "wemath_nc" / "testmini_subset.json"), tmp_path / "home", name="wemath-2")
    assert str(shared_data / "wemath_nc") in caught.value.message, "the user's place is named, not our copy's"
    assert "only with their directory" in str(caught.value.hint)


def test_a_custom_benchmark_keeps_its_way_of_scoring(tmp_path: Path) -> None:
    mine = written(tmp_path / "mine.jsonl", {"question": "2 + 2", "answer": "4"})
    name, manifest = add(str(mine), tmp_path / "home", scoring="number")
    assert (name, manifest.kind, manifest.pictures) == ("mine", "custom", 0)
    found = find_benchmarks(tmp_path / "home")["mine"]
    assert (found.config("mine", 3).scoring, found.config("mine", 3).limit, found.has_pictures) == ("number", 3, False)
    bad = written(tmp_path / "bad.jsonl", {"question": "2 + 2", "answer": "four"})
    with pytest.raises(BenchmarkError, match="'four' is no number"):
        add(str(bad), tmp_path / "home", scoring="number")
    with pytest.raises(BenchmarkError, match="cannot be a benchmark's name"):
        add(str(mine), tmp_path / "home", name="../up")
    with pytest.raises(BenchmarkError, match=r"the checksum is \w+, not 0000"):
        add(str(mine), tmp_path / "home", name="other", checksum="0" * 64)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["mine"]


def test_a_manifest_cannot_lead_out_of_its_directory(tmp_path: Path) -> None:
    mine = written(tmp_path / "mine.jsonl", {"question": "2 + 2", "answer": "4"})
    add(str(mine), tmp_path / "home")
    path = tmp_path / "home" / "mine" / "benchmark.json"
    path.write_text(path.read_text().replace("mine.jsonl", "../../mine.jsonl"))
    with pytest.raises(BenchmarkError, match="outside of its directory"):
        find_benchmarks(tmp_path / "home")
    path.write_text("{}")
    with pytest.raises(BenchmarkError, match="not a benchmark's manifest"):
        find_benchmarks(tmp_path / "home")


def test_what_lies_there_and_says_nothing_is_named_with_the_command_that_adds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    own = written(home / "Mine" / "test.jsonl", {"question": "1 + 1?", "answer": "2"}).parent
    alone = written(home / "quiz.jsonl", {"question": "1 + 2?", "answer": "3"})
    (home / "SOURCE.md").write_text("x")
    assert find_benchmarks(home) == {}
    assert provision.unknown_benchmarks(home) == [own, alone]
    assert f"{own} is there, but nothing says what it is" in where_it_goes("mine", home)
    monkeypatch.setattr("cli.benchmarks._directory", lambda: home)
    listed = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["benchmarks", "list"])
    for path in (own, alone):
        command = provision.how_to_add(path)
        assert command in listed.output
        words = command.replace(command.split()[-1], "custom").split()
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
    assert {name: found.kind for name, found in find_benchmarks(home).items()} == {"Mine": "custom", "quiz": "custom"}
    assert provision.unknown_benchmarks(home) == []


def test_an_absent_benchmark_is_named_with_its_file_sum_and_place(tmp_path: Path) -> None:
    text = where_it_goes("mathvision", tmp_path)
    assert "MathVision.tsv (md5 93f6de14f7916e598aa1b7165589831e, published at https://" in text
    assert str(tmp_path) in text
    assert "test.jsonl" in where_it_goes("gsm8k", tmp_path)
    assert "--name mine" in where_it_goes("mine", tmp_path)


@pytest.fixture
def https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real HTTPS server of tmp_path/www, its certificate trusted."""
    if shutil.which("openssl") is None:
        skip("no openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    (tmp_path / "www").mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", "http://localhost/other.jsonl")
                self.end_headers()
                return
            super().do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "www")))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    yield f"https://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_needs_https_and_a_checksum_that_fits(https: str, tmp_path: Path) -> None:
    mine = written(tmp_path / "www" / "mine.jsonl", {"question": "2 + 2", "answer": "4"})
    sha256 = hashlib.sha256(mine.read_bytes()).hexdigest()
    home = tmp_path / "home"
    for url, message in (
        ("http://localhost/mine.jsonl", "only https URLs"),
        ("https://user:password@localhost/mine.jsonl", "only https URLs"),
        (f"{https}/mine.jsonl", "give the file's md5 or sha256"),
        (f"{https}/mine.zip", "a benchmark file ends in"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            add(url, home)
    with pytest.raises(BenchmarkError, match="the checksum is"):
        add(f"{https}/mine.jsonl", home, checksum="0" * 32)
    with pytest.raises(BenchmarkError, match=r"cannot be fetched \(.*404"):
        add(f"{https}/gone.jsonl", home, checksum=sha256)
    with pytest.raises(BenchmarkError, match=r"redirects to http://localhost/other\.jsonl"):
        add(f"{https}/moved.jsonl", home, checksum=sha256)
    assert not home.exists() or not list(home.iterdir())
    name, manifest = add(f"{https}/mine.jsonl", home, checksum=sha256)
    assert (name, manifest.sha256, manifest.source) == ("mine", sha256, f"{https}/mine.jsonl")


def test_an_official_url_is_checked_by_the_published_sum(https: str, official: Path, tmp_path: Path) -> None:
    shutil.copy(official, tmp_path / "www" / official.name)
    assert add(f"{https}/{official.name}", tmp_path / "home", name="renamed")[1].items == 1
    (tmp_path / "www" / official.name).write_text(official.read_text().replace("12", "13"))
    with pytest.raises(BenchmarkError, match="the checksum is"):
        add(f"{https}/{official.name}", tmp_path / "home", name="renamed", replace=True)


def test_the_command_adds_and_lists(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.settings import get_settings

    monkeypatch.setenv("VLM_DFT_BENCHMARKS", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    get_settings.cache_clear()
    try:
        run = CliRunner()
        assert "none in" in run.invoke(app, ["benchmarks", "list"]).output
        added = run.invoke(app, ["benchmarks", "add", str(official)])
        assert added.exit_code == 0, added.output
        assert "MathVision_MINI (mathvision): 1 items, 1 with pictures, as VLMEvalKit publishes it" in added.output
        assert "MathVision_MINI" in run.invoke(app, ["benchmarks", "list"]).output
        refused = run.invoke(app, ["benchmarks", "add", str(official)])
        assert (refused.exit_code, "already in" in refused.output) == (1, True)
        assert run.invoke(app, ["benchmarks", "add", str(official), "--kind", "x"]).exit_code == 2
    finally:
        get_settings.cache_clear()
