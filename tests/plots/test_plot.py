"""The plot command: files are recognised by content, figures are written, anything unknown is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_moe2dense.cli import main
from megatron_moe2dense.common import records
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.plots import plot
from megatron_moe2dense.plots.config import PlotConfig
from tests.plots.inputs import metrics, ranking, record, write_all, write_statistics


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    return write_all(tmp_path_factory.mktemp("plots") / "run")


def test_every_kind_of_input_gives_its_figures_and_their_paths_are_printed(everything, tmp_path, capsys):
    main(["plot", f"records=[{everything}]", f"output={tmp_path / 'figures'}"])
    names = ["training", "quality", "expert_scores", "score_spectra", "expert_use", "plan", "selection_share"]
    wanted = [str(tmp_path / "figures" / f"{name}.{suffix}") for name in names for suffix in ("png", "svg")]
    assert capsys.readouterr().out.split() == wanted
    for path in map(Path, wanted):
        start = path.read_bytes()[:8]
        assert start == b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else start.startswith(b"<?xml")


def test_the_same_input_gives_the_same_bytes(everything, tmp_path):
    for name in ("a", "b"):
        plot.run(PlotConfig(records=[str(everything / "ranking.json")], output=str(tmp_path / name)))
    for path in (tmp_path / "a").glob("*.[ps][nv]g"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_several_statistics_are_compared_by_kind_of_text(tmp_path):
    paths = [str(write_statistics(tmp_path / kind, np.ones((2, 4)))) for kind in ("prose", "code")]
    facts = plot.dry_run(PlotConfig(records=paths, output="figures"))
    assert [Path(path).name for path in facts["writes"]] == [f"{n}.{s}" for n in ("use_by_kind", "specialisation") for s in ("png", "svg")]


def test_several_rankings_have_figures_of_their_own(tmp_path):
    for name in ("sf run", "do_acp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ranking.json").write_text(json.dumps(ranking()))
    facts = plot.dry_run(PlotConfig(records=[str(tmp_path / "sf run"), str(tmp_path / "do_acp")], output="f"))
    assert "f/expert_scores_sf_run.png" in facts["writes"]
    assert "f/expert_use_do_acp.svg" in facts["writes"]


def test_a_ranking_of_the_same_statistics_shows_their_use_once(tmp_path):
    shares = np.array([[0.5, 0.75, 0.5, 0.25], [1.0, 0.5, 0.25, 0.25]])
    folder, content = write_statistics(tmp_path / "stats", 100 * shares), ranking(2, 4)
    for layer, share in zip(content["layers"], shares, strict=True):
        layer["selected_fraction"] = share.tolist()
    (folder / "ranking.json").write_text(json.dumps(content))
    assert figures_of(folder) == ["expert_scores", "score_spectra", "expert_use"]
    content["layers"][1]["selected_fraction"] = shares[0].tolist()  # of other statistics
    (folder / "ranking.json").write_text(json.dumps(content))
    assert figures_of(folder) == ["expert_scores", "score_spectra", "expert_use", "selection_share"]


def figures_of(folder: Path) -> list[str]:
    return [Path(path).stem for path in plot.dry_run(PlotConfig(records=[str(folder)], output="f"))["writes"][::2]]


def test_a_ranking_without_token_shares_has_scores_alone(tmp_path):
    content = ranking()
    for layer in content["layers"]:
        layer["selected_fraction"] = None
    (tmp_path / "ranking.json").write_text(json.dumps(content))
    facts = plot.dry_run(PlotConfig(records=[str(tmp_path)], output="f"))
    assert facts["writes"] == [f"f/{name}.{suffix}" for name in ("expert_scores", "score_spectra") for suffix in ("png", "svg")]


def test_an_existing_output_is_refused_unless_overwritten(everything, tmp_path):
    config = PlotConfig(records=[str(everything / "plan.json")], output=str(tmp_path / "figures"))
    plot.run(config)
    with pytest.raises(UserError, match="finished output"):
        plot.run(config)
    plot.run(config.model_copy(update={"overwrite": True}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", "hello", "nothing known"),
        ("other.jsonl", '{"a": 1}\n', "nothing known"),
        ("other.json", '{"layers": [{"layer": 0}]}', "nothing known"),
        ("list.json", "[1]", "nothing known"),
        ("empty.jsonl", "", "has no rows"),
        ("broken.json", "{", "broken.json"),
        ("broken.safetensors", "zzzzzzzzzzzz", "broken.safetensors"),
        ("broken.jsonl", "{]\n", "line 1"),
    ],
)
def test_an_unknown_or_broken_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        plot.run(PlotConfig(records=[str(tmp_path / name)], output=str(tmp_path / "figures")))
    assert not (tmp_path / "figures").exists()


def test_a_directory_with_nothing_known_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to plot"):
        plot.run(PlotConfig(records=[str(tmp_path)], output=str(tmp_path / "figures")))


def test_weights_are_no_statistics(tmp_path):
    save_file({"layers.0.weight": np.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no selected_count"):
        plot.run(PlotConfig(records=[str(tmp_path / "model.safetensors")], output=str(tmp_path / "figures")))


def test_an_input_named_twice_is_refused(everything, tmp_path):
    with pytest.raises(UserError, match="named twice"):
        plot.run(PlotConfig(records=[str(everything), str(everything / "plan.json")], output=str(tmp_path / "f")))


def test_runs_of_one_folder_name_are_told_apart_by_the_folder_above(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        records.rewrite(tmp_path / name / "run/metrics.jsonl", metrics())
    labels = [item.label for item in plot.read_inputs([str(tmp_path / name / "run") for name in "ab"])]
    assert labels == ["a/run", "b/run"]


def test_a_run_with_a_loss_spike_is_drawn(tmp_path):
    spike = {"step": 5, "tokens": 2560, "spike": 1.7, "median_loss": 0.5, "first_sample": 16, "last_sample": 19}
    records.rewrite(tmp_path / "metrics.jsonl", [*metrics(), spike, *metrics()])
    plot.run(PlotConfig(records=[str(tmp_path)], output=str(tmp_path / "figures")))
    assert (tmp_path / "figures/training.png").exists()


def test_records_without_quality_are_refused(tmp_path):
    records.rewrite(tmp_path / "records.jsonl", [record("dense", None, None)])
    with pytest.raises(UserError, match="neither perplexity nor KL"):
        plot.run(PlotConfig(records=[str(tmp_path)], output=str(tmp_path / "figures")))
