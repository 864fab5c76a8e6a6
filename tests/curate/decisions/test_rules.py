"""Verdicts: every dropped row has a kept stand-in that really is near, and chains swallow nothing."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

import curate.decisions.judge
import curate.decisions.neighbours
import curate.decisions.parts
import curate.decisions.rounds
import curate.decisions.rules
from curate.decisions.parts import AtThreshold, Part
from curate.decisions.rules import decide, sweep
from curate.decisions.settled import REASONS
from curate.neighbors.join import find_pairs
from curate.neighbors.verify import Pairs


@dataclass
class Near:
    image_of: np.ndarray
    image_pairs: Pairs
    caption_of: np.ndarray
    caption_pairs: Pairs


def pairs_of(*pairs: tuple[int, int, float]) -> Pairs:
    i, j, similarity = zip(*sorted(pairs), strict=True) if pairs else ((), (), ())
    return Pairs(np.array(i, np.int64), np.array(j, np.int64), np.array(similarity, np.float32))


def near(images, captions, image_pairs=(), caption_pairs=()) -> Near:
    return Near(
        np.array(images, np.int64),
        pairs_of(*image_pairs),
        np.array(captions, np.int64),
        pairs_of(*caption_pairs),
    )


def random_case(seed: int) -> tuple[Near, list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))

    def joined(things: int) -> list[tuple[int, int, float]]:
        density = rng.uniform(0, 0.25)
        return [
            (a, b, float(rng.uniform(0.9, 1)))
            for a in range(things)
            for b in range(a + 1, things)
            if rng.random() < density
        ]

    images, captions = (rng.integers(0, max(1, int(n * rng.uniform(0.3, 1.2))), n) for _ in range(2))
    of_images, of_captions = joined(int(images.max()) + 1), joined(int(captions.max()) + 1)
    texts = ["" if c == 0 and seed % 3 == 0 else f"caption {c}" for c in captions]
    return near(images, captions, of_images, of_captions), texts, rng.integers(0, 5, n)


def similarity(pairs: Pairs, a: int, b: int) -> float:
    if a == b:
        return 1.0
    found = (pairs.i == min(a, b)) & (pairs.j == max(a, b))
    return float(pairs.similarity[found][0]) if found.any() else math.nan


CHOICES = [
    (rule, quota, differs)
    for rule in ("greedy", "components")
    for quota in (None, 1, 2)
    for differs in ("pool", "keep")
]


@pytest.mark.parametrize(("rule", "quota", "differs"), CHOICES)
def test_each_dropped_row_has_a_kept_stand_in_and_a_true_reason(rule, quota, differs):
    for seed in range(25):
        case, captions, prefer = random_case(seed)
        verdicts = decide(case, captions, prefer, rule=rule, max_per_caption=quota, on_caption_differs=differs)
        for row in range(len(captions)):
            kept_by, reason = int(verdicts.kept_by[row]), verdicts.reason[row]
            if verdicts.kept[row]:
                assert kept_by == -1 and reason is None and math.isnan(verdicts.image_similarity[row])
                continue
            assert verdicts.kept[kept_by] and reason in REASONS
            of_images = similarity(case.image_pairs, case.image_of[row], case.image_of[kept_by])
            of_captions = similarity(case.caption_pairs, case.caption_of[row], case.caption_of[kept_by])
            np.testing.assert_equal(verdicts.image_similarity[row], np.float32(of_images))
            np.testing.assert_equal(verdicts.caption_similarity[row], np.float32(of_captions))
            if reason == "exact_image":
                assert case.image_of[row] == case.image_of[kept_by]
            elif reason in ("near_pair", "near_image"):
                assert math.isnan(of_captions) == (reason == "near_image")
                assert of_images >= 0.9 or rule == "components"
                assert verdicts.group[row] == verdicts.group[kept_by]
            else:
                assert quota is not None and of_captions >= 0.9
                assert (of_captions == 1.0) == (reason == "caption_quota")
        if rule == "greedy" and quota is None and differs == "pool":
            kept = np.flatnonzero(verdicts.kept)
            for a in kept:
                for b in kept:
                    assert a == b or math.isnan(similarity(case.image_pairs, case.image_of[a], case.image_of[b]))


@pytest.mark.parametrize(("rule", "quota", "differs"), CHOICES)
def test_no_caption_of_a_dropped_image_is_lost(rule, quota, differs):
    for seed in range(25):
        case, captions, prefer = random_case(seed)
        verdicts = decide(case, captions, prefer, rule=rule, max_per_caption=quota, on_caption_differs=differs)
        for row, reason in enumerate(verdicts.reason):
            if reason in ("exact_image", "near_image") and captions[row]:
                kept_by = int(verdicts.kept_by[row])
                alike = not math.isnan(similarity(case.caption_pairs, case.caption_of[row], case.caption_of[kept_by]))
                assert alike or captions[row] in verdicts.pooled[kept_by]
                assert alike or differs == "pool"
        for kept, pooled in verdicts.pooled.items():
            assert verdicts.kept[kept] and pooled and captions[kept] not in pooled
            assert len(set(pooled)) == len(pooled) and "" not in pooled


def test_the_quota_holds():
    for seed in range(60):
        case, captions, prefer = random_case(seed)
        verdicts = decide(case, captions, prefer, max_per_caption=2)
        kept = verdicts.kept & np.array([bool(text) for text in captions])
        assert np.bincount(case.caption_of[kept], minlength=1).max() <= 2


def test_equal_ranks_go_by_input_order_and_groups_are_counted():
    for seed in range(30):
        case, captions, prefer = random_case(seed)
        stable = np.argsort(np.argsort(prefer, kind="stable"))
        one, two = decide(case, captions, prefer), decide(case, captions, stable)
        for name in ("kept", "kept_by", "group", "group_size", "reason"):
            assert (getattr(one, name) == getattr(two, name)).all()
        assert (one.group_size == [(one.group == g).sum() for g in one.group]).all()


def test_the_order_of_pairs_and_numbers_changes_nothing():
    for seed in range(30):
        case, captions, prefer = random_case(seed)
        rng = np.random.default_rng(seed)
        renamed = rng.permutation(int(case.image_of.max()) + 1)
        i, j = renamed[case.image_pairs.i], renamed[case.image_pairs.j]
        low, high = np.minimum(i, j), np.maximum(i, j)
        order = np.lexsort((high, low))
        other = Near(
            renamed[case.image_of],
            Pairs(low[order], high[order], case.image_pairs.similarity[order]),
            case.caption_of,
            case.caption_pairs,
        )
        one, two = decide(case, captions, prefer), decide(other, captions, prefer)
        assert (one.kept_by == two.kept_by).all() and (one.group == two.group).all()


def as_the_rules_have_it(case: Near, captions: list[str], prefer, rule, quota, differs, keep_copies) -> list[tuple]:
    """``(kept_by, reason, group)`` of each row: each against all that were kept before it, without any table."""
    n = len(captions)
    order = sorted(range(n), key=lambda row: (prefer[row], row))
    rank = {row: place for place, row in enumerate(order)}
    image = [[similarity(case.image_pairs, a, b) for b in case.image_of] for a in case.image_of]
    caption = [[similarity(case.caption_pairs, a, b) for b in case.caption_of] for a in case.caption_of]
    component = np.arange(int(case.image_of.max()) + 1)
    for a, b in zip(case.image_pairs.i, case.image_pairs.j, strict=True):
        component[component == component[b]] = component[a]
    linked = component[case.image_of][:, None] == component[case.image_of]
    kept: list[int] = []
    verdicts: dict[int, tuple] = {}

    def best(row, others, *keys):
        return min(others, key=lambda other: (*(key(other) for key in keys), rank[other]))

    for row in order:
        def other_image(kept_row, row=row):
            return case.image_of[kept_row] != case.image_of[row]

        def far(kept_row, row=row):
            return 1.0 if math.isnan(image[row][kept_row]) else -image[row][kept_row]

        if rule == "greedy":
            copies = [other for other in kept if not math.isnan(image[row][other])]
            group = verdicts[best(row, copies, other_image, far)][2] if copies else row
        else:
            copies = [other for other in kept if linked[row][other]]
            group = next((verdicts[other][2] for other in order[: rank[row]] if linked[row][other]), row)
        alike = [other for other in copies if not math.isnan(caption[row][other])]
        if differs == "keep" and captions[row]:
            copies = alike
        if len(copies) >= keep_copies:
            by = best(row, copies, other_image, lambda other, row=row: math.isnan(caption[row][other]), far)
            reason = "exact_image" if not other_image(by) else "near_pair" if by in alike else "near_image"
            verdicts[row] = (by, reason, verdicts[by][2] if rule == "greedy" else group)
            continue
        same = [other for other in kept if not math.isnan(caption[row][other])]
        if quota is not None and captions[row] and len(same) >= quota:
            by = best(row, same, lambda other, row=row: -caption[row][other])
            equal = case.caption_of[by] == case.caption_of[row]
            verdicts[row] = (by, "caption_quota" if equal else "near_caption", group)
            continue
        verdicts[row] = (-1, None, group)
        kept.append(row)
    return [verdicts[row] for row in range(n)]


@pytest.mark.parametrize(("few", "some"), [(0, 1), (16, 1 << 20)])
@pytest.mark.parametrize(("rule", "quota", "differs"), CHOICES)
def test_verdicts_are_those_of_the_rules_read_out(rule, quota, differs, few, some, monkeypatch):
    monkeypatch.setattr(curate.decisions.judge, "FEW", few)
    for module, name in ((curate.decisions.parts, "PART"), (curate.decisions.parts, "_LINKS")):
        monkeypatch.setattr(module, name, some)
    monkeypatch.setattr(curate.decisions.rounds, "_STAND_INS", some)
    monkeypatch.setattr(curate.decisions.rounds, "_ROUNDS", few)
    for seed in range(16):
        case, captions, prefer = random_case(seed)
        copies = 1 + seed % 2
        verdicts = decide(
            case, captions, prefer, rule=rule, max_per_caption=quota, on_caption_differs=differs, keep_copies=copies
        )
        got = list(zip(verdicts.kept_by.tolist(), verdicts.reason, verdicts.group.tolist(), strict=True))
        assert got == as_the_rules_have_it(case, captions, prefer, rule, quota, differs, copies)


def test_a_long_chain_and_a_wide_star_are_decided_as_one_row_after_the_other_is():
    n = 5000
    chain = near(range(n), range(n), [(k, k + 1, 0.95) for k in range(n - 1)])
    captions = [f"number {k}" for k in range(n)]
    assert decide(chain, captions).kept.tolist() == [k % 2 == 0 for k in range(n)]
    star = near(range(n), range(n), [(k, n - 1, 0.95) for k in range(n - 1)])
    assert decide(star, captions, np.arange(n)[::-1]).kept.tolist() == [False] * (n - 1) + [True]
    assert decide(star, captions).kept.sum() == n - 1


@pytest.mark.parametrize("some", [1, 1 << 20])
@pytest.mark.parametrize("crowd", [None, 2])
def test_rows_that_must_stay_are_decided_in_parts_as_in_one(crowd, some, monkeypatch):
    rng = np.random.default_rng(1)
    things = np.repeat(rng.standard_normal((20, 16)), 4, axis=0) + 0.2 * rng.standard_normal((80, 16))
    case = Near(rng.integers(0, 80, 120), find_pairs(things, 0.9), np.arange(120) % 90, pairs_of((0, 1, 0.95)))
    captions, prefer = [f"caption {c}" for c in case.caption_of], rng.integers(0, 9, 120)
    must_stay, excluded = rng.random((2, 120)) < 0.1
    excluded &= ~must_stay
    monkeypatch.setattr(curate.decisions.rules._How, "parts", lambda how, near: [whole(near)])
    one = decide(case, captions, prefer, must_stay=must_stay, excluded=excluded)
    monkeypatch.undo()
    monkeypatch.setattr(curate.decisions.parts, "PART", some)
    case.image_pairs = find_pairs(things, 0.9, crowd=crowd)
    two = decide(case, captions, prefer, must_stay=must_stay, excluded=excluded)
    for name in ("kept", "reason", "kept_by", "group", "group_size", "image_similarity", "caption_similarity"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def whole(case: Near) -> Part:
    """All rows as one part, to be judged one after the other."""
    at = AtThreshold(case.image_of, case.image_pairs, case.caption_of, case.caption_pairs)
    return Part(np.arange(len(case.image_of)), at, by_hand=True)


@pytest.mark.parametrize("ahead", [1, 7, 256])
@pytest.mark.parametrize(("rule", "quota", "differs"), CHOICES)
def test_a_crowd_changes_no_verdict(rule, quota, differs, ahead, monkeypatch):
    monkeypatch.setattr(curate.decisions.neighbours, "AHEAD", ahead)
    monkeypatch.setattr(curate.decisions.rounds, "AHEAD", ahead)
    monkeypatch.setattr(curate.decisions.rounds, "_STAND_INS", 4 * ahead)
    monkeypatch.setattr(curate.decisions.rounds, "_CROWDED", ahead)
    rng = np.random.default_rng(3)
    images, captions = (rng.standard_normal((60, 16)) for _ in range(2))
    for things in (images, captions):
        things[:30] = things[0] + 0.25 * rng.standard_normal((30, 16))  # near, though not all to all
        things[40:] = things[40] + 0.1 * rng.standard_normal((20, 16))
    image_of, caption_of = np.arange(80) % 60, rng.permutation(np.arange(80) % 60)
    texts, prefer = [f"caption {c}" for c in caption_of], rng.integers(0, 9, 80)
    options = {"rule": rule, "max_per_caption": quota, "on_caption_differs": differs}
    results = []
    for crowd in (None, 5):
        joined = [find_pairs(things, 0.9, crowd=crowd) for things in (images, captions)]
        results.append(decide(Near(image_of, joined[0], caption_of, joined[1]), texts, prefer, **options))
    assert joined[0].crowd is not None and joined[1].crowd is not None
    one, two = results
    for name in ("kept", "reason", "kept_by", "group", "group_size", "image_similarity", "caption_similarity"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert one.pooled == two.pooled


class Counted(str):
    """Text that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


@pytest.mark.parametrize("rule", ["greedy", "components"])
def test_a_copy_is_not_compared_with_all_copies_before_it(rule, monkeypatch):
    n = 2000
    captions = [Counted(f"number {k}") for k in range(n)]
    copies = near(np.zeros(n), range(n))
    pooled = decide(copies, captions, rule=rule)
    assert pooled.kept.sum() == 1 and pooled.pooled[0] == captions[1:]
    assert Counted.compared <= 10 * n

    asked = 0

    def counting(judge, row, kept, similarity=curate.decisions.judge.Judge._caption_similarity):
        nonlocal asked
        asked += 1
        return similarity(judge, row, kept)

    monkeypatch.setattr(curate.decisions.judge.Judge, "_caption_similarity", counting)
    kept = decide(copies, captions, rule=rule, on_caption_differs="keep")
    assert kept.kept.all() and (kept.group == 0).all() and asked <= 10 * n


@pytest.mark.parametrize("some", [1, 1 << 20])
def test_a_sweep_counts_what_each_threshold_would_decide(some, monkeypatch):
    monkeypatch.setattr(curate.decisions.parts, "PART", some)
    for seed in range(10):
        case, captions, prefer = random_case(seed)
        thresholds = [0.9, 0.93, 0.97, 1.0]
        table = sweep(case, captions, prefer, thresholds)
        for row, threshold in zip(table, thresholds, strict=True):
            at = Near(case.image_of, case.image_pairs.at_least(threshold), case.caption_of, case.caption_pairs)
            verdicts = decide(at, captions, prefer)
            sizes = np.unique(verdicts.group, return_counts=True)[1]
            assert row == {
                "threshold": threshold,
                "kept": verdicts.kept.sum(),
                "dropped": (~verdicts.kept).sum(),
                "groups": (sizes > 1).sum(),
            }
        assert table[0]["kept"] <= table[-1]["kept"] == len(np.unique(case.image_of))


@pytest.mark.parametrize(("rule", "quota", "differs"), CHOICES)
def test_what_stands_in_another_set_is_dropped_and_stands_for_nothing(rule, quota, differs):
    for seed in range(15):
        case, captions, prefer = random_case(seed)
        elsewhere = np.random.default_rng(seed).random(len(captions)) < 0.3
        options = {"rule": rule, "max_per_caption": quota, "on_caption_differs": differs}
        verdicts = decide(case, captions, prefer, elsewhere=elsewhere, **options)
        assert (verdicts.reason[elsewhere] == "other_set").all() and not verdicts.kept[elsewhere].any()
        assert (verdicts.kept_by[elsewhere] == -1).all() and (verdicts.group_size[elsewhere] == 1).all()
        stand_ins = verdicts.kept_by[verdicts.kept_by >= 0]
        assert verdicts.kept[stand_ins].all() and not elsewhere[stand_ins].any()
        if rule == "greedy":  # as if they had never been there
            rest = np.flatnonzero(~elsewhere)
            alone = Near(case.image_of[rest], case.image_pairs, case.caption_of[rest], case.caption_pairs)
            without = decide(alone, [captions[row] for row in rest], prefer[rest], **options)
            assert verdicts.kept[rest].tolist() == without.kept.tolist()


def test_as_many_copies_stay_as_are_asked_for():
    star = near(range(5), range(5), [(a, b, 0.95) for a in range(5) for b in range(a + 1, 5)])
    captions = [f"number {k}" for k in range(5)]
    for copies in (1, 2, 3):
        for rule in ("greedy", "components"):
            verdicts = decide(star, captions, rule=rule, keep_copies=copies)
            assert verdicts.kept.tolist() == [True] * copies + [False] * (5 - copies)
            assert verdicts.group.tolist() == [0] * 5


def test_a_chain_swallows_nothing_under_greedy_and_is_one_under_components():
    chain = near(range(5), range(5), [(k, k + 1, 0.95) for k in range(4)])
    captions = [f"number {k}" for k in range(5)]
    greedy = decide(chain, captions)
    assert greedy.kept.tolist() == [True, False, True, False, True]
    assert greedy.kept_by.tolist() == [-1, 0, -1, 2, -1]
    components = decide(chain, captions, rule="components")
    assert components.kept.tolist() == [True, False, False, False, False]
    assert components.group_size.tolist() == [5] * 5
    assert np.isnan(components.image_similarity[2:]).all()


def test_preference_decides_who_stays():
    case = near([0, 1, 1], [0, 0, 0], [(0, 1, 0.95)])
    verdicts = decide(case, ["a cat"] * 3, np.array([2, 1, 0]))
    assert verdicts.kept.tolist() == [False, False, True]
    assert verdicts.reason.tolist() == ["near_pair", "exact_image", None]


def test_captions_that_differ_are_pooled_or_keep_the_copy():
    case = near([0, 0, 1], [0, 1, 2], [(0, 1, 0.95)])
    captions = ["a cat", "eine Katze", "un chat"]
    pooled = decide(case, captions)
    assert pooled.reason.tolist() == [None, "exact_image", "near_image"]
    assert pooled.pooled == {0: ["eine Katze", "un chat"]}
    kept = decide(case, captions, on_caption_differs="keep")
    assert kept.kept.all() and kept.pooled == {}
    assert kept.group_size.tolist() == [3, 3, 3]


def test_an_image_without_caption_is_dropped_beside_one_that_has_it():
    case = near([0, 0], [0, 1])
    for differs in ("pool", "keep"):
        verdicts = decide(case, ["a cat", ""], on_caption_differs=differs)
        assert verdicts.kept.tolist() == [True, False] and verdicts.pooled == {}


def test_one_caption_on_many_images_is_kept_as_often_as_allowed():
    case = near(range(4), [0, 0, 0, 1], caption_pairs=[(0, 1, 0.97)])
    verdicts = decide(case, ["a flag", "A flag", "a flag", "a flag!"], max_per_caption=2)
    assert verdicts.kept.tolist() == [True, True, False, False]
    assert verdicts.reason.tolist() == [None, None, "caption_quota", "near_caption"]
    assert verdicts.group_size.tolist() == [1, 1, 1, 1]
    assert np.isnan(verdicts.image_similarity).all()
    assert decide(case, ["", "", "", ""], max_per_caption=1).kept.all()


def test_nothing_gives_nothing():
    verdicts = decide(near([], []), [])
    assert len(verdicts.kept) == len(verdicts.group_size) == 0


def test_bad_arguments_are_named():
    case = near([0], [0])
    with pytest.raises(ValueError, match="rule 'all'"):
        decide(case, ["x"], rule="all")
    with pytest.raises(ValueError, match="max_per_caption"):
        decide(case, ["x"], max_per_caption=0)
    with pytest.raises(ValueError, match="keep_copies"):
        decide(case, ["x"], keep_copies=0)
    with pytest.raises(ValueError, match="one entry a row"):
        decide(case, ["x", "y"])
