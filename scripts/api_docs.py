"""Reference of the public API, docs/api.md, written from docstrings by griffe2md.

    python scripts/api_docs.py            write docs/api.md
    python scripts/api_docs.py --check    exit with 1 when docs/api.md is not what the code says

Sources are parsed, not imported.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import griffe
from griffe2md import ConfigDict, render_object_docs

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "api.md"
# Module -> public names, in the order of the page. Everything else may change without notice.
PUBLIC = {
    "nextpt.config": ("load_config", "to_yaml", "Config"),
    "nextpt.model": ("ModelSpec", "Decoder", "KVCache", "count", "Counts"),
    "nextpt.data.loader": ("Loader",),
    "nextpt.data.batch": ("Batch",),
    "nextpt.objective": ("next_token_loss", "Loss"),
    "nextpt.optim.spec": ("OptimizerSpec", "ParameterGroup", "StateKind"),
    "nextpt.optim.per_parameter": ("PerParameterSpec",),
    "nextpt.parallel.mesh": ("Mesh",),
    "nextpt.train.run": ("run_training",),
    "nextpt.events": ("EventBus", "Listener", "StepEvent", "ValidationEvent", "read_events"),
    "nextpt.exchange.decoder": ("load_model",),
    "nextpt.exchange.import_hf": ("load_hf",),
    "nextpt.evaluate.evaluation": ("evaluate_model", "EvaluationProtocol"),
    "nextpt.evaluate.metrics": ("Metrics",),
    "nextpt.generate": ("generate", "Sampling"),
    "nextpt.scaling.fitting": ("fit", "Fit"),
    "data_prep.prepare": ("prepare",),
    "data_prep.spec": ("PrepSpec",),
    "data_prep.format": ("DatasetManifest",),
    "kernels.attention": ("attention", "attention_packed", "AttentionOutput", "PackedDocuments"),
    "kernels.cross_entropy": ("linear_cross_entropy", "LossOutput", "LinearCrossEntropy"),
}
OPTIONS: ConfigDict = {
    "heading_level": 2,
    "show_root_full_path": True,
    "show_object_full_path": False,
    "docstring_section_style": "list",
    "annotations_path": "brief",
    "signature_crossrefs": False,
    "show_signature_annotations": True,
    "show_if_no_docstring": False,
    "line_length": 100,
    "filters": ["!^_"],
    "inherited_members": False,
}
INTRODUCTION = """# Public API

Written by `make api` from the docstrings; `make lint` checks that it is up to date. A name that is
not on this page may change without notice. The command line is described by `nextpt --help`, the
keys of a run by `nextpt config keys`.
"""


def render() -> str:
    """The page as Markdown. Raises KeyError for a public name that does not exist."""
    loader = griffe.GriffeLoader(search_paths=[ROOT], docstring_parser="google")
    for package in sorted({module.split(".")[0] for module in PUBLIC}):
        loader.load(package)
    loader.resolve_aliases(implicit=True)
    parts = [INTRODUCTION]
    for module, names in PUBLIC.items():
        for name in names:
            definition = loader.modules_collection[f"{module}.{name}"]
            target = definition.final_target if definition.is_alias else definition
            page = render_object_docs(target, OPTIONS)
            parts.append(page.replace(f"`{target.path}", f"`{module}.{name}"))
    text = "\n".join(parts)
    text = re.sub(r"\[([^\]]*)\]\(#[^)]*\)", r"\1", text)  # anchors that plain Markdown lacks
    text = re.sub(r"</?code>", "`", text)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def main() -> int:
    """Write or check docs/api.md; returns the exit code."""
    text = render()
    if "--check" in sys.argv[1:]:
        if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text:
            return 0
        print(f"error: {TARGET.relative_to(ROOT)} is not what the docstrings say; run: make api")
        return 1
    TARGET.write_text(text, encoding="utf-8")
    print(f"written to {TARGET.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
