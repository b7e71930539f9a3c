"""The list of known weights files, and ``ood-seg weights``."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import shutil
import urllib.request
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from ros2_ood_seg.config import cache_root
from ros2_ood_seg.errors import InputError, WeightsError
from ros2_ood_seg.weights.families import Family, recognise, without_prefixes
from ros2_ood_seg.weights.store import BUNDLED_DIR, WEIGHTS_NAME, find_weights, load_weights, save_weights, search_dirs

_CHUNK = 1 << 20
_TIMEOUT_S = 60.0


class ManifestEntry(BaseModel):
    """One known weights file.

    Args:
        name: What settings call it.
        page: Where its publisher describes it.
        licence: SPDX name, or the terms in words.
        url: Direct address, empty where there is none.
        bytes: Size, 0 when unknown.
        sha256: Checksum or its beginning, as published; empty where nobody did.
        profiles: Bundled profiles that use it.
        bundled: It comes with the package.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    page: str
    licence: str
    url: str = ""
    bytes: int = 0
    sha256: str = ""
    profiles: tuple[str, ...] = ()
    bundled: bool = False

    @property
    def file_name(self) -> str:
        """Name of the file on disk: the entry's, with the ending of its address where that has one."""
        if self.bundled:
            return f"{self.name}.safetensors"
        return self.name + (Path(self.url.rsplit("/", 1)[-1]).suffix or ".pth")


def read_manifest(path: Path = BUNDLED_DIR / "manifest.yaml") -> dict[str, ManifestEntry]:
    """All known weights by name.

    Raises:
        InputError: The manifest is damaged.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {name: ManifestEntry(name=name, **values) for name, values in loaded.items()}
    except (OSError, yaml.YAMLError, ValidationError, AttributeError, TypeError) as error:
        raise InputError(f"weights manifest '{path}' cannot be read: {' '.join(str(error).split())}") from error


def sha256_of(path: Path) -> str:
    """Checksum of a file, as lower-case hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def verify(entry: ManifestEntry, path: Path) -> None:
    """Compares a file with its manifest entry.

    Raises:
        WeightsError: Another size or checksum than the publisher's.
    """
    size = path.stat().st_size
    if entry.bytes and size != entry.bytes:
        raise WeightsError(f"'{path}' has {size} bytes, {entry.name} has {entry.bytes}: it is truncated or another file")
    if entry.sha256 and not (found := sha256_of(path)).startswith(entry.sha256):
        raise WeightsError(f"'{path}' has sha256 {found}, {entry.name} has {entry.sha256}: it is damaged or another file")


def download(entry: ManifestEntry, folder: Path) -> Path:
    """Fetches one file, checks it, and only then gives it its name.

    Raises:
        WeightsError: No direct address, the address does not answer, or the checksum differs.
    """
    if not entry.url:
        raise WeightsError(f"{entry.name} has no direct address: get it from {entry.page} and put it into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / entry.file_name
    partial = target.with_suffix(target.suffix + ".partial")
    try:
        with urllib.request.urlopen(entry.url, timeout=_TIMEOUT_S) as response, partial.open("wb") as file:
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(response, "read", total=total, desc=entry.name) as reader:
                shutil.copyfileobj(reader, file, _CHUNK)
        # A connection that ends early looks like the end of the file.
        if total is not None and (size := partial.stat().st_size) != total:
            raise ValueError(f"it broke off after {size} of {total} bytes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        partial.unlink(missing_ok=True)
        raise WeightsError(f"{entry.url} cannot be downloaded ({error}): get it from {entry.page} and put it into {folder}") from error
    try:
        verify(entry, partial)
    except WeightsError:
        partial.unlink()
        raise
    partial.replace(target)
    return target


def import_weights(file: Path, folder: Path | None, name: str = "") -> tuple[Family, Path | None]:
    """Recognises a checkpoint by the names of its entries, and keeps it under the name that settings look for.

    Args:
        file: Any checkpoint :func:`~ros2_ood_seg.weights.store.load_weights` reads.
        folder: Where to save it as safetensors, in full precision and without wrappers; None only recognises it.
        name: File name without ending, one of the family's; empty takes the usual one.

    Returns:
        Its family, and the file that was written.

    Raises:
        WeightsError: Damaged, or of no known family.
        InputError: No setting looks for the name, or there is such a file already.
    """
    weights = without_prefixes(load_weights(file))
    family = recognise(weights)
    if name and name not in family.file_names:
        raise InputError(f"--name is '{name}', allowed for {family.title}: {', '.join(family.file_names)}")
    if folder is None:
        return family, None
    target = folder / f"{name or family.file_names[0]}.safetensors"
    if target.exists():
        raise InputError(f"'{target}' exists already: remove it first")
    save_weights(target, weights.state, weights.metadata, half=False)
    return family, target


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ood-seg weights {list,download,verify,import}``."""
    parser = subparsers.add_parser("weights", help="list, download, verify or import weights files")
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (
        ("list", "known weights and which are present"),
        ("download", "fetch and check"),
        ("verify", "compare with the manifest"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("--weights-dir", type=Path, default=None, help="folder of further weights")
        if name != "list":
            action.add_argument("names", nargs="*" if name == "verify" else "+", help="names from 'ood-seg weights list'")
    importing = actions.add_parser("import", help="say what a checkpoint is, and keep it where settings find it")
    importing.add_argument("file", type=Path, help="checkpoint of a published scorer, detector or segmenter")
    importing.add_argument("--weights-dir", type=Path, default=None, help="folder to save it in as safetensors; without, it is only named")
    importing.add_argument("--name", default="", help="what it is, where the file does not tell: max_entropy, eam, …")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    manifest = read_manifest()
    # The other actions make it.
    if args.action in ("list", "verify") and args.weights_dir is not None and not args.weights_dir.is_dir():
        raise InputError(f"--weights-dir '{args.weights_dir}' is not a folder")
    if args.action == "list":
        for entry in manifest.values():
            path = _present(entry, args.weights_dir)
            size = entry.bytes or (path.stat().st_size if path else 0)
            megabytes = f"{size / 1e6:.0f} MB" if size else "-"
            print(f"{'present' if path else 'missing':8} {entry.name:32} {megabytes:>8}  {entry.licence:12} {path or entry.page}")
        return 0
    if args.action == "import":
        return _import(args)
    for name in args.names:
        if name not in manifest:
            raise InputError(f"unknown weights '{name}': use one of {', '.join(manifest)}")
    if args.action == "download":
        folder = args.weights_dir or cache_root() / "weights"
        for name in args.names:
            print(f"{name}: {download(manifest[name], folder)}")
        print(f"use them with --weights-dir {folder}")
        return 0
    checked = 0
    for entry in manifest.values():
        if args.names and entry.name not in args.names:
            continue
        path = _present(entry, args.weights_dir)
        if args.names and path is None:
            path = find_weights(entry.name, args.weights_dir)
        if path is not None:
            verify(entry, path)
            print(f"{entry.name}: {'matches' if entry.sha256 else 'nobody published a checksum to compare with,'} {path}")
            checked += bool(entry.sha256)
    print(f"{checked} files verified")
    return 0


def _import(args: argparse.Namespace) -> int:
    family, target = import_weights(args.file, args.weights_dir, args.name)
    print(f"{args.file}: {family.title}")
    if target is not None:
        print(f"saved as {target}")
        others = [name for name in family.file_names if name != target.stem]
        if others and not args.name:
            print(f"where it is another's, import it with --name {' or '.join(others)}")
    if target is not None and (BUNDLED_DIR / target.name).is_file():
        # Names find the bundled file first.
        print(f"use it with --set {family.use} --set {family.use.partition('.')[0]}.weights={target}")
    elif family.use:
        print(f"use it with --set {family.use}" + (f" and --weights-dir {args.weights_dir}" if target else ""))
    else:
        print("no stage of this package runs it: write its score maps and use --set scorer.name=external")
    return 0


def _present(entry: ManifestEntry, weights_dir: Path | None) -> Path | None:
    try:
        return find_weights(entry.name, weights_dir)
    except WeightsError:
        folders = search_dirs(weights_dir)
    # What stages read without find_weights: estimates of classes, and folders of transformers.
    others = [folder / f"{entry.name}.h5" for folder in folders]
    others += [folder / entry.name / WEIGHTS_NAME for folder in folders if (folder / entry.name / "config.json").is_file()]
    return next((path for path in others if path.is_file()), None)
