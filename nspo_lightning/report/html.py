"""The page as HTML: one file that asks for nothing else.

Everything in it is untrusted text until it is escaped: prompts, answers, names of skills, messages. Jinja escapes what
templates print; the pictures escape their own. The page's policy allows no script but ours, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nspo_lightning.report import words
from nspo_lightning.report.heat import heat_maps
from nspo_lightning.report.loading import loading
from nspo_lightning.report.pictures import compared, pictures
from nspo_lightning.report.records import Run
from nspo_lightning.report.side_by_side import Comparison, compare, named_apart
from nspo_lightning.report.svg import interval_track

_TEMPLATES = Path(__file__).parent / "templates"


def run_page(run: Run) -> str:
    """Return the page of one run."""
    free = [(i.kind, i.depth, i.free_share) for i in run.null_space.inputs] if run.null_space is not None else []
    exchanges = (*run.answers.shown, *run.answers.attacked) if run.answers is not None else ()
    return _rendered(
        "run.html.j2",
        run=run,
        pictures=pictures(run),
        maps=heat_maps(run.null_space) if run.null_space is not None else [],
        free=words.free_sentence(free),
        loading=loading(run),
        skills=sorted({e.skill for e in exchanges if e.skill}),
        outcomes=sorted({e.outcomes for e in exchanges}),
        attacks=list(dict.fromkeys(e.attack for e in exchanges if e.attack)),
    )


def comparison_page(runs: Sequence[Run]) -> str:
    """Return a page of several runs side by side."""
    runs = named_apart(runs)
    found: Comparison = compare(runs)
    return _rendered("runs.html.j2", runs=runs, found=found, pictures=compared(runs))


def _rendered(template: str, **values: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = _asset("page.js"), _asset("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        words=words,
        track=interval_track,
        script=Markup(script),  # a file of this package
        style=Markup(style),
        script_hash=f"sha256-{digest}",
        **values,
    )


def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")
