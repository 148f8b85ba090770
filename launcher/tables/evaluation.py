"""Tables of `nextpt eval`: loss per domain, by context, by token frequency, by checkpoint."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from launcher.console import build_table, format_half_width, format_interval


def evaluation_table(result: dict[str, Any]) -> Table:
    """Metrics per domain and in total, bits per byte with half the width of its interval."""
    step = "" if result["step"] is None else f", step {result['step']}"
    headings = (
        "domain",
        "tokens",
        "bytes",
        "nats/token",
        "perplexity",
        "bits/byte",
        "with EOD",
    )
    table = build_table(
        f"loss on whole documents{step} (context {result['window']}, stride {result['stride']})",
        headings,
    )
    for name, metrics in (*result["domains"].items(), ("total", result["total"])):
        table.add_row(
            name,
            f"{metrics['tokens']:,}",
            f"{metrics['bytes']:,}",
            f"{metrics['nats_per_token']:.3f}",
            f"{metrics['perplexity']:.2f}",
            format_half_width(metrics["bpb"], metrics["intervals"]["bpb"]),
            f"{metrics['bpb_with_eod']:.3f}",
        )
    return table


def context_table(result: dict[str, Any]) -> Table:
    """Loss by the number of tokens before the predicted token, document starts apart."""
    table = build_table("by tokens of context", ("context", "tokens", "nats/token", "95 %"))
    for row in result["by_context"]:
        name = f"{row['from']:,}"
        if row["from"] != row["to"]:
            name += f" to {row['to']:,}"
        if not row["document_start"]:
            name += ", later windows"
        table.add_row(
            name,
            f"{row['tokens']:,}",
            f"{row['nats_per_token']:.3f}",
            format_interval(row["interval"]),
        )
    return table


def frequency_table(result: dict[str, Any]) -> Table:
    """Loss by the frequency of the predicted token."""
    frequency = result["by_frequency"]
    table = build_table(
        f"by frequency of the token in the {frequency['counted_in']}",
        ("frequency", "tokens", "nats/token", "95 %"),
    )
    for row in frequency["bands"]:
        table.add_row(
            band_name(row),
            f"{row['tokens']:,}",
            f"{row['nats_per_token']:.3f}",
            format_interval(row["interval"]),
        )
    return table


def band_name(band: dict[str, Any]) -> str:
    """Name of a frequency band, such as "1 in 10,000 to 1 in 1,000"."""
    if band["to"] == 0:
        return "never"
    low, high = (f"1 in {round(1 / band[end]):,}" if band[end] else "" for end in ("from", "to"))
    if not band["from"]:
        return f"below {high}"
    return f"above {low}" if band["to"] == 1 else f"{low} to {high}"


def curve_table(result: dict[str, Any]) -> Table:
    """Bits per byte at every checkpoint."""
    table = build_table("bits/byte at every checkpoint", ("step", *result["domains"], "total"))
    for checkpoint in result["checkpoints"]:
        table.add_row(
            f"{checkpoint['step']:,}",
            *(
                format_half_width(metrics["bpb"], metrics["intervals"]["bpb"])
                for metrics in (*checkpoint["domains"].values(), checkpoint["total"])
            ),
        )
    return table


def compressor_table(result: dict[str, Any]) -> Table:
    """Bits per byte of the model beside general-purpose compressors on the same bytes."""
    domains = result["domains"]
    table = build_table(
        "bits per byte: all documents as one stream / document by document", ("", *domains)
    )
    table.add_row("this model", *(f"{m['bpb']:.3f}" for m in domains.values()), style="bold")
    for compressor in next(iter(domains.values()))["compressors"]:
        sizes = (metrics["compressors"][compressor] for metrics in domains.values())
        table.add_row(
            compressor,
            *(f"{size['bpb_concatenated']:.3f} / {size['bpb_documents']:.3f}" for size in sizes),
        )
    return table
