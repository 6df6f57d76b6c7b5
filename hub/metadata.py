"""The metadata of a card: what a student inherits from its teacher's card, and what its own says at its head."""

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..provenance import Record

TAGS = ["custom_code", "hybrid-attention", "linear-attention", "gated-deltanet", "hydrahead"]
LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]{0,63}")  # how the Hub writes them: apache-2.0, llama3.2
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})?|multilingual|code")


def is_hub_id(name: object, owned: bool = True) -> bool:
    """Whether a name can be that of a repository on the Hub; old data sets have no owner in theirs."""
    if not isinstance(name, str) or (owned and "/" not in name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def inherited(folder: Path) -> dict:
    """
    What the card and the config in a teacher's folder say that holds for its students too.

    Returns:
        of `license`, `license_name`, `license_link`, `language` (a list) and `base_model` (the teacher's own id, or
        that of what it was made from, on the Hub) those that are stated.
    """
    found = {}
    if (card := folder / "README.md").is_file():
        try:
            found = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        except Exception:  # it is the teacher's author's, and may be anything
            found = {}
    config = Record(folder / "config.json").read() or {}
    bases = found.get("base_model")
    bases = [config.get("_name_or_path"), *(bases if isinstance(bases, list) else [bases])]
    languages = found.get("language")
    facts = {name: found.get(name) for name in ("license", "license_name", "license_link")}
    facts = {name: value for name, value in facts.items() if isinstance(value, str)}
    facts["language"] = _languages(languages if isinstance(languages, list) else [languages])
    facts["base_model"] = next(filter(is_hub_id, bases), None)
    return {name: value for name, value in facts.items() if value}


def _languages(found: list) -> list[str]:
    return [each for each in found if isinstance(each, str) and LANGUAGE.fullmatch(each)]


def check_stated(license: str | None, language: list[str]) -> None:
    """
    Raises:
        ValueError: a licence or language that the Hub would not know as one.
    """
    if license is not None and not LICENSE.fullmatch(license):
        raise ValueError(
            f"licence {license!r}: expected the Hub's name of one, such as apache-2.0 or llama3.2; other where it has "
            "none"
        )
    for each in language:
        if not LANGUAGE.fullmatch(each):
            raise ValueError(f"language {each!r}: expected a code of ISO 639, such as en, or code, or multilingual")


def terms(made_from: Mapping, stated: Mapping) -> dict:
    """
    Licence and languages: as stated by whoever publishes the student, else as the teacher's.

    Returns:
        of `license`, `license_name`, `license_link` and `language` those that are known. A licence that the Hub has
        no name for is `other`, and its own words are its name.
    """
    known = made_from.get("inherited", {}) | (made_from.get("gguf") or {})
    known = {name: known.get(name) for name in ("license", "license_name", "license_link", "language")}
    if stated.get("license"):
        known |= {name: stated.get(name) for name in ("license", "license_name", "license_link")}
    known["language"] = _languages(stated.get("language") or known["language"] or [])
    if not re.fullmatch(r"\S+", known["license_link"] or ""):
        known["license_link"] = None
    if known["license"] and not LICENSE.fullmatch(known["license"]):
        words = known["license_name"] or known["license"]
        known |= {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")}
    return {name: value for name, value in known.items() if value}


def base_models(made_from: Mapping) -> list[str]:
    """The teacher on the Hub, or what a local teacher says that it is or was made from; none, where nobody says."""
    if is_hub_id(made_from["teacher"]):
        return [made_from["teacher"]]
    ids = [made_from.get("inherited", {}).get("base_model"), *(made_from.get("gguf") or {}).get("base_ids", [])]
    return sorted(set(filter(is_hub_id, ids)))


def datasets(made_from: Mapping) -> list[str]:
    """The data sets on the Hub that any stage read."""
    stages = [made_from["forms"], *made_from["stages"]]
    return sorted({name for stage in stages for name in stage.get("datasets", ()) if is_hub_id(name, owned=False)})


def metadata(made_from: Mapping, stated: Mapping) -> ModelCardData:
    """
    What stands at the head of a student's card, as the Hub reads it.

    Args:
        made_from: as in `hub.checkpoint.save_checkpoint`.
        stated: as in `hub.card.state`.
    """
    bases = base_models(made_from)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation="finetune" if bases else None,
        datasets=datasets(made_from) or None,
        tags=TAGS,
        **terms(made_from, stated),
    )
