"""Promises of the pages that runs leave: complete, safe to open, whole or not there, and drawn by a browser."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import asks_for_nothing, drawn_by_a_browser, started
from ignite.engine import Engine, Events, State

from scripts.engines import NonFiniteLossError
from scripts.handlers import MetricsRecorder, Setting, TrainingReport, WarningLog, pages, report

EVIL = "<script><img src=x onerror=alert(1)>&"
SETTINGS = {
    "recipe": Setting("pretraining", "pretraining", False),
    "dataset_dir": Setting(f"/home/somebody/{EVIL}", None, True),
    "max_epochs": Setting(3, 300, True),
}


def raise_again(_, error):
    """What Checkpointing does, behind the others."""
    raise error


def run(folder, epochs=3, stop_after=None, settings=SETTINGS, seen=None, more=None):
    """Train nothing for some epochs, validated by made-up figures, the second the best; return the page's text."""
    metrics = [{"val_loss": loss, "val_unexplained": 2 * loss} for loss in (0.5, 0.125, 0.25)]
    metrics = [figures | (more or {}) for figures in metrics]
    validator = SimpleNamespace(state=State(best_metric_epoch=-1, key_metric_name="val_loss", metrics={}))
    trainer = Engine(lambda *_: {"loss": torch.tensor(1.0)})
    trainer.optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine):
        validator.state.metrics = metrics[engine.state.epoch - 1]
        validator.state.best_metric_epoch = min(engine.state.epoch, 2)
        if engine.state.epoch == stop_after:
            engine.terminate()

    MetricsRecorder(folder / "metrics.jsonl", validator).attach(trainer)
    cases = {"training": [{"case": EVIL}, {"case": "b"}], "validation": [{"case": "c"}]}
    TrainingReport(folder, validator, cases, settings).attach(trainer)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, raise_again)
    if seen:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, seen)
    trainer.run([0], max_epochs=epochs)
    return (folder / "report.html").read_text()


@pytest.fixture
def warned():
    WarningLog.begin()
    logging.getLogger("anybody").warning("left out %s", EVIL)
    logging.getLogger("anybody").info("not this")
    yield
    WarningLog.begin()


def test_the_page_of_a_training_says_what_came_out_of_what(tmp_path, warned):
    (tmp_path / "figures").mkdir()
    matplotlib.image.imsave(tmp_path / "figures" / "epoch_0002.png", np.eye(4))
    page = run(tmp_path)
    for words in (
        "Finished after 3 epochs.",
        "The best epoch is 2, with a val_loss of 0.125",
        "It explains 75% of the variance of hidden voxels (val_unexplained 0.250",
        "One warning",
        "2 for training, 1 for validation.",
        "<td>max_epochs</td><td>3</td><td>300</td>",
        "<b>loss</b>",
        "<title>validation epoch 2: 0.125</title>",
        "waiting for data",
        "data:image/png;base64,",
        f"PyTorch {torch.__version__}",
    ):
        assert words in page, words
    assert "not this" not in page
    assert "All 3 knobs" in page


JUDGED = {f"val_baseline_{name}": 0.9 for name in ("mean", "nearest", "blur", "loss")}
JUDGED |= {"val_psnr": 10.0, "val_effective_rank": 9.0, "val_dead_channels": 0.0, "val_token_cosine": 0.5}


def test_a_pre_training_is_judged_on_its_page_in_a_file_and_in_the_log(tmp_path, caplog):
    caplog.set_level("INFO")
    page = run(tmp_path, more=JUDGED)
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["name"] == "healthy"
    assert verdict["figures"]["effective_rank"] == 9
    assert page.index(verdict["paragraph"]) < page.index("Finished after 3 epochs.")
    assert f"verdict: {verdict['paragraph']}" in caplog.text
    features, curves = page[page.index('id="features"') :], page[page.index('id="curves"') : page.index('id="metrics"')]
    assert "directions along which the features vary" in features
    assert "effective rank" not in curves
    assert "<title>blur, no network epoch 2: 0.9</title>" in curves
    assert "<title>without a network epoch 2: 0.9</title>" in curves


def test_other_runs_get_no_verdict(tmp_path, caplog):
    caplog.set_level("INFO")
    page = run(tmp_path)
    assert not (tmp_path / "verdict.json").exists()
    assert "verdict: " not in caplog.text
    assert 'id="features"' not in page


def test_a_run_is_judged_as_far_as_it_has_come_and_when_its_loss_ends_it(tmp_path):
    found = []

    def fail(engine):
        found.append(json.loads((tmp_path / "verdict.json").read_text()))
        if engine.state.epoch == 2:
            raise NonFiniteLossError("the loss is nan <b>")

    with pytest.raises(NonFiniteLossError, match="the loss is nan"):
        run(tmp_path, seen=fail, more=JUDGED)
    assert [verdict["name"] for verdict in found] == ["under-trained", "under-trained"]
    assert json.loads((tmp_path / "verdict.json").read_text())["name"] == "diverged"
    assert "Ended in epoch 2 by an error: the loss is nan &lt;b&gt;." in (tmp_path / "report.html").read_text()


def test_no_text_from_outside_becomes_markup_and_the_page_asks_for_nothing(tmp_path, warned):
    page = run(tmp_path)
    assert (
        page.count("&lt;script&gt;&lt;img src=x onerror=alert(1)&gt;&amp;") == 6
    )  # title, heading, warning, case, knob twice
    asks_for_nothing(page)
    assert "/home/somebody" not in page[: page.index("Settings")]


def test_a_name_that_is_no_text_does_not_cost_the_page(tmp_path):
    pages.write(tmp_path / "report.html", "title", pages.section("Names", "caf\udce9"))
    assert "caf?" in (tmp_path / "report.html").read_text()


def test_every_validation_leaves_a_page_that_says_how_far_the_run_is(tmp_path):
    found = []
    run(tmp_path, seen=lambda: found.append((tmp_path / "report.html").read_text()))
    assert [f"Epoch {epoch} of 3 when this page was written" in page for epoch, page in enumerate(found, start=1)] == [
        *(True, True, False)
    ]
    assert "The last epoch is done." in found[2]
    early = run(tmp_path / "early", epochs=9, stop_after=3)
    assert "Stopped after epoch 3 of 9: no better validation for long." in early


def test_a_run_that_ends_with_its_best_epoch_hears_that_more_may_help(tmp_path):
    assert "a longer training may do better" in run(tmp_path / "two", epochs=2)
    assert "a longer training may do better" not in run(tmp_path / "three", epochs=3)


def test_a_kill_while_the_page_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    pages.write(path, "first", pages.section("One"))
    before = path.read_text()

    def cut_off(self, text, **kwargs):
        self.write_bytes(text[: len(text) // 2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pages.write(path, "second", pages.section("Two"))
    assert path.read_text() == before
    assert before.startswith("<!DOCTYPE html>")
    assert before.endswith("</html>")


def test_a_page_that_cannot_be_written_does_not_end_the_run_and_says_why(tmp_path, caplog):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(IsADirectoryError):  # reading it: the run itself has ended well
        run(tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert "report.html is not written; the run goes on" in caplog.text
    assert "Traceback" in caplog.text


def test_scores_are_shown_by_label_and_by_case_the_worst_first(tmp_path):
    (tmp_path / "val_dice_raw.csv").write_text('filename,class0,class1,mean\n"a,b",0.9,0.7,0.8\nc,0.5,nan,0.5\n')
    (tmp_path / "val_hausdorff_raw.csv").write_text('filename,class0,class1,mean\n"a,b",2,4,3\nc,3,5,4\n')
    page = run(tmp_path)
    number = '<td class="number">'
    assert f"<td>label 1</td>{number}0.7</td>{number}2.5</td>" in page
    assert f"<td>label 2</td>{number}0.7</td>{number}4.5</td>" in page  # of the cases that have it
    assert page.index(f"<td>c</td>{number}0.5</td>") < page.index(f"<td>a,b</td>{number}0.9</td>")


def test_figures_that_are_not_finite_leave_the_rest_of_the_page(tmp_path):
    same = {"iteration": 0, "learning_rate": 1.0, "train_loss": None, "val_loss": 1.0, "seconds": 1.0}
    values = [float("nan"), 0.5, float("inf")]
    lines = [{**same, "epoch": epoch, "val_x": value, "val_y": values[0]} for epoch, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    validator = SimpleNamespace(state=State(best_metric_epoch=1, key_metric_name="val_loss"))
    one = TrainingReport(tmp_path, validator, {}, SETTINGS)
    one.start(None)
    one.iterated = 0.0
    one.finish(SimpleNamespace(state=State(epoch=2, max_epochs=2)))
    page = (tmp_path / "report.html").read_text()
    assert "<b>y</b> has no finite value." in page
    drawings = re.findall(r"<svg.*?</svg>", page)
    assert len(drawings) == 3
    assert not re.search(r"\b(nan|inf)\b", "".join(drawings))


def test_a_warning_is_kept_once_with_its_count_and_forgotten_by_the_next_run():
    WarningLog.begin()
    for _ in range(3):
        logging.getLogger("anybody").warning("again")
    assert WarningLog.of_this_run() == {"again": 3}
    WarningLog.begin()
    assert WarningLog.of_this_run() == {}
    assert sum(isinstance(handler, WarningLog) for handler in logging.getLogger().handlers) == 1


def test_the_settings_of_a_run_are_all_knobs_with_what_the_recipe_says(cohort, tmp_path):
    training = started(dataset_dir=str(cohort), output_dir=str(tmp_path), max_epochs="7")
    training.parser["told"] = {"_target_": "scripts.cli.settings"}
    told = training.parser.get_parsed_content("told")
    assert told["max_epochs"] == Setting(7, 300, True)
    assert told["learning_rate"] == Setting(0.001, 0.00015, True)  # an expression of small.yaml
    assert told["mask_ratio"] == Setting(0.75, 0.75, False)
    assert told["cache_dir"][::2] == (f"{tmp_path}/cache", False)  # follows output_dir
    assert "losses" not in told
    assert report.titled(told) == f"Pre-training: {cohort.name}"


def test_a_browser_draws_the_page_without_a_complaint(tmp_path, warned):
    run(tmp_path)
    drawn = drawn_by_a_browser(tmp_path / "report.html")
    assert drawn.std() > 0.05
    blue = np.abs(drawn - np.array([0, 0x72, 0xB2]) / 255).max(axis=-1) < 0.02
    assert blue.sum() > 200  # a curve
