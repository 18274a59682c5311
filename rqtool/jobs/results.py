"""What the public functions give: dataclasses of plain data with `to_json()`, whose keys
docs/json.md describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rqtool.hardware.macro import Macro
from rqtool.train.finetune import Recipe
from rqtool.train.paired import Loss


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What is said of every fine-tuning. top-1 in percent of `images` images; `measured_on` is
    the name of the part: "test", "val" and the like, or "held-out". macros: the macro of each layer
    that has another than `macro`. layers_off_macro: {"layer", "macs"} of each layer that is kept
    off it; layers: rows of the others.

    tuned: after `recipe.epochs` epochs, the integer program that was saved. agreement: percent of
    images on which the integer program and the network that is served, its graph run in floating
    point, name the same class (train/served.py). learning_rate: the peak rate, found or asked for;
    None without epochs. roll_backs: epochs that diverged and were done again, each at half the
    rate. epochs: a row for each epoch, as docs/json.md describes it.
    """

    out: str | None
    macro: Macro
    macros: Mapping[str, Macro]
    layers_off_macro: list[dict[str, Any]]
    recipe: Recipe
    learning_rate: float | None
    tuned_top1: float
    agreement: float
    images: int
    measured_on: str
    train_images: int
    held_out_images: int
    chosen: str
    roll_backs: int
    epochs: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    seconds: float
    warnings: tuple[str, ...] = ()

    def _named(self, *names: str) -> dict[str, Any]:
        """These attributes by name."""
        return {name: getattr(self, name) for name in names}

    def _described(self) -> dict[str, Any]:
        """What was made: the first keys of the JSON object, after the command's own."""
        return {
            "out": self.out,
            "macro": self.macro.to_dict(),
            "macros": plain(self.macros),
            "recipe": self.recipe.to_dict(),
            "learning_rate": self.learning_rate,
        }

    def _training(self) -> dict[str, Any]:
        """How it was trained and measured: the keys after the metrics."""
        return self._named(
            "measured_on", "train_images", "held_out_images", "chosen", "roll_backs", "epochs"
        )


@dataclass(frozen=True, kw_only=True)
class Quantized(Tuned):
    """What `quantize` found, beside what `Tuned` says. float: the model as it came. ptq:
    calibrated, not trained. ideal: the twin with an ideal ADC, trained equally long; twin_chosen:
    its chosen state; twin_out: the file it was saved to. adc_loss: twin minus tuned on the same
    images, with its paired error; None without a twin, and where the macro's ADC is ideal. chain:
    what each step cost, a row for each, as docs/json.md describes it.
    """

    float_top1: float
    ptq_top1: float
    ideal_top1: float | None
    twin_chosen: str | None
    adc_loss: Loss | None
    chain: list[dict[str, Any]]
    twin_out: str | None = None
    islands: tuple[str, ...] = ()

    @property
    def loss(self) -> float | None:
        """Points of top-1 that the ADC costs: ideal twin minus tuned."""
        return None if self.ideal_top1 is None else self.ideal_top1 - self.tuned_top1

    @property
    def reads_per_mac(self) -> float:
        return sum(row["reads"] for row in self.layers) / sum(row["macs"] for row in self.layers)

    def to_json(self) -> dict[str, Any]:
        top1 = self._named("float_top1", "ptq_top1", "tuned_top1", "ideal_top1")
        metrics = {
            **top1,
            **_loss("adc_loss", self.loss, self.adc_loss),
            **self._named("agreement", "images", "reads_per_mac"),
        }
        twin = self._named("twin_chosen", "twin_out")
        return {
            "command": "quantize", **self._described(), "metrics": metrics, "chain": self.chain, **self._training(), **twin, "warnings": list(self.warnings),
            "fully_integer": not self.islands, "islands": list(self.islands), **self._named("layers_off_macro", "layers", "seconds"),
        }  # fmt: skip


def plain(macros: Mapping[str, Macro]) -> dict[str, dict[str, Any]]:
    """The fields of macros by layer."""
    return {layer: macro.to_dict() for layer, macro in macros.items()}


def _loss(name: str, points: float | None, loss: Loss | None) -> dict[str, Any]:
    """A difference in points with its paired error; the errors are None where nothing was compared."""
    return {
        name: points,
        f"{name}_se": loss.se if loss else None,
        f"{name}_interval": list(loss.interval) if loss else None,
    }


@dataclass(frozen=True, kw_only=True)
class Trained(Tuned):
    """What `train_more` found, beside what `Tuned` says. before: the integer program as it came;
    gain: tuned minus before on the same images, with its paired error. recipe: of these epochs;
    history: the recipes of all trainings before, oldest first."""

    source: str
    history: list[Recipe]
    before_top1: float
    gain: Loss

    def to_json(self) -> dict[str, Any]:
        history = [recipe.to_dict() for recipe in self.history]
        gain = _loss("gain", self.gain.points, self.gain)
        metrics = {
            **self._named("before_top1", "tuned_top1"),
            **gain,
            **self._named("agreement", "images"),
        }
        about = {
            **self._training(),
            "warnings": list(self.warnings),
            **self._named("layers_off_macro", "layers", "seconds"),
        }
        return {
            "command": "train",
            "source": self.source,
            **self._described(),
            "history": history,
            "metrics": metrics,
            **about,
        }


@dataclass(frozen=True)
class Evaluated:
    """Top-1 in percent of `images` images by the integer program; adc is "real" or "ideal". macros,
    layers_off_macro: as in `Tuned`; fast: whether each layer on the macro is on the fused kernel."""

    source: str
    top1: float
    images: int
    adc: str
    measured_on: str
    macro: Macro
    seconds: float
    fast: dict[str, bool]
    warnings: tuple[str, ...] = ()
    macros: Mapping[str, Macro] = field(default_factory=dict)
    layers_off_macro: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        metrics = {"top1": self.top1, "images": self.images}
        about = {
            "adc": self.adc,
            "measured_on": self.measured_on,
            "macro": self.macro.to_dict(),
            "macros": plain(self.macros),
            "layers_off_macro": self.layers_off_macro,
            "seconds": self.seconds,
            "fused_layers": self.fast,
            "warnings": list(self.warnings),
        }
        return {"command": "eval", "source": self.source, "metrics": metrics, **about}


@dataclass(frozen=True)
class Exported:
    """An ONNX file and what was proved of it (None where it was not verified)."""

    source: str
    out: str
    body: str
    bytes: int
    report: dict[str, Any] | None
    vectors: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"command": "export", **asdict(self)}


@dataclass(frozen=True)
class Planned:
    """Rows of Plan.cost for one image, layer by layer, and their sums; macros, layers_off_macro: as
    in `Tuned`."""

    source: str
    macro: Macro
    input_shape: tuple[int, ...]
    layers: list[dict[str, Any]]
    warnings: tuple[str, ...] = ()
    macros: Mapping[str, Macro] = field(default_factory=dict)
    layers_off_macro: list[dict[str, Any]] = field(default_factory=list)

    @property
    def totals(self) -> dict[str, Any]:
        sums = {
            key: sum(row[key] for row in self.layers)
            for key in ("tiles", "macs", "reads", "cycles")
        }
        return sums | {"reads_per_mac": sums["reads"] / sums["macs"]}

    def to_json(self) -> dict[str, Any]:
        return {
            "command": "plan",
            "source": self.source,
            "macro": self.macro.to_dict(),
            "macros": plain(self.macros),
            "input_shape": list(self.input_shape),
            "layers_off_macro": self.layers_off_macro,
            "layers": self.layers,
            "totals": self.totals,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Demo:
    """The three results of the demo."""

    quantized: Quantized
    evaluated: Evaluated
    exported: Exported

    def to_json(self) -> dict[str, Any]:
        parts = {"quantize": self.quantized, "eval": self.evaluated, "export": self.exported}
        return {"command": "demo", **{name: part.to_json() for name, part in parts.items()}}
