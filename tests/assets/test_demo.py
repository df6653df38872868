"""The bundled demo set is what its README says: small, float32, clean splits, loadable, and worth merging."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from assets.demo.skills import LENGTH, PRACTICE, SKILLS, make_tokenizer
from merging.checkpoints.header import read_header
from merging.evaluation.exact_match import evaluate, load_model
from merging.evaluation.tasks import Task, read_task

DEMO = Path(__file__).parents[2] / "assets" / "demo"
MODELS = ["base", *(f"experts/{skill}" for skill in SKILLS)]


def prompts(skill: str, split: str) -> list[str]:
    if split == "calibration":
        lines = (DEMO / "calibration" / f"{skill}.jsonl").read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines]
    ending = "" if split == "test" else f".{split}"
    return [item.prompt for item in read_task(DEMO / "tasks" / f"{skill}{ending}.jsonl").items]


def test_the_set_is_at_most_24_mib() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 24 * 2**20


def test_the_folders_are_those_of_the_skills() -> None:
    assert sorted(path.name for path in (DEMO / "experts").iterdir()) == sorted(SKILLS)
    expected = {f"{skill}{ending}.jsonl" for skill in SKILLS for ending in ("", ".validation")}
    assert {path.name for path in (DEMO / "tasks").iterdir()} == expected
    assert {path.name for path in (DEMO / "calibration").iterdir()} == {f"{skill}.jsonl" for skill in SKILLS}


def test_files_are_those_that_the_provenance_names() -> None:
    recorded = json.loads((DEMO / "provenance.json").read_text())["sha256"]
    assert {name: hashlib.sha256((DEMO / name).read_bytes()).hexdigest() for name in recorded} == recorded
    present = {path for part in ("base", "experts", "tasks", "calibration") for path in (DEMO / part).rglob("*")}
    assert {str(path.relative_to(DEMO)) for path in present if path.is_file()} == set(recorded)


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_have_their_sizes_and_right_answers(skill: str) -> None:
    assert len(prompts(skill, "test")) >= 200
    assert len(prompts(skill, "validation")) >= 200
    assert len(prompts(skill, "calibration")) >= 64
    for ending in ("", ".validation"):
        for item in read_task(DEMO / "tasks" / f"{skill}{ending}.jsonl").items:
            word, letters = item.prompt.removesuffix("=").split(" ")
            assert (word, len(letters)) == (skill, LENGTH)
            assert item.answer == PRACTICE[skill](letters)


def test_calibration_has_no_answers() -> None:
    for skill in SKILLS:
        for line in (DEMO / "calibration" / f"{skill}.jsonl").read_text().splitlines():
            assert set(json.loads(line)) == {"prompt"}


def test_no_prompt_is_in_two_splits() -> None:
    splits = ("test", "validation", "calibration")
    everything = [prompt for skill in SKILLS for split in splits for prompt in prompts(skill, split)]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize("place", MODELS)
def test_every_tensor_is_float32_and_shaped_like_the_base(place: str) -> None:
    def shapes(folder: Path) -> dict[str, tuple]:
        with open(folder / "model.safetensors", "rb") as file:
            header = read_header(file.fileno(), str(folder))
        return {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}

    found = shapes(DEMO / place)
    assert {dtype for dtype, _ in found.values()} == {"F32"}
    assert found == shapes(DEMO / "base")
    assert json.loads((DEMO / place / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("place", MODELS)
def test_transformers_loads_every_weight_and_nothing_else(place: str) -> None:
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(DEMO / place, local_files_only=True, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_tokenizer_gives_back_what_it_was_given() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base", local_files_only=True)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    for skill in SKILLS:
        for item in read_task(DEMO / "tasks" / f"{skill}.jsonl").items[:50]:
            for text in (item.prompt, item.answer, item.prompt + item.answer):
                numbers = tokenizer(text)["input_ids"]
                assert tokenizer.decode(numbers) == text
                assert tokenizer.unk_token_id not in numbers
            assert len(tokenizer(item.prompt)["input_ids"]) == LENGTH + 2  # the skill word, the letters, "="
    assert tokenizer("reverse?")["input_ids"][-1] == tokenizer.unk_token_id


def test_all_models_have_the_same_tokenizer_and_it_is_the_one_of_the_script(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    for place in MODELS:
        assert json.loads((DEMO / place / "tokenizer.json").read_text()) == made


def first_items(skill: str, count: int) -> Task:
    task = read_task(DEMO / "tasks" / f"{skill}.jsonl")
    return Task(task.name, task.items[:count], task.sha256)


def test_experts_lead_on_their_own_skill_and_the_base_is_competent_but_not_there() -> None:
    tasks = {skill: first_items(skill, 160) for skill in SKILLS}
    base = load_model(DEMO / "base")
    for skill, task in tasks.items():
        ours = evaluate(base, task).accuracy
        own = evaluate(load_model(DEMO / "experts" / skill), task).accuracy
        assert 0.3 <= ours <= 0.9, f"the base scores {ours} on {skill}"
        assert own >= 0.85, f"the expert {skill} scores {own}"
        assert own >= ours + 0.08, f"the expert {skill} scores {own}, the base {ours}"


def test_the_script_repeats_itself_and_makes_the_shipped_tasks(tmp_path: Path) -> None:
    """A build with hardly any training, twice: the same bytes; its tasks, tokenizer and prompts are those that ship."""
    code = (
        "import sys; from pathlib import Path; from assets.demo.build import Settings, build\n"
        "settings = Settings(base_target=0.0, expert_steps=2, batch_size=8)\n"
        "for name in sys.argv[1:]: build(settings, Path(name))"
    )
    folders = [tmp_path / "first", tmp_path / "second"]
    command = [sys.executable, "-c", code, *map(str, folders)]
    subprocess.run(command, cwd=DEMO.parents[1], check=True, capture_output=True)
    first, second = (json.loads((folder / "provenance.json").read_text()) for folder in folders)
    assert first == second
    shipped = json.loads((DEMO / "provenance.json").read_text())
    for name, digest in shipped["sha256"].items():
        if name.startswith(("tasks/", "calibration/")):
            assert first["sha256"][name] == digest
    assert first["sha256"].keys() == shipped["sha256"].keys()
    assert first["sha256"]["base/model.safetensors"] != first["sha256"]["experts/sort/model.safetensors"]
