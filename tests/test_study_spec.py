"""The file of ``airl-fast study``: what is taken, what is refused, what it plans and costs."""

from pathlib import Path

import pytest

from airl_fast import cli
from airl_fast.config import ConfigError
from airl_fast.study import costs
from airl_fast.study.cells import cell_config, plan
from airl_fast.study.runner import _say_costs
from airl_fast.study.spec import Study, description, load_study, studies, study_text
from tests.tiny_study import TINY, changed, made


@pytest.mark.parametrize("name", studies())
def test_the_studies_that_ship_are_runnable_and_described(name):
    study = load_study(name)
    assert len(study.seeds) >= 3
    assert len(study.variants) <= 20
    assert len(description(study_text(name))) > 40
    cells = plan(study, Path("runs"))
    assert len({cell.folder for cell in cells}) == len(cells)
    before: set[Path] = set()
    for cell in cells:
        assert set(cell.needs) <= before, cell.title
        before.add(cell.folder)
        assert costs.estimate(study, cell) > 0
    # What all tables have to have beside AIRL: the reward frozen, and the true outcome.
    of = [" ".join(v.overrides) for v in study.variants.values()]
    assert any("frozen_discriminator=true" in o for o in of)
    assert any("algorithm.name=grpo" in o for o in of)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("seeds: [0]", "seeds: []")], "seeds: .*at least 1"),
        ([("seeds: [0]", "seeds: [1, 1]")], "one is twice"),
        ([("recipe: arithmetic", "recipe: arithmetics")], "did you mean arithmetic"),
        ([("samples: 2", "sample: 2")], "sample: Unexpected keyword"),
        ([("reward_from: AIRL", "reward_from: GRPO")], "expected one of the variants before it"),
        ([("init: base", "init: best")], "taken over.init"),
        ([("    init: base", "    start: elsewhere")], "no start is called 'elsewhere'"),
        ([("- [GRPO, AIRL]", "- [GRPO, PPO]")], "no variant is called 'PPO'"),
        ([("  GRPO:", "  airl:"), ("[GRPO, AIRL]", "[airl, AIRL]")], "two are the same"),
        ([("algorithm.name=grpo", "algorithm.name=ppo")], "variants.GRPO: .*algorithm.name"),
        ([("algorithm.name=grpo", "run.seed=3")], "run.seed is set by the study"),
        ([("algorithm.name=grpo", "policy.model=x")], "policy.model is where the start's SFT"),
        ([("run.steps=3", "run.stepz=3")], "did you mean run.steps"),
        (
            [
                ("run.steps=3", "algorithm.frozen_discriminator=true"),
                ("name=grpo", "name=grpo, algorithm.frozen_discriminator=false"),
            ],
            "SFT of starts.arithmetic .*what only variants take belongs in theirs",
        ),
        ([("temperatures: [1.0, 0.0]", "temperatures: [0.0]")], "expected 1 among them"),
        (
            [("algorithm.name=grpo", "discriminator.head=score, discriminator.trunk=policy")],
            "set discriminator.trunk=own",
        ),
        ([("comparisons:", "plots: {All: [PPO]}\ncomparisons:")], "no variant is called 'PPO'"),
        ([("seeds: [0]", "seeds: &all [0]")], None),
        ([("seeds: [0]", "seeds: *all")], "not readable as YAML"),
        ([("recipe: arithmetic\n", "- recipe\n")], "not readable|expected `key: value`"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_run(pairs, message, tmp_path):
    source = made(tmp_path, changed(*pairs))
    if message is None:
        load_study(source)
        return
    with pytest.raises(ConfigError, match=message):
        load_study(source)


def test_overrides_of_the_command_come_after_the_file_and_before_starts_and_variants(
    tmp_path, capsys
):
    source = made(
        tmp_path, changed(("  arithmetic:", "  arithmetic:\n    overrides: [task.test=5]"))
    )
    study = load_study(source, None, ["run.steps=4", "task.test=9", "policy.model=a-folder"])
    config = study.config(0, tmp_path, "arithmetic")
    assert (config.run.steps, config.task.test, config.policy.model) == (4, 5, "a-folder")
    for wrong, message in (("run.stepz=4", "did you mean run.steps"), ("run.seed=4", "remove it")):
        assert cli.main(["study", source, wrong, "--output-dir", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    after = ["study", source, "--output-dir", str(tmp_path / "out"), "run.stepz=4"]
    assert cli.main(after) == 2
    assert "did you mean run.steps" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([*after, "--nothing=3", "stray"])
    assert "unrecognized arguments: --nothing=3 stray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_arms_of_sft_are_annealed_whatever_the_study_says(tmp_path):
    study = load_study(made(tmp_path, TINY), None, ["policy.final_lr_fraction=1"])
    left = {
        cell.kind: cell_config(study, cell).policy.final_lr_fraction
        for cell in plan(study, tmp_path / "out")
        if cell.kind != "variant"
    }
    assert left == {"arm": 0.1, "start": 1}


def test_a_name_that_is_none_is_told_what_there_is():
    with pytest.raises(ConfigError, match="countdown-transfer"):
        load_study("nothing")


def test_costs_grow_with_what_is_run_and_are_corrected(tmp_path):
    small = load_study(made(tmp_path, TINY))
    large = load_study(made(tmp_path, changed(("run.steps=3", "run.steps=30"))))
    one, other = plan(small, tmp_path), plan(large, tmp_path)
    assert costs.estimate(large, other[3]) > 2 * costs.estimate(small, one[3])
    assert costs.estimate(small, one[0]) == costs.estimate(large, other[0])
    unsampled = load_study(made(tmp_path, TINY), None, ["discriminator.warmup_samples=false"])
    assert costs.estimate(unsampled, one[3]) < costs.estimate(small, one[3])
    listed = costs.table(small, one)
    assert [(name, count) for name, count, _ in listed] == [
        ("arithmetic, SFT arm 1", 1), ("arithmetic, SFT arm 2", 1), ("arithmetic", 1),
        ("AIRL", 1), ("taken over", 1), ("GRPO", 1),
    ]  # fmt: skip
    clock = costs.Clock(small, one, 2)
    whole = clock.left()
    assert whole == pytest.approx(sum(seconds for *_, seconds in listed) / 2)
    expected = clock.estimates[one[0].folder]
    clock.finished(one[0], 3 * expected)  # three times as long as was thought
    assert clock.left() == pytest.approx(3 * (whole - expected / 2))
    assert [costs.in_words(s) for s in (40, 600, 9000)] == ["40 s", "10 min", "2.5 h"]


@pytest.mark.parametrize(("of", "key"), [("arithmetic", "policy"), ("AIRL", "discriminator")])
def test_a_model_of_ones_own_has_shares_of_the_work_not_seconds(tmp_path, capsys, of, key):
    own = f"  {of}: {{overrides: [{key}.model={tmp_path}]}}\n"
    study = load_study(made(tmp_path, changed((f"  {of}:\n", own))))
    _say_costs(study, plan(study, tmp_path / "out"), 2)
    head, why, *rows = capsys.readouterr().out.splitlines()
    assert head == "6 cells, 0 of them done."
    assert "once one is done" in why
    assert len(rows) == 6
    assert sum(float(row.split()[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.5)


def test_without_a_name_the_studies_are_listed(capsys):
    assert cli.main(["study"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}\n    {description(study_text(name))}" in out for name in studies())
    assert cli.main(["study", "nothing"]) == 2
    assert "no study" in capsys.readouterr().err


def test_a_study_is_frozen():
    with pytest.raises(AttributeError):
        load_study("arithmetic-grid").seeds = (1,)
    assert isinstance(load_study("arithmetic-grid"), Study)
