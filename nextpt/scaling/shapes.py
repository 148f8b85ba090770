"""Model shapes: the config of a run with another width or depth, heads and ratios kept."""

from __future__ import annotations

from typing import Any

from nextpt.base.errors import ScalingError
from nextpt.config import Config, parse_config


def group_width(config: Config) -> int:
    """Width of the query heads that share a key head."""
    model = config.model
    return model.resolved_head_dim * (model.heads // (model.kv_heads or model.heads))


def with_width(config: Config, width: int, source: str = "--widths") -> Config:
    """The config with another width: more or fewer heads of the same width.

    Args:
        config: The run.
        width: Width of the residual stream.
        source: Option or key that the width is of, for messages.

    Raises:
        ScalingError: The width is no multiple of the width of the heads that belong together.
    """
    model, group = config.model, group_width(config)
    if width % group:
        raise ScalingError(
            f"{source} {width} is not a multiple of {group}, the width of the query heads of one"
            " key head (model.head_dim x model.heads / model.kv_heads)"
        )
    values: dict[str, Any] = {"width": width, "head_dim": model.resolved_head_dim}
    values["heads"] = width // values["head_dim"]
    if model.kv_heads is not None:
        values["kv_heads"] = width // group
    if model.ffn_width is not None:
        values["ffn_width"] = round(model.ffn_width * width / model.width)
    return _with_model(config, values)


def with_depth(config: Config, depth: int) -> Config:
    """The config with another number of blocks."""
    return _with_model(config, {"depth": depth})


def _with_model(config: Config, values: dict[str, Any]) -> Config:
    sections = config.model_dump(mode="json")
    sections["model"] |= values
    shape = " ".join(f"model.{key}={value}" for key, value in values.items())
    return parse_config(sections, f"the run with {shape}")
