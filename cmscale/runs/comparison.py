"""Chooses among evaluations: the only place that decides which are compared, and which of them is shown (`RULE`)."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cmscale.io.place import without_folders
from cmscale.runs.results import EvaluationResult

RULE = (
    "Only results over the same features, against the same reference and with the same number of samples are compared. "
    "Of several such groups the one with the most samples counts; then FID before other scores; then the group with "
    "the most results; then the newest. Of several results of one network and sampling the one with the most seeds "
    "counts; then the newest."
)


@dataclass(frozen=True)
class Basis:
    """What two results must have in common for a comparison: a Fréchet distance falls with the number of samples."""

    score_name: str
    features: tuple[str, str | None]
    reference: str | None
    num_samples: int


def basis_of(result: EvaluationResult) -> Basis:
    """What a result can be compared on; the features by their label and the hash of their weights, if it is known."""
    features = result.features, result.protocol.get("features_sha256")
    reference = result.reference.get("sha256") or result.reference.get("name")
    return Basis(result.score_name, features, reference, result.num_samples)


def describe_basis(result: EvaluationResult) -> str:
    """The basis in words: `50,000 samples against lsun_bedroom.npz`."""
    return f"{result.num_samples:,} samples against {_name_of_reference(result)}"


def reference_names(results: Sequence[EvaluationResult]) -> list[str]:
    """The name of each result's reference; with its hash, if other results have another reference of that name."""
    hashes: dict[str, set[str]] = defaultdict(set)
    for each in results:
        hashes[_name_of_reference(each)].add(_hash_of_reference(each))
    named = [(_name_of_reference(each), _hash_of_reference(each)) for each in results]
    return [f"{name} ({sha256[:8]})" if len(hashes[name]) > 1 else name for name, sha256 in named]


def describe_groups(groups: Sequence[Sequence[EvaluationResult]]) -> list[str]:
    """The basis of each group, in words that no other group of its score has; with hashes, where it needs them."""
    firsts = [group[0] for group in groups]
    words = [
        (each.score_name, f"{each.num_samples:,} samples against {reference}")
        for each, reference in zip(firsts, reference_names(firsts), strict=True)
    ]
    features = [f"features {each.features} ({basis_of(each).features[1] or 'of unknown weights'})" for each in firsts]
    return [
        f"{which[1]}, {of}" if words.count(which) > 1 else which[1] for which, of in zip(words, features, strict=True)
    ]


def _name_of_reference(result: EvaluationResult) -> str:
    return without_folders(str(result.reference.get("name") or "an unnamed reference"))


def _hash_of_reference(result: EvaluationResult) -> str:
    return str(result.reference.get("sha256") or "")


def groups_of(results: Iterable[EvaluationResult]) -> list[list[EvaluationResult]]:
    """The results in groups that may be compared, in the rule's order: the first is the one that counts."""
    found: dict[Basis, list[EvaluationResult]] = defaultdict(list)
    for each in results:
        found[basis_of(each)].append(each)
    return sorted(found.values(), key=_rank, reverse=True)


def _rank(group: Sequence[EvaluationResult]) -> tuple[int, bool, int, int, str]:
    newest = max(group, key=lambda each: (each.step or 0, each.date or ""))
    return group[0].num_samples, group[0].score_name == "FID", len(group), newest.step or 0, newest.date or ""


def once_each(group: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    """Of several results of one network in one sampling the one that counts; in the given order.

    If one name stands for other weights meanwhile (a run that was started afresh), the newest counts.
    """
    chosen: dict[tuple[Any, ...], EvaluationResult] = {}
    for each in group:
        what = each.step, each.weights, each.nfe, each.times, (each.samples or {}).get("sha256")
        if what not in chosen or _counts_more(each, than=chosen[what]):
            chosen[what] = each
    return list(chosen.values())


def _counts_more(one: EvaluationResult, *, than: EvaluationResult) -> bool:
    mine, theirs = one.date or "", than.date or ""
    if one.protocol.get("weights_sha256") != than.protocol.get("weights_sha256"):
        return mine >= theirs
    return (len(one.seeds), mine) >= (len(than.seeds), theirs)


def best_of(results: Sequence[EvaluationResult]) -> EvaluationResult:
    """The lowest Fréchet distance among the results that the rule compares; the earliest of equal ones."""
    return min(once_each(groups_of(results)[0]), key=lambda each: each.fid.mean)


def best_by_score(results: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    """For each score name and number of network evaluations the best of the results that the rule compares."""
    found = []
    for name in sorted({each.score_name for each in results}):
        group = groups_of(each for each in results if each.score_name == name)[0]
        for nfe in sorted({each.nfe or 0 for each in group}):
            found.append(best_of([each for each in group if (each.nfe or 0) == nfe]))
    return found
