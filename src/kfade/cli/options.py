"""Options that several commands share: output folder, resumption, printing, files of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from kfade.runs import options as o

Out = Annotated[
    Path, Parameter(group=o.RUN, help="Folder to write. It must be empty or not exist yet.")
]
Resume = Annotated[
    bool, o.FLAG, Parameter(group=o.RUN, help="Continue an interrupted run in --out.")
]
ExportModel = Annotated[
    bool,
    o.FLAG,
    Parameter(
        group=o.RUN, help="Also write the edited model, as a folder that from_pretrained loads."
    ),
]
Json = Annotated[
    bool, o.FLAG, Parameter(group=o.RUN, help="Print the result as one JSON object on stdout.")
]
ConfigFile = Annotated[
    Path | None,
    Parameter(
        group=o.RUN,
        help="Read settings from this YAML file. Options on the command line override them. Unset: "
        "the default of each option.",
    ),
]
CurvatureFolder = Annotated[
    Path | None,
    Parameter(
        group=o.FIT,
        help="Folder of a kfade fit, whose curvature replaces the first fit. Unset: none.",
    ),
]
