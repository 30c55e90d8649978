"""Which linears get other bits than the rest: `--keep PATTERN=8`, by the names of modules."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate

from quant.errors import UsageError
from quant.plan import HEAD
from quant.scheme import DEFAULT_INT4_GROUP_SIZE, Scheme
from quant.schemes.affine import Affine

PRECISIONS = ("4", "8", "dense")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears with one input, which engines multiply as one matrix: those of a layer have one scheme."""

_EXAMPLE = "write it like '*.mlp.down_proj=8', 're:.*layers\\.(0|1)\\..*=8' or lm_head=dense"


@dataclass(frozen=True)
class KeepRule:
    """Modules whose name, or whose weight's name, `pattern` matches get `precision`: 4, 8 or dense.

    A pattern is a glob of the whole name, or `re:` and a regular expression that matches from its start.
    """

    pattern: str
    precision: str

    def __str__(self) -> str:
        return f"{self.pattern}={self.precision}"

    def matches(self, module: str) -> bool:
        expression = (
            self.pattern.removeprefix("re:") if self.pattern.startswith("re:") else translate(self.pattern)
        )
        return any(re.match(expression, name) for name in (module, f"{module}.weight"))


def parse_rule(text: str) -> KeepRule:
    """A rule as a command line has it, `PATTERN=8`.

    Raises:
        UsageError: it is none.
    """
    pattern, separator, precision = text.rpartition("=")
    if not separator or not pattern or precision not in PRECISIONS:
        raise UsageError(f"--keep {text!r} is not a pattern, = and one of {', '.join(PRECISIONS)}", _EXAMPLE)
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else translate(pattern))
    except re.error as error:
        raise UsageError(f"--keep {text!r} has no regular expression: {error}", _EXAMPLE) from error
    return KeepRule(pattern, precision)


def exceptions(rules: Sequence[KeepRule], modules: Sequence[str], scheme: Scheme) -> dict[str, Scheme | None]:
    """What the rules give to modules, by full name; of several rules for one, the last. None is dense.

    modules: all that can be quantized. scheme: that of the others.

    Raises:
        UsageError: a rule fits no module, or a layer's fused linears would differ, or the format cannot mix schemes.
    """
    if rules:
        require_mixable(scheme, "--keep", to_dense_only=all(rule.precision == "dense" for rule in rules))
    chosen: dict[str, str] = {}
    for rule in rules:
        found = [module for module in modules if rule.matches(module)]
        if not found:
            raise UsageError(
                f"--keep {rule} fits no linear of the model",
                f"names are like {modules[0]}; embedding and norms are always dense",
            )
        chosen |= dict.fromkeys(found, rule.precision)
    for members in fused_sets(modules):
        given = {chosen.get(module) for module in members}
        if len(given) > 1:
            names = ", ".join(members)
            raise UsageError(
                f"--keep gives different bits to {names}",
                "they have one input and engines multiply them as one: give all of them the same",
            )
    return {module: with_precision(scheme, precision) for module, precision in chosen.items()}


def require_mixable(scheme: Scheme, option: str, *, to_dense_only: bool = False) -> None:
    """UsageError where builds in `scheme` cannot have some linears in another, or not leave them dense."""
    if not isinstance(scheme, Affine):
        raise UsageError(
            f"{option} does not go with {scheme.name}: bitsandbytes stores all linears alike",
            f"leave out {option}, or choose int4 or int8",
        )
    if not scheme.symmetric and not to_dense_only:
        raise UsageError(
            f"{option} does not go with --asymmetric: transformers then takes one scheme for all linears",
            f"leave out {option} or --asymmetric",
        )


def with_precision(scheme: Scheme, precision: str) -> Affine | None:
    """The scheme of `precision` beside `scheme`: that itself where it has these bits, else the usual one."""
    assert isinstance(scheme, Affine)
    if precision == "dense":
        return None
    bits = int(precision)
    if bits == scheme.bits:
        return scheme
    return replace(scheme, bits=bits, group_size=DEFAULT_INT4_GROUP_SIZE if bits == 4 else None)


def fused_sets(modules: Sequence[str]) -> Iterator[list[str]]:
    """The modules in sets that share their bits, most of them alone; the head is not among them."""
    present = set(modules)
    for module in modules:
        prefix, _, kind = module.rpartition(".")
        fused = next((kinds for kinds in FUSED if kind in kinds), (kind,))
        members = [f"{prefix}.{name}" for name in fused if f"{prefix}.{name}" in present]
        if module != HEAD and members[0] == module:
            yield members
