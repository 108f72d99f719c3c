"""Labels: every row's class is the one that an independent reading by value gives, or the row is named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest

from datamodules import HuggingFaceTexts, TextFiles
from datamodules.labels.values import label_name, learn_classes, positions, several_labels, width_of_indicators


def csv(name: str, labels: list[Any], column: str = "label") -> str:
    """A file with a text for each label, as typed."""
    lines = [f"text {row},{label}" for row, label in enumerate(labels)]
    Path(name).write_text("\n".join([f"text,{column}", *lines, ""]))
    return name


def jsonl(name: str, labels: list[Any]) -> str:
    """The same as JSON lines."""
    Path(name).write_text(
        "".join(json.dumps({"text": f"t{row}", "label": one}) + "\n" for row, one in enumerate(labels))
    )
    return name


def classes_of(data: Any, split: str = "train") -> list[str]:
    """The name that each label of a split is read as."""
    return [data.class_names[label] for label in data.read_splits()[split].labels.tolist()]


@pytest.mark.parametrize(
    ("train", "other"), [([1, 2, 4, 5], 3), ([0, 2], 1), ([1, 2, 3, 4, 5], 0), ([10, 20], 1), (["01", "02"], 1)]
)
@pytest.mark.parametrize("write", [csv, jsonl])
def test_a_number_is_a_name_and_never_counts_in_names_that_were_learnt(write: Any, train: Any, other: int) -> None:
    suffix = ".csv" if write is csv else ".jsonl"
    files = {"train_file": write(f"train{suffix}", train), "val_file": write(f"val{suffix}", [train[1], other])}
    line = 3 if write is csv else 2
    with pytest.raises(ValueError, match=f"val{suffix}, line {line}: label '{other}' is not among the classes"):
        TextFiles(**files, on_error="skip").read_splits()


def test_numbers_with_gaps_are_the_classes_that_they_name() -> None:
    data = TextFiles(csv("train.csv", [4, 2, 10, 2]), test_file=csv("test.csv", [10, 4, 2]))
    assert data.class_names == ["2", "4", "10"]
    assert classes_of(data) == ["4", "2", "10", "2"] and classes_of(data, "test") == ["10", "4", "2"]


def test_numbers_are_compared_by_value(caplog: pytest.LogCaptureFixture) -> None:
    data = TextFiles(csv("train.csv", ["1.0", "2.0", "3.0", "4.0", "10.0"]), test_file=csv("test.csv", [1, 2, 3]))
    assert data.class_names == ["1", "2", "3", "4", "10"]
    with caplog.at_level(logging.INFO):
        assert classes_of(data, "test") == ["1", "2", "3"]
    assert "matched by value, such as 1.0 to class 1" in caplog.text


def test_pandas_reads_integers_as_floats_where_one_is_missing() -> None:
    frame = pandas.DataFrame({"text": list("abcd"), "label": [1, 2, None, 3]})
    frame.to_parquet("train.parquet")
    pandas.DataFrame({"text": list("ab"), "label": [3, 2]}).to_parquet("val.parquet")
    with pytest.raises(ValueError, match="train.parquet, row 3: there is no label"):
        TextFiles("train.parquet").read_splits()
    data = TextFiles("train.parquet", val_file="val.parquet", on_error="skip")
    assert data.class_names == ["1", "2", "3"] and data.read_splits()["train"].skipped == 1
    assert classes_of(data, "val") == ["3", "2"]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_what_is_missing_is_no_class(missing: Any) -> None:
    with pytest.raises(ValueError, match="line 2: there is no label"):
        TextFiles(jsonl("a.jsonl", ["x", missing, "y"])).read_splits()
    assert TextFiles("a.jsonl", on_error="skip").class_names == ["x", "y"]


@pytest.mark.parametrize("word", ["NaN", "nan", "NULL", "null", "<NA>"])
def test_words_for_what_is_missing(word: str) -> None:
    with pytest.raises(ValueError, match=f"line 3: there is no label, found '{word}'"):
        TextFiles(csv("a.csv", ["x", word, "y"])).read_splits()


def test_truth_values_and_numbers_are_one_class_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    data = TextFiles(jsonl("a.jsonl", [True, 1.0, 1, False, 0]))
    assert data.class_names == ["0", "1"] and classes_of(data) == ["1", "1", "1", "0", "0"]
    assert "one class: 0 and false; 1 and true" in caplog.text
    assert TextFiles(jsonl("b.jsonl", [True, False])).class_names == ["false", "true"]


def test_numbers_that_begin_with_zeros_are_names_of_their_own() -> None:
    data = TextFiles(csv("a.csv", ["007", "7", "07"]))
    assert sorted(data.class_names) == ["007", "07", "7"] and classes_of(data) == ["007", "7", "07"]


def test_numbers_sort_as_numbers_whatever_their_form() -> None:
    assert learn_classes(["10", "9.0", "-1", "1.5", "b", "a", "+2"]) == ["-1", "1.5", "2", "9", "10", "a", "b"]
    assert learn_classes(["--1", "1e3", "²"]) == ["--1", "1e3", "²"]
    assert [label_name(v) for v in (1.50, "1.50", 2**60, -0.0, "0.0")] == ["1.5", "1.5", str(2**60), "0", "0"]


def test_names_that_are_given_can_be_counted_in() -> None:
    path = csv("a.csv", [0, 1, "positive"])
    assert TextFiles(path, class_names=["negative", "positive"]).read_splits()["train"].labels.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="line 4: label '2' is not among"):
        TextFiles(csv("b.csv", [0, 1, 2]), class_names=["negative", "positive"]).read_splits()


def test_in_given_names_that_are_numbers_nothing_counts() -> None:
    stars = [str(star) for star in range(1, 6)]
    assert classes_of(TextFiles(csv("a.csv", [5, 1, 3.0]), class_names=stars)) == ["5", "1", "3"]
    with pytest.raises(ValueError, match="label '0' is not among the classes"):
        TextFiles(csv("b.csv", [5, 0]), class_names=stars).read_splits()
    with pytest.raises(ValueError, match="differ from each other"):
        TextFiles("b.csv", class_names=["a", "a"]).read_splits()


def test_names_of_a_checkpoint_are_names() -> None:
    data = TextFiles(test_file=csv("a.csv", ["pos", "neg", 1]), class_names=["neg", "pos"])
    data.names_learnt = True
    with pytest.raises(ValueError, match="line 4: label '1' is not among the classes"):
        data.read_splits()


@pytest.mark.parametrize("names", [["1", "2", "3", "4", "5"], ["5", "4", "3", "2", "1"], ["1", "0"]])
@pytest.mark.parametrize("many", [False, True])
def test_a_class_labels_integer_is_an_index_whatever_the_names_look_like(names: list[str], many: bool) -> None:
    kind: Any = datasets.ClassLabel(names=names)
    stored: list[Any] = list(range(len(names)))
    if many:
        kind, stored = datasets.List(kind), [[one] for one in stored]
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    table = datasets.Dataset.from_dict(
        {"text": [f"t{n}" for n in range(len(names))], "label": stored}, features=features
    )
    table.to_parquet("a.parquet")
    task: Any = "multi_label_classification" if many else "single_label_classification"
    data = HuggingFaceTexts("parquet", data_files={"train": "a.parquet"}, problem_type=task)
    assert data.class_names == names
    labels = data.read_splits()["train"].labels
    assert (labels.argmax(1) if many else labels).tolist() == list(range(len(names)))


def hub(labels: list[Any], **options: Any) -> HuggingFaceTexts:
    """A data set without a ClassLabel."""
    pandas.DataFrame({"text": [f"t{row}" for row in range(len(labels))], "label": labels}).to_parquet("hub.parquet")
    return HuggingFaceTexts("parquet", data_files={"train": "hub.parquet"}, **options)


def test_other_integers_of_a_data_set_are_names() -> None:
    data = hub([5, 1, 10])
    assert data.class_names == ["1", "5", "10"] and classes_of(data) == ["5", "1", "10"]
    assert hub(["10", "9"]).class_names == ["9", "10"], "text that is a number sorts as one"


@pytest.mark.parametrize("labels", [[1.0, None, 2.0], ["a", None, "b"], ["a", "nan", "b"]])
def test_what_a_data_set_lacks_is_named(labels: list[Any]) -> None:
    with pytest.raises(ValueError, match="split 'train', row 1: there is no label"):
        hub(labels).read_splits()


def test_a_class_label_and_a_score_that_are_missing() -> None:
    label = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, None]}, features=label).to_parquet("a.parquet")
    with pytest.raises(ValueError, match="row 1: there is no label"):
        HuggingFaceTexts("parquet", data_files={"train": "a.parquet"}).read_splits()
    with pytest.raises(ValueError, match="row 1: the score is"):
        hub([0.5, None], problem_type="regression").read_splits()


@pytest.mark.parametrize("written", ["['a', 'b']", '["a", "b"]', "{'a', 'b'}", "('a', 'b')", "a,b", " a , b "])
def test_lists_of_labels_as_programs_write_them(written: str) -> None:
    quoted = '"' + written.replace('"', '""') + '"'
    data = TextFiles(csv("a.csv", [quoted, "a", "b", ""]), problem_type="multi_label_classification")
    assert data.class_names == ["a", "b"]
    assert data.read_splits()["train"].labels.tolist() == [[1, 1], [1, 0], [0, 1], [0, 0]]


def test_what_looks_like_a_list_and_is_none_is_named() -> None:
    assert several_labels("[1 0 1]", ",") == ([], "the labels look like a list, but cannot be read as one: [1 0 1]")
    assert several_labels("(other)", ",") == (["(other)"], "")
    assert several_labels(None, ",")[1] == several_labels(float("nan"), ",")[1] != ""
    assert several_labels(["a", None], ",")[1] == "among the labels: there is no label"


def test_a_list_is_not_one_label() -> None:
    with pytest.raises(ValueError, match="line 1: the label is a list: several labels need data.problem_type"):
        TextFiles(jsonl("a.jsonl", [["x"], "y"])).read_splits()


def test_labels_with_another_separator_are_not_classes_of_their_own() -> None:
    path, many = csv("a.csv", ["negative|long", "negative", "long", "positive"]), "multi_label_classification"
    with pytest.raises(ValueError, match=r"label 'negative\|long' looks like several labels joined by '\|'"):
        TextFiles(path, problem_type=many).read_splits()  # type: ignore[arg-type]
    data = TextFiles(path, problem_type=many, label_separator="|")  # type: ignore[arg-type]
    assert data.class_names == ["long", "negative", "positive"]
    assert data.read_splits()["train"].labels[0].tolist() == [1, 1, 0]
    assert TextFiles(csv("b.csv", ['"a,b/c"', "d"]), problem_type=many).class_names == ["a", "b/c", "d"]  # type: ignore[arg-type]


def test_a_truth_value_for_each_class() -> None:
    rows = [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    for data in (
        TextFiles(jsonl("a.jsonl", rows), problem_type="multi_label_classification"),
        hub(rows, problem_type="multi_label_classification"),
    ):
        assert data.class_names == ["0", "1", "2"]
        assert data.read_splits()["train"].labels.tolist() == rows
    named = TextFiles("a.jsonl", problem_type="multi_label_classification", class_names=["x", "y", "z"])
    assert named.read_splits()["train"].labels.tolist() == rows and named.class_names == ["x", "y", "z"]
    with pytest.raises(ValueError, match="line 2: expected 0 or 1 for each of 3 classes, received"):
        val = jsonl("val.jsonl", [[0, 1, 1], [0, 1]])
        TextFiles("a.jsonl", val_file=val, problem_type="multi_label_classification").read_splits()
    assert width_of_indicators([["1"], ["0"]]) is None and width_of_indicators([[1, 0], [2]]) is None


@pytest.mark.parametrize("odd", [[0, 1], [], [0, 2, 1], [0, -1, 1]])
def test_one_odd_row_among_truth_values_is_named(odd: list[int]) -> None:
    rows = [[0, 1, 1], [1, 0, 0], odd, [1, 1, 0]]
    for names in (None, ["x", "y", "z"]):
        data = TextFiles(jsonl("a.jsonl", rows), problem_type="multi_label_classification", class_names=names)
        with pytest.raises(ValueError, match="line 3: expected 0 or 1 for each of 3 classes"):
            data.read_splits()


def test_truth_values_where_training_lists_labels_are_named() -> None:
    train, val = jsonl("a.jsonl", [["x", "z"], ["y"]]), jsonl("val.jsonl", [[1, 0, 1]])
    data = TextFiles(train, val_file=val, problem_type="multi_label_classification", class_names=["x", "y", "z"])
    with pytest.raises(ValueError, match="line 1: .* has a label twice: are these truth values"):
        data.read_splits()


@pytest.mark.parametrize(
    "written", ["['a' 'b']", "array(['a', 'b'], dtype=object)", "frozenset({'a'})", "set()", "{'toxic': 1}", "[1 0]"]
)
def test_what_programs_write_that_is_no_list_is_named(written: str) -> None:
    assert several_labels(written, ",")[1].startswith("the labels look like a list, but cannot be read as one: ")
    assert several_labels({"toxic": 1}, ",")[1] and several_labels("'a', 'b'", ",") == (["a", "b"], "")


@pytest.mark.parametrize("names", [["01", "02", "03"], ["1.", "2.", "3."], [" 1", " 2", " 3"], ["false", "true"]])
def test_names_that_could_be_taken_for_numbers_are_not_counted_in(names: list[str]) -> None:
    data = TextFiles(csv("a.csv", [1, 2]), class_names=names)
    try:
        read = classes_of(data)
    except ValueError as error:
        assert "label '1' is not among the classes" in str(error)
    else:
        assert [float(name) for name in read] == [1, 2]


def test_a_class_label_in_a_file_of_ones_own_brings_its_names() -> None:
    def write(name: str, names: list[str], labels: list[int]) -> str:
        kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        rows = {"text": [f"t{row}" for row in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(name)
        return name

    files = write("train.parquet", ["neg", "pos"], [0, 1]), write("val.parquet", ["pos", "neg"], [0, 0, 1])
    data = TextFiles(files[0], val_file=files[1])
    assert classes_of(data) == ["neg", "pos"] and classes_of(data, "val") == ["pos", "pos", "neg"]
    hub = HuggingFaceTexts("parquet", data_files={"train": files[0], "val": files[1]}, val_split="val")
    with pytest.raises(ValueError, match="val.parquet: the classes of 'label' are pos, neg, and elsewhere neg, pos"):
        hub.read_splits()


def test_bytes_that_are_no_text_are_labels_of_their_own() -> None:
    assert learn_classes([b"caf\xe9", b"caf\xe8"]) == ["caf\\xe8", "caf\\xe9"]
    assert learn_classes(["9" * 40, "1"]) == ["1", "9" * 40] and label_name("1" + "0" * 5000) == "1" + "0" * 5000


def test_labels_joined_with_another_separator_beside_the_right_one_are_named() -> None:
    path = csv("a.csv", ['"x,y"', "x|y"])
    with pytest.raises(ValueError, match=r"label 'x\|y' looks like several labels joined by '\|'"):
        TextFiles(path, problem_type="multi_label_classification").read_splits()


def test_a_class_label_of_another_split_may_be_in_another_order() -> None:
    where = "row {}".format
    assert positions([0, 1, 1], ["b", "a"], ["a", "b"], where).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="row 1: label '1' 'c' is not among the classes a, b"):
        positions([0, 1], ["b", "c"], ["a", "b"], where)
    with pytest.raises(ValueError, match="row 0: label '2' is not among the classes"):
        positions([2], ["a", "b"], ["a", "b"], where)


def test_a_split_with_a_class_label_of_its_own_order_is_read_by_it() -> None:
    def table(names: list[str], labels: list[int]) -> Any:
        kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        rows = {"text": [f"t{row}" for row in range(len(labels))], "label": labels}
        return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))

    data = HuggingFaceTexts("parquet", val_split="val")
    data.tables = {"train": table(["a", "b"], [0, 1]), "val": table(["b", "a"], [0, 0, 1])}
    assert classes_of(data) == ["a", "b"] and classes_of(data, "val") == ["b", "b", "a"]
