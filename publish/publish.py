"""Publish the quantized model, or its adapter alone, on the Hugging Face Hub: -> publish/, the Hub

python publish/publish.py recipes/chat.yaml --dry-run publish.repo_id=your-name/Llama-3.2-1B-chat
python publish/publish.py recipes/chat.yaml publish.repo_id=your-name/Llama-3.2-1B-chat
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finequant.publish.loading import ADAPTER, ADAPTER_CONFIG, CARD, QUANTIZED, base_on_hub
from finequant.recipes.artifact import CLUTTER, SUMS, files_in, replace_text
from finequant.recipes.errors import UserError, listed
from finequant.recipes.load import without_folders, write_recipe
from finequant.recipes.rundir import RunDir
from finequant.recipes.schema import Recipe
from finequant.recipes.stages import STAGES, command_of, stages_of
from finequant.recipes.terminal import say

PARTS_WITH_ROWS = ("samples", "passages")
"""Parts of the report that quote rows, which may be private."""

FOR_CARD = ("quantization", "model_type", "generation")
"""Parts that `read_report` adds."""

# Files that are not published: they name this machine's folders, or hold hashes. A publication has
# its own hashes, by which the next one knows which files it made.
STAYS_HERE = ("recipe.yaml", "training_log.json", SUMS)

LINKED = (".safetensors", ".gguf", ".pte")
"""Large files that nobody edits: hard-linked into publish/ if the file system allows it."""


class Options(NamedTuple):
    """Options of the command line that are not part of the recipe."""

    yes: bool = False
    dry_run: bool = False
    adapter_only: bool = False
    overrule_gate: tuple[str, ...] = ()
    into_existing: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    from finequant.recipes.run import main as finequant

    finequant(["publish", *(sys.argv[1:] if argv is None else argv)])


def publish(recipe: Recipe, run: RunDir, options: Options) -> None:
    """Writes publish/, shows it, asks, uploads it, and compares every file with the Hub's.

    Raises:
        UserError: if the report does not match what would be published, its gate failed, the
            base's license is violated, or the Hub refuses.
        OutsideError: if the network or the Hub fails.
    """
    from finequant.publish.upload import look, send, verify

    kind = ADAPTER if options.adapter_only else QUANTIZED
    check_name(recipe, kind, options.dry_run)
    run.hold()
    check_current(recipe, run)
    report = read_report(run)
    if kind == QUANTIZED:
        check_gate(report, options.overrule_gate)
    folder = assemble(recipe, run, report, kind)
    files = files_of(folder)
    if options.dry_run:
        where = recipe.publish.repo_id
        show(
            files, f"to {where}, {visibility(recipe)}" if where else "(publish.repo_id is not set)"
        )
        say(f"publish: dry run, nothing was sent: {folder} contains what would be uploaded")
        return
    remote = look(recipe, kind, files, options.into_existing)
    show(files, f"to {remote.url}, {visibility(recipe)}")
    for line in remote.in_words(files):
        say(f"publish: {line}")
    if not options.yes and not confirmed():
        say("publish: nothing was sent")
        sys.exit(1)
    commit = send(recipe, files, remote)
    verify(recipe, files, commit)
    say(f"publish: {remote.url} has all {len(files)} files, each with the hash of the one here")


def check_name(recipe: Recipe, kind: str, dry_run: bool) -> None:
    """Checks, before anything is written, the names that the recipe gives.

    Raises:
        UserError: for a missing repository, or an adapter whose base nobody else could find.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo_id = recipe.publish.repo_id
    if repo_id is None and not dry_run:
        raise UserError("publish.repo_id: where to? Set publish.repo_id=your-name/model-name")
    try:
        validate_repo_id(repo_id or "name/model")
    except HFValidationError as error:
        raise UserError(f"publish.repo_id: {error}") from None
    if kind == ADAPTER and base_on_hub(without_folders(recipe)) is None:
        raise UserError(
            f"publish.base_model: an adapter needs its base, and {recipe.model.base} is not on the "
            "Hub: set publish.base_model=org/name"
        )


def check(recipe: Recipe) -> None:
    """Checks before training what publishing would refuse, if the recipe names a repository.

    Raises:
        UserError: for an invalid repository name or a license that forbids publishing.
    """
    from finequant.publish.license import license_of

    if recipe.publish.repo_id:
        check_name(recipe, QUANTIZED, dry_run=False)
        license_of(recipe)


def check_current(recipe: Recipe, run: RunDir) -> None:
    """Checks that recipe, report, and weights, which the card describes, are of the same run.

    Raises:
        UserError: if a stage is missing, or something has changed since it ran.
    """
    for stage in (name for name in stages_of(recipe) if name in STAGES):
        run.require_intact(stage)
        changes = run.what_changed(recipe, stage)
        if changes is None:
            raise UserError(
                f"publish: manifest.json does not say that {stage} finished: run `finequant run "
                "RECIPE`, or copy the whole run directory from the machine where it did"
            )
        if changes:
            raise UserError(
                f"publish: the report does not match what would be published: since {stage} ran\n"
                f"  {listed(changes)}\nrun `finequant run RECIPE` first"
            )


def read_report(run: RunDir) -> dict[str, Any]:
    """Reads report.json; adds quantization.json as "quantization", the "model_type", and
    generation_config.json as "generation"."""
    report = json.loads(run.report.read_text(encoding="utf-8"))
    record = json.loads((run.quantized / "quantization.json").read_text(encoding="utf-8"))
    config = json.loads((run.quantized / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((run.quantized / "generation_config.json").read_text(encoding="utf-8"))
    added = (record, config["model_type"], generation)
    return report | dict(zip(FOR_CARD, added, strict=True))


def check_gate(report: dict[str, Any], overruled: Sequence[str]) -> None:
    """Checks that the recipe's gate passed, or that each failed check is overruled by name.

    Raises:
        UserError: for a failed check that is not overruled, or an overruled one that is unknown.
    """
    checks = report["gate"]["checks"]
    names = [check["name"] for check in checks]
    if unknown := [name for name in overruled if name not in names]:
        raise UserError(
            f"--overrule-gate: the gate has no check {unknown[0]!r}; it has "
            f"{', '.join(map(repr, names)) or 'none'}"
        )
    failed = [check["name"] for check in checks if not check["passed"]]
    if left := [name for name in failed if name not in overruled]:
        flags = " ".join(f'--overrule-gate "{name}"' for name in left)
        raise UserError(
            f"publish: the gate failed: {', '.join(left)}; report.md says by how much. To publish "
            f"all the same, and have the card say so: {flags}"
        )


def assemble(recipe: Recipe, run: RunDir, report: dict[str, Any], kind: str) -> Path:
    """Writes publish/: artifact, exports, license, report, and card, without local folders."""
    from finequant.evaluate.report.page import write_page
    from finequant.publish.card import card_text
    from finequant.publish.license import license_of

    license = license_of(recipe)
    shown = without_folders(recipe)
    with run.writing(run.publication, shown) as folder:
        if kind == ADAPTER:
            _take(run.adapter, folder)
            _name_base(folder / ADAPTER_CONFIG, shown)
        else:
            _take(run.quantized, folder)
            for export in exports(recipe, run):
                _take(export, folder / export.name)
        for name, content in license.documents.items():
            (folder / name).write_bytes(content)
        private = () if recipe.publish.rows else PARTS_WITH_ROWS
        report = {key: value for key, value in report.items() if key not in private}
        measured = {key: report[key] for key in report if key not in FOR_CARD}
        measured["recipe"] = shown.model_dump(mode="json", exclude={"output_dir"})
        _write_json(folder / "report.json", measured)
        if recipe.publish.rows:
            write_page(run.root, folder / run.page.name, measured["recipe"])
            say("publish: report.html and report.json show held-out rows (publish.rows)")
        sources = [row.source for row in recipe.data.train]
        datasets = [source for source in sources if not Path(source).is_absolute()]
        card = card_text(shown, report, license, kind, list(files_of(folder)), datasets)
        (folder / CARD).write_text(card, encoding="utf-8")
        write_recipe(shown, folder / "recipe.yaml")
    return run.publication


def exports(recipe: Recipe, run: RunDir) -> list[Path]:
    """Lists finished exports of the quantized model, each a folder named after its format.

    Raises:
        UserError: for an export of a different quantized/ than the one here.
    """
    # As `RunDir.writing` names folders in between.
    interrupted = (".partial", ".replaced", ".unrecorded")
    folders = sorted(
        path
        for path in run.exports.glob("*")
        if path.suffix not in interrupted and not CLUTTER.fullmatch(path.name)
    )
    for folder in folders:
        if folder.name not in run.manifest():
            raise UserError(
                f"{folder}: nothing says that it was made from this quantized/: run "
                f"`{command_of(folder.name)}` again, or delete it"
            )
        try:
            run.require(folder.name, recipe)
        except UserError as error:
            raise UserError(f"{error}\nor delete {folder}, which is then not published") from None
    return folders


def files_of(folder: Path) -> dict[str, Path]:
    """Maps names in the repository to files."""
    return {path.relative_to(folder).as_posix(): path for path in files_in(folder, "**/*")}


def visibility(recipe: Recipe) -> str:
    return "private" if recipe.publish.private else "public"


def show(files: dict[str, Path], where: str) -> None:
    """Prints what would be uploaded."""
    from finequant.evaluate.report.table import print_rows

    sizes = {name: path.stat().st_size for name, path in files.items()}
    rows = [[name, f"{size / 1e3:,.1f}"] for name, size in sizes.items()]
    total = [f"{len(files)} files {where}", f"{sum(sizes.values()) / 1e3:,.1f}"]
    print_rows(["file", "kB"], [*rows, total])


def confirmed() -> bool:
    """Asks for confirmation on the terminal.

    Raises:
        UserError: if there is no terminal.
    """
    if not sys.stdin.isatty():
        raise UserError("publish: no terminal to ask on: look at the list above, then add --yes")
    return input("Upload? [y/N] ").strip().lower() in ("y", "yes")


def _take(source: Path, target: Path) -> None:
    """Copies the files of an artifact that are published; links large ones."""
    for name, path in files_of(source).items():
        if path.name in STAYS_HERE:
            continue
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            (os.link if path.suffix in LINKED else shutil.copyfile)(path, copy)
        except OSError:  # another file system
            shutil.copyfile(path, copy)


def _name_base(file: Path, recipe: Recipe) -> None:
    """Writes the base's Hub id, by which peft finds it; locally, it may be a folder."""
    config = json.loads(file.read_text(encoding="utf-8"))
    same = recipe.model.base == base_on_hub(recipe)
    config["base_model_name_or_path"] = base_on_hub(recipe)
    config["revision"] = recipe.model.revision if same else None
    _write_json(file, config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    replace_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
