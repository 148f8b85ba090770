"""The whole path on this machine's CPU: corpus, shards, training, resume, evaluation, samples. `make demo` runs it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

from data_prep.files import atomic_write, canonical_json
from data_prep.prepare import PrepSpec, is_current, prepare, summary_table
from data_prep.stdlib_corpus import collect
from launcher.console import compressor_table, evaluation_table, friendly, out, say
from launcher.local import start_training
from nextpt.checkpoint.commit import folder_of, steps
from nextpt.config import Config, load_config
from nextpt.errors import UserError
from nextpt.evaluate.heldout import evaluate_run, open_model
from nextpt.events import read_events
from nextpt.generate.sample import Sampling
from nextpt.generate.text import generate_text

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
RANKS = 2
RESUMED_STEPS = 20  # enough for four logged losses
# A stride of a quarter: three quarters of the context before nearly every token, at four times the work of none.
STRIDES_PER_WINDOW = 4
PROMPTS = {"code": "def read_config(path):\n", "prose": "This module provides", "empty": ""}


@friendly
def main() -> None:
    """Run all stages; raises UserError at the first that fails."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the demo is the same everywhere, and shows the CPU path
    config = load_config(CONFIG)
    stage(1, "the standard library of this Python as a corpus")
    corpus = Path(config.data.path).parent / "corpus"
    found = collect(corpus)
    for domain, count in found.documents.items():
        say(f"{domain}: {count:,} documents, {found.bytes[domain]:,} bytes")
    stage(2, "tokenizer, packing, shards")
    spec = PrepSpec({d: corpus / f"{d}.jsonl" for d in found.documents}, Path(config.data.path), config.data.sequence_length,
                    vocab_size=config.model.vocab_size)
    out.print(summary_table(prepare(spec, overwrite=not is_current(spec), console=out)))
    stage(3, f"training on {RANKS} CPU ranks with ZeRO-{config.train.zero_stage}: deepspeed launcher/run.py --config configs/demo.yaml")
    train(config)
    stage(4, "resume: the middle checkpoint, continued, against the uninterrupted run")
    prove_resume(config)
    stage(5, "evaluation on held-out documents")
    evaluate(config)
    stage(6, "three samples")
    sample(config)
    say(f"\nThe run is in {config.run_dir}. Next: nextpt generate --run {config.run_dir} --prompt 'import ', or change "
        "configs/demo.yaml and give it another run.name. To start afresh: rm -r runs data/demo")


def stage(number: int, title: str) -> None:
    say(f"\n=== {number}/6  {title}")


def train(config: Config, *overrides: str) -> None:
    started = time.monotonic()
    code = start_training(str(CONFIG), list(overrides), ranks=RANKS)
    if code:
        raise UserError(f"training ended with exit code {code}; the message is above. Run make demo again: it resumes")
    if not overrides:
        say(f"took {(time.monotonic() - started) / 60:.1f} minutes with start-up")


def prove_resume(config: Config) -> None:
    """Continue from the middle checkpoint in a copy of the run and compare every logged loss, bit by bit."""
    run, copy = config.run_dir, config.run_dir.with_name(config.run_dir.name + "-resumed")
    middle = next(s for s in sorted(steps(run / "checkpoints")) if s >= config.checkpoint.every_steps)
    stop = min(middle + RESUMED_STEPS, config.last_step)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder_of(run / "checkpoints", middle), folder_of(copy / "checkpoints", middle))
    shutil.copy(run / "config.yaml", copy)
    train(config, f"run.dir={copy}", f"train.stop_at={stop}", "validation.every_steps=null")
    losses = [{e["step"]: e["loss"] for e in read_events(folder / "metrics.jsonl", "train") if middle < e["step"] <= stop}
              for folder in (run, copy)]
    for step, loss in losses[1].items():
        same = losses[0].get(step) == loss
        say(f"step {step}: uninterrupted {losses[0].get(step)!r}, resumed {loss!r}: {'identical' if same else 'DIFFERENT'}")
    if not losses[1] or any(losses[0].get(step) != loss for step, loss in losses[1].items()):
        raise UserError("the resumed run is not the uninterrupted one; please report this with the lines above")
    shutil.rmtree(copy)


def evaluate(config: Config) -> None:
    """Figures beside the compressors'; raises UserError when the model is worse than zlib."""
    window = config.max_position
    result = evaluate_run(config.run_dir, window=window, stride=window // STRIDES_PER_WINDOW, compressors=True)
    with atomic_write(config.run_dir / "evaluation.json") as file:
        file.write(canonical_json(result))
    out.print(evaluation_table(result))
    out.print(compressor_table(result))
    for compressor in ("zlib -9", "bz2 -9", "xz -9e"):
        behind = [d for d, f in result["domains"].items() if f["bpb_text"] >= f["compressors"][compressor]["bpb_concatenated"]]
        say(f"against {compressor} on one stream: " + (f"behind in {', '.join(behind)}" if behind else "ahead in every domain"))
        if behind and compressor == "zlib -9":
            raise UserError(f"the model is worse than zlib in {', '.join(behind)}; was training cut short?")


def sample(config: Config) -> None:
    config, model, tokenizer, _ = open_model(config.run_dir, None, "cpu")
    for kind, prompt in PROMPTS.items():
        say(f"\n--- {kind} prompt: {json.dumps(prompt)}")
        pieces = generate_text(config, model, tokenizer, prompt, max_tokens=100, sampling=Sampling(0.7, top_p=0.95, seed=1))
        say(prompt + "".join(pieces))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
