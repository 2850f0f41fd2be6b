"""The command line: one function per command, each importing what it needs only when it runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from anynorm.apps import cli_doctor, cli_surgery
from anynorm.apps.factory import MODEL_HELP

app: typer.Typer = typer.Typer(
    name="anynorm",
    help="Normalization layers as one formula: see the family, try it on your model, learn how it works.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    """Print the installed version and end, where --version was given."""
    if wanted:
        from anynorm import __version__

        typer.echo(f"anynorm {__version__}")
        raise typer.Exit


@app.callback()
def anynorm(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Normalization layers as one formula: see the family, try it on your model, learn how it works."""


@app.command("list")
def list_family() -> None:
    """Show every norm of the family and how it answers the formula's three questions."""
    from anynorm.apps.list import print_family

    print_family()


@app.command("try")
def try_model(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, max=600, help="How long to measure speed.")] = 6.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; 1 is steadier on a busy machine.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=2, help="Samples per batch, where the example is ours.")
    ] = None,
) -> None:
    """Try anynorm on a model without data: speed, differences, and what a sample's output depends on."""
    from anynorm.apps.try_model.try_model import print_trial

    print_trial(model, seconds=seconds, threads=threads, batch=batch)


@app.command("speed")
def show_speed(
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, max=3600, help="How long it takes, setting up included.")
    ] = 70.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads; 1 is steadier on a busy machine.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=2, help="Images of a training step.")] = 16,
    side: Annotated[int, typer.Option("--side", min=32, help="Their side in pixels.")] = 224,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write it as a page with bars, one file (.html).")
    ] = None,
) -> None:
    """Time anynorm against torch on this machine: a dozen layers, and whole training steps of two networks."""
    from anynorm.apps.speed.speed import print_speed

    print_speed(seconds=seconds, threads=threads, images=(batch, side), html=html)


@app.command("explain")
def explain(
    out: Annotated[
        Path | None, typer.Option("--out", help="Also draw the page as a picture (.png, .svg or .pdf).")
    ] = None,
    mine: Annotated[
        str | None, typer.Option("--mine", metavar="MODEL", help="Explain a layer of a model: " + MODEL_HELP)
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", metavar="NAME", help="With --mine: which layer (the first norm).")
    ] = None,
) -> None:
    """Explain normalization in real numbers, on a small batch or on a layer of your own model."""
    from anynorm.apps.explain.explain import print_explanation

    print_explanation(out=out, model=mine, layer=layer)


@app.command("compare")
def compare_norms(
    *,
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="mnist|digits|PATH", help="What to learn: a name, or an .npz, .csv or .parquet."
        ),
    ] = "mnist",
    model: Annotated[
        str, typer.Option("--model", help="cnn, mlp or your own as module:factory or file.py:factory; commas between.")
    ] = "cnn,mlp",
    task: Annotated[
        str, typer.Option("--task", help="What y holds: classes, labels (several may hold), values, or auto.")
    ] = "auto",
    target: Annotated[
        str, typer.Option("--target", help="Column or array to learn; else y, label, target or the last column.")
    ] = "",
    tokens: Annotated[bool, typer.Option("--tokens", help="x holds token ids, which stay integers.")] = False,
    standardize: Annotated[
        bool, typer.Option("--standardize/--no-standardize", help="Whether to standardize x, and y in a regression.")
    ] = True,
    loss: Annotated[str, typer.Option("--loss", help="Your loss, module:function of (outputs, targets).")] = "",
    metric: Annotated[
        str, typer.Option("--metric", help="Your metric, the same; module:function:lower where lower is better.")
    ] = "",
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="Your optimizer, module:function of (parameters, rate); else SGD.")
    ] = "",
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", metavar="FILE", help="Weights that every network starts from.")
    ] = "",
    norms: Annotated[str, typer.Option("--norms", help="Which norms to compare.")] = (
        "none,batch,layer,instance,group,rms"
    ),
    batch_sizes: Annotated[
        str, typer.Option("--batch-sizes", help="Sizes with commas between; 64:8 changes from 64 to 8 halfway.")
    ] = "64,8,2",
    rates: Annotated[str, typer.Option("--rates", help="Learning rates, the same for every norm.")] = (
        "0.0003,0.001,0.003,0.01,0.03,0.1,0.3"
    ),
    seeds: Annotated[str, typer.Option("--seeds", help="How many seeds each norm gets at its best rate.")] = "8",
    images: Annotated[str, typer.Option("--images", help="How many images a full run sees.")] = "2048",
    minutes: Annotated[str, typer.Option("--minutes", help="Time for everything, from start to report.")] = "3",
    out: Annotated[str, typer.Option("--out", help="Where journal, results and report go.")] = "anynorm-compare",
) -> None:
    """Which normalization should this network use, on this data, at this batch size? Trains it with each."""
    from anynorm.apps.extras import check_installed
    from anynorm.apps.studies.compare.options import read_options

    options = read_options(
        data=data,
        model=model,
        norms=norms,
        batch_sizes=batch_sizes,
        rates=rates,
        seeds=seeds,
        images=images,
        minutes=minutes,
        out=out,
        task=task,
        target=target,
        tokens=tokens,
        standardize=standardize,
        loss=loss,
        metric=metric,
        optimizer=optimizer,
        checkpoint=checkpoint,
    )
    check_installed("compare", ["matplotlib", "scipy"])
    from anynorm.apps.studies.compare.compare import compare, process_start

    raise typer.Exit(compare(options, started=process_start()))


studies: typer.Typer = typer.Typer(
    help="The claims about batch normalization put to the test, one command each.", no_args_is_help=True
)
app.add_typer(studies, name="study")


@studies.command("list")
def list_studies() -> None:
    """Show every study and the question that it asks."""
    from anynorm.apps.studies.find import find_studies
    from anynorm.apps.terminal import open_console, plain_table

    table = plain_table("study", "asks")
    table.columns[1].justify, table.columns[1].no_wrap = "left", False
    for study in find_studies():
        table.add_row(study.name, study.title)
    table.add_row("compare", "Which normalization should this network use, on this data, at this batch size?")
    open_console().print(table)


@studies.command("run")
def run_study(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Studies by name, or all.")],
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it runs, in 20 seconds.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="A published experiment at its own size, which takes hours.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=2, max=1000, help="Paired seeds; each study has its own number.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.05, max=10080, help="Stop then; the same command goes on.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="mnist|digits|PATH", help="Your data; a file holds x and y.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Your network, as module:factory or file.py:factory.")
    ] = None,
    norms: Annotated[str | None, typer.Option("--norms", help="Your norms, with commas between.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where journal, results, pictures and report go.")] = Path(
        "anynorm-studies"
    ),
) -> None:
    """Put a claim to the test: its trials, its verdict, and a report."""
    from anynorm.apps.extras import check_installed
    from anynorm.apps.studies.command import StudyOptions, read_study_norms, run_named

    check_installed("study run", ["matplotlib", "scipy"])

    chosen = None if norms is None else read_study_norms(norms)
    raise typer.Exit(run_named(names, StudyOptions(quick, full, seeds, minutes, data, model, chosen, out)))


cli_surgery.add_commands(app)
cli_doctor.add_commands(app)


@app.command("env")
def show_environment(
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object, for a report of a fault.")] = False,
) -> None:
    """Show versions, whether the compiled kernels are in use, and how memory is allocated."""
    from anynorm.apps.env import print_environment

    print_environment(as_json=as_json)


def main() -> None:
    """Run the command line; what the user can repair ends in one sentence and exit code 2."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away (`anynorm list | head`); Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ValueError as problem:
        # Imported here only: it brings torch with it, and --help should not wait for that.
        from anynorm.errors import UserError

        if not isinstance(problem, UserError):
            raise
        from anynorm.apps.terminal import show_controls

        print(show_controls(f"anynorm: {problem}"), file=sys.stderr)
        sys.exit(2)
