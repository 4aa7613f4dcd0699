"""Channels: what a query and a candidate show, and that a query's own answer is in nothing that chooses for it."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
import torch

from lever_plus import paths
from lever_plus.data import channel_names, channels
from lever_plus.data.dataset import load_split
from lever_plus.data.labels import label_data, label_reward
from lever_plus.provenance import sidecar
from lever_plus.selectors import PointerSelector, SelectorConfig
from lever_plus.settings import word_lists
from lever_plus.settings.data import ChannelSettings
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from lever_plus.stages import lvlm
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError
from open_mmicl.metrics.vqa import vqa_accuracy


@pytest.fixture
def made(tmp_path):
    """Channel files of 12 train and 5 validation items with known values."""
    settings = load(InferenceSettings, {}, {"DATASET": "mini_okvqa", "RESULT_DIR": str(tmp_path)})
    generator = torch.Generator().manual_seed(0)
    for split, rows in (("train", 12), ("val", 5)):
        path = paths.modality_embeddings(settings, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        apart = {m: torch.nn.functional.normalize(torch.randn(rows, 4, generator=generator)) for m in ("image", "text")}
        torch.save(apart, path)
        np.save(paths.lvlm_states(settings, split), 7 + 3 * torch.randn(rows, 6, generator=generator).numpy())
    np.save(paths.answer_embeddings(settings, "answer"), torch.randn(12, 3, generator=generator).numpy())
    return settings


def standard(values, of):
    z = (values - of.mean(0)) / of.std(0, ddof=1)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def test_a_query_has_the_first_channels_and_no_answer_a_candidate_has_all(made):
    tables = channels.load_tables(channel_names.table_files(made, "val"), 12, 5)
    assert tables.split and tables.widths == (4 + 4 + 6, 4 + 4 + 6 + 3)
    assert len(tables.queries) == 5 and len(tables.candidates) == 12
    states = {split: np.load(paths.lvlm_states(made, split)) for split in ("train", "val")}
    answers = np.load(paths.answer_embeddings(made, "answer"))
    train, val = (torch.load(paths.modality_embeddings(made, split)) for split in ("train", "val"))
    rows = torch.tensor([[4, 0], [3, 3]])
    expected = np.concatenate([val["image"], val["text"], standard(states["val"], states["train"])], axis=1)
    np.testing.assert_allclose(tables.queries[rows].numpy(), expected[rows.numpy()], atol=1e-5)
    lvlm = standard(states["train"], states["train"])
    expected = np.concatenate([train["image"], train["text"], lvlm, standard(answers, answers)], axis=1)
    np.testing.assert_allclose(tables.candidates[torch.arange(12)].numpy(), expected, atol=1e-5)
    of_train = channels.load_tables(channel_names.table_files(made), 12)
    np.testing.assert_allclose(of_train.queries[torch.arange(12)].numpy(), expected[:, :14], atol=1e-5)
    assert tables.dimensions("lvlm") == slice(8, 14)


def test_no_file_behind_a_query_holds_an_answer(made):
    for split in ("train", "val"):
        roles = channel_names.files(made, split, candidates=False)
        assert not any("answer" in role or "answer" in path.name for role, path in roles.items())
    assert "answer" in channel_names.files(made, "train", candidates=True)


@pytest.mark.parametrize("embedding", ["auto", "clip_text lvlm answer", "mean"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_pools_of_the_channel_sampler_are_the_nearest_in_what_a_query_shows(made, embedding, split):
    settings = dataclasses.replace(made, sampler="channel_sim_sampler", embedding=embedding, candidate_num=3)
    for name, rows in (("candidate", 12), ("query", 5)):  # the item embeddings of EMBEDDING=mean
        values = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
        file = paths.dataset_dir(made) / "cache" / f"{name}_embeddings.pt"
        torch.save(values, file)
        sidecar(file).write_text("{}")  # made here, not brought
    splits = {"train": Split(12, 0), "val": Split(5, 100)}
    asked = splits[split]
    rows = np.arange(len(asked))
    rows.flags.writeable = False  # as a split's query_rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pools = lvlm.query_pools(settings, asked, rows, splits["train"], split)
    tables = channels.load_tables(channel_names.table_files(settings, split), 12, 5)
    queries = tables.queries[torch.arange(len(asked))].numpy()
    items = channels.load_tables(channel_names.table_files(settings), 12).queries[torch.arange(12)].numpy()
    cosine = queries @ items.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(items, axis=1)
    for row, pool in enumerate(pools):
        allowed = splits["train"].image_ids != asked.image_ids[row]
        assert pool.tolist() == np.argsort(-np.where(allowed, cosine[row], -9), kind="stable")[:3].tolist()
    read = lvlm.feature_files(settings, "train", split)
    assert all(path.is_file() for path in read.values())
    assert not any("answer" in path.name for path in read.values())  # no answer can reach a pool
    of_queries = {"auto": f"lvlm_{split}", "mean": "embeddings" if split == "train" else "queries_val"}
    assert of_queries.get(embedding, f"clip_{split}") in read


class Split:
    """The part of a split that pools are made of: two items an image."""

    def __init__(self, rows, first):
        self.image_ids = first + np.arange(rows) // 2

    def __len__(self):
        return len(self.image_ids)


@pytest.mark.parametrize("words", ["", "clip", "answer", "clip_text clip_text", "mean concat", "clip_image mean"])
def test_words_of_no_channel_are_refused(words):
    with pytest.raises(UsageError, match="EMBEDDING=.* is not allowed"):
        word_lists.check_words(words)


@pytest.mark.parametrize("text", ["", "last", "-1 -1", "1.5", "٣", "--1"])
def test_layers_are_distinct_whole_numbers(text):
    with pytest.raises(UsageError, match="LVLM_LAYERS"):
        word_lists.layers(text)


def test_the_order_of_the_words_does_not_matter_queries_channels_come_first(made):
    some = dataclasses.replace(made, embedding="answer lvlm clip_text")
    assert channel_names.names(some) == ("clip_text", "lvlm", "answer")


def test_of_a_model_on_a_server_the_reference_shows_the_states_or_they_are_left_out(tmp_path, monkeypatch):
    folder = tmp_path / "configs" / "infer_model"
    folder.mkdir(parents=True)
    own = "name: O\nmodel_name_or_path: lever_plus/mini/weights/lvlm\ninterface: qwen_vl\n"
    served = "name: S\nmodel_name_or_path: s\ninterface: openai\n"
    served += "server: {urls: [http://h/v1], reference: 'REFERENCE'}\n"
    (folder / "own.yaml").write_text(own)
    for name, reference in (("closed", ""), ("open", folder / "own.yaml"), ("circular", folder / "closed.yaml")):
        (folder / f"{name}.yaml").write_text(served.replace("REFERENCE", str(reference)))
    monkeypatch.chdir(tmp_path)

    def of(model, **changed):
        return load(ChannelSettings, {}, {"DATASET": "mini_okvqa", "BEAM_MODEL": model, **changed})

    assert channel_names.names(of("own")) == channel_names.names(of("open")) == tuple(word_lists.DEFAULT.split())
    assert channel_names.names(of("closed")) == tuple(word_lists.WITHOUT_WEIGHTS.split())
    assert not {"lvlm", "answer"} & set(word_lists.WITHOUT_WEIGHTS.split())
    for word in ("lvlm", "clip_text answer"):
        with pytest.raises(UsageError, match=r"S: a server shows neither .* leave lvlm and answer out of EMBEDDING"):
            channel_names.names(of("closed", EMBEDDING=word))
    with pytest.raises(UsageError, match="is a server itself"):
        channel_names.names(of("circular", EMBEDDING="lvlm"))
    inner, usual = lvlm.inner_config(of("open")), lvlm.model_config(of("own"))
    assert lvlm.model_fingerprint(of("open"), inner) == lvlm.model_fingerprint(of("own"))
    assert inner.local_dir() == usual.local_dir() and lvlm.inner_config(of("own")) == usual


def test_what_does_not_fit_is_named(made):
    np.save(paths.answer_embeddings(made, "answer"), np.zeros((11, 3), np.float32))
    with pytest.raises(DamagedInputError, match="11 rows for 12 items"):
        channels.load_tables(channel_names.table_files(made), 12)
    with pytest.raises(DamagedInputError, match="different numbers of items"):
        channels.load_tables(channel_names.table_files(made), None)
    for content in (b"", b"\x93NUMPY", b"version https://git-lfs.github.com/spec/v1\n" * 3):
        paths.answer_embeddings(made, "answer").write_bytes(content)
        with pytest.raises(DamagedInputError, match="not a readable .npy file"):
            channels.load_tables(channel_names.table_files(made), 12)
    np.save(paths.answer_embeddings(made, "answer"), np.full((12, 3), np.nan, np.float32))
    with pytest.raises(DamagedInputError, match="row 0, column 0 is nan"):
        channels.load_tables(channel_names.table_files(made), 12)
    paths.answer_embeddings(made, "answer").unlink()
    with pytest.raises(MissingInputError, match="export_embeddings.sh"):
        channels.load_tables(channel_names.table_files(made), 12)


@pytest.mark.parametrize("encoder", ["towers", "metric"])
def test_channels_start_as_the_cosine_of_what_both_have(encoder):
    torch.manual_seed(0)
    shape = SelectorConfig(input_dim=9, query_dim=6, hidden_dim=32, num_layers=0, encoder=encoder)
    selector = PointerSelector(shape).eval()
    query, candidates = torch.randn(3, 6), torch.randn(3, 5, 9)
    enc = selector.encode(query, candidates)
    cosine = torch.nn.functional.cosine_similarity(query[:, None], candidates[..., :6], dim=-1)
    torch.testing.assert_close(torch.bmm(enc.candidates, enc.query.unsqueeze(2)).squeeze(2), cosine)


def test_a_metric_is_the_cosine_of_one_projection_of_both_and_of_what_only_candidates_have(tmp_path):
    torch.manual_seed(0)
    shape = {"query_dim": 6, "hidden_dim": 32, "num_layers": 0, "encoder": "metric"}
    metric = {w: PointerSelector(SelectorConfig(input_dim=w, **shape), "random").eval() for w in (6, 9)}
    query, candidates = torch.randn(3, 6), torch.randn(3, 5, 9)
    for width, selector in metric.items():
        weights = dict(selector.named_parameters())
        both, extra = weights["towers.query.weight"], weights.get("towers.extra.weight")
        seen = candidates[..., :width]
        projected = seen[..., :6] @ both.T + (0 if extra is None else seen[..., 6:] @ extra.T)
        expected = torch.nn.functional.cosine_similarity((query @ both.T)[:, None], projected, dim=-1)
        enc = selector.encode(query, seen)
        torch.testing.assert_close(torch.bmm(enc.candidates, enc.query.unsqueeze(2)).squeeze(2), expected)
        selector.save(tmp_path / f"{width}.pt", "grpo", 1, {}, {}, {})
        again = PointerSelector.load(tmp_path / f"{width}.pt", (6, width))
        assert torch.equal(again.select(query, seen, 3), selector.select(query, seen, 3))
    a, b = torch.randn(2, 1, 6)  # without anything of candidates alone it is symmetric
    forth, back = metric[6].encode(a, b.unsqueeze(1)), metric[6].encode(b, a.unsqueeze(1))
    torch.testing.assert_close(forth.query @ forth.candidates[0].T, back.query @ back.candidates[0].T)


@pytest.mark.slow
def test_a_changed_answer_of_a_query_changes_none_of_its_picks(tmp_path):
    """The same selector picks the same, bit for bit, whatever the annotators of the queries said."""
    from lever_plus.settings.data import ChannelSettings, EmbeddingSettings
    from lever_plus.stages import export_channels, export_embeddings, lvlm, prepare_dataset

    picks = {}
    for name in ("as_it_is", "changed"):
        env = {"DATASET": "mini_okvqa", "RESULT_DIR": str(tmp_path / name), "TEST_DATA_NUM": "-1", "DEVICE": "cpu"}
        settings = load(InferenceSettings, {}, env)
        assert prepare_dataset.run(settings, False) == 0
        if name == "changed":
            for file in (tmp_path / name).rglob("*val2014_annotations.json"):
                content = json.loads(file.read_text())
                for annotation in content["annotations"]:
                    annotation["answers"] = [{**a, "answer": "nothing like it"} for a in annotation["answers"]]
                file.write_text(json.dumps(content))
            for made in (tmp_path / "as_it_is").rglob("cache/*_train.*"):  # the train split is the same
                target = tmp_path / name / made.relative_to(tmp_path / "as_it_is")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(made, target)
        assert export_embeddings.run(load(EmbeddingSettings, {}, env), False) == 0
        assert export_channels.run(load(ChannelSettings, {}, env), False) == 0
        train, val = load_split(paths.dataset(settings), "train"), load_split(paths.dataset(settings), "val")
        tables = channels.load_tables(channel_names.table_files(settings, "val"), len(train), len(val))
        torch.manual_seed(1)
        config_of = SelectorConfig(input_dim=tables.widths[1], query_dim=tables.widths[0], encoder="towers")
        selector = PointerSelector(config_of, "random").eval()
        rows = np.arange(len(val))
        pools = lvlm.query_pools(settings, val, rows, train, "val")
        picked = selector.select(tables.queries[torch.from_numpy(rows)], tables.candidates[torch.from_numpy(pools)], 4)
        picks[name] = (picked, tables.queries[torch.from_numpy(rows)])
    assert torch.equal(picks["as_it_is"][0], picks["changed"][0])
    assert torch.equal(picks["as_it_is"][1], picks["changed"][1])


def test_labels_are_the_official_accuracy_of_the_candidates_own_answer(tmp_path):
    settings = load(InferenceSettings, {}, {"DATASET": "mini_okvqa", "RESULT_DIR": str(tmp_path)})
    from lever_plus.stages import lvlm, prepare_dataset

    prepare_dataset.run(settings, False)
    train = load_split(paths.dataset(settings), "train")
    rows = np.arange(0, 60)
    pools = lvlm.query_pools(settings, train, rows, train, "train")
    found = {q.query_idx: q for q in label_data(train, rows, pools).queries}
    for row, pool in zip(rows, pools, strict=True):
        expected = {
            (k,): vqa_accuracy(train.answer(int(item)), train.answers(int(row)))
            for k, item in enumerate(pool)
            if vqa_accuracy(train.answer(int(item)), train.answers(int(row))) > 0
        }
        got = {c.pointer: c.vqa_acc_score for c in found[row].candidates} if row in found else {}
        assert got == expected
    some = next(iter(found.values())).candidates[0]
    assert np.exp(label_reward(some, "")) == pytest.approx(some.vqa_acc_score)
