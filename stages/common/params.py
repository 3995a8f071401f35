"""`params.yaml`, typed and bounded: a bad value stops a stage before it does anything."""

import difflib
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from stages.common.cli import StageError

Size = Annotated[int, Field(ge=1)]
Precision = Literal["float32", "bfloat16"]
Head = Literal["flatten", "pooled", "original"]
Augment = Literal["none", "light", "strong"]
Framing = Literal["crop", "squash", "pad"]
Given = Literal["auto", "ignore"]
NearDuplicates = Literal["together", "report"]
# `split.group` may also be a regular expression.
GROUP_RULES = ("folder", "column")


class Section(BaseModel):
    """Strict: an unknown key, a value of another type, NaN and infinity are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)


class Data(Section):
    """Which images."""

    path: Annotated[str, Field(min_length=1)]
    labels: Annotated[str, Field(min_length=1)] | None = None
    corrections: Annotated[str, Field(min_length=1)] | None = None
    grey_max: Annotated[int, Field(ge=1, le=0xFFFF)] | None = None


def _check_group(group: str | None) -> str | None:
    if group is None or group in GROUP_RULES:
        return group
    try:
        if re.compile(group).groups == 1:
            return group
        problem = "has one group in parentheses"
    except re.error as error:
        problem = f"is valid ({error})"
    raise ValueError(f"should be null, {', '.join(GROUP_RULES)} or a regular expression that {problem}")


SeedNumber = Annotated[int, Field(ge=0, lt=2**32)]


class Split(Section):
    """How the images are divided; fractions of each class.

    With `folds`, `fold` selects the test split among that many equal parts, in place of `test_size`. `seed` is that of
    the split alone; `None`: the general one.
    """

    test_size: Annotated[float, Field(gt=0, lt=1)]
    val_size: Annotated[float, Field(ge=0, lt=1)]
    rejected_limit: Annotated[float, Field(ge=0, le=1)]
    given: Given = "auto"
    near_duplicates: NearDuplicates = "together"
    group: Annotated[str | None, AfterValidator(_check_group)] = None
    folds: Annotated[int, Field(ge=2)] | None = None
    fold: Annotated[int, Field(ge=0)] = 0
    seed: SeedNumber | None = None

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> "Split":
        test, name = (self.test_size, "test_size") if self.folds is None else (1 / self.folds, "1 / folds")
        if test + self.val_size >= 1:
            raise ValueError(f"{name} + val_size should be less than 1, is {test + self.val_size:g}")
        return self

    @model_validator(mode="after")
    def _have_the_fold(self) -> "Split":
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"fold should be less than folds, {self.folds}, is {self.fold}")
        return self


class Model(Section):
    """The network."""

    arch: str
    weights: str | None
    head: Head
    hidden: Size
    image_size: Annotated[int, Field(ge=32)] | None
    framing: Framing | None = None


class Phase(Section):
    """One phase of training; keys with a default may be missing."""

    epochs: Size
    batch_size: Size
    lr: Annotated[float, Field(gt=0, le=1)]
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: Annotated[float, Field(ge=0)]
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augment: Augment
    mixup: Annotated[float, Field(ge=0, le=1)] = 0.0
    select: Literal["line", "best", "last"]
    patience: Size | None

    def count_epochs(self, images: int) -> int:
        """Return the number of epochs for a number of training images.

        `auto`: as many as see 4,800 images, within 3 to 30.
        """
        if isinstance(self.epochs, int):
            return self.epochs
        return min(_MOST_EPOCHS, max(_LEAST_EPOCHS, round(_IMAGES_SEEN / images)))


class TrainHead(Phase):
    """The first phase; with `search`, the head is chosen by folds (`training.search`)."""

    select: Literal["best", "last"]
    search: bool = False


# For `epochs: auto`: few images need several hundred steps, and many cost no more than few (docs/recipe.md).
_IMAGES_SEEN, _LEAST_EPOCHS, _MOST_EPOCHS = 4_800, 3, 30


class Finetune(Phase):
    """The second phase: the last `unfreeze` blocks are trained too."""

    epochs: Size | Literal["auto"]  # type: ignore[assignment]
    unfreeze: Annotated[int, Field(ge=0)]
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0

    def settle(self, images: int, watches_test: bool) -> "Finetune":
        """Return this with a number of epochs, and without a line if it would be chosen on the test images."""
        select = "last" if self.select == "line" and watches_test else self.select
        return self.model_copy(update={"epochs": self.count_epochs(images), "select": select})


def _check_class_weights(weights: object) -> object:
    """Check `class_weights` with one message for all branches of the union; class names may be unquoted numbers.

    A list, since `dvc exp run -S` can replace any value by one, but merges mappings and takes only ASCII keys.
    """
    if weights is None or weights == "balanced":
        return weights
    if isinstance(weights, list) and all(isinstance(item, str) for item in weights):
        with suppress(ValueError):
            pairs = {name.strip(): float(weight) for name, _, weight in (item.rpartition("=") for item in weights)}
            weights = pairs if len(pairs) == len(weights) else weights
    if isinstance(weights, dict):
        named = {str(name) if type(name) is int else name: weight for name, weight in weights.items()}
        if named and all(
            isinstance(name, str) and type(weight) in (int, float) and 0 < weight < math.inf
            for name, weight in named.items()
        ):
            return {name: float(weight) for name, weight in named.items()}
    raise ValueError(
        "should be null, balanced, or a mapping of each class to a number above 0, or a list of such as 'cat=2'; "
        "quote a name that YAML reads as something else, such as no"
    )


ClassWeights = Annotated[Literal["balanced"] | dict[str, float] | None, PlainValidator(_check_class_weights)]


class Cache(Section):
    """What is kept between runs."""

    max_gigabytes: Annotated[float, Field(ge=0)]


class Evaluate(Section):
    """The test."""

    batch_size: Size


class Params(Section):
    """All of `params.yaml`. Stages read only the keys listed in their entry in `dvc.yaml`."""

    seed: SeedNumber
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    workers: Annotated[int, Field(ge=0)] | Literal["auto"]
    processes: Size | Literal["auto"] = "auto"
    precision: Precision
    cache: Cache
    data: Data
    split: Split
    model: Model
    class_weights: ClassWeights = None
    train_head: TrainHead
    finetune: Finetune
    evaluate: Evaluate


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `1e-05`, as DVC writes a small number, is a number (dvc#5971, dvc#8466)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_params(path: Path) -> Params:
    """Read and check all of the pipeline's `params.yaml`; raises what `load_section` does."""
    return load_section(path, Params)


def load_section(path: Path, kind: type[AnySection]) -> AnySection:
    """Read and check all of `path`, a mapping with the keys of `kind`.

    Raises:
        StageError: naming the file, each bad key, its value and what it may be.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise StageError(f"{path}: empty or not a mapping of keys to values; `git checkout {path}` brings it back")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = dict.fromkeys(_problem(detail, kind) for detail in error.errors(include_url=False))
        raise StageError(f"{path}: {'; '.join(problems)}") from None


def _problem(detail: Any, kind: type[Section]) -> str:  # noqa: ANN401 (pydantic's ErrorDetails: its context has no type)
    keys, fields = _known_keys(detail["loc"], kind)
    if detail["type"] == "missing":
        return f"{keys}: is missing"
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(keys.rpartition(".")[2], fields, n=1)
        return f"{keys}: unknown key; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}")
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if isinstance(detail["input"], dict):
        return f"{keys}: {message}"
    return f"{keys}: {message}, is {detail['input']!r}"


def _known_keys(location: tuple[int | str, ...], kind: type[Section]) -> tuple[str, list[str]]:
    """Return the dotted key and its allowed siblings; pydantic's location also names a union's branch."""
    keys: list[str] = []
    section: type[BaseModel] | None = kind
    fields: list[str] = []
    for key in location:
        if section is None:
            break
        keys.append(str(key))
        fields = list(section.model_fields)
        inner = section.model_fields[str(key)].annotation if key in fields else None
        section = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    return ".".join(keys), fields


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        flat |= inner
    return flat


# Suffixes of weight files.
_SUFFIXES = {".pth", ".pt", ".bin", ".safetensors"}


def weight_file(weights: str | None) -> Path | None:
    """Return the file that `model.weights` means, or `None` where it is a name or null."""
    if weights is None or not ("/" in weights or "\\" in weights or Path(weights).suffix.lower() in _SUFFIXES):
        return None
    return Path(weights).expanduser()
