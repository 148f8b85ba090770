"""The `nextpt` command line."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

# The checkout before installed packages: Hugging Face has a package `kernels` too, and ours must be
# found.
ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "pyproject.toml").is_file():
    sys.path.insert(0, str(ROOT))

import typer  # noqa: E402

from launcher.ablate_cli import EXAMPLE as ABLATE_EXAMPLE  # noqa: E402
from launcher.ablate_cli import ablate  # noqa: E402
from launcher.checkpoint_cli import checkpoint_app  # noqa: E402
from launcher.compress_cli import register as register_compress  # noqa: E402
from launcher.console import friendly, out, say, say_finding  # noqa: E402
from launcher.eval_cli import EXAMPLE as EVAL_EXAMPLE  # noqa: E402
from launcher.eval_cli import evaluate  # noqa: E402
from launcher.export_cli import export_app, import_app  # noqa: E402
from launcher.generate_cli import EXAMPLE as GENERATE_EXAMPLE  # noqa: E402
from launcher.generate_cli import generate  # noqa: E402
from launcher.inspect_cli import EXAMPLE as INSPECT_EXAMPLE  # noqa: E402
from launcher.inspect_cli import inspect  # noqa: E402
from launcher.memorization_cli import memorization_app  # noqa: E402
from launcher.prep_shards import EXAMPLE as SHARDS_EXAMPLE  # noqa: E402
from launcher.prep_shards import prep_shards  # noqa: E402
from launcher.prep_stored import register as register_stored  # noqa: E402
from launcher.scaling_cli import scaling_app  # noqa: E402
from launcher.slurm_cli import slurm_app  # noqa: E402
from launcher.tokenizer_cli import tokenizer_app  # noqa: E402

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Pretrain decoder-only language models: prepare data, train, evaluate, generate.",
)
prep = typer.Typer(no_args_is_help=True, help="Turn text into packed, tokenized shards.")
config_app = typer.Typer(no_args_is_help=True, help="Look at configs.")
app.add_typer(prep, name="prep")
prep.command("shards", epilog=SHARDS_EXAMPLE)(friendly(prep_shards))
register_stored(prep)
app.command("eval", epilog=EVAL_EXAMPLE)(friendly(evaluate))
app.command(epilog=ABLATE_EXAMPLE)(friendly(ablate))
register_compress(app)
app.command(epilog=GENERATE_EXAMPLE)(friendly(generate))
app.command(epilog=INSPECT_EXAMPLE)(friendly(inspect))
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(slurm_app, name="slurm")
app.add_typer(config_app, name="config")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(memorization_app, name="memorization")
app.add_typer(export_app, name="export")
app.add_typer(import_app, name="import")
app.add_typer(scaling_app, name="scaling")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="override keys of the file")
]


@app.command()
@friendly
def demo() -> None:
    """The whole path on this CPU in minutes: corpus, training, resume, evaluation, samples, report.

    `make demo`.
    """
    from launcher.demo import main as run_demo

    run_demo()


@prep.command("stdlib", epilog="example: nextpt prep stdlib --output data/stdlib")
@friendly
def prep_stdlib(
    output: Annotated[Path, typer.Option(help="folder for code.jsonl and prose.jsonl")],
) -> None:
    """Collect a corpus that every machine has: this Python's standard library, as code and prose."""
    from data_prep.stdlib_corpus import collect

    found = collect(output)
    for domain, count in found.documents.items():
        say(f"{output}/{domain}.jsonl: {count:,} documents, {found.bytes[domain]:,} bytes")


@app.command(epilog="example: nextpt train --config configs/demo.yaml train.steps=50")
@friendly
def train(
    config: Annotated[str, typer.Option(help="YAML file, see configs/")],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="processes; one per GPU, or 1 without, unless given")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="TCP port where ranks meet; a free one unless given"),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="train on the hosts of this file, lines `NAME slots=N`, over ssh"),
    ] = None,
    ssh: Annotated[str, typer.Option(help="how hosts are reached, such as 'ssh -p 2222'")] = "ssh",
    restarts: Annotated[
        int,
        typer.Option(
            min=0,
            help=(
                "how often in a row, without a new checkpoint, to start again what hung, crashed or"
                " was killed"
            ),
        ),
    ] = 3,
) -> None:
    """Train on this machine, or on the hosts of a hostfile. The same command again resumes the run.

    SIGTERM and SIGUSR1 save and end. Exit codes: 0 finished, 1 crashed, 2 a mistake to mend first,
    4 another job works in the run folder, 65 no valid checkpoint where there were some, 75 told to
    stop, 76 a rank did not answer, 128+N ended by signal N. RUN/exit.json has the reason.

    On a cluster also: `deepspeed --hostfile HOSTS launcher/run.py --config FILE`, or `nextpt slurm
    submit`; see docs/clusters.md.
    """
    from launcher.fleet import Fleet
    from launcher.hosts import read_hostfile
    from launcher.local import start_training
    from launcher.supervise import supervise
    from nextpt.config import load_config
    from nextpt.errors import ConfigError
    from nextpt.observe.trackers import check_trackers

    settings = load_config(config, overrides or [])
    check_trackers(settings)  # a wrong key is told before any process starts
    if hostfile and ranks:
        raise ConfigError(
            "--ranks is for this machine; the hostfile says how many each host has (slots=N)"
        )
    if hostfile:
        start = Fleet(config, overrides or [], read_hostfile(hostfile), ssh, port).start
    else:
        start = lambda: start_training(config, overrides or [], ranks, port)  # noqa: E731
    sys.exit(supervise(start, settings.run_dir, restarts))


@app.command(
    epilog="example: nextpt report runs/demo    nextpt report runs/a runs/b --output compare.html"
)
@friendly
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="run folders; several are laid over each other"),
    ],
    output: Annotated[
        Path | None, typer.Option(help="file to write; RUN/report.html unless given")
    ] = None,
) -> None:
    """Write one HTML page about one run or several, which opens without network."""
    from nextpt.observe.report import default_output, write_report

    target = output or default_output(runs)
    write_report(runs, target)
    say(f"written to {target}; open it in a browser")


@app.command(epilog="example: nextpt doctor    nextpt doctor --json | jq .problems")
@friendly
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
    folder: Annotated[Path, typer.Option(help="folder that runs are written to")] = Path("runs"),
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="TCP port where ranks of deepspeed meet")
    ] = 29500,
) -> None:
    """Say what this machine has and what to do about each lack.

    Exit code 1 when training would not work.
    """
    from launcher.doctor import Status, examine

    with out.status("looking at libraries and the machine") if not as_json else nullcontext():
        findings = examine(folder, port)
    counts = {status: sum(f.status == status for f in findings) for status in Status}
    if as_json:
        print(
            json.dumps(
                {
                    "problems": counts[Status.PROBLEM],
                    "warnings": counts[Status.WARNING],
                    "findings": [asdict(f) for f in findings],
                },
                indent=1,
            )
        )
    else:
        for finding in findings:
            say_finding(finding.subject, finding.status, finding.found, finding.advice)
        say(f"\n{counts[Status.PROBLEM]} problems, {counts[Status.WARNING]} warnings")
    sys.exit(1 if counts[Status.PROBLEM] else 0)


@app.command(
    epilog=(
        "example: nextpt plan --config configs/7b.yaml --devices 256 --device h100"
        " train.micro_batch_size=2"
    )
)
@friendly
def plan(
    config: Annotated[str, typer.Option(help="YAML file, see configs/")],
    devices: Annotated[int, typer.Option(min=1, help="how many devices, one rank on each")],
    overrides: Overrides = None,
    device: Annotated[
        str, typer.Option(help="a10, l40s, a100-40, a100, h100, h200 or b200")
    ] = "h100",
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1, help="share of the peak that the model's FLOPs reach")
    ] = 0.4,
    memory: Annotated[
        float | None,
        typer.Option(min=0.1, help="memory of a device, GiB; the device's own unless given"),
    ] = None,
    peak: Annotated[
        float | None, typer.Option(min=0.001, help="dense peak of a device, TFLOP/s")
    ] = None,
    link: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s of a device inside its node, one direction"),
    ] = None,
    network: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s of a node, all adapters; 400 unless given")
    ] = None,
    node_size: Annotated[
        int | None, typer.Option(min=1, help="devices per node; 8 unless given")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON and nothing else")] = False,
) -> None:
    """Memory, time and traffic of a run on many devices, for every ZeRO stage, before it is started."""
    from launcher.planning import plan_json, say_plan
    from nextpt.config import load_config
    from nextpt.scaling.machines import machine
    from nextpt.scaling.plan import plan as make_plan

    chosen = machine(
        device,
        memory_gib=memory,
        peak_tflops=peak,
        link_gbs=link,
        node_gbs=network,
        node_size=node_size,
    )
    made = make_plan(load_config(config, overrides or []), devices, chosen, utilisation)
    if as_json:
        print(json.dumps(plan_json(made), indent=1))
    else:
        say_plan(made)


@config_app.command(
    "show", epilog="example: nextpt config show configs/7b.yaml --ranks 64 train.zero_stage=3"
)
@friendly
def config_show(
    file: Annotated[str, typer.Argument(help="YAML file, see configs/")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="ranks to divide the state among")] = 1,
) -> None:
    """Print the resolved run and the figures derived from it."""
    from nextpt.config import load_config, to_yaml
    from nextpt.model import count
    from nextpt.train.memory import estimate_memory, usual_device

    config = load_config(file, overrides or [])
    counts, memory = count(config), estimate_memory(config, ranks, device=usual_device(config))
    tokens = config.total_steps * config.tokens_per_step
    accumulation = config.accumulation_steps(ranks)
    say(to_yaml(config))
    say("# derived")
    say(f"parameters              {counts.parameters:>20,}")
    say(f"  non-embedding         {counts.non_embedding_parameters:>20,}")
    say(
        f"FLOPs per token         {counts.training_flops_per_token:>20,.0f}   (causal:"
        f" {counts.causal_flops_per_token:,.0f})"
    )
    say(
        f"tokens per step         {config.tokens_per_step:>20,}   ({accumulation} micro-batches on"
        f" each of {ranks} ranks)"
    )
    say(f"steps                   {config.total_steps:>20,}")
    say(f"total tokens            {tokens:>20,}")
    say(f"tokens per parameter    {tokens / counts.parameters:>20,.1f}")
    say(
        f"memory per rank         {memory.total / 2**30:>16,.2f} GiB   (estimate for"
        f" ZeRO-{config.train.zero_stage})"
    )
    for name in ("weights", "gradients", "optimizer", "buffers", "activations", "loss"):
        say(f"  {name:<21} {getattr(memory, name) / 2**30:>16,.2f} GiB")


@config_app.command("keys")
@friendly
def config_keys() -> None:
    """List every key with its meaning."""
    from nextpt.config import Config, describe_keys

    for key, meaning in describe_keys(Config):
        say(f"{key:<34} {meaning}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
