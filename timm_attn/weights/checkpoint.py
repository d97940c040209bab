"""One checkpoint: what the index says of it, and its files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import sha256
from . import fetch
from .schema import WeightsError

INDEX = "index.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, as an index describes it.

    Args:
        name: Folder name and name on the Hub, ``<architecture>.<tag>``.
        folder: Where it lies, or would lie if it had been downloaded with its index.
        repo_id: ``ORG/NAME`` on the Hub, or None before it is published.
        revision: Commit of the repository, 40 hexadecimal digits; None takes what is newest there.
        pretrained_cfg: timm's pretrained configuration: preprocessing, number of classes, label names.
        model_args: Keyword arguments that the architecture was built with.
        files: ``{file name: {"sha256": hex digest, "size": bytes}}``.
        metrics: ``{"top1": %, "top5": %, "loss": nats, "images", "epoch", "seed", "parameters",
            "logit_difference"}`` of these very weights, measured on the test split in float32.
        over_seeds: ``{"seeds": [...], "top1": {"mean", "std", "n", "values": [...]}, ...}`` of all runs of
            the recipe, measured as ``metrics``; values in the order of the seeds.
        recipe: The resolved recipe.
        dataset: ``{"id", "license", "split", "images": {split: number}}``.
        training: Hardware, precision, packages and git commit of the run.
        mechanism: Key of the mechanism.
        paper: ``{"title", "arxiv", "url"}``.
        caveats: What a reader must know before comparing.
        controls: Names of checkpoints of plain and SE networks with the same recipe.
        runtimes: ``{file name: relative difference of its logits}`` of files for other runtimes.
        folded_from: Name of the checkpoint that this one is the folded form of, or None.
        folded: Name of its folded form, or None.
        frozen_from: Name of the checkpoint some of whose gates are constants here, or None.
        frozen: What was measured of that: ``{"gates", "frozen", "budget", "steps", "images", "before",
            "after", "batch_size", "hardware"}``, of ``timm-attn freeze``.
    """

    name: str
    folder: Path
    architecture: str
    tag: str
    repo_id: str | None = None
    revision: str | None = None
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    over_seeds: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    mechanism: str = "resnet"
    paper: dict[str, str] = field(default_factory=dict)
    caveats: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    runtimes: dict[str, float] = field(default_factory=dict)
    folded_from: str | None = None
    folded: str | None = None
    frozen_from: str | None = None
    frozen: dict[str, Any] = field(default_factory=dict)

    @property
    def here(self) -> bool:
        """Whether its weights lie in its folder."""
        return (self.folder / WEIGHTS).is_file()

    @property
    def is_control(self) -> bool:
        """Whether it is a plain or SE network, which stands for no claim of this package."""
        return self.mechanism in ("resnet", "se")

    @property
    def derived_from(self) -> str | None:
        """Name of the trained checkpoint that it is another form of, or None."""
        return self.folded_from or self.frozen_from

    def as_trained(self, others: Mapping[str, "Checkpoint"]) -> "Checkpoint":
        """The one that this was folded or frozen from, in one step or several; itself if it was trained.

        Args:
            others: By name.
        """
        found = self
        for _ in others:  # an index may be wrong, and lead round in a circle
            source = others.get(found.derived_from or "")
            if source is None:
                break
            found = source
        return found

    @property
    def source(self) -> dict[str, str]:
        """Where timm is told that the weights are."""
        if self.here or not self.repo_id:
            return {"file": str(self.folder / WEIGHTS)}
        return {"hf_hub_id": f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id}

    def verified(self, filename: str = WEIGHTS) -> Path:
        """Path of one of its files, after comparing size and sha256 with the index.

        Raises:
            WeightsError: The file is missing, differs from the index, or lies outside the folder.
        """
        path = self.folder / filename
        want = self.files.get(filename)
        if want is None or not path.is_file():
            raise WeightsError(f"{path} is missing: restore it, or export the run again")
        check_inside(path, self.folder)
        if path.stat().st_size != want["size"] or sha256(path) != want["sha256"]:
            raise WeightsError(
                f"{path} is damaged: its sha256 is not the one in {self.folder.parent / INDEX}. "
                "Restore the file, or export the run again"
            )
        return path

    def weights(self) -> Path:
        """Path of its weights: in its folder, in the Hub's cache, or downloaded now; sha256 compared.

        Raises:
            WeightsError: They cannot be had, or are damaged.
        """
        if self.here or not self.repo_id:
            return self.verified()
        digest = self.files.get(WEIGHTS, {}).get("sha256")
        return fetch.fetch(self.repo_id, WEIGHTS, self.revision, digest)


def check_inside(path: Path, folder: Path) -> None:
    """Raise a WeightsError if a link leads out of a folder, or out of the Hub's cache that it is part of."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        folder = folder.parents[1]
    if not path.resolve().is_relative_to(folder):
        raise WeightsError(f"{path} is a link out of {folder}: put the file itself there")
