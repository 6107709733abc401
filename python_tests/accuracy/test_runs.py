"""Methods as words on a command line, and the runs that come of them."""

from __future__ import annotations

import pytest

from benchmarks.accuracy.runs import parse_methods, plan
from consensusdrop_kernels.demo import DemoError
from consensusdrop_kernels.methods import ConsensusDrop, PyramidDrop, Random, VisionDrop, methods


def test_every_method_of_the_table_by_its_name():
    names = [row.method.__name__ for row in methods()]
    assert [(s.label, s.method.__name__) for s in parse_methods(",".join(names))] == [
        (name, name) for name in names
    ]


def test_options_labels_and_budgets_of_their_own():
    one, two, three = parse_methods(
        "ConsensusDrop(alpha=.3, size_attention=True),"
        ' PyramidDrop(stages_at=(0.5,), keep=0.7), VisionDrop(start=2.0, label="steep")'
    )
    assert one.label == "ConsensusDrop(alpha=0.3, size_attention=True)"
    assert one.at(16).method == ConsensusDrop(keep=16, alpha=0.3, size_attention=True)
    assert two.keep == 0.7
    assert two.at(two.keep).method == PyramidDrop(keep=0.7, stages_at=(0.5,))
    assert three.label == "steep"
    assert three.at(0.1).method == VisionDrop(keep=0.1, start=2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one"),
        ("Foo", "must be of AdaFV, .*, got Foo$"),
        ("Method", "must be of .*, got Method$"),
        ("VisionDrop(", "must be like VisionDrop"),
        ("VisionDrop(2)", "options by name, alpha=0.3, got VisionDrop"),
        ("VisionDrop.select", "got VisionDrop.select$"),
        ("__import__('os').system('x')", "got __import__"),
        ("Random(seed=open('x'))", "plain values by name, got seed=open"),
        ("Random(**{'seed': 1})", "plain values by name"),
        ("Random(sed=1)", "Random has no option sed; it has seed, positions, budget_scope$"),
        ("Random(seed=-1)", r"Random\(seed=-1\): seed must be an int >= 0, got -1$"),
        ("Random(keep=0)", "keep must be a count"),
        ("Full(seed=1)", "Full has no option seed; it has none$"),
        ("Random(label=3)", "label must be a text, got 3"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(DemoError, match=message):
        parse_methods(text)


def test_two_rows_need_two_labels():
    with pytest.raises(DemoError, match="labels of their own, got Random twice"):
        plan(parse_methods("Random,Random"), [4])


def rows(made):
    return [(run.label, run.keep) for run in made.runs]


def rivals(made, at):
    return [made.runs[i].method for i in made.against[at]]


def test_each_is_compared_with_the_signals_alone():
    made = plan(parse_methods("VisionDrop,ConsensusDrop(blend=0.5),Full"), [32, 0.1])
    assert rows(made)[:5] == [
        ("Full", None), ("VisionDrop", 32), ("VisionDrop", 0.1),
        ("ConsensusDrop(blend=0.5)", 32), ("ConsensusDrop(blend=0.5)", 0.1),
    ]  # fmt: skip
    assert sorted(made.against) == [1, 2, 3, 4]
    # The options of the ConsensusDrop in the list; each run once, whoever is compared with it.
    for at, keep in ((1, 32), (2, 0.1), (3, 32), (4, 0.1)):
        assert rivals(made, at) == [
            ConsensusDrop(keep=keep, blend=0.5, alpha=alpha) for alpha in (0, 1)
        ]
    assert made.extra == {5, 6, 7, 8}


def test_each_consensus_with_its_own_options():
    made = plan(parse_methods("ConsensusDrop,ConsensusDrop(rows='last'),Random"), [8])
    assert {m.rows for m in rivals(made, 1)} == {None}
    assert {m.rows for m in rivals(made, 2)} == {"last"}
    assert {m.rows for m in rivals(made, 3)} == {None}
    assert {m.alpha for m in rivals(made, 2)} == {0, 1}


def test_a_baseline_that_is_in_the_list_runs_once():
    made = plan(parse_methods("ConsensusDrop,ConsensusDrop(alpha=0)"), [8])
    assert made.against[1] == (2, 3)
    assert made.extra == {3}


def test_other_baselines():
    specs = parse_methods("VisionDrop,Random")
    assert plan(specs, [8], "none").against == {1: (), 2: ()}
    made = plan(specs, [8, 4], "Random(seed=3)")
    assert rivals(made, 2) == [Random(keep=4, seed=3)]
    assert len(made.extra) == 2


def test_a_count_is_no_share():
    """`1 == 1.0`, and dataclasses compare so."""
    made = plan(parse_methods("Random"), [1, 1.0], "Random")
    assert made.against == {1: (1,), 2: (2,)}


def test_a_budget_that_a_method_refuses_is_a_row():
    made = plan(parse_methods("ConsensusDrop(contextual=2)"), [True, 4], "none")
    assert "keep must be a count" in made.runs[1].reason
    assert made.runs[1].method is None
    assert made.runs[2].reason == ""
    assert 1 not in made.against
