"""Commands for runs on one machine: demo, init, preview, plan and run, then verify and export."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from fedforward.cli.console import display, friendly, out_console, say
from fedforward.core.errors import FedForwardError
from fedforward.core.paths import home

ConfigArgument = Annotated[Path, typer.Argument(help="TOML file", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="section.key=value …", show_default=False)
]
OutOption = Annotated[Path | None, typer.Option("--out", help="run directory", show_default=False)]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="continue the run in --out, if there is one")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
RunArgument = Annotated[Path, typer.Argument(help="run directory", show_default=False)]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="folder that the run went on from (model.adapter), where it has moved",
        show_default=False,
    ),
]
InitFileOption = Annotated[
    str | None,
    typer.Option(
        "--init-file",
        help="file that aligned adapters began with (lora.init_file), where it has moved",
        show_default=False,
    ),
]
MaskFileOption = Annotated[
    str | None,
    typer.Option(
        "--mask-file",
        help="file that says which weights move (method.mask_file), where it has moved",
        show_default=False,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="folder of the base model, where it has moved or the run directory is a server's",
        show_default=False,
    ),
]
RoundOption = Annotated[
    int | None,
    typer.Option(
        "--round",
        help="the state after so many rounds, 0 for the base model; the last if left out",
        show_default=False,
    ),
]


def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    out: OutOption = None,
    resume: ResumeOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the data as `fedforward preview` does, and stop")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="in place of model.path", show_default=False),
    ] = None,
    report: Annotated[
        bool,
        typer.Option("--report", help="write report.html in --out, again at each evaluation"),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Carry out a run: federated tuning of one model over simulated clients."""
    from fedforward.config.loading import load

    out = out or Path("runs") / config.stem
    changes = overrides or []
    if model is not None:
        changes = [*changes, f"model.path={json.dumps(model, ensure_ascii=False)}"]
    if dry_run:
        _preview_data(load(config, changes), 3, as_json)
        return
    again = ["fedforward", "run", str(config), *changes, "--out", str(out), "--resume"]
    again += ["--report"] if report else []
    with friendly(f"Continue with: {shlex.join(again)}"):
        _carry_out(load(config, changes), out, resume, as_json, report=report)


def preview(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    examples: Annotated[int, typer.Option("--examples", min=0, max=50, help="how many")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show what a run will see of its data: examples, lengths, what is left out, balance."""
    from fedforward.config.loading import load

    _preview_data(load(config, overrides or []), examples, as_json)


def _preview_data(config: Any, examples: int, as_json: bool) -> None:
    """Read the data of a configuration and show them."""
    with display("loading libraries"):
        from fedforward.models.libraries import quiet_libraries

        quiet_libraries()
        from fedforward.training.data_preview import preview_data

        found = preview_data(config, examples)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    from fedforward.cli import data_tables

    for part in data_tables.render(found):
        out_console.print(part)


def demo(
    out: Annotated[Path, typer.Option("--out", help="run directory")] = Path("runs/demo"),
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tune the small model that ships with fedforward, over four sites, in about ten seconds."""
    from fedforward.demo import run as demonstration

    with friendly(f"Continue with: fedforward demo --out {shlex.quote(str(out))} --resume"):
        out = home(out)
        data = out.parent / f"{out.name}-data" / "sites.jsonl"
        _carry_out(demonstration.prepare(data), out, resume, as_json)
        from fedforward.cli import report

        page = out / report.NAME
        report.write_report([out], page)
    if not as_json:
        say(out_console, f"a page of it all, with every curve and table:\n{page}")


def _carry_out(
    config: Any, out: Path, resume: bool, as_json: bool, *, report: bool = False
) -> None:
    """Run a configuration and show its result; with `report`, keep its page up to date."""
    with display("loading libraries") as progress:
        from fedforward.models.libraries import quiet_libraries

        quiet_libraries()
        from fedforward.training.run import Run
        from fedforward.training.run_directory import strict

        page = _live_page(home(out)) if report else None

        def told(done: int, total: int, line: dict[str, Any]) -> None:
            progress.progress(done, total, line)
            if page is not None:
                page.progress(done, total, line)

        run = Run(config, out, resume, told)
        progress.objective = run.config.objective
        try:
            summary = run.fit().to_json()
        finally:
            # Whatever has ended the run, nobody writes the page again.
            if page is not None:
                page.write()
    if as_json:
        print(json.dumps(strict(summary), indent=2))
        return
    from fedforward.cli.tables import summary_table

    out_console.print(summary_table(summary))
    folder = "adapter" if config.model.tune == "lora" else "model"
    say(out_console, f"\neverything is in {out}: see summary.json, loss.png and {folder}")
    if page is not None:
        say(out_console, str(page.path))


def _live_page(out: Path) -> Any:
    from fedforward.cli.report import NAME
    from fedforward.reporting.live import LivePage

    return LivePage(out, out / NAME)


def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    picture: Annotated[
        Path | None, typer.Option("--png", help="also draw the plan", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run will need, before it runs: memory, blocks of each client, bytes."""
    from fedforward.config.loading import load

    settings = load(config, overrides or [])
    if picture is not None:
        _check_picture(picture)
    with display("loading libraries"):
        from fedforward.models.libraries import quiet_libraries

        quiet_libraries()
        from fedforward.training.preview import preview

        result = preview(settings)
    from fedforward.cli import plan_tables

    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        for part in plan_tables.render(result):
            out_console.print(part)
    if picture is not None:
        plan_tables.draw(picture, result)
        if not as_json:
            say(out_console, f"\nwrote {picture}")


def tune(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="rounds with the rate auto")] = 12,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="also show what the upper blocks alone learn")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--png", help="also draw loss against rate", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find a learning rate in a few rounds, and show the loss against it; nothing is kept."""
    from fedforward.config.loading import load

    settings = load(config, overrides or [])
    if picture is not None:
        _check_picture(picture)
    with display("loading libraries") as progress:
        from fedforward.models.libraries import quiet_libraries

        quiet_libraries()
        from fedforward.training.run_directory import strict
        from fedforward.training.tune import tune as find

        result = find(settings, rounds, progress.count, blocks)
        if picture is not None:
            from fedforward.cli.tuning_tables import draw

            draw(picture, result)
    if as_json:
        print(json.dumps(strict(result.as_json()), indent=2))
        return
    from fedforward.cli.tuning_tables import blocks_table, table

    out_console.print(table(result))
    if blocks:
        out_console.print("", blocks_table(result))
    back = f", {result.taken_back} of them taken back" if result.taken_back else ""
    say(
        out_console,
        f"\nmethod.learning_rate = {result.learning_rate:.3g}, found in {result.rounds} "
        f"rounds{back}, {result.passes:,.0f} forward passes, {result.examples} held-out examples",
    )
    if picture is not None:
        say(out_console, f"wrote {picture}")


def _check_picture(path: Path) -> None:
    """Refuse a file that no picture can be written to, before anything is computed."""
    if not path.absolute().parent.is_dir():
        raise FedForwardError(f"--png {path}: there is no folder {path.parent}.")
    if path.is_dir() or path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise FedForwardError(f"--png {path}: give a file that ends in .png, .pdf or .svg.")


def _made(maker: str, config: Path, out: Path, overrides: list[str] | None) -> Any:
    """The file that a function of `training.before` makes for a configuration, once written."""
    from fedforward.config.site import load_partial

    settings = load_partial(config, overrides or [])
    with display("loading libraries"):
        from fedforward.models.libraries import quiet_libraries

        quiet_libraries()
        from fedforward.training import before

        return getattr(before, maker)(settings, out)


def align(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option("--out", help="file to write", show_default=False)],
    overrides: OverridesArgument = None,
) -> None:
    """Make the file of aligned adapters (lora.init_file) from public text, before a run."""
    made = _made("make_initial_a", config, out, overrides)
    made_for = made.made_for
    layers = sum(".lora_A." in name for name in made.tensors)
    both = {0: "", 1: " and one U"}.get(len(made.tensors) - layers, " and a U of each")
    say(
        out_console,
        f"wrote {out}: A of {layers} layers{both}, rank {made_for['rank']}, from "
        f"{made_for['rows']} rows with {made_for['tokens']} tokens\nsha256 {made.digest}\n"
        f'set lora.init = "aligned" and lora.init_file to this file, here or in every site.toml',
    )


def mask(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option("--out", help="file to write", show_default=False)],
    overrides: OverridesArgument = None,
) -> None:
    """Make the mask of a run (method.mask_file) from gradients on public text, before the run."""
    made = _made("make_mask", config, out, overrides)
    made_for = made.made_for
    say(
        out_console,
        f"wrote {out}: {made_for['coordinates']} free weights (method.density = "
        f"{made_for['density']:g}), from {made_for['rows']} rows\nsha256 {made.digest}\n"
        f'set method.mask = "file" and method.mask_file to this file, here or in every site.toml',
    )


def init(
    path: Annotated[Path, typer.Argument(help="file to write")] = Path("fedforward.toml"),
    site: Annotated[
        bool, typer.Option("--site", help="a site's half of a configuration across machines")
    ] = False,
) -> None:
    """Write a commented example configuration."""
    from fedforward.config.site import example_site
    from fedforward.config.template import example

    if path.exists():
        raise FedForwardError(f"{path} exists already. Choose another name.")
    try:
        text = example_site() if site else example()
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FedForwardError(f"{path} cannot be written: {error.strerror}.") from error
    say(
        out_console,
        f"wrote {path}: set model.path and data.source, then fedforward "
        f"{'client' if site else 'run'} {shlex.quote(str(path))}",
    )


def verify(
    run: RunArgument,
    model: BaseOption = None,
    adapter: AdapterOption = None,
    init_file: InitFileOption = None,
    mask_file: MaskFileOption = None,
    rounds: RoundOption = None,
    seen: Annotated[
        list[Path] | None,
        typer.Option(
            "--seen",
            help="seen/RUN.json of a site's folder: was it sent this ledger? May be repeated",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Rebuild the tuned parameters from base and ledger, and say whether every bit agrees."""
    with display("rebuilding from base and ledger") as progress:
        from fedforward.models.libraries import quiet_libraries

        quiet_libraries()
        from dataclasses import asdict

        from fedforward.training import replay

        result = replay.verify(
            run, model, progress.count, adapter, init_file, mask_file, rounds, seen or ()
        )
    if as_json:
        print(json.dumps(asdict(result), indent=2))
    elif not result.differences:
        say(out_console, "\n".join(_verified(result)))
        for file in seen or ():
            say(out_console, f"{file}: that site was sent this ledger")
    if result.differences:
        raise FedForwardError(f"{run} does not verify: " + "; ".join(result.differences) + ".")


def _verified(result: Any) -> list[str]:
    """The lines for a run that verifies."""
    of = f" of {result.length}" if result.rounds != result.length else ""
    how = "rebuilt from base and ledger" if result.replayed else "state file and ledger"
    checked = ["summary.json"] if result.recorded else []
    checked += ["the saved tensors"] if result.saved else []
    checked += [f"{result.proofs} state digests in reports"] if result.proofs else []
    lines = [
        f"bit-identical: {result.rounds} rounds{of}, {how}, agree with "
        f"{' and '.join(checked) or 'each other (nothing else was saved of this round)'}",
        f"state digest   {result.state_digest}",
        f"ledger digest  {result.ledger_digest}",
    ]
    if result.unchecked:
        lines.append(f"not made again from the reports: {'; '.join(result.unchecked)}")
    return lines


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", help="new folder", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="a whole model, adapters merged")] = False,
    model: BaseOption = None,
    adapter: AdapterOption = None,
    init_file: InitFileOption = None,
    mask_file: MaskFileOption = None,
    rounds: RoundOption = None,
) -> None:
    """Write the adapter (PEFT format) or a merged model, rebuilt from the ledger."""
    with display("rebuilding from base and ledger") as progress:
        from fedforward.models.libraries import quiet_libraries

        quiet_libraries()
        from fedforward.training import replay

        replay.export(
            run,
            out,
            merge=merge,
            base=model,
            on_round=progress.count,
            adapter=adapter,
            init_file=init_file,
            mask_file=mask_file,
            rounds=rounds,
        )
    say(out_console, f"wrote {out}")
