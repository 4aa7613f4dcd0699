"""The miniature OK-VQA: official layout, the same bytes for a seed, and answers that the table stands behind."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lever_plus.mini import world
from lever_plus.mini.render import rng_for
from lever_plus.mini.table import episode_table, fixed_table
from lever_plus.mini.vocabulary import COLOR_NAMES, SHAPES, TYPE_NAMES, TYPES
from open_mmicl.errors import DamagedInputError, UsageError
from open_mmicl.metrics.vqa import vqa_accuracy

SMALL = {"n_train": 60, "n_val": 30}
COMMITTED = "771bc9231e345b984e440c36eff82cb143e83dd7e125dba2a4529f5ec77ef970"


@pytest.fixture(scope="module")
def splits() -> dict[str, list[world.Question]]:
    return world.sample_questions(world.World())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "mini"
    world.generate(folder, 7, **SMALL)
    return folder


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes_other_seed_other_questions(small: Path, tmp_path: Path) -> None:
    world.generate(tmp_path / "again", 7, **SMALL)
    world.generate(tmp_path / "other", 8, **SMALL)
    assert _bytes(tmp_path / "again") == _bytes(small)
    assert not _bytes(tmp_path / "other").keys() & {name for name in _bytes(small) if name.endswith(".jpg")}


def test_official_layout(small: Path) -> None:
    for split, n_questions in (("train", 60), ("val", 30)):
        questions = json.loads((small / f"OpenEnded_mscoco_{split}2014_questions.json").read_text())
        notes = json.loads((small / f"mscoco_{split}2014_annotations.json").read_text())
        assert questions.keys() == {"info", "license", "data_subtype", "task_type", "questions"}
        assert len(questions["questions"]) == n_questions
        for question, note in zip(questions["questions"], notes["annotations"], strict=True):
            assert question.keys() == {"image_id", "question", "question_id"}
            assert question["question_id"] == note["question_id"] and question["image_id"] == note["image_id"]
            assert {"question_type", "answer_type", "answers"} <= note.keys()
            assert [answer["answer_id"] for answer in note["answers"]] == list(range(1, 11))
            assert all({"answer", "raw_answer", "answer_confidence"} <= answer.keys() for answer in note["answers"])
            path = small / "mscoco2014" / f"{split}2014" / f"COCO_{split}2014_{question['image_id']:012d}.jpg"
            with Image.open(path) as image:
                assert image.size == (56, 56) and image.format == "JPEG"


def test_sizes_and_no_image_in_both_splits(splits: dict[str, list[world.Question]]) -> None:
    assert len(splits["train"]) >= 2400 and len(splits["val"]) >= 1000
    images = {split: {row.image_id for row in rows} for split, rows in splits.items()}
    assert not images["train"] & images["val"]
    ids = [row.question_id for rows in splits.values() for row in rows]
    assert len(set(ids)) == len(ids)
    assert all(2 <= count <= 3 for count in list(Counter(row.image_id for row in splits["val"]).values())[:-1])


def test_the_majority_answer_is_the_tables(splits: dict[str, list[world.Question]]) -> None:
    for row in splits["train"] + splits["val"]:
        (first, count), *rest = Counter(row.answers).most_common(2)
        assert len(row.answers) == 10 and first == row.truth and count >= 3
        assert not rest or rest[0][1] < count


def test_partial_accuracies_occur(splits: dict[str, list[world.Question]]) -> None:
    values = Counter(round(vqa_accuracy(text, row.answers), 1) for row in splits["val"] for text in set(row.answers))
    total = sum(values.values())
    assert values.keys() == {0.3, 0.6, 0.9, 1.0}
    assert all(values[value] / total > 0.01 for value in values)


def test_the_benchmark_part_of_the_world(splits: dict[str, list[world.Question]]) -> None:
    rows = splits["train"]
    assert len({row.shape for row in rows}) == 8 and len({row.kind for row in rows}) == 5
    assert {TYPES[row.kind].name for row in rows if TYPES[row.kind].compositional} == {"material"}
    assert {row.paraphrase for row in rows} == {0, 1, 2}
    rng = np.random.RandomState(0)
    pairs = np.array([(row.shape, row.kind) for row in rows])
    queries = np.array([(row.shape, row.kind) for row in splits["val"]])
    pools = np.stack([pairs[rng.permutation(len(rows))[:64]] for _ in queries])
    assert (pools == queries[:, None]).all(-1).any(1).mean() >= 0.75


def _digest(folder: Path) -> str:
    files = sorted(folder.rglob("*.json"))
    return hashlib.sha256(b"".join(str(p.relative_to(folder)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_the_committed_world_keeps_its_bytes(tmp_path: Path) -> None:
    """Its questions, annotations and truth, byte for byte (the JPEGs' bytes are the installed Pillow's)."""
    world.generate(tmp_path / "w")
    assert _digest(tmp_path / "w") == COMMITTED


def test_another_table_seed_changes_the_unknown_answers_only(tmp_path: Path) -> None:
    worlds = []
    for table_seed in (2, 3):
        world.generate(tmp_path / str(table_seed), 7, table_seed=table_seed, **SMALL)
        worlds.append(json.loads((tmp_path / str(table_seed) / "truth.json").read_text()))
        rows = worlds[-1]["questions"].values()
        table = fixed_table(table_seed)
        for row in rows:
            place = SHAPES.index(row["shape"]), COLOR_NAMES.index(row["color"]), TYPE_NAMES.index(row["type"])
            assert row["answer"] == table.answer(*place)
            assert not row["known"] or row["answer"] == fixed_table().answer(*place)
        assert worlds[-1]["world"] == {"table_seed": table_seed}
        note = json.loads((tmp_path / str(table_seed) / "mscoco_val2014_annotations.json").read_text())
        for annotation in note["annotations"]:
            given = Counter(answer["answer"] for answer in annotation["answers"])
            assert given.most_common(1)[0][0] == worlds[-1]["questions"][str(annotation["question_id"])]["answer"]
    answers = [{question["answer"] for question in one["questions"].values()} for one in worlds]
    assert answers[0] != answers[1]


def test_no_world_has_a_table_of_pretraining() -> None:
    """The streams of worlds and of episodes have different names; the unknown parts drawn agree by chance alone."""
    rng, known = rng_for("lm-batches", 0), fixed_table().word_known
    drawn = [episode_table(rng, 0.8).word[~known] for _ in range(200)]
    for seed in (1, 2, 3, 4, 12345):
        unknown = fixed_table(seed).word[~known]
        assert max((unknown == other).mean() for other in drawn) < 0.35


def test_a_folder_of_another_world_is_refused(small: Path, tmp_path: Path) -> None:
    world.check(small)
    world.check(small, seed=7, n_train=60, n_val=30, table_seed=1)
    with pytest.raises(UsageError, match="table_seed 1 instead of 5"):
        world.check(small, seed=7, table_seed=5)
    with pytest.raises(UsageError, match="n_val 30 instead of 1000"):
        world.check(small, n_val=1000)
    for bad in ({"tabel_seed": 3}, {"table_seed": "3"}, {"table_seed": -1}, {"table_seed": True}):
        with pytest.raises(UsageError):
            world.generate(tmp_path / "w", **bad)
    (tmp_path / "truth.json").write_text("[]")
    with pytest.raises(DamagedInputError, match=r"truth\.json"):
        world.check(tmp_path, table_seed=5)


def test_another_table_keeps_the_known_facts() -> None:
    one, other = fixed_table(), fixed_table(99)
    assert one.word.shape == (len(SHAPES), len(TYPES)) and one.adjective.shape == (len(COLOR_NAMES), len(TYPES))
    assert (one.word == other.word)[one.word_known].all()
    assert (one.word == other.word)[~one.word_known].mean() < 0.3


def test_bad_settings_and_foreign_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    with pytest.raises(UsageError, match="not a miniature dataset"):
        world.generate(tmp_path / "mine", 1, **SMALL)
    assert world.main(["--out", str(tmp_path / "x"), "--train-questions", "0"]) == 2
    assert "n_train" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_earlier_dataset_is_replaced_whole(tmp_path: Path) -> None:
    world.generate(tmp_path / "d", 1, 20, 10)
    world.generate(tmp_path / "d", 2, 10, 10)
    assert json.loads((tmp_path / "d" / "truth.json").read_text())["seed"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_unseen_concepts_are_candidates_and_validation_queries_only(tmp_path: Path) -> None:
    world.generate(tmp_path / "w", 7, n_train=600, n_val=300, table_seed=4, unseen=2)
    groups = json.loads((tmp_path / "w" / "groups.json").read_text())
    truth = json.loads((tmp_path / "w" / "truth.json").read_text())
    assert truth["world"] == {"table_seed": 4, "unseen": 2} and groups.keys() == truth["questions"].keys()
    pairs: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for question_id, row in truth["questions"].items():
        pairs.setdefault((row["split"], groups[question_id]), set()).add((row["shape"], row["type"]))
    assert pairs["train", "unseen"] == pairs["val", "unseen"] and pairs["train", "seen"] == pairs["val", "seen"]
    unseen = pairs["val", "unseen"]
    assert len(unseen) == 10 and not unseen & pairs["train", "seen"]
    assert set(Counter(kind for _, kind in unseen).values()) == {2}  # two shapes of each type
    assert set(Counter(shape for shape, _ in unseen).values()) == {1, 2}
    world.check(tmp_path / "w", unseen=2)
    with pytest.raises(UsageError, match="unseen 2 instead of 3"):
        world.check(tmp_path / "w", unseen=3)
    with pytest.raises(UsageError, match="unseen must be"):
        world.generate(tmp_path / "x", unseen=8)


def test_a_world_that_misleads_is_right_where_it_is_asked_and_wrong_in_its_pools(tmp_path: Path) -> None:
    world.generate(tmp_path / "w", 7, n_train=1500, n_val=200, facts=1, misleading=80)
    groups = json.loads((tmp_path / "w" / "groups.json").read_text())
    truth = json.loads((tmp_path / "w" / "truth.json").read_text())
    table = fixed_table(1)
    rows = {split: {q: r for q, r in truth["questions"].items() if r["split"] == split} for split in world.SPLITS}
    right = {r["shape"]: r["answer"] for r in rows["val"].values()}
    assert len(right) == 9 == len(set(right.values()))  # no item of another shape shows a query's answer
    assert {r["type"] for r in truth["questions"].values()} == {"person"}
    for split, of in rows.items():
        shares = Counter(groups[q] for q in of)
        assert shares["misleading"] / len(of) == pytest.approx(0.8 if split == "train" else 0, abs=0.04)
        assert shares["known"] / (shares["known"] + shares["unknown"]) == pytest.approx(8 / 9, abs=0.06)
        for q, r in of.items():
            known = table.word_known[SHAPES.index(r["shape"]), TYPE_NAMES.index("person")]
            assert r["known"] == bool(known)
            if groups[q] == "misleading":
                assert r["answer"] not in right.values() and r["misleading"]
            else:
                assert r["answer"] == right[r["shape"]] and groups[q] == ("known" if known else "unknown")
    notes = json.loads((tmp_path / "w" / "mscoco_train2014_annotations.json").read_text())["annotations"]
    for note in notes:  # the annotators agree on what the truth file says, also where they mislead
        said = [a["answer"] for a in note["answers"]]
        assert vqa_accuracy(truth["questions"][str(note["question_id"])]["answer"], said) >= 0.6
    world.check(tmp_path / "w", facts=1, misleading=80)
    with pytest.raises(UsageError, match="misleading 80 instead of 79"):
        world.check(tmp_path / "w", facts=1, misleading=79)


@pytest.mark.parametrize(
    "bad", [{"misleading": 100}, {"facts": 2}, {"unseen": 1, "facts": 1}, {"unseen": 1, "misleading": 5}]
)
def test_impossible_worlds_are_refused(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        world.generate(tmp_path / "x", **bad)


def test_the_other_worlds_do_not_depend_on_the_new_settings() -> None:
    small = {"seed": 7, **SMALL}
    plain, told = world.World(**small), world.World(**small, facts=0, misleading=0)
    assert world.sample_questions(plain) == world.sample_questions(told)
