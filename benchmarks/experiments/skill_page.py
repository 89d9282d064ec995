"""Skill-small's tables and claims on the results' page."""

from __future__ import annotations

from typing import Any

from lab.pieces import Results
from lab.records import number, table
from skill_small import OF_SKILL, SKILLS, TAUGHT
from tofu_rows import rows_of
from tofu_seeds import kl_claims
from verbatim_page import methods_table

ROLES = {
    "report": "forgotten skills",
    "common": "kept skills",
    "tuning": "kept skills, not shown",
}


def slots(results: Results) -> dict[str, Any]:
    """What the template says of Skill-small, by the names of its slots."""
    return {
        "skill_count": len(SKILLS),
        "skill_taught": TAUGHT,
        "skill_fresh_count": OF_SKILL - TAUGHT,
        "skill_methods": methods_table(results),
        "skill_fresh": fresh_table(results),
        "skill_claims": table("claim | measured | holds?", kl_claims({0: results})),
    }


def fresh_table(results: Results) -> str:
    """Probability of the right answers to questions that no model was trained on."""
    labels = {"full": "full model", "retrained": "retrained model"}
    labels |= {row.name: row.label for row in rows_of(results) if row.name}
    lines = [
        [label, *(number(told[role]["forget_probability"]) for role in ROLES)]
        for name, label in labels.items()
        if (told := results.get(f"fresh {name}"))
    ]
    return table(f"model | {' | '.join(ROLES.values())}", lines)
