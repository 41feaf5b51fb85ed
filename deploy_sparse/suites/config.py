"""What a suite measures: networks × forms × targets × precisions × batches, read from TOML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ..artifact import digest_of
from ..config import Config, config_from, read_toml
from ..engine.target import Precision
from ..errors import ConfigError, nearest

DENSE = "dense"
"""What the baseline of every group is called; no form may be."""

Name = Annotated[str, Field(pattern=r"^[^/*?\[\]\s]([^/*?\[\]]*[^/*?\[\]\s])?$", max_length=80)]
Share = Annotated[float, Field(gt=0, le=1)]
Batches = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class Form(Config):
    """One way to make a network sparse, once on its first random weights; or a network that is on disk already."""

    structure: Literal["channels", "blocks", "folder"] = Field(
        description="channels: whole output channels go; blocks: weights outside of dense blocks go; folder: a ticket, "
        "compact network or engine given by its path"
    )
    keep: Share | None = Field(None, description="share that stays: of the channels, or of the weights in blocks")
    layers: Literal["all", "inner"] = Field(
        "all", description="channels of all layers that can be narrowed; or only those inside residual blocks"
    )
    rule: Literal["even", "magnitude", "chase"] = Field(
        "even",
        description="even: the same share in every layer; magnitude: what global magnitude pruning leaves of each; "
        "chase: the channels with the lowest score of all layers go",
    )
    floor: float = Field(0.2, ge=0, le=1, description="of chase: what a layer keeps at least, of its even part")
    multiple: int | None = Field(
        None, ge=1, description="widths, or rows and columns of blocks, in multiples of this; the target's by default"
    )
    exclude: tuple[str, ...] = Field((), description="of blocks: shell patterns of weights that stay dense")
    blocks: Literal["equal", "disjoint"] = Field("equal", description="form of the blocks")
    parts: int = Field(0, ge=0, description="blocks of a layer at most; 0: chosen by the rule for blocks")
    format: Literal["channels", "packed", "auto"] | None = Field(
        None,
        description="how it is deployed: channels cut, blocks packed, or whatever is fastest on the target at the "
        "first batch; by default as its structure is",
    )
    path: str | None = Field(None, description="of a folder: the ticket's, compact network's or engine's")
    accuracy: float | None = Field(None, ge=0, le=1, description="accuracy of what is in the folder, where known")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        given = self.model_fields_set
        folder = self.structure == "folder"
        wanted = "path" if folder else "keep"
        if getattr(self, wanted) is None:
            raise ValueError(f"a value for {wanted}, which structure {self.structure!r} needs")
        allowed: dict[str, set[str]] = {
            "channels": {"keep", "layers", "rule", "floor", "multiple", "format"},
            "blocks": {"keep", "rule", "multiple", "exclude", "blocks", "parts", "format"},
            "folder": {"path", "accuracy", "format", "multiple"},
        }
        for key in sorted(given - allowed[self.structure] - {"structure"}):
            raise ValueError(f"no {key} with structure {self.structure!r}")
        if "floor" in given and self.rule != "chase":
            raise ValueError("floor only with rule 'chase'")
        if self.structure == "blocks" and self.rule == "chase":
            raise ValueError("rule 'even' or 'magnitude' with structure 'blocks'")
        if self.structure == "channels" and self.format == "packed":
            raise ValueError("format 'channels' or 'auto' with structure 'channels', which leaves no blocks to pack")
        return self

    @property
    def deployed(self) -> Literal["channels", "packed", "auto"]:
        """The format, or what the structure implies."""
        return self.format or ("packed" if self.structure == "blocks" else "channels")

    def family(self, multiple: int) -> str:
        """What forms that differ in how much they keep have in common, in words; for lines over sparsity.

        Args:
            multiple: of widths, where the form itself says none.
        """
        if self.structure == "folder":
            return "from a folder"
        which = {"even": "", "magnitude": ", by magnitude", "chase": ", Chase's"}[self.rule]
        if self.structure == "blocks":
            what = f"{self.blocks} blocks{which}"
        else:
            widths = self.multiple or multiple
            inner = " inside blocks" if self.layers == "inner" else ""
            what = f"channels{inner}{which}, " + (f"multiples of {widths}" if widths > 1 else "any width")
        return what + (", fastest form" if self.deployed == "auto" else "")


class Network(Config):
    """A dense network and the forms it is timed in."""

    name: Name = Field(description="what it is called in the report")
    network: str = Field(description="a zoo network, or torchvision/<name>")
    arguments: dict[str, Any] = Field(default_factory=dict, description="arguments of the network, such as classes")
    input: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="one sample (C, H, W); the network's own by default"
    )
    forms: tuple[Name, ...] = Field(min_length=1, description="names of forms")
    layer_tables: tuple[Name, ...] = Field(
        (), description="forms whose layers are timed one by one, at the first batch"
    )
    batches: Batches | None = Field(None, description="instead of the suite's")
    accuracy: float | None = Field(None, ge=0, le=1, description="accuracy of the dense network, where known")


class Goal(Config):
    """What forms are to reach: a share of the speed-up that their MACs predict, or a ratio over another form."""

    forms: tuple[Name, ...] = Field(min_length=1, description="whom it is for")
    of_predicted: float | None = Field(None, gt=0, description="measured over MAC-predicted speed-up, at least")
    over: Name | None = Field(None, description="the form that is to be beaten")
    times: float | None = Field(None, gt=0, description="time of that form over this one's, at least")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.of_predicted is None) == (self.over is None) or (self.over is None) != (self.times is None):
            raise ValueError("either of_predicted, or over with times")
        return self


class Headline(Config):
    """A figure that a paper printed, and the form of ours that has the structure it is about."""

    source: str = Field(description="the paper, and where in it")
    claim: str = Field(description="structure, sparsity and data set as the paper states them")
    network: Name = Field(description="name of a network of this suite")
    forms: tuple[Name, ...] = Field(min_length=1, description="its forms with that structure")
    saving: float | None = Field(None, ge=0, lt=1, description="share of the running time the paper saved")
    macs_left: float | None = Field(None, gt=0, le=1, description="share of the MACs that the paper says is left")
    timed: str = Field(description="what the paper timed")


class Suite(Config):
    """A suite. ``name`` is its file's."""

    name: str
    title: str = Field(description="of the report")
    about: str = Field("", description="what it is for, in a sentence or two")
    targets: tuple[str, ...] = Field(("cpu",), min_length=1, description="names or TOML files of targets")
    precisions: tuple[Precision, ...] = Field(("fp32",), min_length=1, description="each target in each of them")
    batches: Batches = Field((1, 32), description="samples of a timed call")
    seconds: float = Field(1.0, gt=0, description="timed seconds for each subject and batch, at least")
    min_iterations: int = Field(10, ge=1, description="timed calls for each subject and batch, at least")
    warmup_ms: float = Field(200.0, ge=0, description="untimed ms before")
    transfers: Literal["excluded", "included"] = Field(
        "excluded", description="included: from NumPy arrays to NumPy arrays, with copies to a GPU"
    )
    cache: Literal["warm", "cold"] = Field(
        "warm", description="cold: a processor's caches are evicted before each call"
    )
    cuda_graph: bool = Field(False, description="on a GPU, replay runs as CUDA graphs")
    seed: int = Field(0, ge=0, description="of the random weights and inputs")
    forms: dict[Name, Form] = Field(min_length=1)
    networks: tuple[Network, ...] = Field(min_length=1)
    goals: tuple[Goal, ...] = ()
    headlines: tuple[Headline, ...] = ()
    headlines_note: str = Field("", description="what else has to be known to read the headlines")

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [network.name for network in self.networks]
        for what, values in (
            ("networks", names), ("targets", self.targets), ("precisions", self.precisions), ("batches", self.batches),
            *((f"batches of {n.name!r}", n.batches or ()) for n in self.networks),
            *((f"forms of {n.name!r}", n.forms) for n in self.networks),
        ):  # fmt: skip
            if len({*values}) < len(values):
                raise ValueError(f"every one of the {what} once")
        if DENSE in self.forms:
            raise ValueError(f"another name for the form {DENSE!r}, which is every network's baseline")
        own = {network.name: network.forms for network in self.networks}
        for network in self.networks:
            _known(network.forms, self.forms, f"form of network {network.name!r}")
            _known(network.layer_tables, network.forms, f"form of network {network.name!r} to look into")
        for goal in self.goals:
            _known((*goal.forms, *((goal.over,) if goal.over else ())), self.forms, "form of a goal")
        for headline in self.headlines:
            _known((headline.network,), own, "network of a headline")
            _known(headline.forms, own[headline.network], f"form of network {headline.network!r}, for a headline")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        return digest_of(self.model_dump(mode="json"))

    def measured(self) -> dict[str, Any]:
        """What decides what a measurement means: all but texts, goals, and what is chosen to be measured."""
        texts = {"title", "about", "goals", "headlines", "headlines_note"}
        chosen = {*texts, "targets", "precisions", "batches", "networks"}
        networks = {
            network.name: network.model_dump(mode="json", exclude={"forms", "batches", "layer_tables"})
            for network in self.networks
        }
        return {**self.model_dump(mode="json", exclude=chosen), "networks": networks}

    def batches_of(self, network: Network) -> tuple[int, ...]:
        """The network's own batches, else the suite's."""
        return network.batches or self.batches


def _known(given: tuple[str, ...], known: Mapping[str, Any] | tuple[str, ...], what: str) -> None:
    for name in given:
        if name not in known:
            names = list(known)
            raise ValueError(f"one of {', '.join(names)}; {name!r}, a {what}, is none. {nearest(name, names)}".strip())


def suites_folder() -> Path:
    """``benchmarks/suites`` of a checkout, else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "benchmarks" / "suites"
    return checkout if (package.parent / "pyproject.toml").is_file() and checkout.is_dir() else package / "_suites"


def list_suites() -> tuple[str, ...]:
    """Names of the shipped suites, sorted."""
    return tuple(sorted(path.stem for path in suites_folder().glob("*.toml")))


def load_suite(name_or_path: str | Path) -> Suite:
    """The suite with this name, or described by this TOML file; paths in it are relative to the working directory.

    Raises:
        ConfigError: no such name or file, an unknown key, values out of range or that do not go together.
    """
    path = _suite_file(name_or_path)
    try:
        return config_from(Suite, {"name": path.stem}, read_toml(path), source=str(path))
    except ConfigError as problem:  # whose advice is an option on the command line
        hint, question, _ = problem.fix.rpartition("? ")
        raise ConfigError(problem.given, expected=problem.expected, fix=f"{hint}{question}mend it in {path}") from None


def _suite_file(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml" or len(path.parts) >= 2:
        return path
    names = list_suites()
    if str(name_or_path) not in names:
        raise ConfigError(
            f"unknown suite {str(name_or_path)!r}",
            expected=f"one of {', '.join(names)}, or the path of a TOML file",
            fix=f"{nearest(str(name_or_path), names)}choose one, or write your own after {suites_folder()}/smoke.toml",
        )
    return suites_folder() / f"{name_or_path}.toml"
