"""Options of chat templates: the object that renders, and one date for a run and its resumption."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kfade.data.chat import ChatTemplate
from kfade.data.rows import read_utf8
from kfade.errors import InputError
from kfade.method.update import Update
from kfade.runs.config import TemplateConfig
from kfade.runtime import distributed
from kfade.runtime.run_dir import interrupted

_DATE = "template_date"
Rendering = TypeVar("Rendering", bound=TemplateConfig)
logger = logging.getLogger(__name__)


def template_of(config: TemplateConfig) -> ChatTemplate:
    """The chat template that the settings describe.

    Raises:
        InputError: no such template file, or an argument or a date that cannot be read.
    """
    if config.template == "plain" and (config.template_file or config.template_args):
        raise InputError("--template plain uses no template: leave out its file and arguments")
    text = None
    if config.template_file is not None:
        path = Path(config.template_file)
        if not path.is_file():
            raise InputError(f"--template-file {path}: no such file; give a chat template in Jinja")
        text = read_utf8(path)
    arguments = dict(_argument(word) for word in config.template_args)
    return ChatTemplate(text, arguments, _moment(config.template_date), config.enabled)


def with_date(
    config: Rendering, out: Path, *, resume: bool = False, update: Path | None = None
) -> Rendering:
    """The settings with the date for templates, and the digest of the template file.

    The date is the first of these that exists: ``template_date``; the date of the interrupted run
    in ``out``, if it is resumed; that of the run that made ``update``; the present. If a template
    file or arguments are not given, those of the run that made ``update`` are used.

    Raises:
        InputError: the template cannot be read, or the template file of the run that made
            ``update`` has changed or is missing.
    """
    template_of(config)  # raises if it cannot be read
    made = _recorded(Update.load(update).provenance) if update is not None else {}
    config = _with_templates_of(made, config)
    if config.template == "plain":
        return config
    resumed = _recorded(interrupted(out)) if resume else {}
    date = config.template_date or resumed.get(_DATE) or made.get(_DATE)
    if date is None:
        now = int(distributed.maximum(int(time.time())))  # one clock for all processes
        date = datetime.fromtimestamp(now).isoformat()
    return replace(config, template_date=date, template_sha256=_digest(config))


def without_unused_date(config: Rendering, tokenizer: Any) -> Rendering:
    """The settings for a manifest, without the date if no chat template is used.

    So two runs that differ only in an unused date have equal manifests.
    """
    template = template_of(config)
    return config if template.used_by(tokenizer) else replace(config, template_date=None)


def rendering_of(
    given: TemplateConfig, settings: dict[str, Any], out: Path, *, resume: bool
) -> ChatTemplate:
    """The chat template of an evaluation. Its settings are written into ``settings``.

    Values of --template other than chat and auto use no chat template.
    """
    config = with_date(given, out, resume=resume, update=settings["update"])
    settings.update(asdict(config))
    settings["template_args"] = config.template_args or None
    return template_of(config)


def _with_templates_of(made: Mapping[str, Any], config: Rendering) -> Rendering:
    """The settings; a template file and arguments that are not given come from the run ``made``."""
    if config.template not in ("auto", "chat"):
        return config
    taken: dict[str, Any] = {}
    options = []
    if config.template_file is None and (file := made.get("template_file")):
        taken["template_file"] = file
        options.append(f"--template-file {file}")
        exists = Path(file).is_file()
        recorded = made.get("template_sha256")
        if not exists or (recorded and recorded != _digest(replace(config, template_file=file))):
            what = "has changed since" if exists else "is gone"
            raise InputError(
                f"{file}: the run that made --update used this template, and it {what}; restore "
                "it, or give a --template-file"
            )
    if not config.template_args and (arguments := made.get("template_args")):
        taken["template_args"] = arguments
        options += [f"--template-arg {argument}" for argument in arguments]
    if options:
        logger.warning("note: as in the run that made --update: %s", ", ".join(options))
    return replace(config, **taken)


def _digest(config: TemplateConfig) -> str | None:
    """SHA-256 of the text of the template file; None without a file."""
    text = template_of(config).text
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _argument(word: str) -> tuple[str, Any]:
    """(name, value) of ``NAME=VALUE``; the value is YAML."""
    name, given, value = word.partition("=")
    try:
        if given and name.strip().isidentifier():
            return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise InputError(f"--template-arg {word}: write NAME=VALUE, as in enable_thinking=false")


def _moment(date: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(date) if date is not None else None
    except ValueError:
        raise InputError(
            f"--template-date {date}: write a date as 2026-01-31 or 2026-01-31T12:00:00"
        ) from None


def _recorded(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The data settings in a run's record, at any depth; empty if there are none.

    They are the mapping that has a template date.
    """
    if isinstance(settings.get(_DATE), str):
        return settings
    parts = (part for part in settings.values() if isinstance(part, Mapping))
    return next((found for part in parts if (found := _recorded(part))), {})
