"""The vlm-dft command: its list of subcommands, and nothing else.

Exit codes: 0 done; 1 refused, or what was asked for failed (a job that did not succeed, a gate not passed, something
needed that doctor misses); 2 wrong usage; 3 no service answers at OPENAI_BASE_URL.

--json, which every command takes that shows or makes something: on standard output one JSON document, what the API
answers where it answers it, and nothing else; messages, progress and logs go to standard error; exit codes are the
same, and a job that failed is still printed. A command that was refused prints no document.
"""

from __future__ import annotations

import sys
from typing import Any

import structlog
import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from cli import (
    benchmarks,
    compare,
    control,
    doctor,
    estimate,
    evaluate,
    import_job,
    items,
    local,
    preflight,
    preview,
    queue,
    report,
    samples,
    serve,
    show,
    submit,
    table,
    tenancy,
    upkeep,
    watch,
)
from cli.client import EXIT_USAGE, print_error


class _Commands(TyperGroup):
    """A setting of the environment that cannot be used is named, whichever command meets it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ValidationError as error:
            if error.title != "Settings":
                raise
            for problem in error.errors(include_url=False):
                name = "_".join(["VLM_DFT", *(str(part) for part in problem["loc"])]).upper()
                print_error(f"{name}: {problem['msg']}")
            raise typer.Exit(EXIT_USAGE) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune vision-language and text models with SFT or DFT on your own machine. "
    "Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no service answers.",
)


@app.callback()
def log_to_stderr() -> None:
    """What the service's own code logs in here, as in `gc`, is no output of the command."""
    if not structlog.is_configured():
        structlog.configure(logger_factory=_stderr_logger)


def _stderr_logger(*_: Any) -> structlog.PrintLogger:
    return structlog.PrintLogger(sys.stderr)


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
app.command()(items.items)
app.command()(report.report)
app.command()(report.bundle)
app.command()(table.table)
app.command()(watch.watch)
app.command()(queue.jobs)
app.command()(queue.workers)
app.command()(show.logs)
app.command()(show.histograms)
app.command()(samples.samples)
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
