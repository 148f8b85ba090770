"""Error hints: unknown keys, also those of other frameworks, lead to the intended key."""

from __future__ import annotations

import pytest

from nextpt.base.errors import ConfigError
from nextpt.config import all_keys, parse_config
from nextpt.config.hints import COMPUTED, VALUES, hint
from tests.config.test_config import values

MEANINGS = {
    # Names of torchtitan, Megatron-LM, Hugging Face, nanoGPT, OLMo-core, litgpt
    "model.num_layers": "model.depth",
    "model.n_layer": "model.depth",
    "model.n_layers": "model.depth",
    "model.num_hidden_layers": "model.depth",
    "model.hidden_size": "model.width",
    "model.d_model": "model.width",
    "model.n_embd": "model.width",
    "model.dim": "model.width",
    "model.n_heads": "model.heads",
    "model.n_head": "model.heads",
    "model.num_attention_heads": "model.heads",
    "model.num_key_value_heads": "model.kv_heads",
    "model.n_kv_heads": "model.kv_heads",
    "model.intermediate_size": "model.ffn_width",
    "model.d_ff": "model.ffn_width",
    "model.rope_theta": "model.rope_base",
    "model.tie_word_embeddings": "model.tied_embeddings",
    "model.rms_norm_eps": "model.norm_eps",
    "model.max_position_embeddings": "model.max_position",
    "model.block_size": "data.sequence_length",
    "model.attn_implementation": "model.attention",
    "model.layer_types": "model.layer_pattern",
    "model.sliding_window_pattern": "model.layer_pattern",
    "model.rope_local_base_freq": "model.local_rope_base",
    "model.relu2": "model.ffn=relu2",
    "train.lr": "optimizer.lr",
    "train.learning_rate": "optimizer.lr",
    "optimizer.learning_rate": "optimizer.lr",
    "optimizer.beta1": "optimizer.betas",
    "optimizer.beta2": "optimizer.betas",
    "optimizer.max_grad_norm": "optimizer.grad_clip",
    "train.gradient_clipping": "optimizer.grad_clip",
    "train.weight_decay": "optimizer.weight_decay",
    "train.batch_size": "train.global_batch_size or train.micro_batch_size",
    "train.per_device_train_batch_size": "train.micro_batch_size",
    "train.max_steps": "train.steps",
    "train.max_iters": "train.steps",
    "train.bf16": "train.precision=bf16",
    "train.dtype": "train.precision",
    "train.gradient_checkpointing": "train.activation_checkpointing",
    "train.log_interval": "train.log_every",
    "train.seed": "run.seed",
    "train.warmup_steps": "schedule.warmup",
    "schedule.min_lr": "schedule.final_ratio",
    "data.seq_len": "data.sequence_length",
    "data.block_size": "data.sequence_length",
    "data.max_seq_len": "data.sequence_length",
    "data.num_workers": "data.prefetch_threads",
    "train.eval_interval": "validation.every_steps",
    "train.save_interval": "checkpoint.every_steps",
    "train.every_steps": "checkpoint.every_steps or validation.every_steps",
    "checkpoint.save_total_limit": "checkpoint.keep_last",
    "run.output_dir": "run.dir",
    "trackers.wandb_project": "trackers.wandb.project",
    # Sections, and keys without one
    "optim": "optimizer",
    "lr_scheduler": "schedule",
    "training": "train",
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    # Earlier names in another section, and misspellings
    "train.repeat_caps": "data.max_epochs",
    "train.step": "train.steps",
    "model.dept": "model.depth",
    "model.num_layer": "model.depth",
    "optimiser": "optimizer",
    "data.stages.0.mixin": "data.stages.0.mixing",
    "data.stages.2.seq_len": "data.sequence_length",
}


@pytest.mark.parametrize(("unknown", "meaning"), MEANINGS.items())
def test_names_of_other_frameworks_hint_at_the_key(unknown: str, meaning: str) -> None:
    assert hint(unknown) == f"did you mean {meaning}?"


@pytest.mark.parametrize("unknown", [n for n in MEANINGS if n.count(".") == 1])
def test_the_error_names_the_key_and_the_hint(unknown: str) -> None:
    section, _, leaf = unknown.partition(".")
    config = values()
    config.setdefault(section, {})[leaf] = 1
    with pytest.raises(ConfigError) as error:
        parse_config(config, "run.yaml")
    assert str(error.value) == f"run.yaml: unknown key {unknown}; {hint(unknown)}"


def test_computed_quantities_are_explained_as_computed() -> None:
    assert hint("train.gradient_accumulation_steps") == (
        "it is computed: train.global_batch_size / (train.micro_batch_size x ranks)"
    )
    assert "--ranks" in hint("train.world_size")


def test_a_key_of_another_section_is_the_first_hint() -> None:
    """For every key with one name, in every section that lacks it."""
    names = {key.name for key in all_keys()}
    sections = [key.name for key in all_keys() if key.is_section and "." not in key.name]
    for key in all_keys():
        if key.parent not in sections or key.leaf in COMPUTED | VALUES:
            continue
        for section in sections:
            if f"{section}.{key.leaf}" not in names:
                homes = [
                    other.name
                    for other in all_keys()
                    if other.leaf == key.leaf and ".N." not in other.name
                ]
                advice = hint(f"{section}.{key.leaf}").removeprefix("did you mean ")
                assert advice.rstrip("?").split(" or ")[0] == homes[0], (section, key.name)


def test_an_unknown_name_gets_the_keys_of_its_section() -> None:
    assert hint("guard.zzzzz") == (
        "the keys of guard are spike_sigma, window, rollback_after, max_rollbacks"
    )
    assert hint("zzzzz").startswith("the sections are run, data, model, ")


def test_no_alias_is_a_key_of_its_section() -> None:
    names = {key.name for key in all_keys()}
    for key in all_keys():
        for alias in key.metadata.aliases:
            assert f"{key.parent}.{alias}".lstrip(".") not in names, (key.name, alias)
