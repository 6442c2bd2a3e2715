"""In what two recipes differ, for the refusal to mix what they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def changed_fields(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    free: frozenset[str] = frozenset(),
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """«loss.kl_weight: 1e-06 -> 1e-05» for each field of two recipes that differs, but for the `free` ones.

    Args:
        free: dotted names of fields, or of sections, whose change changes nothing that is learned.
        defaults: what a field counts as that `before` lacks: an older version wrote it, which knew no other way.
    """
    flat_before, flat_after = flatten(defaults or {}) | flatten(before), flatten(after)
    return [
        f"{key}: {flat_before.get(key, 'unset')} -> {flat_after.get(key, 'unset')}"
        for key in sorted(flat_before.keys() | flat_after.keys())
        if flat_before.get(key, "unset") != flat_after.get(key, "unset")
        and key not in free
        and key.split(".")[0] not in free
    ]


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
