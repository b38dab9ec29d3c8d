# SPDX-License-Identifier: Apache-2.0
"""What a library's entries, lists, names and reports say, without files: against tables written by
hand.
"""

import hashlib
import json
from dataclasses import replace

import pytest

from peft import TaskType
from peft.base.errors import CheckpointError, PeftTypeError, PeftValueError
from peft.library.catalog import Catalog
from peft.library.configs import config_digest
from peft.library.entry import AdapterEntry, Place, Stamp, checked_scores, checked_tags
from peft.library.fleet import FleetStatus
from peft.library.index import Exclusion, Index
from peft.library.inspecting import UnfitError, check_keys, is_lasting, reason_of
from peft.library.listing import AdapterList, LibraryReport, Problem, select
from peft.library.naming import default_name, free_name
from peft.library.placing import check_one_base
from peft.library.refreshing import LibraryChanges

FULL = AdapterEntry(
    "sums", Place("users/ada"), "POLY", "base/x", "CAUSAL_LM", 3, ("add", "sub"), 500, "aa", "bb",
    ("math", "new"), {"acc": 0.5}, (Stamp(1, 2, 3, 4), Stamp(5, 6, 7, 8)),
)  # fmt: skip
LINE = {
    "name": "sums",
    "path": "users/ada",
    "method": "POLY",
    "base_model": "base/x",
    "task_type": "CAUSAL_LM",
    "rank": 3,
    "tasks": ["add", "sub"],
    "bytes": 500,
    "sha256": "aa",
    "config_sha256": "bb",
    "tags": ["math", "new"],
    "scores": {"acc": 0.5},
    "stamps": [[1, 2, 3, 4], [5, 6, 7, 8]],
}
BARE = AdapterEntry("b", Place(repo="me/x", revision="c0ffee123456", subfolder="s"), "LOHA")
BARE_LINE = {"name": "b", "repo": "me/x", "revision": "c0ffee123456", "subfolder": "s"}
BARE_LINE |= {"method": "LOHA", "bytes": 0}
MEMBER = replace(FULL, name="m", place=Place("p.adapters.safetensors", "ada"), rank=None)


def test_an_entry_is_a_line_and_a_line_an_entry():
    assert FULL.to_json() == LINE and AdapterEntry.from_json(LINE) == FULL
    assert BARE.to_json() == BARE_LINE and AdapterEntry.from_json(BARE_LINE) == BARE
    least = {"name": "b", "path": "x", "method": "LOHA"}
    assert AdapterEntry.from_json(least) == AdapterEntry("b", Place("x"), "LOHA")
    assert AdapterEntry.from_json(MEMBER.to_json()) == MEMBER
    empty = LINE | {"base_model": None, "task_type": "", "stamps": [["x"]]}
    assert AdapterEntry.from_json(empty) == replace(
        FULL, base_model=None, task_type=None, stamps=()
    )


def test_places_and_entries_in_words():
    places = [str(each.place) for each in (FULL, BARE, MEMBER)]
    assert places == ["users/ada", "hub:me/x/s@c0ffee12", "p.adapters.safetensors#ada"]
    assert str(BARE.place._replace(subfolder="")) == "hub:me/x@c0ffee12"
    assert str(FULL) == "sums: POLY of rank 3 for base/x, 500 B, in users/ada"
    assert str(BARE) == "b: LOHA, 0 B, in hub:me/x/s@c0ffee12"


@pytest.mark.parametrize("change", [{"sha256": "x"}, {"config_sha256": "x"}, {"stamps": ()}])
def test_a_version_is_another_if_any_of_the_files_is(change):
    assert replace(FULL, **change).version != FULL.version
    assert replace(FULL, name="x", tags=(), scores={}).version == FULL.version


def test_tags_are_words_in_order():
    assert checked_tags("b a") == ("b a",) and checked_tags(()) == ()
    assert checked_tags(["b", "a", "b"]) == checked_tags({"a", "b"}) == ("a", "b")
    for odd in ("", " ", "a\nb", 3, None):
        for given in (odd, ["a", odd]):
            with pytest.raises(PeftValueError, match=r"`tags` has .*; a tag is a word in one line"):
                checked_tags(given)
    with pytest.raises(PeftValueError, match="`remove` has 3"):
        checked_tags([3], "remove")


def test_scores_are_numbers_by_name():
    given = {"a": 1, "b": 0.5}
    assert checked_scores(given) == given and checked_scores(given) is not given
    assert checked_scores(None) == checked_scores({}) == {}
    for odd, message in (
        ({"": 1}, "A score's name '' must be a non-empty string"),
        ({3: 1}, "A score's name 3 must be"),
        ({"a": 1, "b": "x"}, r"`scores\['b'\]`='x' must be"),
        ({"a": float("inf")}, "must be a .*finite number"),
    ):
        with pytest.raises(PeftValueError, match=message):
            checked_scores(odd)
    with pytest.raises(PeftTypeError, match=r"`scores`=\[\] must be a dictionary"):
        checked_scores([])


NAMES = {
    Place("users/ada"): "users/ada",
    Place("qwen2.5/v1.0"): "qwen2_5/v1_0",
    Place("."): "default",
    Place("items"): "adapter_items",
    Place("p.adapters.safetensors", "ada"): "p/ada",
    Place(repo="me/x.y", revision="a"): "me/x_y",
    Place(repo="me/x", revision="a", subfolder="s"): "me/x/s",
}


def test_names_by_place():
    assert {place: default_name(place) for place in NAMES} == NAMES
    taken = ["a", "a-2", "a-3", "b"]
    assert [free_name(name, taken) for name in "abc"] == ["a-4", "b-2", "c"]


# Lists


def listed(number):
    return AdapterList(replace(FULL, name=f"n{i:02}", bytes=1000) for i in range(number))


def test_a_table_of_adapters():
    tasks = tuple("abcde")
    entries = AdapterList([replace(FULL, tasks=tasks, scores={"acc": 1 / 3, "f": 2}), BARE])
    assert entries.names == ["sums", "b"] and entries.bytes == 500
    assert entries.to_json()[1] == BARE_LINE
    assert str(entries).splitlines() == [
        "name  method  rank  base model  tasks            size  tags       acc     f",
        "sums  POLY       3  base/x      a, b, c, d + 1  500 B  math, new  0.3333  2",
        "b     LOHA                                        0 B",
        "2 adapters, 500 B",
    ]
    lines = str(AdapterList([replace(FULL, tasks=tuple("abcd"))])).splitlines()
    assert "  a, b, c, d  500 B" in lines[1]


@pytest.mark.parametrize(("number", "more"), [(40, []), (41, ["… 1 more"])])
def test_forty_rows_are_shown(number, more):
    lines = str(listed(number)).splitlines()
    assert lines[1:41] == [lines[1].replace("n00", f"n{i:02}") for i in range(40)]
    assert lines[41:] == [*more, f"{number} adapters, {number}.0 kB"]
    report = LibraryReport(7, 1000, (Problem("a", "missing", "Gone."),) * number)
    lines = str(report).splitlines()
    assert lines[0].split() == ["name", "kind", "detail"] and lines[40] == "a     missing  Gone."
    assert lines[41:] == [*more, "7 adapters checked, 1.0 kB: not sound"]


def test_a_report_in_words_and_as_json():
    assert str(LibraryReport(2, 10)) == "2 adapters checked, 10 B: sound"
    assert LibraryReport(2, 10).to_json() == {"ok": True, "checked": 2, "bytes": 10, "problems": []}
    kinds = {"missing": False, "changed": False, "damaged": False, "left out": True}
    for kind, ok in (kinds | {"not indexed": True}).items():
        beside = Problem("b", "left out", "Why.")
        report = LibraryReport(1, 0, (Problem("a", kind, "Why."), beside))
        assert report.ok is ok and str(report).endswith(": sound") is ok
        assert report.to_json()["problems"][0] == {"name": "a", "kind": kind, "detail": "Why."}


def chosen(*entries, **asked):
    options = dict.fromkeys(
        ("method", "base_model", "task_type", "tags", "task", "rank", "min_scores", "where")
    )
    return select(entries or (FULL, BARE), **options | asked).names


FILTERS = [
    ({}, ["sums", "b"]),
    ({"method": "poly"}, ["sums"]),
    ({"method": ("LOHA", "Lora")}, ["b"]),
    ({"base_model": "base/x"}, ["sums"]),
    ({"base_model": "base"}, []),
    ({"task_type": "CAUSAL_LM"}, ["sums"]),
    ({"task_type": TaskType.CAUSAL_LM}, ["sums"]),
    ({"task_type": "SEQ_CLS"}, []),
    ({"tags": "math"}, ["sums"]),
    ({"tags": ["new", "math"]}, ["sums"]),
    ({"tags": ["math", "x"]}, []),
    ({"tags": []}, ["sums", "b"]),
    ({"task": "sub"}, ["sums"]),
    ({"task": "su"}, []),
    ({"rank": 3}, ["sums"]),
    ({"rank": 2}, []),
    ({"min_scores": {"acc": 0.5}}, ["sums"]),  # as much as asked for is enough
    ({"min_scores": {"acc": 0.51}}, []),
    ({"min_scores": {"acc": -1e300}}, ["sums"]),  # without a score it is less than any
    ({"where": lambda entry: entry.bytes}, ["sums"]),
    ({"where": lambda entry: entry.name == "b", "method": "LOHA"}, ["b"]),
    ({"where": lambda entry: entry.name == "b", "method": "POLY"}, []),
]


@pytest.mark.parametrize(("asked", "names"), FILTERS, ids=[str(n) for n in range(len(FILTERS))])
def test_a_filter_asks_for_all_that_is_given(asked, names):
    assert chosen(**asked) == names


def test_a_filter_of_several_scores():
    both = replace(FULL, name="c", scores={"acc": 0.6, "f": 1})
    assert chosen(FULL, both, min_scores={"acc": 0.1, "f": 1}) == ["c"]


def test_filters_of_other_kinds():
    for asked, kind, message in (
        ({"method": 3}, PeftTypeError, "`method`=3 must be a word or a list of words"),
        ({"method": ["LORA", 3]}, PeftTypeError, "`method`=.* must be a word or a list of words"),
        ({"tags": {"a": 1, 2: 3}}, PeftTypeError, "`tags`=.* must be a word or a list of words"),
        ({"where": "x"}, PeftTypeError, "`where`='x' must be a function"),
        ({"min_scores": {"f": 1}}, PeftValueError, r"No adapter has a score 'f'; .* \['acc'\]"),
        ({"min_scores": [1]}, PeftTypeError, "must be a dictionary"),
        ({"method": ["LORA", "NEW"]}, PeftValueError, "`method`='NEW' is none of this package"),
    ):
        with pytest.raises(kind, match=message):
            chosen(**asked)


# Names in an index

OTHER = replace(BARE, name="users/ada")  # the name is another adapter's path
LOST = replace(FULL, name="lost", place=Place("away"))


@pytest.fixture
def catalog(tmp_path):
    entries = {each.place: each for each in (OTHER, FULL, MEMBER)}
    left_out = {"z": Exclusion("No weights.", ()), "broken": Exclusion("No config.", ())}
    index = Index(entries, left_out, {Place("gone")}, {LOST.place: LOST})
    return Catalog(tmp_path, index)


def test_an_adapter_by_name_path_or_entry(catalog):
    assert catalog.entries() == AdapterList([MEMBER, FULL, OTHER])
    assert catalog.left_out() == [("broken", "No config."), ("z", "No weights.")]
    assert catalog.find("users/ada") == OTHER  # a name comes before a path
    assert catalog.find("sums") == catalog.find(replace(FULL, tags=())) == FULL
    assert catalog.find_all(["sums", "m", FULL]) == [FULL, MEMBER]
    assert catalog.find_all("m") == catalog.find_all(MEMBER) == [MEMBER]
    for name, kind, message in (
        ("broken", PeftValueError, "no adapter 'broken' among 3. It is left out: No config."),
        ("sum", PeftValueError, "no adapter 'sum' among 3. Did you mean 'sums'"),
        (3, PeftTypeError, "An adapter is named by a string, got 3"),
    ):
        with pytest.raises(kind, match=message):
            catalog.find(name)
    for names in (3, None):
        with pytest.raises(PeftTypeError, match=f"`names`={names} must be a name or a list"):
            catalog.find_all(names)


def test_places_of_all_that_can_be_removed(catalog):
    asked = ["broken", "gone", "lost", FULL, "users/ada", "m"]
    expected = {Place("broken"), Place("gone"), LOST.place, FULL.place, OTHER.place, MEMBER.place}
    assert catalog.places(asked) == expected
    assert catalog.places("lost") == {LOST.place}
    with pytest.raises(PeftValueError, match="no adapter 'away'"):
        catalog.places("away")


def test_a_new_name_is_free_and_can_be_one(catalog):
    for name in ("new", "away", "sums"):
        catalog.check_new(name, FULL.place)
    with pytest.raises(PeftValueError, match="has an adapter 'm' already; choose another name"):
        catalog.check_new("m", FULL.place)
    with pytest.raises(PeftValueError, match="without dots"):
        catalog.check_new("a.b", FULL.place)


def test_changes_from_one_index_to_another():
    new = replace(FULL, name="new", place=Place("new"))
    before = Index({FULL.place: FULL, BARE.place: BARE}, {"x": Exclusion("Why.", ())})
    changed = replace(FULL, config_sha256="other")
    after = Index(
        {new.place: new, FULL.place: changed},
        {"x": Exclusion("Other.", ()), "y": Exclusion("Why.", ())},
    )
    changes = LibraryChanges.between(before, after)
    assert changes == (["new"], ["sums"], ["b"], ["y"])
    assert str(changes) == "1 added, 1 changed, 1 dropped, 1 left out"
    assert not LibraryChanges.between(after, after)
    for i in range(4):  # any of them is a change
        assert LibraryChanges(*([["x"]] * (i == j) or [[]] for j in range(4)))


def test_one_base_model_in_several_folders():
    def of(*bases):
        return [replace(FULL, base_model=base) for base in bases]

    check_one_base(of("me/llama", "/data/llama/", "llama", None))
    check_one_base([])
    with pytest.raises(PeftValueError, match=r"several base models: 'b' \(2\), 'x/a' \(1\)\. Ch"):
        check_one_base(of("x/a", "b", None, "b"))
    with pytest.raises(PeftValueError, match=r"models: ('\d' \(1\), ){5}'5' \(1\)\. Choose"):
        check_one_base(of(*"0123456"))


# Files


def test_the_digest_of_a_config_is_of_what_it_says():
    text = json.dumps({"a": 1, "b": [2, {"c": 3}]}, sort_keys=True)
    expected = hashlib.sha256(text.encode()).hexdigest()
    for same in (text, '{"b": [2, {"c": 3}],\r\n"a": 1}'):
        assert config_digest(same, "x") == expected
    for other in ('{"a": 1, "b": [2]}', '{"a": 1, "b": [2, {"c": 3}], "unknown": 0}'):
        assert config_digest(other, "x") != expected
    with pytest.raises(CheckpointError, match="x"):
        config_digest("[]", "x")


def caused_by(cause):
    try:
        raise ValueError from cause
    except ValueError as error:
        return error


def test_errors_that_may_not_come_again():
    """Of the disk or the memory, whatever was made of them."""
    for error in (OSError(), MemoryError(), caused_by(OSError()), caused_by(MemoryError())):
        assert is_lasting(error) is False
    for error in (ValueError(), caused_by(KeyError()), UnfitError()):
        assert is_lasting(error) is True


def test_errors_as_sentences():
    sentences = {
        "It has none.": UnfitError("It has none."),
        "It is damaged.": CheckpointError("It is damaged."),
        "It can't be read: broken.": OSError(5, "broken"),
        "It can't be read: cut off.": OSError("cut off"),
        "It can't be read (KeyError: 'a').": KeyError("a"),
    }
    for sentence, error in sentences.items():
        assert reason_of(error) == sentence


def test_keys_of_another_method():
    check_keys(["head.weight", "base_model.model.0.lora_A.weight"], "LORA")
    for keys, message in (
        (["a.lokr_w1", "b.xlora_A"], r"no tensor of LORA \(`lora_…`\), but `a.lokr_w1`\.$"),
        ([], r"no tensor of LORA \(`lora_…`\); it is empty\.$"),
    ):
        with pytest.raises(UnfitError, match=message):
            check_keys(keys, "LORA")


# A fleet


def test_a_fleet_in_words():
    status = FleetStatus({"ada": 500, "ben": 1500}, ("ben",), {"own": 20}, 7, 3)
    assert status.bytes == 2000
    assert str(status).splitlines() == [
        "adapter    size",
        "ada       500 B",
        "ben      1.5 kB  in use",
        "own        20 B  not the fleet's",
        "2 adapters, 2.0 kB; 7 loaded, 3 evicted so far",
    ]


@pytest.mark.parametrize(("number", "more"), [(40, []), (41, ["… 1 more before these"])])
def test_forty_adapters_of_a_fleet_are_shown(number, more):
    sizes = {f"n{i:02}": 1 for i in range(number)}
    lines = str(FleetStatus(sizes, (), {}, number, 0)).splitlines()
    assert lines[: len(more)] == more
    assert [line.split()[0] for line in lines[len(more) + 1 : -1]] == list(sizes)[-40:]
