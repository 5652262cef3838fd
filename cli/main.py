"""The vlm-dft command: its list of subcommands, and nothing else.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no service answers.
"""

from __future__ import annotations

import typer

from cli import (
    benchmarks,
    compare,
    control,
    doctor,
    estimate,
    evaluate,
    import_job,
    local,
    preflight,
    preview,
    report,
    serve,
    show,
    submit,
    table,
    tenancy,
    upkeep,
    watch,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune vision-language and text models with SFT or DFT on your own machine.",
)

app.command()(serve.up)
app.command()(serve.migrate)
app.command()(serve.work)
app.command()(serve.demo)
app.add_typer(tenancy.keys_app, name="keys")
app.add_typer(tenancy.projects_app, name="projects")
app.command()(tenancy.audit)
app.command()(local.train)
app.command()(preview.preview)
app.command()(estimate.estimate)
app.command()(preflight.preflight)
app.command()(submit.submit)
app.command()(import_job.import_job)
app.command()(compare.compare)
app.command("eval")(evaluate.evaluate)
app.add_typer(benchmarks.benchmarks_app, name="benchmarks")
app.command()(report.report)
app.command()(table.table)
app.command()(watch.watch)
app.command()(show.jobs)
app.command()(show.logs)
app.command()(show.histograms)
app.command()(show.cancel)
for command in (control.pause, control.resume, control.start, control.clone, control.priority):
    app.command()(command)
app.add_typer(show.models_app, name="models")
app.command()(doctor.doctor)
app.command()(upkeep.gc)
app.command()(upkeep.backup)
app.command()(upkeep.restore)

if __name__ == "__main__":
    app()
