"""What to do to which weight: an ordered tuple of steps, the same in Python and in YAML.

A rule is a glob over weight paths: ``*`` matches any characters, ``/`` among them, ``?`` one
character, ``[ab]`` one of a set. A rule that starts with ``re:`` is a regular expression that must
match the whole path. ``exclude`` is stronger than ``include``. The bare ``"*"`` stands for every
weight that a contraction uses as a matrix; what else could be compressed (an embedding, a tied
head) has to be named by a rule of its own.
"""

import collections.abc
import difflib
import hashlib
import os
import pathlib
import re
from typing import Any, get_args

import msgspec

from jaxcomp.errors import RecipeError
from jaxcomp.pruning import Magnitude, SparseGPT, Wanda
from jaxcomp.quantization import AWQ, GPTQ, RTN, Binary, LLMInt8, SmoothQuant, Ternary
from jaxcomp.quantization.trainable import FakeQuant, FakeQuantValues
from jaxcomp.rules import close_names, compiled, fits
from jaxcomp.step import Step

AnyStep = (
    RTN
    | GPTQ
    | AWQ
    | SmoothQuant
    | LLMInt8
    | Magnitude
    | Wanda
    | SparseGPT
    | Ternary
    | Binary
    | FakeQuant
    | FakeQuantValues
)

KEPT = ("*lm_head*", "*router*")
"""What presets exclude: the usual names of a head, and of what sends tokens to experts.

Alone among rules these may match nothing."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An ordered tuple of steps.

    Attributes:
      steps: what to do, first to last. Where several steps name the same weight, each continues
        from what the one before it left.

    Example:
      >>> from jaxcomp.formats.spec import Int
      >>> recipe = Recipe(steps=(GPTQ(format=Int(bits=4, group_size=128), exclude=("*head*",)),))
      >>> recipe.matches(0, "layers/0/mlp/up/kernel"), recipe.matches(0, "lm_head/kernel")
      (True, False)
    """

    steps: tuple[AnyStep, ...]

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Recipe":
        """Reads a recipe from a YAML file.

        Args:
          path: the file.

        Returns:
          The recipe.

        Raises:
          RecipeError: the file is missing or is no recipe; the message names the file, the key and
            what is allowed there.
        """
        path = pathlib.Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"recipe {path}: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {path}: not a UTF-8 text file ({error}).") from error
        return cls.loads(text, str(path))

    @classmethod
    def loads(cls, text: str, source: str = "<string>") -> "Recipe":
        """Reads a recipe from YAML text; ``source`` names it in errors."""
        try:
            raw = msgspec.yaml.decode(text)
        except msgspec.DecodeError as error:
            detail = " ".join(str(error.__cause__ or error).split())
            raise RecipeError(f"recipe {source}: not valid YAML: {detail}.") from error
        try:
            recipe = msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise RecipeError(f"recipe {source}: {_explain(str(error), raw, cls)}") from error
        recipe.check(source)
        return recipe

    def dump(self, path: str | os.PathLike) -> None:
        """Writes the recipe as YAML, options at their defaults left out; ``load`` gives it back."""
        pathlib.Path(path).write_text(self.dumps(), encoding="utf-8")

    def dumps(self) -> str:
        """The recipe as YAML text, options at their defaults left out."""
        return msgspec.yaml.encode(_without_defaults(self)).decode()

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of all options, in hexadecimal: equal for equal recipes."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    def check(self, source: str = "recipe") -> None:
        """Raises a ``RecipeError`` when there is no step, or a step has no or malformed rules."""
        if not self.steps:
            raise RecipeError(f"{source}: a recipe needs at least one step.")
        for index, step in enumerate(self.steps):
            if not step.include:
                raise RecipeError(
                    f"{source}: {_label(index, step)} has an empty include, so it applies to "
                    "nothing; "
                    'leave include out for every weight, or name paths, such as "*mlp*".'
                )
            for rule in (*step.include, *step.exclude):
                compiled(rule)

    def matches(self, index: int, path: str) -> bool:
        """Whether step ``index`` applies to the weight at ``path``."""
        return matches(self.steps[index], path)

    def resolve(
        self, paths: collections.abc.Iterable[str], on_request: collections.abc.Iterable[str] = ()
    ) -> dict[str, tuple[int, ...]]:
        """Says for each weight which steps apply to it.

        Args:
          paths: weights that the bare rule ``"*"`` stands for: those that contractions use.
          on_request: further weights that can be compressed, but only when a rule other than the
            bare ``"*"`` names them: embeddings, tied heads.

        Returns:
          For each weight that some step applies to, in the order given, the indices of those steps.

        Raises:
          RecipeError: a rule matches no weight, or a step applies to none.

        Example:
          >>> recipe = Recipe(steps=(Wanda(sparsity=0.5, include=("*mlp*",)),))
          >>> recipe.resolve(["attention/kernel", "mlp/kernel"])
          {'mlp/kernel': (0,)}
        """
        self.check()
        paths, on_request = list(paths), list(on_request)
        everything = paths + on_request
        found: dict[str, list[int]] = {path: [] for path in everything}
        for index, step in enumerate(self.steps):
            named = tuple(rule for rule in step.include if rule != "*")
            for rule in step.include:
                if not any(fits(rule, p) for p in (paths if rule == "*" else everything)):
                    raise RecipeError(_unmatched(index, step, "include", rule, everything))
            for rule in step.exclude:
                if rule not in KEPT and not any(fits(rule, p) for p in everything):
                    raise RecipeError(_unmatched(index, step, "exclude", rule, everything))
            chosen = [p for p in paths if matches(step, p)]
            chosen += [p for p in on_request if _any(named, p) and not _any(step.exclude, p)]
            if not chosen:
                raise RecipeError(
                    f"{_label(index, step)} applies to no weight: exclude {list(step.exclude)} "
                    f"removes all that include {list(step.include)} matches; loosen one of them."
                )
            for path in chosen:
                found[path].append(index)
        return {path: tuple(steps) for path, steps in found.items() if steps}


def matches(step: Step, path: str) -> bool:
    """Whether a step's rules take in the weight at ``path``."""
    return _any(step.include, path) and not _any(step.exclude, path)


def _any(rules: tuple[str, ...], path: str) -> bool:
    return any(fits(rule, path) for rule in rules)


def _label(index: int, step: Step) -> str:
    return f"step {index} ({step.__struct_config__.tag})"


def _unmatched(index: int, step: Step, which: str, rule: str, paths: list[str]) -> str:
    if not paths:
        return f"{_label(index, step)}: the model has no weight that could be compressed."
    close = close_names(rule, paths)
    shown = ", ".join(close) + (", .." if len(paths) > len(close) else "")
    hint = ""
    if not rule.startswith("re:") and "*" not in rule:
        hint = ' A rule is matched against the whole path; put "*" around a part of one.'
    return (
        f"{_label(index, step)}: {which} rule {rule!r} matches none of the model's {len(paths)} "
        f"weights; the closest are {shown}.{hint} Correct or remove the rule."
    )


def _without_defaults(value: Any) -> Any:
    """A struct as plain data, fields at their defaults left out (tags stay)."""
    if isinstance(value, msgspec.Struct):
        config = value.__struct_config__
        plain = {config.tag_field: config.tag} if config.tag is not None else {}
        for field in msgspec.structs.fields(value):
            item = getattr(value, field.name)
            default = field.default
            if default is msgspec.NODEFAULT and field.default_factory is not msgspec.NODEFAULT:
                default = field.default_factory()
            if default is msgspec.NODEFAULT or type(item) is not type(default) or item != default:
                plain[field.encode_name] = _without_defaults(item)
        return plain
    if isinstance(value, tuple | list):
        return [_without_defaults(item) for item in value]
    return value


def _explain(message: str, raw: Any, root: type) -> str:
    """Adds to a validation error what is allowed at the place it names."""
    complaint, _, place = message.partition(" - at `")
    place = place.rstrip("`")
    complaint = complaint.removeprefix("Object ").replace("`", "'")
    trail = re.findall(r"\.([A-Za-z_]\w*)|\[(\d+|\.\.\.)\]", place)
    steps = [name or (int(number) if number.isdigit() else None) for name, number in trail]
    where = place.removeprefix("$").removeprefix(".") or "the top level"
    allowed = _allowed(complaint, raw, root, steps)
    return f"{where}: {complaint[:1].lower()}{complaint[1:]}.{allowed}"


def _allowed(complaint: str, raw: Any, root: type, steps: list) -> str:
    types: tuple = (root,)
    tag_field = None
    for step in steps:
        types = tuple(t for t in types if t is not type(None))
        if isinstance(step, str):
            structs = [t for t in types if isinstance(t, type) and issubclass(t, msgspec.Struct)]
            structs = _narrowed(structs, raw)
            if structs and step == structs[0].__struct_config__.tag_field:
                tag_field, types = step, tuple(structs)
                break
            types = tuple(m for s in structs for m in _members(_hints(s).get(step)))
            raw = raw.get(step) if isinstance(raw, dict) else None
        else:
            types = tuple(m for t in types for a in get_args(t)[:1] for m in _members(a))
            raw = (
                raw[step]
                if isinstance(raw, list) and step is not None and step < len(raw)
                else None
            )
    structs = [t for t in types if isinstance(t, type) and issubclass(t, msgspec.Struct)]
    if not structs:
        return ""
    tags = [s.__struct_config__.tag for s in structs]
    field = structs[0].__struct_config__.tag_field
    wrong = re.search(r"'([^']*)'", complaint)
    if (
        tag_field
        or "invalid value" in complaint.lower()
        or f"required field '{field}'" in complaint
    ):
        return _choices(f"{field} is one of", tags, wrong)
    names = [f.encode_name for s in _narrowed(structs, raw) for f in msgspec.structs.fields(s)]
    names = ([field] if field else []) + list(dict.fromkeys(names))
    return _choices("Allowed keys:", names, wrong) if "field" in complaint else ""


def _choices(intro: str, names: list[str], wrong: re.Match | None) -> str:
    close = difflib.get_close_matches(wrong.group(1), names, n=1) if wrong else []
    meant = f" Did you mean {close[0]!r}?" if close and close[0] != wrong.group(1) else ""
    return f"{meant} {intro} {', '.join(names)}."


def _narrowed(structs: list, raw: Any) -> list:
    """The struct that the tag in ``raw`` chooses, or all of them."""
    if isinstance(raw, dict):
        same = [
            s
            for s in structs
            if s.__struct_config__.tag is not None
            and raw.get(s.__struct_config__.tag_field) == s.__struct_config__.tag
        ]
        return same or structs
    return structs


def _hints(struct: type) -> dict[str, Any]:
    return {f.encode_name: f.type for f in msgspec.structs.fields(struct)}


def _members(annotation: Any) -> tuple:
    if annotation is None:
        return ()
    if type(annotation).__name__ in ("UnionType", "Union", "_UnionGenericAlias"):
        return get_args(annotation)
    return (annotation,)
