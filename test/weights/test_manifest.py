"""``ood-seg weights``: a file is only called good when it is the publisher's."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ros2_ood_seg import cli
from ros2_ood_seg.errors import WeightsError
from ros2_ood_seg.scorers import SCORERS
from ros2_ood_seg.weights.manifest import ManifestEntry, download, read_manifest, verify
from ros2_ood_seg.weights.store import BUNDLED_DIR

CONTENT = b"weights" * 1000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real HTTP server on this machine with one file."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "model.pth").write_bytes(CONTENT)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def entry(url: str, **fields: object) -> ManifestEntry:
    values: dict[str, object] = {"name": "model", "page": "the publisher's page", "licence": "MIT", "url": url}
    return ManifestEntry.model_validate({**values, **fields})


def test_download_checks_before_it_names_the_file(server: str, tmp_path: Path) -> None:
    good = entry(f"{server}/model.pth", sha256=hashlib.sha256(CONTENT).hexdigest(), bytes=len(CONTENT))
    path = download(good, tmp_path / "weights")
    assert path.read_bytes() == CONTENT
    wrong = entry(f"{server}/model.pth", sha256="0" * 64)
    with pytest.raises(WeightsError, match="sha256"):
        download(wrong, tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_dead_address_says_where_to_get_the_file(server: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="the publisher's page"):
        download(entry(f"{server}/gone.pth"), tmp_path)
    with pytest.raises(WeightsError, match="no direct address"):
        download(entry(""), tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(WeightsError, match="truncated"):
        verify(entry("", bytes=len(CONTENT)), path)


def test_the_beginning_of_a_checksum_is_enough_where_no_more_was_published(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(CONTENT)
    digest = hashlib.sha256(CONTENT).hexdigest()
    verify(entry("", sha256=digest[:8]), path)
    with pytest.raises(WeightsError, match="sha256"):
        verify(entry("", sha256=("1" if digest[0] == "0" else "0") + digest[1:8]), path)


def test_every_scorer_that_needs_weights_has_them_in_the_manifest() -> None:
    # Trained by users: the small network, and the plain Ladder-DenseNet and GMMSeg of Cityscapes, which nobody published.
    own = {"external", "compact", "mahalanobis", "torchvision_segmentation", "deeplab_mobilenet_v2", "ldn121", "gmmseg"}
    assert set(SCORERS.names) - own <= set(read_manifest())


def test_list_shows_what_is_present_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weights", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(read_manifest())
    assert any(line.startswith("present") and "compact_scorer" in line for line in lines)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_download_that_breaks_off_is_no_file(chunked: bool, tmp_path: Path) -> None:
    class Broken(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", "1000000")))
            self.end_headers()
            self.wfile.write(b"1000\r\nabc" if chunked else b"abc")
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        with pytest.raises(WeightsError, match="cannot be downloaded"):
            download(entry(f"http://127.0.0.1:{httpd.server_port}/model.pth"), tmp_path)
        httpd.shutdown()
    assert list(tmp_path.iterdir()) == []


def test_estimates_and_folders_are_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mahalanobis_estimates.h5").write_bytes(CONTENT)
    (tmp_path / "segformer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "segformer" / name).write_bytes(CONTENT)
    assert cli.main(["weights", "list", "--weights-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("mahalanobis_estimates", "segformer"):
        assert any(line.startswith("present") and f" {name} " in line for line in lines), name
    assert cli.main(["weights", "verify", "segformer", "--weights-dir", str(tmp_path)]) == 0


@pytest.mark.parametrize("action", ["list", "verify"])
def test_a_folder_that_is_not_there_is_named(action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["weights", action, "--weights-dir", str(tmp_path / "wieghts")]) == 2
    assert capsys.readouterr().err == f"ood-seg: --weights-dir '{tmp_path / 'wieghts'}' is not a folder\n"


def test_an_imported_file_of_a_bundled_name_is_named_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = BUNDLED_DIR / "compact_scorer.safetensors"
    assert cli.main(["weights", "import", str(weights), "--weights-dir", str(tmp_path)]) == 0
    assert f"scorer.weights={tmp_path / 'compact_scorer.safetensors'}" in capsys.readouterr().out


def test_bundled_files_are_those_of_the_manifest(capsys: pytest.CaptureFixture[str]) -> None:
    bundled = [entry for entry in read_manifest().values() if entry.bundled]
    assert len(bundled) == 3
    for known in bundled:
        path = BUNDLED_DIR / known.file_name
        assert (known.bytes, known.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert cli.main(["weights", "verify", *(known.name for known in bundled)]) == 0
    assert "3 files verified" in capsys.readouterr().out


def test_downloads_go_where_the_user_keeps_such_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    monkeypatch.setattr("ros2_ood_seg.weights.manifest.download", lambda entry, folder: fetched.append(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["weights", "download", "sam_vit_b_01ec64"]) == 0
    assert fetched == [tmp_path / "ros2_ood_seg" / "weights"]
    assert f"use them with --weights-dir {fetched[0]}" in capsys.readouterr().out
