"""The page holds the numbers, loads nothing, and shows hostile text as text."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from tests.evaluate.test_results import SETTINGS, facts_of, scores_of, systems_of
from trsr_dist.evaluate.figures import MAX_POINTS, build_figures, score_histogram, training_curve, training_values
from trsr_dist.evaluate.report import ReportParts, largest_slices, write_report
from trsr_dist.evaluate.results import NUM_EXAMPLES, build_example, build_results, system_results
from trsr_dist.records import Candidate, Sample

HOSTILE = "</td><script>alert('x')</script><img src=x onerror=alert(1)> & \"quoted\""


def sample_of(user: int, labels: np.ndarray) -> Sample:
    candidates = tuple(Candidate(str(i), f"{HOSTILE} {i}", int(label)) for i, label in enumerate(labels))
    return Sample(f"{HOSTILE} {user}", "do", HOSTILE, (HOSTILE, "two"), candidates)


def write(path: Path, num_samples: int = 200, loss: str = "answer", train_negatives: float | None = 1) -> str:
    (labels, scores), (systems, model) = scores_of(120), systems_of(120)
    settings = replace(SETTINGS, num_samples=num_samples, train_negatives=train_negatives)
    facts = [{"history length": "6-10" if user % 2 else "11-15", "category": HOSTILE} for user in range(120)]
    results = build_results(systems, model, facts_of(facts), settings)
    provenance = {"domain": HOSTILE, "train": {"loss": loss}}
    results |= {"split": "test", "model": HOSTILE, "candidates": "uniform", "provenance": provenance}
    results["protocols"] = {"targets": system_results(systems, settings)}
    training = [{"stage": "train", "step": step, "train/loss": 1 / (step + 1)} for step in range(20)]
    figures = build_figures(results, systems, model, training, "recall@5")
    examples = [
        build_example(sample_of(i, labels[i]), scores["model"][i], scores["control"][i]) for i in range(NUM_EXAMPLES)
    ]
    write_report(
        path,
        ReportParts(results, figures, examples, f"run: {HOSTILE}", "recall@5", Path("OUT/test"), Path("RUN/shards")),
    )
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_is_whole_and_alone(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html")
    tags = Tags()
    tags.feed(page)
    assert tags.names.count("svg") == 5
    assert tags.names.count("details") == NUM_EXAMPLES + 2
    assert not {"script", "link", "img", "iframe"} & set(tags.names)
    assert all(link.startswith("#") for link in tags.links)
    assert not re.search(r"url\(\s*['\"]?https?:", page)
    assert "R@5" in page
    assert "personalization gain in R@5" in page
    assert "gain: fine-tuned - control" in page
    assert page.count("R@5, negatives") == 1


def test_equal_evaluations_give_equal_pages(tmp_path: Path) -> None:
    assert write(tmp_path / "one.html") == write(tmp_path / "two.html")


def test_a_model_of_unknown_training_is_not_called_corrected(tmp_path: Path) -> None:
    assert "Corrected: the log-odds moved" in write(tmp_path / "known.html")
    page = write(tmp_path / "unknown.html", train_negatives=None)
    assert "Corrected" not in page and "is not recorded, so nothing is corrected" in page


def test_without_resamples_there_are_means_alone(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html", num_samples=0)
    assert "no interval: evaluate.bootstrap_samples is 0" in page
    assert 'class="interval"' not in page


def test_scores_without_a_scale_are_said_to_be_none(tmp_path: Path) -> None:
    assert "are no log-odds" in write(tmp_path / "pairwise.html", loss="pairwise")
    assert "are no log-odds" not in write(tmp_path / "answer.html")


def test_curves_leave_out_what_a_later_start_has_made_void() -> None:
    steps = [10, 20, 30, 20, 30, 40]
    rows = [{"stage": "train", "step": step, "train/loss": float(number)} for number, step in enumerate(steps)]
    others = [{"stage": "train", "step": 20, "valid/auc": 0.5}, {"stage": "evaluate", "step": 5, "train/loss": 9.0}]
    assert training_values([*rows, *others], "train/loss") == {10: 0.0, 20: 3.0}
    assert training_values([*rows, *others], "valid/auc") == {20: 0.5}
    assert training_values(rows, "train/loss") == {10: 0.0, 20: 3.0, 30: 4.0, 40: 5.0}


def test_a_report_of_many_users_stays_readable() -> None:
    sizes = [31, *range(40, 70), 40]
    rows = [{"slice": "category", "value": str(i), "num_users": size} for i, size in enumerate(sizes)]
    others = [{"slice": "trimmed", "value": "no", "num_users": 31}]
    assert largest_slices(rows + others) == rows[11:31] + others
    labels = (np.arange(100_000) % 20 == 0).astype(np.int8)
    scores = np.random.default_rng(0).normal(size=len(labels)) + 2 * labels
    scores[0] = -80
    low, high = score_histogram(scores, labels).axes[0].get_xlim()
    assert -5 < low < -2 and 4 < high < 7
    curve = training_curve({10 * step: float(step % 2) for step in range(40_000)}, "loss").axes[0].lines[0]
    assert len(curve.get_xdata()) == MAX_POINTS and set(curve.get_ydata()) == {0.5}
    assert list(training_curve({5: 3.0, 7: 1.0}, "loss").axes[0].lines[0].get_ydata()) == [3.0, 1.0]


def test_example_ranks_the_target_by_its_score() -> None:
    labels = np.array([0, 1, 0])
    example = build_example(sample_of(0, labels), np.array([2.0, 1.0, -1.0]), None)
    assert example["rank"] == 2
    assert [(row["rank"], row["score"]) for row in example["rows"]] == [(1, 2.0), (2, 1.0), (3, -1.0)]


def test_long_lists_and_texts_are_shown_in_part() -> None:
    labels = np.zeros(3000, dtype=np.int64)
    labels[[5, 99, 100, *range(1000, 1100)]] = 1
    sample = replace(sample_of(0, labels), summary="s" * 5000, recent=("r" * 2000, "q" * 2001))
    example = build_example(sample, -np.arange(3000.0), None)
    shown = [row.get("rank", -row.get("left_out", 0)) for row in example["rows"]]
    assert shown == [*range(1, 21), -79, 100, 101, -899, *range(1001, 1019), -1982]
    assert (example["rank"], example["num_candidates"]) == (6, 3000)
    assert example["summary"] == "s" * 2000 + "... (3,000 characters more)"
    assert example["recent"] == ["r" * 2000, "q" * 2000 + "... (1 characters more)"]
