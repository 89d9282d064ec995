"""Options of a command itself: where it writes, how it goes on, what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kfade.runs import options as o

Out = Annotated[Path, Parameter(group=o.RUN, help="Folder to write. It must not exist yet.")]
Resume = Annotated[
    bool, o.FLAG, Parameter(group=o.RUN, help="Go on with an interrupted run in --out.")
]
ExportModel = Annotated[
    bool,
    o.FLAG,
    Parameter(group=o.RUN, help="Also write the edited model, for from_pretrained."),
]
Json = Annotated[bool, o.FLAG, Parameter(group=o.RUN, help="Print one JSON object on stdout.")]
ConfigFile = Annotated[
    Path | None,
    Parameter(
        group=o.RUN,
        help="Read settings from this YAML file. Options on the command line override it.",
    ),
]
CurvatureFolder = Annotated[
    Path | None, Parameter(group=o.FIT, help="Use a curvature that kfade fit saved.")
]
