"""Export to Hugging Face: the same logits and tokens in transformers.

A model that the layout cannot express is refused by name.
"""

from __future__ import annotations

import itertools
import json
import lzma
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from data_prep.tokenizer import Tokenizer, convert
from data_prep.tokenizer.adversarial import adversarial_texts
from nextpt.base.errors import CheckpointError, DataPrepError
from nextpt.checkpoint.format import Checkpoint
from nextpt.config import Config
from nextpt.exchange import export_deepspeed, export_hf, load_hf
from nextpt.exchange.architectures import choose_architecture
from nextpt.model import Decoder, ModelSpec
from tests.support.models import POSITIONS, checkpoint_of, decoder, our_logits, some_tokens
from tests.support.tokenizers import KINDS, TEXTS

transformers = pytest.importorskip("transformers")

GRID = {
    "ffn": ("swiglu", "gelu", "relu2"),
    "bias": (False, True),
    "qk_norm": (False, True),
    "sliding_window": (None, 5),
    "logit_softcap": (None, 3.0),
    "tied_embeddings": (False, True),
}
# One of each architecture.
SHAPES: list[dict[str, Any]] = [
    {},
    {"qk_norm": True},
    {"sliding_window": 7},
    {"ffn": "gelu"},
    {"ffn": "gelu", "qk_norm": True},
    {"bias": True, "sliding_window": 7},
    {"bias": True, "qk_norm": True},
    {"logit_softcap": 3.0},
    {"sliding_window": 7, "layer_pattern": ["local", "global"], "local_rope_base": 50.0},
]
SCALINGS = {
    "linear": {"kind": "linear", "factor": 4.0, "original_max_position": 10},
    "llama3": {
        "kind": "llama3",
        "factor": 8.0,
        "original_max_position": 20,
        "low_freq_factor": 1.0,
        "high_freq_factor": 3.0,
    },
    # Its ramp inside a head of 16
    "yarn": {
        "kind": "yarn",
        "factor": 3.0,
        "original_max_position": 1000,
        "beta_fast": 4.0,
        "beta_slow": 2.0,
    },
}


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    KINDS["byte_level"](path)
    return path


def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    with torch.no_grad():
        return model.eval()(tokens).logits


def check_round_trip(
    config: Config, model: Decoder, root: Path, tokenizer: Path, **export: Any
) -> str:
    """Export, compare logits at all positions, import, compare weights bit by bit.

    Returns the architecture.
    """
    name = export_hf(
        checkpoint_of(config, model, root / "checkpoints"), tokenizer, root / "hf", **export
    )
    tokens = some_tokens(config.model.vocab_size, min(POSITIONS, config.max_position))
    torch.testing.assert_close(
        their_logits(root / "hf", tokens), our_logits(model, tokens), atol=1e-4, rtol=0
    )
    reloaded = load_hf(root / "hf")
    assert reloaded.spec == ModelSpec.from_config(config)
    mine, theirs = dict(model.named_parameters()), dict(reloaded.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[n]) for n, p in mine.items())
    torch.testing.assert_close(
        our_logits(reloaded, tokens), our_logits(model, tokens), atol=0, rtol=0
    )
    return name


def possible(options: dict[str, Any]) -> bool:
    """Cases of the table in docs/export.md."""
    plain, bias, qk_norm = options["ffn"] != "swiglu", options["bias"], options["qk_norm"]
    if options["logit_softcap"]:
        return not (plain or bias or qk_norm)
    return not (options["sliding_window"] and qk_norm and (plain or bias))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "values", [*itertools.product(*GRID.values())], ids=lambda v: "-".join(map(str, v))
)
def test_every_combination_round_trips_with_equal_logits_or_is_refused(
    values: tuple[Any, ...], tmp_path: Path, tokenizer_file: Path
) -> None:
    options = dict(zip(GRID, values, strict=True))
    config, model = decoder(**options)
    if possible(options):
        check_round_trip(config, model, tmp_path, tokenizer_file)
        return
    with pytest.raises(CheckpointError, match="no architecture of transformers has") as raised:
        export_hf(
            checkpoint_of(config, model, tmp_path / "checkpoints"), tokenizer_file, tmp_path / "hf"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
    assert ("model.logit_softcap" in str(raised.value)) == bool(options["logit_softcap"])


@pytest.mark.thorough
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)) or "plain")
def test_rotary_scaling_in_every_architecture(
    shape: dict[str, Any], scaling: str, tmp_path: Path, tokenizer_file: Path
) -> None:
    check_round_trip(
        *decoder(head_dim=16, rope_base=500.0, rope_scaling=SCALINGS[scaling], **shape),
        tmp_path,
        tokenizer_file,
    )


@pytest.mark.thorough
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_configs_give_the_same_logits(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path
) -> None:
    draw = data.draw
    options = {
        key: draw(st.sampled_from(values), key)
        for key, values in GRID.items()
        if key != "logit_softcap"
    }
    options["logit_softcap"] = (
        draw(st.sampled_from([None, 0.7, 30.0]), "softcap")
        if possible(options | {"logit_softcap": 1.0})
        else None
    )
    if options["sliding_window"]:
        options["sliding_window"] = draw(st.integers(1, POSITIONS + 3), "window")
    kv_heads, groups = draw(st.integers(1, 3), "kv_heads"), draw(st.integers(1, 3), "groups")
    heads = kv_heads * groups
    whole = draw(st.booleans(), "whole") or options["logit_softcap"] is not None
    options |= {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 9), "half"),
        "depth": draw(st.integers(1, 3), "depth"),
        "width": (
            heads * draw(st.integers(8, 12), "per head")
            if whole
            else draw(st.integers(8, 40), "width")
        ),
        "ffn_width": draw(st.one_of(st.none(), st.integers(1, 50)), "ffn_width"),
        "vocab_size": draw(st.integers(2, 200), "vocabulary"),
        "rope_base": draw(st.sampled_from([10.0, 1e4, 5e5]), "base"),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-2]), "eps"),
        "rope_scaling": draw(st.sampled_from([None, *SCALINGS.values()]), "scaling"),
    }
    config, model = decoder(**options)
    root = tmp_path_factory.mktemp("drawn")
    try:
        choose_architecture(ModelSpec.from_config(config))
    except CheckpointError:
        assert not possible(
            options | {"sliding_window": (options["sliding_window"] or POSITIONS) < POSITIONS}
        )
        return
    check_round_trip(config, model, root, tokenizer_file)


def test_a_window_that_hides_nothing_is_none() -> None:
    config, _ = decoder(sliding_window=POSITIONS, qk_norm=True, bias=True)
    assert choose_architecture(ModelSpec.from_config(config)).name == "HYV3ForCausalLM"
    windowed = replace(ModelSpec.from_config(config), sliding_window=POSITIONS - 1)
    message = "model.qk_norm = true together with model.sliding_window = 39 together with model.b"
    with pytest.raises(CheckpointError, match=message):
        choose_architecture(windowed)
    odd, _ = decoder(width=30, head_dim=8, logit_softcap=1.0)
    with pytest.raises(
        CheckpointError, match=r"model.logit_softcap together with model.head_dim = 8"
    ):
        choose_architecture(ModelSpec.from_config(odd))


@pytest.mark.thorough
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 3.0}], ids=["llama", "vaultgemma"])
def test_large_models_are_divided_among_files(
    options: dict[str, Any], tmp_path: Path, tokenizer_file: Path
) -> None:
    check_round_trip(*decoder(**options), tmp_path, tokenizer_file, shard_bytes=10_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = {p.name: load_file(p) for p in (tmp_path / "hf").glob("model-*.safetensors")}
    assert set(index["weight_map"].values()) == files.keys() and len(files) > 5
    for tensors in files.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 10_000
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    # All files have the same permissions
    assert len({p.stat().st_mode for p in (tmp_path / "hf").iterdir()}) == 1


@pytest.mark.thorough
def test_bf16_halves_the_file_and_rounds_once(tmp_path: Path, tokenizer_file: Path) -> None:
    config, model = decoder(qk_norm=True)
    export_hf(
        checkpoint_of(config, model, tmp_path / "checkpoints"),
        tokenizer_file,
        tmp_path / "hf",
        dtype="bf16",
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    reloaded = load_hf(tmp_path / "hf")
    for name, p in model.named_parameters():
        assert torch.equal(reloaded.get_parameter(name), p.bfloat16().float()), name
    size = (tmp_path / "hf" / "model.safetensors").stat().st_size
    assert size == pytest.approx(2 * sum(p.numel() for p in model.parameters()), rel=0.1)


@pytest.mark.thorough
def test_generation_equals_ours(tmp_path: Path, tokenizer_file: Path) -> None:
    """Greedy, from the folder alone: start token, positions and the end token's id are right."""
    config, model = decoder(sliding_window=5, vocab_size=420)
    export_hf(
        checkpoint_of(config, model, tmp_path / "checkpoints"), tokenizer_file, tmp_path / "hf"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    own = Tokenizer(tokenizer_file)
    prompt = tokenizer("The quick fox", return_tensors="pt").input_ids
    assert prompt[0].tolist() == [own.start_id, *own.encode("The quick fox").tolist()]
    tokens = prompt
    for _ in range(12):
        tokens = torch.cat([tokens, our_logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
        if int(tokens[0, -1]) == own.end_id:
            break
    generated = theirs.generate(prompt, do_sample=False, max_new_tokens=12)
    assert generated.tolist() == tokens.tolist()


def test_a_normalized_special_token_is_exported_by_its_own_content(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    """The library names it by its normalized form, for which transformers would add an id."""
    content = json.loads(tokenizer_file.read_text())
    content["normalizer"] = {"type": "Prepend", "prepend": "_"}
    for token in content["added_tokens"]:
        token["normalized"] = True
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    own = Tokenizer(path)
    config, model = decoder(vocab_size=own.vocab_size)
    export_hf(checkpoint_of(config, model, tmp_path / "checkpoints"), path, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (own.start_id, own.end_id)
    assert theirs.eos_token == "<|endoftext|>" and len(theirs) == own.vocab_size


# Every kind in one architecture, and one kind in all: transformers picks classes by both.
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in KINDS), *(("llama", s) for s in SHAPES[1:])],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v)),
)
def test_the_exported_tokenizer_encodes_as_ours(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    KINDS[kind](tmp_path / "tokenizer.json")
    own = Tokenizer(tmp_path / "tokenizer.json")
    config, model = decoder(vocab_size=own.vocab_size, **options)
    export_hf(
        checkpoint_of(config, model, tmp_path / "checkpoints"),
        tmp_path / "tokenizer.json",
        tmp_path / "hf",
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    described = [
        json.loads((tmp_path / "hf" / name).read_text())
        for name in ("config.json", "generation_config.json")
    ]
    for start, end in (
        (theirs.bos_token_id, theirs.eos_token_id),
        *((d["bos_token_id"], d["eos_token_id"]) for d in described),
    ):
        assert (start, end) == (own.start_id, own.end_id)
    texts = [*TEXTS, "", " ", "  two  spaces ", "\n\ttabs\n"]
    texts += (
        []
        if kind == "characters"
        else [
            "z\u0301 e\u0301 \ufb01 \u212b",
            "\U0001f468\u200d\U0001f469\u200d\U0001f467",
            "\x00\x7f\x80",
            "don't I'LL",
        ]
    )
    for text in texts:
        if kind == "characters" and not set(text) <= set("".join(TEXTS)):
            continue
        ids = own.encode(text).tolist()
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs(text).input_ids == [own.start_id, *ids], text
        assert theirs.decode(ids, skip_special_tokens=True) == own.decode(ids), text
    reloaded = Tokenizer(tmp_path / "hf" / "tokenizer.json")
    assert (reloaded.start_id, reloaded.end_id) == (own.start_id, own.end_id)


@pytest.mark.slow
@pytest.mark.skipif(
    "NEXTPT_TEST_DATA" not in os.environ,
    reason="NEXTPT_TEST_DATA names no folder of real tokenizers",
)
@pytest.mark.parametrize(
    "name", ["gptneox_20B_tokenizer.json", "tekken_240911.json.xz", "gpt2_encoder.json"]
)
def test_real_tokenizers_encode_as_ours(name: str, tmp_path: Path) -> None:
    data = Path(os.environ["NEXTPT_TEST_DATA"])
    source = data / "tokenizers" / name
    if source.suffix == ".xz":
        source = tmp_path / "tekken.json"
        source.write_bytes(lzma.decompress((data / "tokenizers" / name).read_bytes()))
    if name.startswith("gpt2"):
        for part, called in (
            ("gpt2_encoder.json", "encoder.json"),
            ("gpt2_vocab.bpe", "vocab.bpe"),
        ):
            shutil.copyfile(data / "tokenizers" / part, tmp_path / called)
        source = tmp_path / "encoder.json"
    convert(
        str(source), tmp_path / "tokenizer.json", pattern=None, specials=(), start=None, end=None
    )
    own = Tokenizer(tmp_path / "tokenizer.json")
    config, model = decoder(vocab_size=own.vocab_size, depth=1, width=8, heads=1, kv_heads=1)
    export_hf(
        checkpoint_of(config, model, tmp_path / "checkpoints"),
        tmp_path / "tokenizer.json",
        tmp_path / "hf",
        dtype="bf16",
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (own.start_id, own.end_id)
    specials = [
        t["content"]
        for t in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
        if t["special"]
    ]
    texts = [t for t in adversarial_texts() if not any(s in t for s in specials)]
    texts.append((data / "tinyshakespeare.txt").read_text(encoding="utf-8")[:200_000])
    for text in texts:
        assert theirs(text).input_ids == [own.start_id, *own.encode(text).tolist()], text[:200]
    assert len(texts) > 50


def to_hf(checkpoint: Checkpoint, tokenizer: Path, output: Path) -> None:
    export_hf(checkpoint, tokenizer, output)


def to_deepspeed(checkpoint: Checkpoint, tokenizer: Path, output: Path) -> None:
    export_deepspeed(checkpoint, output)


Export = Callable[[Checkpoint, Path, Path], None]


@pytest.mark.thorough
@pytest.mark.parametrize("export", [to_hf, to_deepspeed])
def test_an_existing_output_is_not_overwritten(
    export: Export, tmp_path: Path, tokenizer_file: Path
) -> None:
    checkpoint = checkpoint_of(*decoder(), tmp_path / "checkpoints")
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("out", "link"):
        with pytest.raises(CheckpointError, match=f"{name} exists already; remove it"):
            export(checkpoint, tokenizer_file, tmp_path / name)
    with pytest.raises(CheckpointError, match="none for the output does not exist"):
        export(checkpoint, tokenizer_file, tmp_path / "none" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints",
        "link",
        "out",
    ] and not list((tmp_path / "out").iterdir())


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("export", [to_hf, to_deepspeed])
@pytest.mark.parametrize("lack", [1, 4, 12, 30])
def test_a_full_disk_is_named_and_nothing_is_left(
    export: Export, lack: int, tmp_path: Path, tokenizer_file: Path
) -> None:
    """lack: Pages missing on the disk: it is full in the last file or an earlier one."""
    checkpoint = checkpoint_of(*decoder(logit_softcap=2.0), tmp_path / "checkpoints")
    disk = tmp_path / "disk"
    disk.mkdir()
    export(checkpoint, tokenizer_file, tmp_path / "whole")
    size = 4096 * (
        sum(-(-p.stat().st_size // 4096) for p in (tmp_path / "whole").rglob("*") if p.is_file())
        - lack
    )
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(
            CheckpointError,
            match=r"out cannot be written: (no space left|No space left) on (the )?device; nothing",
        ):
            export(checkpoint, tokenizer_file, disk / "out")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, tokenizer_file: Path) -> None:
    checkpoint = checkpoint_of(*decoder(), tmp_path / "checkpoints")
    reads = iter(range(5))

    class Interrupted(Checkpoint):
        def read_whole(self, name: str, kind: str = "weight") -> Tensor:
            if next(reads, None) is None:
                raise KeyboardInterrupt
            return super().read_whole(name, kind)

    with pytest.raises(KeyboardInterrupt):
        export_hf(
            Interrupted(checkpoint.folder), tokenizer_file, tmp_path / "hf", shard_bytes=10_000
        )
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_bad_requests_are_named(tmp_path: Path, tokenizer_file: Path) -> None:
    checkpoint = checkpoint_of(*decoder(), tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="--dtype fp8 is not known; use one of fp32, bf16"):
        export_hf(checkpoint, tokenizer_file, tmp_path / "hf", dtype="fp8")
    with pytest.raises(DataPrepError, match=r"tokenizer .*none.json does not exist"):
        export_hf(checkpoint, tmp_path / "none.json", tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]
