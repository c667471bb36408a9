"""The command line: parse, call, print."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import lrface
from lrface.errors import LrfaceError

app = typer.Typer(
    help="Face recognition for faces of any resolution: align, train, verify, embed, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def say(message: str) -> None:
    """Messages go to standard error; standard output is for results."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def errors_for_users() -> Iterator[None]:
    """Print what went wrong without a traceback; exit 1 for a failed job, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        yield
    except LrfaceError as error:
        say(f"error: {error}")
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        say("interrupted; the same command goes on where it stopped")
        raise typer.Exit(130) from error


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data", help="Folder that data is looked for in; else $LRFACE_DATA, else ~/.cache/lrface."),
]


def _version(value: bool) -> None:
    if value:
        print(f"lrface {lrface.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe (see `lrface recipes`).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Fields to change, dotted: seed=1 out=runs/x data.batch_size=64 stages.0.epochs=2",
        ),
    ] = None,
    data: DataRoot = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete an earlier run in the same place.")] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with an earlier run although the recipe changed.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Only check the recipe and print it resolved.")] = False,
    json_output: Json = False,
) -> None:
    """Train a recipe, from where the same command stopped last time.

    The run goes to the recipe's `out` (runs/NAME): model.safetensors and model.json at the end, checkpoints,
    metrics.csv and TensorBoard events for each stage in stages/. Ctrl-C and SIGTERM write a checkpoint first;
    after a kill the run goes on from its newest checkpoint.
    """
    with errors_for_users():
        from dataclasses import asdict

        from lrface import config, recipes
        from lrface.train.trainer import Interrupted

        loaded = recipes.load_recipe(recipe, overrides or [])
        if check:
            for stage in loaded.stages:
                recipes.build_method(loaded, stage, identities=2)
            print_json(config.to_plain(loaded)) if json_output else print(config.to_yaml(loaded), end="")
            return
        try:
            summary = recipes.run_recipe(
                loaded, data=data, restart=restart, accept_changes=accept_changes, say=say
            )
        except Interrupted as stopped:
            import signal

            say(f"stopped after step {stopped.step}, saved {stopped.checkpoint}; the same command goes on from there")
            raise typer.Exit(130 if stopped.signal == signal.SIGINT else 0) from stopped
        for entry in summary.stages:
            if "seconds" in entry:
                say(
                    f"stage {entry['name']}: steps {entry['resumed_at']} to {entry['steps']} in "
                    f"{entry['seconds']:.0f} s, {entry['images_per_second']:.0f} images/s, "
                    + ", ".join(f"{key} {value:.4g}" for key, value in entry["logs"].items() if key != "images_per_second")
                )
        print_json(asdict(summary)) if json_output else print(f"model: {summary.model}")


@app.command(name="recipes")
def list_recipes(
    action: Annotated[str, typer.Argument(help="list, show or copy.")] = "list",
    name: Annotated[str | None, typer.Argument(help="Recipe to show or copy.")] = None,
    destination: Annotated[Path | None, typer.Argument(help="Where to copy to; default: the recipe's file name here.")] = None,
    json_output: Json = False,
) -> None:
    """List the shipped recipes, show one, or copy one to change it."""
    with errors_for_users():
        from lrface import config, recipes
        from lrface.errors import UsageError
        from lrface.files import write_text

        if action == "list":
            found = {key: config.parse_recipe(config.read_yaml(path)) for key, path in recipes.shipped_recipes().items()}
            if json_output:
                print_json({key: recipe.description for key, recipe in found.items()})
            else:
                width = max(map(len, found), default=0)
                for key, recipe in found.items():
                    print(f"{key:{width}}  {recipe.description}")
            return
        if action not in ("show", "copy") or name is None:
            raise UsageError("usage: lrface recipes [list], lrface recipes show NAME, lrface recipes copy NAME [FILE]")
        path = recipes.find_recipe(name)
        if action == "show":
            print(path.read_text(encoding="utf-8"), end="")
            return
        target = destination or Path(path.name)
        if target.exists():
            raise UsageError(f"{target} exists; give another file name")
        write_text(target, path.read_text(encoding="utf-8"))
        say(f"copied to {target}; train it with: lrface train {target}")


if __name__ == "__main__":
    app()
