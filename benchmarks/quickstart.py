"""The quickstarts over five seeds, each as a stranger starts it: accuracy, seconds from the command, peak memory.

    python -m benchmarks.quickstart
    python -m benchmarks.quickstart text

Beside the text quickstart stands what needs no network, on the same split: the majority class, and logistic
regression on TF-IDF, with scikit-learn's defaults and with the best of twelve settings by the validation texts.
"""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.measure import write_result

NAMES = {"vision": "quickstart", "text": "text_quickstart"}


def starts(recipe: str) -> dict[str, Any]:
    """Five starts from an empty folder."""
    command = [sys.executable, "-m", f"recipes.{recipe}", "fit", "--test", "--config", f"{recipe}/quickstart"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    accuracies, seconds, screen = [], [], ""
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(5):
            started = time.time()
            options = [f"--seed_everything={seed}", f"--data.seed={seed}"] if seed else []
            done = subprocess.run(
                [*command, *options], cwd=folder, capture_output=True, text=True, check=True, env=environment
            )
            seconds.append(time.time() - started)
            accuracies.append(float(re.findall(r"accuracy (\d\.\d+), f1", done.stdout)[-1]))
            screen = screen or done.stdout[done.stdout.index("────") :]
    return {
        "test_accuracy": accuracies,
        "mean": round(statistics.mean(accuracies), 4),
        "wall_s": [round(value, 1) for value in seconds],
        "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2),
        "screen": [line.rstrip() for line in screen.strip().splitlines()],
    }


def baselines() -> dict[str, Any]:
    """Test accuracy on the docstrings of the majority class, and of TF-IDF with logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from datamodules import Docstrings

    splits = Docstrings(tokenizer="none is needed").read_splits()
    texts = {name: [part.text(index) for index in range(len(part))] for name, part in splits.items()}
    labels = {name: part.labels.tolist() for name, part in splits.items()}

    def learnt(ngrams: int, sublinear: bool, c: float) -> Any:
        words = TfidfVectorizer(ngram_range=(1, ngrams), sublinear_tf=sublinear)
        return make_pipeline(words, LogisticRegression(C=c, max_iter=2000)).fit(texts["train"], labels["train"])

    settings = [(ngrams, sublinear, c) for ngrams in (1, 2) for sublinear in (False, True) for c in (1.0, 10.0, 100.0)]
    models = {setting: learnt(*setting) for setting in settings}
    best = max(settings, key=lambda setting: models[setting].score(texts["val"], labels["val"]))
    most = max(labels["test"].count(label) for label in set(labels["test"]))
    return {
        "test_texts": len(labels["test"]),
        "majority_class": round(most / len(labels["test"]), 4),
        "tfidf": round(models[1, False, 1.0].score(texts["test"], labels["test"]), 4),
        "tfidf_tuned": round(models[best].score(texts["test"], labels["test"]), 4),
        "tfidf_tuned_setting": dict(zip(("ngrams", "sublinear_tf", "C"), best, strict=True)),
        "tfidf_best_on_the_test_itself": round(
            max(model.score(texts["test"], labels["test"]) for model in models.values()), 4
        ),
    }


if __name__ == "__main__":
    recipe = sys.argv[1] if len(sys.argv) > 1 else "vision"
    write_result(NAMES[recipe], {**starts(recipe), **(baselines() if recipe == "text" else {})})
