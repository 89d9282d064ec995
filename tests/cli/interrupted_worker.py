"""A baseline that is interrupted in each of several processes, for test_baselines_cli.py."""

from __future__ import annotations

from unittest import mock

from kfade.cli import INTERRUPTED, main
from kfade.runtime.run_dir import RunDir


def interrupted(words: list[str], step: int) -> int:
    """Run ``kfade`` up to an evaluation after ``step``; 0 if it ended as an interrupted one."""
    log = RunDir.log

    def cut(self, event, **facts):
        if facts["step"] == step:
            raise KeyboardInterrupt
        log(self, event, **facts)

    with (
        mock.patch("kfade.runs.baselines.SAVE_SECONDS", 0.0),
        mock.patch.object(RunDir, "log", cut),
    ):
        return int(main(words) != INTERRUPTED)
