"""The bundle: the folder that ships, whole and hashed.

model.pte | model.onnx, ...          the program and what belongs to it (afq_export/backends)
tokenizer.json, ..., chat_template   as the source model's
config.json, generation_config.json  the source model's
recipe.toml, target.toml             what it was made with and for
report.json, report.md, README.md    what was measured (written by validate)
LICENSE*, sbom.cdx.json              what comes with the weights; what the bundle contains and was made with
manifest.json                        sha256 of every file above
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from afq_export.errors import InputError
from afq_export.files import sha256_file, write_text
from afq_export.load.checkpoint import FloatCheckpoint
from afq_export.load.config import GENERATION
from afq_export.load.origin import licence_files
from afq_export.spec.recipe import Recipe
from afq_export.spec.report import Manifest, ManifestModel, ValidationReport, read_report, to_json
from afq_export.spec.strict import to_toml
from afq_export.spec.target import BackendName, TargetProfile
from afq_export.stdout import standard_output_closed

MANIFEST = "manifest.json"
BEFORE = {"model.pte": ("executorch", "xnnpack"), "model.onnx": ("onnxruntime", "onnxruntime")}
"""Program -> runtime and backend, of manifests that name none of them."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle on disk."""

    folder: Path
    manifest: Manifest

    @property
    def runtime(self) -> str:
        """The runtime that the exported file is for."""
        return self.manifest.runtime or BEFORE[self.model.name][0]

    @property
    def backend(self) -> BackendName:
        """The backend that made the exported file."""
        return self.manifest.backend or BEFORE[self.model.name][1]

    @property
    def model(self) -> Path:
        """The exported file."""
        named = self.manifest.program
        return self.folder / (named or next(name for name in BEFORE if name in self.manifest.files))

    @property
    def model_bytes(self) -> int:
        """Size of the exported file and of the tensors beside it."""
        names = (f"{self.model.name}.data", self.model.with_suffix(".bin").name)
        beside = [self.folder / name for name in names if name in self.manifest.files]
        return sum(path.stat().st_size for path in (self.model, *beside))

    def report(self) -> ValidationReport | None:
        """What validate wrote, None before it ran. Raises InputError when it does not fit."""
        path = self.folder / "report.json"
        if not path.is_file():
            return None
        try:
            return read_report(path.read_bytes())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(
                "the report does not fit",
                where=str(path),
                why=str(error),
                do=f"run `afq-export validate {shlex.quote(str(self.folder))}`",
            ) from error


def describe(recipe: Recipe, target: TargetProfile, folder: Path) -> None:
    """recipe.toml and target.toml with every default written out, so that they read back as what was used."""
    write_text(folder / "recipe.toml", to_toml(recipe))
    write_text(folder / "target.toml", to_toml(target))


def save_model_files(model: FloatCheckpoint, tokenizer: Any, folder: Path) -> None:
    """Tokenizer, chat template, configuration and generation configuration, as Hugging Face names them."""
    with standard_output_closed():
        tokenizer.save_pretrained(folder)
    _without_paths(folder / "tokenizer_config.json")
    from transformers import AutoConfig, GenerationConfig

    if model.gguf is not None:
        config = AutoConfig.from_pretrained(model.files, gguf_file=model.gguf.name)
    else:
        config = AutoConfig.from_pretrained(model.files, local_files_only=True)
    config.save_pretrained(folder)
    for path in licence_files(model.files):
        shutil.copyfile(path, folder / path.name)
    generation = model.files / GENERATION
    if model.gguf is None and generation.is_file():
        # As it is: transformers refuses to write what many published models have in theirs.
        (folder / GENERATION).write_bytes(generation.read_bytes())
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def seal(folder: Path, manifest: Manifest) -> Bundle:
    """Writes manifest.json over every file that is in the folder now."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files = {name: sha256_file(path) for name, path in sorted(paths.items()) if name != MANIFEST}
    sealed = msgspec.structs.replace(manifest, files=files)
    write_text(folder / MANIFEST, to_json(sealed))
    return Bundle(folder, sealed)


def open_bundle(folder: Path, *, reports: bool = True) -> Bundle:
    """Opens a bundle and checks every hash. `reports` False: report files may be missing or newer.

    Raises InputError when a file is missing, changed, or named outside of the folder.
    """
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except OSError as error:
        raise InputError("not a bundle", where=str(folder), why=f"there is no {MANIFEST}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("the manifest does not fit", where=str(folder / MANIFEST), why=str(error)) from error
    for name, digest in manifest.files.items():
        path = folder / name
        if not _inside(folder, name):
            raise InputError("the manifest names a file outside of the bundle", where=f"{folder}: {name}")
        if not reports and name in REPORTS:
            continue
        if not path.is_file():
            do = "run `afq-export validate` on its run folder" if name in REPORTS else "export it again"
            raise InputError("a file of the bundle is missing", where=str(path), do=do)
        if sha256_file(path) != digest:
            raise InputError(
                "a file of the bundle was changed",
                where=str(path),
                why="its sha256 is not the manifest's",
                do="export it again",
            )
    if not any(name in manifest.files for name in ([manifest.program] if manifest.program else BEFORE)):
        raise InputError("the bundle has no model file", where=str(folder))
    return Bundle(folder, manifest)


def _inside(folder: Path, name: str) -> bool:
    """Whether `name` is a relative path without `..`, none of whose parts is a link."""
    parts = PurePosixPath(name).parts
    if not parts or name != "/".join(parts) or ".." in parts or "\\" in name or Path(name).is_absolute():
        return False
    return not any(folder.joinpath(*parts[: count + 1]).is_symlink() for count in range(len(parts)))


REPORTS = ("report.json", "report.md", "README.md")
"""What validate writes after the rest."""


def new_manifest(
    model: FloatCheckpoint,
    recipe: Recipe,
    target: TargetProfile,
    program: str,
    versions: dict[str, str],
    seed: int,
    command: list[str],
) -> Manifest:
    """A manifest without files yet."""
    name = Path(model.name).name if model.gguf else model.name
    return Manifest(
        files={},
        model=ManifestModel(name=name, digest=model.digest, origin=model.origin),
        recipe=recipe.name,
        target=target.name,
        runtime=target.runtime,
        backend=target.backend,
        program=program,
        versions=versions,
        seed=seed,
        command=tuple(command),
    )


def _without_paths(path: Path) -> None:
    """tokenizer_config.json without the folder that the tokenizer came from: it would differ between machines."""
    if not path.exists():
        return
    data = json.loads(path.read_text(encoding="utf-8"))
    cleaned = {k: v for k, v in data.items() if k not in ("name_or_path", "_name_or_path", "local_files_only")}
    cleaned["model_max_length"] = None if data.get("model_max_length", 0) > 1e9 else data["model_max_length"]
    path.write_text(json.dumps({k: v for k, v in cleaned.items() if v is not None}, indent=2) + "\n", encoding="utf-8")
